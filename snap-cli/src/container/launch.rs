//! Starts daemons, and receives their reports that the mount is ready.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpgid, kill_process_group};

use cowlfs::config::{Awake, Coherence, Keeper, Passthrough, choice_name};

use crate::error::{Error, Kind, Result};
use crate::store::Store;
use cowl_layers::shown::Show as _;

/// The size in bytes from which a log is rotated.
pub const LOG_LIMIT: u64 = 1 << 20;

/// The daemon's message to its parent when the mount is ready.
const READY: &str = "ready";

/// The time within which a daemon must report that its mount is ready. A start takes milliseconds, or seconds on a busy
/// disk.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The time that a killed daemon may take to close its output.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// Starts a daemon and waits until its mount is ready, but not longer than [`START_TIMEOUT`]. `fill` adds arguments to
/// its command.
pub(super) fn launch(store: &Store, log: &Path, fill: impl FnOnce(&mut Command)) -> Result<()> {
    let program = store.session().program()?;
    let mut command = Command::new(&program);
    command.stdin(Stdio::null());
    command.arg("--store").arg(store.root()).arg("serve");
    // The daemon reads no configuration file: this command's settings apply.
    let mounts = store.session().mounts;
    for (variable, value) in [
        (
            "COWL_PASSTHROUGH",
            choice_name(&Passthrough::NAMES, &mounts.passthrough),
        ),
        (
            "COWL_COHERENCE",
            choice_name(&Coherence::NAMES, &mounts.coherence),
        ),
        ("COWL_AWAKE", choice_name(&Awake::NAMES, &mounts.awake)),
        ("COWL_KEEPER", choice_name(&Keeper::NAMES, &mounts.keeper)),
    ] {
        command.env(variable, value);
    }
    fill(&mut command);
    command
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(open_log(log)?);
    let child = command
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    await_report(child, log, START_TIMEOUT)
}

/// Waits for the report of a daemon. One that does not report in time is killed.
fn await_report(mut child: Child, log: &Path, timeout: Duration) -> Result<()> {
    let unread = |error| Error::failed("cannot read the daemon's reply").because(error);
    let mut reply = Vec::new();
    if let Some(mut out) = child.stdout.take()
        && !read_within(&mut out, &mut reply, timeout).map_err(unread)?
    {
        return Err(end_silent(child, &mut out, log, timeout));
    }
    // Neither report contains anything else.
    let reply = std::str::from_utf8(&reply).unwrap_or_default();
    if is_ready(reply) {
        started_daemons().push(child);
        return Ok(());
    }
    child
        .wait()
        .map_err(|e| Error::failed("cannot wait for the daemon").because(e))?;
    Err(start_error(reply, log))
}

/// Reads a pipe to its end. Returns false if it has not ended in time.
fn read_within(
    out: &mut ChildStdout,
    reply: &mut Vec<u8>,
    timeout: Duration,
) -> std::io::Result<bool> {
    let deadline = Instant::now() + timeout;
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(out, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match out.read(&mut buffer)? {
            0 => return Ok(true),
            count => reply.extend(buffer.iter().take(count)),
        }
    }
}

/// Kills a daemon that has not reported in time, and returns the error.
///
/// One that waits for a disk ends when the disk responds. Until then it holds the lock of its container.
fn end_silent(mut child: Child, out: &mut ChildStdout, log: &Path, timeout: Duration) -> Error {
    let pid = child.id();
    // Its group, with its keeper, unless it hangs before it has one.
    let group = Pid::from_child(&child);
    let killed = match getpgid(Some(group)) {
        Ok(own) if own == group => kill_process_group(group, Signal::KILL).map_err(Into::into),
        _ => child.kill(),
    };
    let ended = killed.and_then(|()| read_within(out, &mut Vec::new(), END_TIMEOUT));
    let left = match ended.and_then(|ended| {
        if ended {
            child.wait().map(|_| true)
        } else {
            Ok(false)
        }
    }) {
        Ok(true) => "was killed",
        Ok(false) => "was killed and has not ended yet",
        Err(error) => {
            log::warn!("cannot end the daemon {pid}: {error}");
            "could not be killed"
        }
    };
    started_daemons().push(child);
    Error::failed(format!(
        "the daemon (pid {pid}) was not ready after {} s and {left}",
        timeout.as_secs()
    ))
    .hint(format!(
        "check the disk of the store, and read the log of the daemon: {}",
        log.shown()
    ))
}

/// The daemons that this process has started and not waited for.
static STARTED_DAEMONS: Mutex<Vec<Child>> = Mutex::new(Vec::new());

fn started_daemons() -> MutexGuard<'static, Vec<Child>> {
    // A list that a panicking thread has pushed to or filtered is consistent.
    STARTED_DAEMONS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Waits for those daemons of this process that have ended: they are zombies until then. Returns the number of the
/// others.
///
/// Only a process that outlives the mounts it makes needs this.
pub fn reap_daemons() -> usize {
    let mut daemons = started_daemons();
    daemons.retain_mut(|daemon| match daemon.try_wait() {
        Ok(ended) => ended.is_none(),
        Err(error) => {
            log::debug!("cannot wait for the daemon {}: {error}", daemon.id());
            false
        }
    });
    daemons.len()
}

/// Whether a reply reports that the mount is ready. A daemon that was killed directly after the report is succeeded by one
/// that reports again.
fn is_ready(reply: &str) -> bool {
    let mut rest = reply.trim();
    while let Some(more) = rest.strip_prefix(READY) {
        rest = more;
    }
    rest.is_empty() && !reply.trim().is_empty()
}

/// Reports to the command that waits in [`launch`] that the mount is ready, and closes the pipe to it.
pub(crate) fn report_ready() -> Result<()> {
    let failed = |error: std::io::Error| {
        Error::failed("cannot report that the mount is ready").because(error)
    };
    let mut out = std::io::stdout();
    out.write_all(READY.as_bytes())
        .and_then(|()| out.flush())
        .map_err(failed)?;
    release_output()
}

/// Closes the pipe to the command that waits in [`launch`].
pub(crate) fn release_output() -> Result<()> {
    let failed = |error: std::io::Error| Error::failed("cannot release the output").because(error);
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .map_err(failed)?;
    rustix::stdio::dup2_stdout(&null).map_err(|e| failed(e.into()))
}

/// Opens a log for appending; rotates it first if it is longer than [`LOG_LIMIT`].
pub(super) fn open_log(path: &Path) -> Result<std::fs::File> {
    let at = |error| Error::at("open the log", path, error);
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() > LOG_LIMIT => {
            std::fs::rename(path, path.with_extension("old")).map_err(at)?;
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(at(error)),
    }
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(at)
}

/// Converts the reply of a daemon that failed to start, an error in JSON, to an error.
fn start_error(reply: &str, log: &Path) -> Error {
    let field = |value: &serde_json::Value, key: &str| {
        value.get(key).and_then(|v| v.as_str()).map(str::to_owned)
    };
    if let Ok(value) = serde_json::from_str::<serde_json::Value>(reply)
        && let Some(what) = field(&value, "what")
    {
        let kind = field(&value, "kind").and_then(|kind| Kind::from_name(&kind));
        let error = Error::new(kind.unwrap_or(Kind::Failed), what);
        return match field(&value, "hint") {
            Some(hint) => error.hint(hint),
            None => error,
        };
    }
    Error::failed("the daemon ended before the mount was ready")
        .hint(format!("read its log: {}", log.shown()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reply_of_a_failed_daemon_becomes_an_error() {
        let log = Path::new("/log");
        let error = start_error(r#"{"kind":"busy","what":"in use","hint":"wait"}"#, log);
        assert_eq!((error.kind, error.what.as_str()), (Kind::Busy, "in use"));
        assert_eq!(error.hint.as_deref(), Some("wait"));
        for reply in ["", "read", "{}", "[1]"] {
            let error = start_error(reply, log);
            assert_eq!(error.kind, Kind::Failed);
            assert!(error.hint.unwrap().contains("/log"));
        }
    }

    #[test]
    fn a_daemon_that_hangs_while_it_starts_is_killed() {
        let mut command = Command::new("sleep");
        let child = command.arg("1000").stdout(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let error = await_report(child, Path::new("/log"), Duration::from_millis(20)).unwrap_err();
        assert!(error.what.contains("was killed"), "{error}");
        assert!(!error.what.contains("not ended"), "{error}");
        let process = format!("/proc/{pid}/stat");
        assert!(!Path::new(&process).try_exists().unwrap());
    }

    #[test]
    fn the_keeper_of_a_daemon_that_hangs_is_killed_with_it() {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 1000 & wait"]).process_group(0);
        let child = command.stdout(Stdio::piped()).spawn().unwrap();
        // Both hold the pipe. Its end shows that both have ended.
        let error = await_report(child, Path::new("/log"), Duration::from_millis(200)).unwrap_err();
        assert!(error.what.contains("was killed"), "{error}");
        assert!(!error.what.contains("not ended"), "{error}");
    }

    #[test]
    fn a_daemon_that_reports_in_time_continues() {
        let start = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]).stdout(Stdio::piped());
            let child = command.spawn().unwrap();
            (
                child.id(),
                await_report(child, Path::new("/log"), START_TIMEOUT),
            )
        };
        let (pid, started) = start("echo ready; exec sleep 1000 > /dev/null");
        started.unwrap();
        let ended = start(r#"echo '{"kind":"busy","what":"in use"}'"#).1;
        assert_eq!(ended.unwrap_err().kind, Kind::Busy);
        let mut daemons = started_daemons();
        let mut daemon = daemons
            .extract_if(.., |one| one.id() == pid)
            .next()
            .unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }
}

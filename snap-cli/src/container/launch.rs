//! Starts daemons, and receives their reports that the mount is ready.

use std::io::{Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cowlfs::config::{Awake, Coherence, Keeper, Passthrough, choice_name};

use crate::error::{Error, Kind, Result};
use crate::store::Store;
use cowl_layers::shown::Show as _;

/// The size in bytes from which a log is rotated.
pub const LOG_LIMIT: u64 = 1 << 20;

/// The daemon's message to its parent when the mount is ready.
const READY: &str = "ready";

/// Starts a daemon and waits until its mount is ready. `fill` adds arguments to its command.
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
    let mut child = command
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let mut reply = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut reply)
            .map_err(|e| Error::failed("cannot read the daemon's reply").because(e))?;
    }
    if is_ready(&reply) {
        started_daemons().push(child);
        return Ok(());
    }
    child
        .wait()
        .map_err(|e| Error::failed("cannot wait for the daemon").because(e))?;
    Err(start_error(&reply, log))
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
}

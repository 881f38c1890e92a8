//! Scripts of the machine's owner that run before and after a command: all executables of a folder, in
//! the order of their names. What they are told stands in their environment.
//!
//! A script before may stop the command. One after can't: what is done is done, and its failure is told.
//! When a script before has run, those after always run, whatever became of the command, so that what was
//! quiesced is woken again. It knows nothing of stores and containers but what it is told.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// Set for every script: cowl, called by one, runs none.
pub const INSIDE: &str = "COWL_IN_HOOK";

/// How long a script that was told to end may take for it.
const GRACE: Duration = Duration::from_secs(2);

/// What the scripts are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A snapshot is taken.
    Snapshot,
    /// A container is made what it was at a snapshot.
    Restore,
    /// Snapshots are removed.
    Rm,
    /// A container is destroyed.
    Destroy,
}

impl Event {
    /// The name that folders and the environment have.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
            Self::Rm => "rm",
            Self::Destroy => "destroy",
        }
    }
}

/// Where scripts are found, and how long each may take (no limit when zero).
#[derive(Clone, Debug)]
pub struct Hooks {
    /// The folder with `pre-EVENT.d` and `post-EVENT.d`.
    pub dir: PathBuf,
    /// How long one script may take.
    pub timeout: Duration,
}

/// What is told of the command, as variables of the environment.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    variables: Vec<(&'static str, OsString)>,
}

impl Facts {
    /// Tells one thing more, or anew.
    pub fn tell(&mut self, name: &'static str, value: impl AsRef<OsStr>) {
        self.variables.retain(|(known, _)| *known != name);
        self.variables.push((name, value.as_ref().to_owned()));
    }
}

/// Does `work` with the scripts of `event` before and after it. `work` may tell more facts, for those after.
pub fn around<T>(
    hooks: &Hooks,
    event: Event,
    facts: &mut Facts,
    work: impl FnOnce(&mut Facts) -> Result<T>,
) -> Result<T> {
    if std::env::var_os(INSIDE).is_some() {
        log::info!(
            "called by a hook: the hooks of {} are not run",
            event.name()
        );
        return work(facts);
    }
    let before = format!("pre-{}", event.name());
    let after = format!("post-{}", event.name());
    let mut ran = 0;
    let ready = run_all(hooks, &before, facts, &mut ran);
    let done = match ready {
        Ok(()) => work(facts),
        Err(error) => {
            if ran > 0 {
                facts.tell("COWL_RESULT", "stopped");
                tell_failure(run_all(hooks, &after, facts, &mut 0));
            }
            return Err(error);
        }
    };
    facts.tell("COWL_RESULT", if done.is_ok() { "done" } else { "failed" });
    let told = run_all(hooks, &after, facts, &mut 0);
    match (done, told) {
        (Ok(done), Ok(())) => Ok(done),
        (Ok(_), Err(error)) => Err(Error::failed(format!(
            "the {} is done, but a hook after it failed",
            event.name()
        ))
        .because(error.to_string())
        .hint("nothing was undone; see what the hook said above")),
        (Err(error), told) => {
            tell_failure(told);
            Err(error)
        }
    }
}

/// What failed beside the failure that is answered.
fn tell_failure(told: Result<()>) {
    if let Err(error) = told {
        log::warn!("{error}");
    }
}

/// Runs the scripts of one folder; `ran` counts those that were begun.
fn run_all(hooks: &Hooks, when: &str, facts: &Facts, ran: &mut usize) -> Result<()> {
    for script in scripts(&hooks.dir.join(format!("{when}.d")))? {
        log::info!("running {}", script.shown());
        *ran += 1;
        run(&script, when, facts, hooks.timeout)?;
    }
    Ok(())
}

/// The executables of a folder, by name. What is none is passed over: an editor's copy, a README.
fn scripts(folder: &Path) -> Result<Vec<PathBuf>> {
    let at = |error| Error::at("read the hooks in", folder, error);
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(at)?;
        let name = entry.file_name();
        let path = entry.path();
        let hidden = name.as_encoded_bytes().starts_with(b".");
        if hidden || name.as_encoded_bytes().ends_with(b"~") {
            continue;
        }
        let meta = std::fs::metadata(&path).map_err(|error| Error::at("look at", &path, error))?;
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
            continue;
        }
        check_owner(&path, &meta)?;
        found.push(path);
    }
    found.sort();
    Ok(found)
}

/// A script runs with all that cowl may do: nobody else may have written it.
fn check_owner(path: &Path, meta: &std::fs::Metadata) -> Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let foreign = meta.uid() != 0 && meta.uid() != own;
    if foreign || meta.permissions().mode() & 0o022 != 0 {
        let path = path.shown();
        return Err(
            Error::failed(format!("the hook {path} may be written by others"))
                .hint(format!("chown root {path}; chmod 755 {path}")),
        );
    }
    Ok(())
}

fn run(script: &Path, when: &str, facts: &Facts, timeout: Duration) -> Result<()> {
    let at = |error: std::io::Error| Error::at("run the hook", script, error);
    let err = std::io::stderr();
    let stderr = std::os::fd::AsFd::as_fd(&err)
        .try_clone_to_owned()
        .map_err(at)?;
    let mut child = Command::new(script)
        .env("COWL_HOOK", when)
        .env(INSIDE, "1")
        .envs(facts.variables.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        // What cowl prints as data stays free of what hooks say.
        .stdout(stderr)
        .process_group(0)
        .spawn()
        .map_err(at)?;
    // Who interrupts the command means the hook as well. Not before it runs: it would inherit the block.
    let signals = Signals::block()?;
    let ended = watch(&mut child, &signals, timeout).map_err(at)?;
    drop(signals);
    let script = script.shown();
    match ended {
        Ended::By(status) if status.success() => Ok(()),
        Ended::By(status) => {
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, signal) => format!("signal {}", signal.unwrap_or_default()),
            };
            Err(Error::failed(format!("the hook {script} failed: {how}")))
        }
        Ended::Late => Err(Error::failed(format!(
            "the hook {script} took longer than {} s and was ended",
            timeout.as_secs()
        ))
        .hint("`hooks.timeout` in the configuration file gives hooks more time")),
        Ended::Interrupted(signal) => Err(Error::failed(format!(
            "the hook {script} was interrupted by {signal}"
        ))),
    }
}

enum Ended {
    By(std::process::ExitStatus),
    Late,
    Interrupted(Signal),
}

/// Waits for a script, and ends it when its time is over or a signal says so.
fn watch(child: &mut Child, signals: &Signals, timeout: Duration) -> std::io::Result<Ended> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::By(status));
        }
        if let Some(signal) = signals.pending()? {
            end(child, signal)?;
            return Ok(Ended::Interrupted(signal));
        }
        if !timeout.is_zero() && began.elapsed() >= timeout {
            end(child, Signal::SIGTERM)?;
            return Ok(Ended::Late);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Ends a script with all that it started: kindly first.
fn end(child: &mut Child, signal: Signal) -> std::io::Result<()> {
    let group = Pid::from_raw(i32::try_from(child.id()).map_err(std::io::Error::other)?);
    let tell = |signal| match killpg(group, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(std::io::Error::from(error)),
    };
    tell(signal)?;
    let until = Instant::now() + GRACE;
    while child.try_wait()?.is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    tell(Signal::SIGKILL)?;
    child.wait()?;
    Ok(())
}

/// Signals that wait until they are asked for, as long as this lives.
struct Signals {
    descriptor: SignalFd,
    before: SigSet,
}

impl Signals {
    fn block() -> Result<Self> {
        let lost = |error: Errno| Error::failed("cannot block signals").because(error);
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        let before = SigSet::thread_get_mask().map_err(lost)?;
        set.thread_block().map_err(lost)?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        match SignalFd::with_flags(&set, flags) {
            Ok(descriptor) => Ok(Self { descriptor, before }),
            Err(error) => {
                before.thread_set_mask().map_err(lost)?;
                Err(lost(error))
            }
        }
    }

    fn pending(&self) -> std::io::Result<Option<Signal>> {
        let Some(info) = self.descriptor.read_signal()? else {
            return Ok(None);
        };
        let number = i32::try_from(info.ssi_signo).map_err(std::io::Error::other)?;
        Ok(Some(Signal::try_from(number)?))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        if let Err(error) = self.before.thread_set_mask() {
            log::warn!("cannot let signals through again: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(dir: &Path, when: &str, name: &str, text: &str) -> PathBuf {
        let folder = dir.join(format!("{when}.d"));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    fn hooks(dir: &Path) -> Hooks {
        Hooks {
            dir: dir.to_owned(),
            timeout: Duration::from_secs(60),
        }
    }

    /// Runs the work between the hooks of `dir`, and gives what they noted in `dir/log`.
    fn with(dir: &Path, work: Result<()>) -> (Result<()>, String) {
        let mut facts = Facts::default();
        facts.tell("COWL_CONTAINER", "web");
        facts.tell("LOG", dir.join("log"));
        let done = around(&hooks(dir), Event::Restore, &mut facts, |facts| {
            std::fs::write(dir.join("worked"), "").unwrap();
            facts.tell("COWL_SNAPSHOT", "snap7");
            work
        });
        let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
        (done, log)
    }

    const NOTE: &str = "echo $COWL_HOOK $(basename $0) $COWL_CONTAINER $COWL_SNAPSHOT $COWL_RESULT \
                        $COWL_IN_HOOK >> $LOG";

    #[test]
    fn scripts_run_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["20-b", "10-a", "30-c"] {
            script(dir.path(), "pre-restore", name, NOTE);
        }
        script(dir.path(), "post-restore", "x", NOTE);
        script(dir.path(), "pre-snapshot", "other", NOTE);
        // None of these is a hook.
        let none = script(dir.path(), "pre-restore", "README", NOTE);
        std::fs::set_permissions(&none, PermissionsExt::from_mode(0o644)).unwrap();
        script(dir.path(), "pre-restore", ".hidden", NOTE);
        script(dir.path(), "pre-restore", "10-a~", NOTE);
        std::fs::create_dir(dir.path().join("pre-restore.d/folder")).unwrap();
        let (done, log) = with(dir.path(), Ok(()));
        done.unwrap();
        assert_eq!(
            log,
            "pre-restore 10-a web 1\npre-restore 20-b web 1\npre-restore 30-c web 1\n\
             post-restore x web snap7 done 1\n"
        );
    }

    #[test]
    fn a_script_before_stops_the_command_and_those_after_undo_what_others_did() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "pre-restore", "1", NOTE);
        let bad = script(dir.path(), "pre-restore", "2", "exit 9");
        script(dir.path(), "pre-restore", "3", NOTE);
        script(dir.path(), "post-restore", "1", NOTE);
        let (done, log) = with(dir.path(), Ok(()));
        let error = done.unwrap_err().to_string();
        assert!(
            error.contains(bad.to_str().unwrap()) && error.contains("exit code 9"),
            "{error}"
        );
        assert!(!dir.path().join("worked").try_exists().unwrap());
        assert_eq!(log, "pre-restore 1 web 1\npost-restore 1 web stopped 1\n");
    }

    #[test]
    fn those_after_run_when_the_command_failed_and_their_failure_undoes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "post-restore", "1", NOTE);
        let (done, log) = with(dir.path(), Err(Error::busy("somebody uses it")));
        assert_eq!(done.unwrap_err().kind, crate::error::Kind::Busy);
        assert_eq!(log, "post-restore 1 web snap7 failed 1\n");

        script(dir.path(), "post-restore", "1", "kill -9 $$");
        let (done, _) = with(dir.path(), Ok(()));
        let error = done.unwrap_err();
        assert_eq!(error.kind, crate::error::Kind::Failed);
        assert!(error.to_string().contains("signal 9"), "{error}");
        assert!(error.to_string().contains("the restore is done"), "{error}");
    }

    #[test]
    fn a_script_that_takes_too_long_is_ended_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let text = format!("sleep 1000 & echo $! > {}; wait", pid.shown());
        let script = script(dir.path(), "pre-rm", "slow", &text);
        let late = run(
            &script,
            "pre-rm",
            &Facts::default(),
            Duration::from_millis(300),
        );
        let error = late.unwrap_err().to_string();
        assert!(error.contains("was ended"), "{error}");
        let pid = std::fs::read_to_string(pid).unwrap();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        // Gone, or dead and not waited for yet by whoever adopted it.
        assert!(stat.is_err() || stat.unwrap().contains(") Z "));
    }

    #[test]
    fn a_script_that_others_may_write_is_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "pre-restore", "open", NOTE);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        let (done, log) = with(dir.path(), Ok(()));
        let error = done.unwrap_err();
        assert!(
            error.to_string().contains("may be written by others"),
            "{error}"
        );
        assert!(error.hint.unwrap().contains("chmod 755"));
        assert_eq!(log, "");
        // A script that can't be run is a failure, too.
        std::fs::write(&path, "#!/no/such/interpreter\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let error = with(dir.path(), Ok(())).0.unwrap_err();
        assert!(error.to_string().contains("cannot run the hook"), "{error}");
    }
}

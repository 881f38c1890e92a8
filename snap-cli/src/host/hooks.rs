//! Scripts of the administrator that run before and after a command: all executables in a directory, in the order of
//! their names. They receive information in environment variables.
//!
//! A script that runs before a command (pre) can stop it. A script that runs after a command (post) cannot undo it, but
//! its failure is reported. If a pre script has run, the post scripts always run, even if the command failed, so that
//! services that were quiesced are resumed. The module does not depend on stores and containers.

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

use super::reach;
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The variable that is set for every script. If it is set, cowl runs no scripts, which prevents recursion.
pub const IN_HOOK: &str = "COWL_IN_HOOK";

/// The time between the signal that asks a script to terminate and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

/// The command that scripts run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Taking a snapshot.
    Snapshot,
    /// Restoring a container to a snapshot.
    Restore,
    /// Removing snapshots.
    Rm,
    /// Destroying a container.
    Destroy,
}

impl Event {
    /// Returns the name in directories and in the environment.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
            Self::Rm => "rm",
            Self::Destroy => "destroy",
        }
    }
}

/// The settings of scripts.
#[derive(Clone, Debug)]
pub struct Hooks {
    /// The directory that contains `pre-EVENT.d` and `post-EVENT.d`.
    pub dir: PathBuf,
    /// The time limit of each script; no limit if zero.
    pub timeout: Duration,
}

/// The environment variables that describe a command to its scripts.
#[derive(Clone, Debug, Default)]
pub struct HookEnv {
    variables: Vec<(&'static str, OsString)>,
}

impl HookEnv {
    /// Sets a variable.
    pub fn set(&mut self, name: &'static str, value: impl AsRef<OsStr>) {
        self.variables.retain(|(other, _)| *other != name);
        self.variables.push((name, value.as_ref().to_owned()));
    }
}

/// Runs `work` between the pre and post scripts of `event`.
///
/// `work` may set more variables for the post scripts.
pub fn run_around<T>(
    hooks: &Hooks,
    event: Event,
    env: &mut HookEnv,
    work: impl FnOnce(&mut HookEnv) -> Result<T>,
) -> Result<T> {
    if std::env::var_os(IN_HOOK).is_some() {
        log::info!(
            "not running the hooks of {}: cowl was called by a hook",
            event.name()
        );
        return work(env);
    }
    let pre = format!("pre-{}", event.name());
    let post = format!("post-{}", event.name());
    let mut started = 0;
    let ready = run_all(hooks, &pre, env, &mut started);
    let done = match ready {
        Ok(()) => work(env),
        Err(error) => {
            if started > 0 {
                env.set("COWL_RESULT", "stopped");
                log_failure(run_all(hooks, &post, env, &mut 0));
            }
            return Err(error);
        }
    };
    env.set("COWL_RESULT", if done.is_ok() { "done" } else { "failed" });
    let post_result = run_all(hooks, &post, env, &mut 0);
    match (done, post_result) {
        (Ok(done), Ok(())) => Ok(done),
        (Ok(_), Err(error)) => Err(Error::failed(format!(
            "the {} is done, but a post hook failed",
            event.name()
        ))
        .because(error.to_string())
        .hint("nothing was undone; see the output of the hook above")),
        (Err(error), post_result) => {
            log_failure(post_result);
            Err(error)
        }
    }
}

/// Logs a failure that is not returned, because another one is.
fn log_failure(result: Result<()>) {
    if let Err(error) = result {
        log::warn!("{error}");
    }
}

/// Runs the scripts of one directory; `started` counts those that were started.
fn run_all(hooks: &Hooks, when: &str, env: &HookEnv, started: &mut usize) -> Result<()> {
    for script in list_scripts(&hooks.dir.join(format!("{when}.d")))? {
        log::info!("running {}", script.shown());
        *started += 1;
        run(&script, when, env, hooks.timeout)?;
    }
    Ok(())
}

/// The number of links that the kernel follows.
const MOST_LINKS: usize = 40;

/// Lists the executables in a directory, sorted by name. Other files are ignored: backup copies of an editor, a README.
fn list_scripts(dir: &Path) -> Result<Vec<PathBuf>> {
    let at = |error| Error::at("read the hooks in", dir, error);
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(at)?;
        let name = entry.file_name();
        let path = entry.path();
        let is_hidden = name.as_encoded_bytes().starts_with(b".");
        if is_hidden || name.as_encoded_bytes().ends_with(b"~") {
            continue;
        }
        let meta = std::fs::metadata(&path).map_err(|error| Error::at("inspect", &path, error))?;
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
            continue;
        }
        found.push(name);
    }
    found.sort();
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let scripts: Vec<_> = found.into_iter().map(|name| dir.join(name)).collect();
    for script in &scripts {
        check(script)?;
    }
    Ok(scripts)
}

/// Refuses an entry of a directory if another user can modify or replace the script to which it leads.
fn check(entry: &Path) -> Result<()> {
    let at = |error| Error::at("inspect", entry, error);
    // Each link on the way, and then the script.
    let mut link = entry.to_owned();
    for _ in 0..MOST_LINKS {
        check_dirs(&link)?;
        match std::fs::read_link(&link) {
            Ok(target) => link = link.parent().unwrap_or(&link).join(target),
            Err(_) => break,
        }
    }
    let script = entry.canonicalize().map_err(at)?;
    check_dirs(&script)?;
    check_owner(&script, &std::fs::metadata(&script).map_err(at)?)
}

/// Refuses a script in a directory in which another user can replace it.
fn check_dirs(path: &Path) -> Result<()> {
    let Some(dir) = reach::replaceable(path)? else {
        return Ok(());
    };
    let (path, dir) = (path.shown(), dir.shown());
    Err(Error::failed(format!(
        "refusing to run the hook {path}: other users can replace files in {dir}"
    ))
    .hint(format!(
        "change the owner and the mode of the directory: chown root {dir}; chmod 755 {dir}"
    )))
}

/// Refuses a script that another user can modify, because it runs with the privileges of cowl.
fn check_owner(path: &Path, meta: &std::fs::Metadata) -> Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let is_foreign = meta.uid() != 0 && meta.uid() != own;
    if is_foreign || meta.permissions().mode() & 0o022 != 0 {
        let path = path.shown();
        return Err(Error::failed(format!(
            "refusing to run the hook {path}: other users can modify it"
        ))
        .hint(format!(
            "change its owner and mode: chown root {path}; chmod 755 {path}"
        )));
    }
    Ok(())
}

/// Runs one script and waits for it; `when` is the value of COWL_HOOK.
fn run(script: &Path, when: &str, env: &HookEnv, timeout: Duration) -> Result<()> {
    let at = |error: std::io::Error| Error::at("run the hook", script, error);
    let err = std::io::stderr();
    let stderr = std::os::fd::AsFd::as_fd(&err)
        .try_clone_to_owned()
        .map_err(at)?;
    let mut child = Command::new(script)
        .env("COWL_HOOK", when)
        .env(IN_HOOK, "1")
        .envs(env.variables.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        // The output of hooks must not mix with the data that cowl prints.
        .stdout(stderr)
        .process_group(0)
        .spawn()
        .map_err(at)?;
    // A signal that interrupts the command is forwarded to the hook. Signals are blocked after the start, because the
    // hook would inherit the mask.
    let signals = BlockedSignals::block()?;
    let outcome = wait(&mut child, &signals, timeout).map_err(at)?;
    drop(signals);
    let script = script.shown();
    match outcome {
        Outcome::Exited(status) if status.success() => Ok(()),
        Outcome::Exited(status) => {
            let how = match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, signal) => format!("signal {}", signal.unwrap_or_default()),
            };
            Err(Error::failed(format!("the hook {script} failed: {how}")))
        }
        Outcome::TimedOut => Err(Error::failed(format!(
            "the hook {script} took longer than {} s and was terminated",
            timeout.as_secs()
        ))
        .hint("increase `hooks.timeout` in the configuration file")),
        Outcome::Interrupted(signal) => Err(Error::failed(format!(
            "the hook {script} was interrupted by {signal}"
        ))),
    }
}

/// The end of a script.
enum Outcome {
    Exited(std::process::ExitStatus),
    TimedOut,
    Interrupted(Signal),
}

/// Waits for a script, and terminates it on a timeout or when this process receives a signal.
fn wait(
    child: &mut Child,
    signals: &BlockedSignals,
    timeout: Duration,
) -> std::io::Result<Outcome> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Outcome::Exited(status));
        }
        if let Some(signal) = signals.pending()? {
            terminate(child, signal)?;
            return Ok(Outcome::Interrupted(signal));
        }
        if !timeout.is_zero() && start.elapsed() >= timeout {
            terminate(child, Signal::SIGTERM)?;
            return Ok(Outcome::TimedOut);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Terminates the process group of a script: sends `signal`, and SIGKILL after [`GRACE`].
fn terminate(child: &mut Child, signal: Signal) -> std::io::Result<()> {
    let group = Pid::from_raw(i32::try_from(child.id()).map_err(std::io::Error::other)?);
    let send = |signal| match killpg(group, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(std::io::Error::from(error)),
    };
    send(signal)?;
    let deadline = Instant::now() + GRACE;
    while child.try_wait()?.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    send(Signal::SIGKILL)?;
    child.wait()?;
    Ok(())
}

/// The signals that terminate a command, blocked and read from a signalfd(2) during the lifetime of this value.
struct BlockedSignals {
    descriptor: SignalFd,
    previous: SigSet,
}

impl BlockedSignals {
    /// Blocks the signals for this thread.
    fn block() -> Result<Self> {
        let failed = |error: Errno| Error::failed("cannot block signals").because(error);
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        let previous = SigSet::thread_get_mask().map_err(failed)?;
        set.thread_block().map_err(failed)?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        match SignalFd::with_flags(&set, flags) {
            Ok(descriptor) => Ok(Self {
                descriptor,
                previous,
            }),
            Err(error) => {
                previous.thread_set_mask().map_err(failed)?;
                Err(failed(error))
            }
        }
    }

    /// Returns a signal that was received, if any.
    fn pending(&self) -> std::io::Result<Option<Signal>> {
        let Some(info) = self.descriptor.read_signal()? else {
            return Ok(None);
        };
        let number = i32::try_from(info.ssi_signo).map_err(std::io::Error::other)?;
        Ok(Some(Signal::try_from(number)?))
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        if let Err(error) = self.previous.thread_set_mask() {
            log::warn!("cannot unblock signals: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(dir: &Path, when: &str, name: &str, text: &str) -> PathBuf {
        let script_dir = dir.join(format!("{when}.d"));
        std::fs::create_dir_all(&script_dir).unwrap();
        let path = script_dir.join(name);
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

    /// Runs `work` between the hooks of `dir`, and returns the log that they wrote to `dir/log`.
    fn run_with_log(dir: &Path, work: Result<()>) -> (Result<()>, String) {
        let mut env = HookEnv::default();
        env.set("COWL_CONTAINER", "web");
        env.set("LOG", dir.join("log"));
        let done = run_around(&hooks(dir), Event::Restore, &mut env, |env| {
            std::fs::write(dir.join("worked"), "").unwrap();
            env.set("COWL_SNAPSHOT", "snap7");
            work
        });
        let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
        (done, log)
    }

    const LOG_LINE: &str = "echo $COWL_HOOK $(basename $0) $COWL_CONTAINER $COWL_SNAPSHOT $COWL_RESULT \
                        $COWL_IN_HOOK >> $LOG";

    #[test]
    fn scripts_run_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["20-b", "10-a", "30-c"] {
            script(dir.path(), "pre-restore", name, LOG_LINE);
        }
        script(dir.path(), "post-restore", "x", LOG_LINE);
        script(dir.path(), "pre-snapshot", "other", LOG_LINE);
        // None of these is a hook.
        let none = script(dir.path(), "pre-restore", "README", LOG_LINE);
        std::fs::set_permissions(&none, PermissionsExt::from_mode(0o644)).unwrap();
        script(dir.path(), "pre-restore", ".hidden", LOG_LINE);
        script(dir.path(), "pre-restore", "10-a~", LOG_LINE);
        std::fs::create_dir(dir.path().join("pre-restore.d/dir")).unwrap();
        let (done, log) = run_with_log(dir.path(), Ok(()));
        done.unwrap();
        assert_eq!(
            log,
            "pre-restore 10-a web 1\npre-restore 20-b web 1\npre-restore 30-c web 1\n\
             post-restore x web snap7 done 1\n"
        );
    }

    #[test]
    fn a_failing_pre_script_stops_the_command_and_post_scripts_still_run() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "pre-restore", "1", LOG_LINE);
        let bad = script(dir.path(), "pre-restore", "2", "exit 9");
        script(dir.path(), "pre-restore", "3", LOG_LINE);
        script(dir.path(), "post-restore", "1", LOG_LINE);
        let (done, log) = run_with_log(dir.path(), Ok(()));
        let error = done.unwrap_err().to_string();
        assert!(
            error.contains(bad.to_str().unwrap()) && error.contains("exit code 9"),
            "{error}"
        );
        assert!(!dir.path().join("worked").try_exists().unwrap());
        assert_eq!(log, "pre-restore 1 web 1\npost-restore 1 web stopped 1\n");
    }

    #[test]
    fn post_scripts_run_after_a_failed_command_and_their_failure_undoes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "post-restore", "1", LOG_LINE);
        let (done, log) = run_with_log(dir.path(), Err(Error::busy("in use")));
        assert_eq!(done.unwrap_err().kind, crate::error::Kind::Busy);
        assert_eq!(log, "post-restore 1 web snap7 failed 1\n");

        script(dir.path(), "post-restore", "1", "kill -9 $$");
        let (done, _) = run_with_log(dir.path(), Ok(()));
        let error = done.unwrap_err();
        assert_eq!(error.kind, crate::error::Kind::Failed);
        assert!(error.to_string().contains("signal 9"), "{error}");
        assert!(error.to_string().contains("the restore is done"), "{error}");
    }

    #[test]
    fn a_script_that_exceeds_the_timeout_is_terminated_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let text = format!("sleep 1000 & echo $! > {}; wait", pid.shown());
        let script = script(dir.path(), "pre-rm", "slow", &text);
        let result = run(
            &script,
            "pre-rm",
            &HookEnv::default(),
            Duration::from_millis(300),
        );
        let error = result.unwrap_err().to_string();
        assert!(error.contains("was terminated"), "{error}");
        let pid = std::fs::read_to_string(pid).unwrap();
        // It ends soon (SIGKILL does not wait), or becomes a zombie that its new parent has not waited for yet.
        let has_ended = || {
            std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
                .map_or(true, |stat| stat.contains(") Z "))
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !has_ended() {
            assert!(Instant::now() < deadline, "{pid} is running");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_script_that_others_can_modify_is_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), "pre-restore", "open", LOG_LINE);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        let (done, log) = run_with_log(dir.path(), Ok(()));
        let error = done.unwrap_err();
        assert!(
            error.to_string().contains("other users can modify it"),
            "{error}"
        );
        assert!(error.hint.unwrap().contains("chmod 755"));
        assert_eq!(log, "");
        // A directory in which others can replace the script, or the target of a link, is refused as well.
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        };
        set(&path, 0o755);
        let scripts = path.parent().unwrap();
        let elsewhere = dir.path().join("elsewhere");
        for open in [scripts, dir.path(), &elsewhere] {
            if open == elsewhere {
                std::fs::create_dir(open).unwrap();
                std::fs::rename(&path, open.join("target")).unwrap();
                std::os::unix::fs::symlink(open.join("target"), &path).unwrap();
            }
            let before = std::fs::metadata(open).unwrap().permissions();
            set(open, 0o777);
            let (done, log) = run_with_log(dir.path(), Ok(()));
            let error = done.unwrap_err().to_string();
            assert!(error.contains("can replace files in"), "{error}");
            assert_eq!(log, "");
            std::fs::set_permissions(open, before).unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        // A script that cannot be executed is a failure, too.
        std::fs::write(&path, "#!/no/such/interpreter\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let error = run_with_log(dir.path(), Ok(())).0.unwrap_err();
        assert!(error.to_string().contains("cannot run the hook"), "{error}");
    }
}

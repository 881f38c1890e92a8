//! The processes that hold a user's namespace.
//!
//! There are two of them, and each replaces the other one if it is killed. Both have a lock of the same byte of the
//! user's file, so there is no moment without a holder. They do nothing else, and have no terminal, no descriptors of
//! their creator, and no working directory but `/`.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use cowl_layers::sys::child::{self, BlockedSignals, Ended, Forked};
use cowl_layers::sys::socket;
use cowl_layers::sys::user_namespace::{self, UserNamespace};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{PidfdFlags, pidfd_open};

use super::ids::IdMap;
use super::limits;
use super::lock::NamespaceFile;
use crate::error::{Error, Result};
use crate::wait::poll_until;

/// The reports of the holder to its creator, and the answer.
const UNSHARED: &str = "unshared";
const MAPPED: &str = "mapped";
const READY: &str = "ready";

/// The pause before a killed holder is replaced, so that a program that kills both in turn does not use a CPU.
const PAUSE: Duration = Duration::from_millis(20);
/// The longest time in which the holder reports the next step; less than that in which other commands wait for it.
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest line that it reports.
const LONGEST_LINE: usize = 64;
/// The pause before another attempt to start the second holder.
const RETRY: Duration = Duration::from_secs(5);

/// The namespace that a new holder holds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin<'a> {
    /// A new one with these ids.
    New(&'a IdMap),
    /// That of its creator.
    Existing,
}

/// The first step of a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstStep {
    /// It creates a namespace.
    Create,
    /// It remains in the namespace of its creator.
    Remain,
}

/// Starts the holders, and waits until they hold the namespace. The caller must have locked its creation.
pub(super) fn start(file: &NamespaceFile, store: &Path, origin: Origin<'_>) -> Result<()> {
    let program = std::env::current_exe()
        .map_err(|e| Error::failed("cannot find the cowl program itself").because(e))?;
    let mut command = Command::new(&program);
    command.arg("--store").arg(store).arg("hold");
    if matches!(origin, Origin::Existing) {
        command.arg("--existing");
    }
    let mut holder = command
        .arg(file.dir())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let started = converse(&mut holder, origin);
    if started.is_err() {
        let ended = holder.kill().and_then(|()| holder.wait());
        if let Err(error) = ended {
            log::debug!("cannot end the holder of the namespace: {error}");
        }
    }
    started
}

/// Creates the ids of the namespace when the holder has created it, and waits until the holder is ready.
fn converse(holder: &mut Child, origin: Origin<'_>) -> Result<()> {
    let failed = |error| Error::failed("cannot create your namespace").because(error);
    let (Some(mut input), Some(mut output)) = (holder.stdin.take(), holder.stdout.take()) else {
        return Err(Error::failed("the holder of the namespace has no pipes"));
    };
    let mut next = || {
        read_line(&mut output).map_err(|error| match error.kind() {
            ErrorKind::TimedOut => {
                Error::busy("the process that holds your namespace does not answer")
                    .hint("try again when the machine has less load")
            }
            _ => failed(error),
        })
    };
    if let Origin::New(ids) = origin {
        expect(&next()?, UNSHARED)?;
        ids.apply(holder.id())?;
        writeln!(input, "{MAPPED}").map_err(failed)?;
    }
    expect(&next()?, READY)
}

/// Reads the line that reports the next step. The holder writes another one only after it was answered.
fn read_line(output: &mut ChildStdout) -> std::io::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut line = Vec::new();
    while line.len() < LONGEST_LINE && line.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = left.try_into().map_err(std::io::Error::other)?;
        let mut polled = [PollFd::new(&*output, PollFlags::IN)];
        match poll(&mut polled, Some(&left)) {
            Ok(0) => return Err(ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let mut part = [0; LONGEST_LINE];
        let count = output.read(&mut part)?;
        if count == 0 {
            break;
        }
        line.extend(part.iter().take(count));
    }
    let line = String::from_utf8(line).map_err(std::io::Error::other)?;
    Ok(line.trim_end().to_owned())
}

fn expect(line: &str, wanted: &str) -> Result<()> {
    if line == wanted {
        return Ok(());
    }
    let errno = line.strip_prefix("failed ").and_then(|n| n.parse().ok());
    Err(errno.map_or_else(
        || Error::failed("the process that holds your namespace was killed").hint("try again"),
        limits::explain,
    ))
}

/// Holds a namespace until this process is killed: the command that [`start`] runs.
///
/// Reports on standard output, and reads the answers from standard input.
pub fn run(dir: &Path, first: FirstStep) -> Result<()> {
    let failed =
        |error| Error::failed("cannot talk to the creator of the namespace").because(error);
    let report = |line: &str| writeln!(std::io::stdout(), "{line}").map_err(failed);
    if first == FirstStep::Create {
        let created = user_namespace::create();
        if report_failure(created, report)? {
            return Ok(());
        }
        report(UNSHARED)?;
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map_err(failed)?;
        if line.trim_end() != MAPPED {
            return Ok(());
        }
    }
    // This needs the privilege to mount, so it is a trial as well: AppArmor permits only the creation.
    if report_failure(user_namespace::receive_mounts(), report)? {
        return Ok(());
    }
    let file = NamespaceFile::open(dir)?
        .ok_or_else(|| Error::at("open", dir, std::io::Error::from(ErrorKind::NotFound)))?;
    file.hold()?;
    let signals = receive_signals()
        .map_err(|error| Error::failed("cannot receive signals").because(error))?;
    report(READY)?;
    release_streams().map_err(failed)?;
    loop {
        if let Err(error) = hold_with_partner(&file, &signals) {
            // There is no log. One process suffices to hold the namespace, until the kernel permits another one.
            drop(error);
            std::thread::sleep(RETRY);
        }
    }
}

/// Reports a failed step to the creator. Returns whether it failed.
fn report_failure(
    done: cowl_layers::error::Result<()>,
    report: impl Fn(&str) -> Result<()>,
) -> Result<bool> {
    match done {
        Ok(()) => Ok(false),
        Err(error) => {
            report(&format!("failed {}", error.errno().raw_os_error()))?;
            Ok(true)
        }
    }
}

/// Blocks the signals that end programs, in order to receive them: both holders end together.
fn receive_signals() -> std::io::Result<BlockedSignals> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGQUIT,
        Signal::SIGHUP,
    ] {
        signals.add(signal);
    }
    signals.thread_set_mask()?;
    BlockedSignals::receive()
}

fn release_streams() -> std::io::Result<()> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// Forks the second holder. Returns when one of both was killed, in the other one.
fn hold_with_partner(file: &NamespaceFile, signals: &BlockedSignals) -> Result<()> {
    let failed = |error: std::io::Error| Error::failed("cannot start a holder").because(error);
    let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
        .map_err(|error| failed(error.into()))?;
    match child::fork_daemon().map_err(failed)? {
        Forked::Child => {
            // The parent still holds the namespace. It starts another process later.
            let ended = file.hold().and_then(|()| wait_for_end(&own, signals));
            ended.or_else(|_| std::process::exit(1))
        }
        Forked::Parent(child) => {
            let waited = wait_for_end(&child, signals);
            if waited.is_err() {
                child.signal(Signal::SIGKILL as i32);
            }
            let ended = child.wait().map_err(failed)?;
            waited?;
            match ended {
                Ended::Killed(_) => Ok(()),
                Ended::Exited(_) => Err(failed(std::io::Error::other("it ended itself"))),
            }
        }
    }
}

/// Waits until the other process has ended. SIGTERM, SIGINT and SIGQUIT end both.
fn wait_for_end(other: impl std::os::fd::AsFd, signals: &BlockedSignals) -> Result<()> {
    let failed = |error: std::io::Error| Error::failed("cannot wait").because(error);
    loop {
        let mut polled = [
            PollFd::new(&other, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let has_ended = polled.first().is_some_and(|one| !one.revents().is_empty());
        while let Some(signal) = signals.next().map_err(failed)? {
            if signal != Signal::SIGHUP as i32 {
                // The group contains the two holders only.
                killpg(Pid::from_raw(0), Signal::SIGKILL).map_err(|error| failed(error.into()))?;
            }
        }
        if has_ended {
            std::thread::sleep(PAUSE);
            return Ok(());
        }
    }
}

/// Returns the processes that hold a namespace.
pub(super) fn group(file: &NamespaceFile) -> Result<Vec<u32>> {
    let failed = |error| Error::failed("cannot inspect the holders").because(error);
    let Some(holder) = file.holder()? else {
        return Ok(Vec::new());
    };
    let group_of = |pid: u32| {
        let pid = i32::try_from(pid).ok()?;
        nix::unistd::getpgid(Some(Pid::from_raw(pid))).ok()
    };
    let group = group_of(holder);
    let pids = cowl_layers::sys::users::pids().map_err(failed)?;
    let is_holder = |pid: &u32| group.is_some() && group_of(*pid) == group;
    Ok(pids.into_iter().filter(is_holder).collect())
}

/// Ends the holders of a namespace.
pub(super) fn stop(file: &NamespaceFile) -> Result<()> {
    let failed = |error| Error::failed("cannot end the namespace").because(error);
    let deadline = Instant::now() + Duration::from_secs(10);
    let ended = poll_until(deadline, Duration::from_millis(5), || {
        let Some(pid) = file.holder()? else {
            return Ok(Some(()));
        };
        let pid = i32::try_from(pid).map_err(|error| failed(std::io::Error::other(error)))?;
        match kill(Pid::from_raw(pid), Signal::SIGTERM) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    })?;
    ended.ok_or_else(|| Error::failed("the processes that hold your namespace do not end"))
}

/// Enters the user namespace of a daemon that serves a container of the store, if there is one. Its mount namespace has
/// no other mounts, so this process gets a new one.
///
/// The kernel reports the process that listens at the socket, which is in a directory of the user.
pub(super) fn enter_daemons_namespace(store: &Path) -> bool {
    let run = store.join("run");
    let dirs = std::fs::read_dir(&run).into_iter().flatten().flatten();
    for dir in dirs {
        match enter_namespace_of(&dir.path()) {
            Ok(true) => return true,
            Ok(false) => {}
            Err(error) => log::info!("cannot enter the namespace of a daemon: {error}"),
        }
    }
    false
}

fn enter_namespace_of(dir: &Path) -> std::io::Result<bool> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(CWD, dir, flags, Mode::empty())?;
    // The path of the directory may be longer than the address of a socket.
    let path = PathBuf::from(format!("/proc/self/fd/{}/sock", dir.as_raw_fd()));
    let stream = socket::connect(&path, Duration::from_secs(1))?;
    // The descriptor is valid for this process only, also if its id is used again.
    let process = socket::peer_handle(&stream)?;
    let pid = socket::peer_process(&stream)?;
    let found = UserNamespace::of(pid).map_err(|error| std::io::Error::from(error.errno()))?;
    let mut polled = [PollFd::new(&process, PollFlags::IN)];
    let now = rustix::event::Timespec::default();
    let has_ended = poll(&mut polled, Some(&now))? != 0;
    let own = rustix::process::geteuid().as_raw();
    let io_error = |error: cowl_layers::Error| std::io::Error::from(error.errno());
    let is_usable = !has_ended
        && found.shares_processes().map_err(io_error)?
        && found.owner().map_err(io_error)? == own
        && found.is_child().map_err(io_error)?;
    if !is_usable {
        return Ok(false);
    }
    found.enter_with_own_mounts().map_err(io_error)?;
    Ok(true)
}

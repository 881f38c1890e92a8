//! Unmounting: the daemon unmounts itself unless the mount is in use; then the error names the users.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowlfs::control::{Bind, Client, ControlError, KernelMount};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::state::{self, Mounted, RunState};
use super::{Container, daemon, lxc};
use crate::error::{Error, Result};
use crate::host::mountinfo;
use crate::host::users::{self, Device, User};
use crate::shell::quoted;
use crate::store::lock::Lock;
use crate::wait::wait_until;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::{flocks, process};

/// The number of attempts to unmount.
const ATTEMPTS: u32 = 9;
/// The number of attempts while the obstacle is not transient.
///
/// Retry: a child that has forked but not yet exec'd inherits its parent's descriptors.
const ATTEMPTS_IF_LASTING: u32 = 4;
/// The first and the longest pause between attempts. All pauses together take less than two seconds.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(400);

/// A mount to be unmounted.
pub(super) struct UnmountTarget<'a> {
    /// The mount's server.
    pub(super) server: Server,
    /// The daemon's process id; 0 if there is none.
    pub(super) pid: u32,
    /// The mount point.
    pub(super) mountpoint: &'a Path,
    /// The mount's file system, if known.
    pub(super) device: Option<Device>,
}

/// The server of a mount.
pub(super) enum Server {
    /// A daemon, with its socket.
    Daemon(PathBuf),
    /// Kernel overlayfs.
    Kernel(KernelMount),
}

/// A connection to the server of a mount.
enum Connection<'a> {
    Daemon(Box<Client>),
    Kernel(&'a KernelMount),
}

impl Connection<'_> {
    /// Unmounts, unless a process uses the mount.
    fn detach(&mut self) -> Result<(), ControlError> {
        match self {
            Self::Daemon(client) => client.detach(),
            Self::Kernel(mount) => mount.detach(),
        }
    }

    fn to_error(&self, target: &UnmountTarget<'_>, error: &ControlError) -> Error {
        match self {
            Self::Daemon(_) => daemon::to_error(error),
            Self::Kernel(_) => Error::failed(format!(
                "the mount at {} was not unmounted",
                target.mountpoint.shown()
            ))
            .because(error.to_string()),
        }
    }
}

/// The reason why a mount cannot be unmounted.
struct Obstacle {
    error: Error,
    /// Whether it may disappear as soon as another process has set up or left a mount namespace.
    transient: bool,
}

/// Asks the daemon to unmount, or unmounts kernel overlayfs. After this succeeds, a daemon writes to no layer any more.
pub(super) fn unmount(container: &Container<'_>, target: &UnmountTarget<'_>) -> Result<()> {
    let mut client = match &target.server {
        Server::Daemon(socket) => Connection::Daemon(Box::new(daemon::connect_at(socket)?)),
        Server::Kernel(mount) => Connection::Kernel(mount),
    };
    let mut pause = PAUSE;
    let patience = Instant::now() + container.store().session().patience;
    let mut tried = 1;
    while tried <= ATTEMPTS {
        let obstacle = match client.detach() {
            Ok(()) => return Ok(()),
            Err(ControlError::InUse { pids, binds }) => {
                find_obstacle(container, target, &pids, &binds)?
            }
            Err(ControlError::Busy { writers, readers }) => {
                let found = find_obstacle(container, target, &[], &[])?;
                if found.is_none() && !is_mounted(target)? && Instant::now() < patience {
                    // A daemon was killed after it had unmounted, and its successor has not noticed that yet.
                    std::thread::sleep(pause);
                    continue;
                }
                found.or(Some(Obstacle {
                    error: open_without_process(container, readers + writers),
                    transient: false,
                }))
            }
            // The daemon was killed after it had unmounted, and could not answer.
            Err(ControlError::Io(_)) if !is_mounted(target)? => return Ok(()),
            Err(error) => return Err(client.to_error(target, &error)),
        };
        match obstacle {
            Some(Obstacle { error, transient })
                if tried == ATTEMPTS || (!transient && tried >= ATTEMPTS_IF_LASTING) =>
            {
                return Err(error);
            }
            // Retry. `None`: the obstacle has disappeared.
            Some(_) | None => {}
        }
        std::thread::sleep(pause);
        if tried > ATTEMPTS_IF_LASTING {
            pause = (pause * 2).min(LONGEST);
        }
        tried += 1;
    }
    Err(
        Error::busy(format!("{} is in use", container.name())).hint(format!(
            "try again: {}",
            container.store().session().command
        )),
    )
}

/// Waits until the daemon of a mount in the namespaces of an LXC container has ended. Returns whether it has.
///
/// These namespaces end some time after the container's last process.
pub(super) fn await_end(
    container: &Container<'_>,
    state: &RunState,
    patience: Duration,
) -> Result<bool> {
    let lock = state::daemon_lock(container.store, container.id(), state.daemon);
    wait_until(Instant::now() + patience, daemon::PAUSE, || {
        Ok(!Lock::is_held(&lock)?)
    })
}

/// Whether the file system is mounted at its mount point.
fn is_mounted(target: &UnmountTarget<'_>) -> Result<bool> {
    let mounts = mountinfo::read()?;
    let top = mountinfo::topmost(&mounts, target.mountpoint);
    Ok(top.is_some_and(|top| target.device.is_none_or(|device| top.device == device)))
}

/// Finds the obstacle that keeps the daemon from unmounting.
///
/// `pids` are processes whose mount namespaces contain copies of the mount.
fn find_obstacle(
    container: &Container<'_>,
    target: &UnmountTarget<'_>,
    pids: &[u32],
    binds: &[Bind],
) -> Result<Option<Obstacle>> {
    let mut users = users(target.pid, target.device)?;
    for pid in pids {
        if users.iter().all(|user| user.pid != *pid) {
            users.extend(User::from_namespace(*pid));
        }
    }
    if !users.is_empty() {
        return Ok(Some(Obstacle {
            transient: users.iter().all(User::has_only_a_copy),
            error: in_use(container, &users),
        }));
    }
    if let Some(error) = mounted_elsewhere(container, binds) {
        return Ok(Some(Obstacle {
            error,
            transient: true,
        }));
    }
    let mounts = mountinfo::read()?;
    let inner: Vec<_> = mountinfo::below(&mounts, target.mountpoint)
        .map(|mount| mount.at.shown().to_string())
        .collect();
    Ok(inner.last().map(|last| Obstacle {
        transient: false,
        error: Error::busy(format!(
            "{} is in use: other file systems are mounted in it, at {}",
            container.name(),
            inner.join(", ")
        ))
        .hint(format!(
            "unmount them first (umount {}), then type: {}",
            quoted(last),
            container.store().session().command
        )),
    }))
}

/// Returns the error that names other mounts of the same file system.
fn mounted_elsewhere(container: &Container<'_>, binds: &[Bind]) -> Option<Error> {
    let own = std::fs::read_link("/proc/self/ns/mnt").ok();
    let is_here = |bind: &Bind| {
        let namespace = std::fs::read_link(format!("/proc/{}/ns/mnt", bind.pid)).ok();
        namespace.is_some() && namespace == own
    };
    // Those in this namespace first: a namespace that was created since may have a copy of one, for as long as its
    // processes live.
    let mut binds: Vec<&Bind> = binds.iter().collect();
    binds.sort_by_key(|bind| !is_here(bind));
    let first = *binds.first()?;
    let mounts: Vec<_> = binds
        .iter()
        .map(|bind| {
            let at = match bind.overlay {
                true => format!("as a layer of the overlay at {}", bind.at.shown()),
                false => format!("at {}", bind.at.shown()),
            };
            if is_here(bind) {
                return at;
            }
            let proc = PathBuf::from(format!("/proc/{}", bind.pid));
            let program = cowl_layers::sys::users::command(&proc);
            format!(
                "{at} in the mount namespace of pid {} ({program})",
                bind.pid
            )
        })
        .collect();
    let command = &container.store.session().command;
    let unmount = format!("umount {}", quoted(OsStr::from_bytes(&first.at)));
    let hint = match lxc::stop_hint(container, command) {
        Some(how) => how,
        None if is_here(first) => format!("unmount it there ({unmount}), then type: {command}"),
        // Root must not run a program there: the processes of the namespace decide what it is.
        None => format!(
            "end the program there (kill {}), then type: {command}",
            first.pid
        ),
    };
    Some(
        Error::busy(format!(
            "{} is in use: mounted {}",
            container.name(),
            mounts.join(", ")
        ))
        .hint(hint),
    )
}

/// Returns the error for open files that belong to no visible process.
fn open_without_process(container: &Container<'_>, files: u32) -> Error {
    Error::busy(format!(
        "{} is in use: {files} file(s) are open in it, but by no process that is visible here",
        container.name()
    ))
    .hint(format!(
        "detach loop devices and swap files that use them (losetup -l, swapon), then type: {}",
        container.store().session().command
    ))
}

/// Returns the processes that use a mount, except for its daemon and this command.
pub fn users(daemon: u32, device: Option<Device>) -> Result<Vec<User>> {
    match device {
        Some(device) => users::list(device, &[daemon, std::process::id()]),
        None => Ok(Vec::new()),
    }
}

/// Returns the error that names the processes that use the mount, with a hint.
pub fn in_use(container: &Container<'_>, users: &[User]) -> Error {
    let users_named = users::describe(users);
    let error = Error::busy(format!("{} is in use by {users_named}", container.name()));
    error.hint(unmount_hint(container, users))
}

/// Returns the hint for a mount that processes use.
pub(super) fn unmount_hint(container: &Container<'_>, users: &[User]) -> String {
    let command = &container.store.session().command;
    if let Some(how) = lxc::stop_hint(container, command) {
        return how;
    }
    let pids: Vec<_> = users.iter().map(|user| user.pid.to_string()).collect();
    format!(
        "end these processes (kill {}), then type: {command}",
        pids.join(" ")
    )
}

/// Waits up to two seconds for the daemon `pid` to exit.
///
/// Until it exits, the file systems of its descriptors cannot be unmounted. A daemon that is still syncing may take
/// longer. The caller must not hold the container's lock, because a daemon acquires it at its end to record a sync.
pub fn wait_for_exit(pid: u32) {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // The daemon has exited, or is not visible in this pid namespace.
    let Some(Ok(process)) = process.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return;
    };
    let timeout = Timespec {
        tv_sec: 2,
        tv_nsec: 0,
    };
    let mut polled = [PollFd::new(&process, PollFlags::IN)];
    match poll(&mut polled, Some(&timeout)) {
        Ok(0) => log::info!("the daemon (pid {pid}) has not ended yet"),
        Ok(_) => {}
        Err(error) => log::info!("cannot wait for the daemon (pid {pid}): {error}"),
    }
}

/// Kills the daemon if it is alive and does not answer. Returns whether it was killed.
///
/// Every access to the mount fails from then on.
pub fn kill_silent_daemon(container: &Container<'_>) -> Result<bool> {
    let Mounted::Alive(state) = container.mounted()? else {
        return Ok(false);
    };
    let socket = daemon::socket(container.store, container.id());
    let lock = state::daemon_lock(container.store, container.id(), state.daemon);
    kill_if_silent(container, &socket, &lock)
}

/// Kills the daemon that listens at `socket` and holds `lock` if it does not answer. Returns whether it was killed.
pub(super) fn kill_if_silent(
    container: &Container<'_>,
    socket: &Path,
    lock: &Path,
) -> Result<bool> {
    let pid = match Client::connect(socket) {
        Err(ControlError::Silent { pid, .. }) => pid,
        Ok(_) | Err(_) => return Ok(false),
    };
    if !kill_holders(lock)? {
        return Err(Error::busy(format!(
            "the daemon (pid {pid}) was killed and has not ended yet: it waits for a disk"
        ))
        .hint("try again when the disk responds"));
    }
    let name = container.name();
    log::warn!("killed the daemon of {name} (pid {pid}), which did not answer");
    Ok(true)
}

/// The keeper and the daemon of a mount. The descriptors prevent that their ids are reused.
#[derive(Debug)]
pub struct Servers(Vec<(u32, OwnedFd)>);

/// The way in which a mount is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By its daemon.
    Orderly,
    /// By killing the processes that do not respond.
    Forced,
}

/// Finds the keeper and the daemon of a container.
pub fn find_servers(container: &Container<'_>) -> Result<Servers> {
    let Mounted::Alive(state) = container.mounted()? else {
        return Ok(Servers(Vec::new()));
    };
    let lock = state::daemon_lock(container.store, container.id(), state.daemon);
    Servers::find(&lock)
}

impl Servers {
    /// Finds the processes that hold `lock` during their lifetime.
    pub(super) fn find(lock: &Path) -> Result<Self> {
        holders(lock).map(Self)
    }

    /// Kills those that have not ended and are stopped, after an unmount. They hold the layers locked.
    pub fn kill_stopped(self) -> Result<()> {
        let has_ended = |process: &OwnedFd| {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let mut polled = [PollFd::new(process, PollFlags::IN)];
            // A descriptor of a process can always be polled.
            poll(&mut polled, Some(&now)).map_or(true, |found| found > 0)
        };
        let deadline = Instant::now() + daemon::ENDING;
        wait_until(deadline, daemon::PAUSE, || {
            let left = self.0.iter().filter(|(_, process)| !has_ended(process));
            let left: Vec<_> = left.collect();
            // A daemon that is about to end must not lose its keeper before.
            if left.iter().all(|(pid, _)| process::is_stopped(*pid)) {
                for (pid, process) in &left {
                    kill(*pid, process)?;
                }
            }
            Ok::<_, Error>(left.is_empty())
        })
        .map(drop)
    }
}

/// Kills the processes that hold `lock` during their lifetime, until there is none: with a keeper, another daemon takes
/// the place of a killed one, and vice versa. Returns whether the lock is free.
fn kill_holders(lock: &Path) -> Result<bool> {
    let deadline = Instant::now() + daemon::ENDING;
    wait_until(deadline, daemon::PAUSE, || {
        if !Lock::is_held(lock)? {
            return Ok(true);
        }
        for (pid, process) in holders(lock)? {
            kill(pid, &process)?;
        }
        Ok(false)
    })
}

/// Returns the processes that hold `lock` during their lifetime.
fn holders(lock: &Path) -> Result<Vec<(u32, OwnedFd)>> {
    let file = match std::fs::metadata(lock) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::at("stat", lock, error)),
    };
    let open = |pid: u32| {
        let process = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        // It may have ended.
        Some((pid, pidfd_open(process, PidfdFlags::empty()).ok()?))
    };
    let found = flocks::exclusive_holders(&file).into_iter();
    let mut opened: Vec<_> = found.filter_map(open).collect();
    // The descriptors were opened before: their ids were not reused since.
    let still = flocks::exclusive_holders(&file);
    opened.retain(|(pid, _)| still.contains(pid));
    Ok(opened)
}

fn kill(pid: u32, process: &OwnedFd) -> Result<()> {
    match pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(Error::failed(format!("cannot kill the daemon (pid {pid})"))
            .because(std::io::Error::from(error))),
    }
}

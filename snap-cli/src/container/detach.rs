//! Ending a mount: the daemon unmounts it, unless something uses it; then the refusal names what does.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowlfs::control::{Bind, Client, ControlError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::state::{self, Mounted};
use super::{Container, daemon, lxc};
use crate::error::{Error, Result};
use crate::host::mountinfo;
use crate::host::users::{self, Device, User};
use crate::shell::quoted;
use crate::store::lock::Lock;
use crate::wait::wait_until;
use cowl_layers::shown::Show as _;

/// How often it is tried.
const TRIES: u32 = 9;
/// After so many tries what uses the mount is not about to let go of it. (A child of another program holds its
/// parent's files until it has become a program itself.)
const SURE_AFTER: u32 = 4;
/// The pause after the first tries, and the longest: less than two seconds for all.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(400);

/// A mount that is to be ended.
pub(super) struct Target<'a> {
    /// Where its daemon listens.
    pub(super) socket: PathBuf,
    /// The daemon's process.
    pub(super) pid: u32,
    /// Where it is.
    pub(super) mountpoint: &'a Path,
    /// Its file system, where that is known.
    pub(super) device: Option<Device>,
}

/// What a mount is not ended for.
struct Obstacle {
    error: Error,
    /// It may be there only for as long as a mount namespace is set up or taken down.
    passing: bool,
}

/// Has the daemon unmount. When it answers, it writes to no layer any more.
pub(super) fn unmount(container: &Container<'_>, target: &Target<'_>) -> Result<()> {
    let mut client = daemon::connect_at(&target.socket)?;
    let mut pause = PAUSE;
    for tried in 1..=TRIES {
        let obstacle = match client.detach() {
            Ok(()) => return Ok(()),
            Err(ControlError::InUse { pids, binds }) => obstacle(container, target, &pids, &binds)?,
            Err(ControlError::Busy { writers, readers }) => obstacle(container, target, &[], &[])?
                .or(Some(Obstacle {
                    error: held_unseen(container, readers + writers),
                    passing: false,
                })),
            Err(error) => return Err(daemon::told(&error)),
        };
        match obstacle {
            Some(Obstacle { error, passing })
                if tried == TRIES || (!passing && tried >= SURE_AFTER) =>
            {
                return Err(error);
            }
            // What was in the way is gone.
            Some(_) | None => {}
        }
        std::thread::sleep(pause);
        if tried > SURE_AFTER {
            pause = (pause * 2).min(LONGEST);
        }
    }
    Err(Error::busy(format!("{} is in use", container.name()))
        .hint(format!("try again: {}", container.store().session().who)))
}

/// Finds what is in the way. `pids` hold copies of the mount in namespaces of theirs.
fn obstacle(
    container: &Container<'_>,
    target: &Target<'_>,
    pids: &[u32],
    binds: &[Bind],
) -> Result<Option<Obstacle>> {
    let mut users = users(target.pid, target.device)?;
    for pid in pids {
        if users.iter().all(|user| user.pid != *pid) {
            users.extend(User::of_namespace(*pid));
        }
    }
    if !users.is_empty() {
        return Ok(Some(Obstacle {
            passing: users.iter().all(User::has_only_a_copy),
            error: in_use(container, &users),
        }));
    }
    if let Some(error) = mounted_elsewhere(container, binds) {
        return Ok(Some(Obstacle {
            error,
            passing: true,
        }));
    }
    let mounts = mountinfo::read()?;
    let inner: Vec<_> = mountinfo::below(&mounts, target.mountpoint)
        .map(|mount| mount.at.shown().to_string())
        .collect();
    Ok(inner.last().map(|last| Obstacle {
        passing: false,
        error: Error::busy(format!(
            "{} is in use: mounted inside it: {}",
            container.name(),
            inner.join(", ")
        ))
        .hint(format!(
            "unmount that first (umount {}), then type: {}",
            quoted(last),
            container.store().session().who
        )),
    }))
}

/// The refusal that names mounts of the same file system at other places.
fn mounted_elsewhere(container: &Container<'_>, binds: &[Bind]) -> Option<Error> {
    let own = std::fs::read_link("/proc/container/ns/mnt").ok();
    let first = binds.first()?;
    let is_here = |bind: &Bind| {
        let namespace = std::fs::read_link(format!("/proc/{}/ns/mnt", bind.pid)).ok();
        namespace.is_some() && namespace == own
    };
    let places: Vec<_> = binds
        .iter()
        .map(|bind| {
            let at = match bind.overlay {
                true => format!("as a layer of the overlay at {}", bind.at.escape_ascii()),
                false => format!("at {}", bind.at.escape_ascii()),
            };
            if is_here(bind) {
                return at;
            }
            let proc = PathBuf::from(format!("/proc/{}", bind.pid));
            let command = cowl_layers::sys::users::command(&proc);
            format!(
                "{at} in the mount namespace of pid {} ({command})",
                bind.pid
            )
        })
        .collect();
    let who = &container.store.session().who;
    let unmount = format!("umount {}", quoted(OsStr::from_bytes(&first.at)));
    let hint = match lxc::how_to_stop(container, who) {
        Some(how) => how,
        None if is_here(first) => format!("unmount it there ({unmount}), then type: {who}"),
        None => format!(
            "unmount it there (nsenter -t {} -m {unmount}), then type: {who}",
            first.pid
        ),
    };
    Some(
        Error::busy(format!(
            "{} is in use: mounted {}",
            container.name(),
            places.join(", ")
        ))
        .hint(hint),
    )
}

/// The refusal for files that are open in no process.
fn held_unseen(container: &Container<'_>, files: u32) -> Error {
    Error::busy(format!(
        "{} is in use: {files} file(s) are open in it, by no process that is visible here",
        container.name()
    ))
    .hint(format!(
        "a loop device or swap space may lie on them (losetup -l, swapon); then type: {}",
        container.store().session().who
    ))
}

/// Lists the processes that use a mount, other than its daemon and this command.
pub fn users(daemon: u32, device: Option<Device>) -> Result<Vec<User>> {
    match device {
        Some(device) => users::list(device, &[daemon, std::process::id()]),
        None => Ok(Vec::new()),
    }
}

/// Returns the error that names the processes that use the mount, and what to type.
pub fn in_use(container: &Container<'_>, users: &[User]) -> Error {
    let users_named = users::describe(users);
    let error = Error::busy(format!("{} is in use by {users_named}", container.name()));
    error.hint(how_to_end(container, users))
}

/// Says what to type against processes that use the mount.
pub(super) fn how_to_end(container: &Container<'_>, users: &[User]) -> String {
    let who = &container.store.session().who;
    if let Some(how) = lxc::how_to_stop(container, who) {
        return how;
    }
    let pids: Vec<_> = users.iter().map(|user| user.pid.to_string()).collect();
    format!(
        "end what uses it (kill {}), then type: {who}",
        pids.join(" ")
    )
}

/// Waits a moment for the daemon `pid` to end: until then the file systems that its descriptors lie on cannot
/// be unmounted. One that still syncs may take longer and is not waited for. The container's lock must be
/// free: a daemon that records a sync at its end takes it.
pub fn wait_for_exit(pid: u32) {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // One that has ended, or that is not visible here, is not waited for.
    let Some(Ok(process)) = process.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return;
    };
    let until = Timespec {
        tv_sec: 2,
        tv_nsec: 0,
    };
    let mut asked = [PollFd::new(&process, PollFlags::IN)];
    match poll(&mut asked, Some(&until)) {
        Ok(0) => log::info!("the daemon (pid {pid}) has not ended yet"),
        Ok(_) => {}
        Err(error) => log::info!("cannot wait for the daemon (pid {pid}): {error}"),
    }
}

/// Kills the daemon if it lives and does not answer; whether it did. What programs do in the mount fails
/// from then on.
pub fn kill_silent_daemon(container: &Container<'_>) -> Result<bool> {
    let Mounted::Alive(state) = container.mounted()? else {
        return Ok(false);
    };
    let socket = daemon::socket(container.store, container.id());
    let lock = state::daemon_lock(container.store, container.id(), state.daemon);
    kill_if_silent(container, &socket, &lock)
}

/// Kills the daemon that listens at `socket` and holds `lock` for life if it does not answer.
pub(super) fn kill_if_silent(
    container: &Container<'_>,
    socket: &Path,
    lock: &Path,
) -> Result<bool> {
    let pid = match Client::connect(socket) {
        Err(ControlError::Silent { pid, .. }) => pid,
        Ok(_) | Err(_) => return Ok(false),
    };
    let failed = |error: rustix::io::Errno| {
        Error::failed(format!("cannot kill the daemon (pid {pid})"))
            .because(std::io::Error::from(error))
    };
    let unseen = || Error::failed("the daemon's process is not visible here");
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(process.ok_or_else(unseen)?, PidfdFlags::empty()).map_err(failed)?;
    // Its lock shows that the process is still the one that did not answer.
    if Lock::is_held(lock)? {
        pidfd_send_signal(&process, Signal::KILL).map_err(failed)?;
    }
    let deadline = Instant::now() + daemon::ENDING;
    if !wait_until(deadline, daemon::PAUSE, || {
        Ok::<_, Error>(!Lock::is_held(lock)?)
    })? {
        return Err(Error::busy(format!(
            "the daemon (pid {pid}) was killed and has not ended yet: it waits for a disk"
        )));
    }
    let name = container.name();
    log::warn!("the daemon of {name} (pid {pid}) did not answer: killed");
    Ok(true)
}

//! Dead mounts: mounts whose daemon died while processes used them.
//!
//! Every system call of these processes on the mount fails with ENOTCONN, even after the container is mounted again,
//! until the processes are restarted. `dead.json` in the run directory lists such mounts while a process uses them.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use cowl_layers::error::Errno;
use serde::{Deserialize, Serialize};

use super::state::{self, RunState};
use super::{Container, detach, lxc};
use crate::error::{Error, Result};
use crate::host;
use crate::host::users::{self, Device, User};
use crate::store::manifest::ContainerId;
use crate::store::name::ContainerName;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// A mount whose daemon died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DeadMount {
    daemon: u32,
    device: Device,
    boot: String,
    /// The reason why no other daemon has continued, if its keeper has reported one.
    #[serde(default)]
    reason: Option<String>,
}

/// The processes that still use a mount whose daemon died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranded {
    /// The process id of the daemon that died.
    pub daemon: u32,
    /// The reason why no other daemon has continued, if its keeper has reported one.
    pub reason: Option<String>,
    /// The processes.
    pub users: Vec<User>,
}

/// Returns the path of the list of dead mounts.
fn state_path(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join("dead.json")
}

/// Reads the list of dead mounts.
fn read(path: &Path) -> Result<Vec<DeadMount>> {
    match std::fs::read(path) {
        // A partial write, left by a crash, contains nothing usable.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_default()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::at("read", path, error)),
    }
}

/// Writes the list of dead mounts, or removes the file if the list is empty.
fn write(path: &Path, dead: &[DeadMount]) -> Result<()> {
    if dead.is_empty() {
        return disk::remove_if_exists(path);
    }
    let bytes = serde_json::to_vec(dead).map_err(|e| Error::at("write", path, e))?;
    std::fs::write(path, bytes).map_err(|e| Error::at("write", path, e))
}

/// Records the mount of a daemon that died, if a process uses it. The caller must hold the container's lock.
fn record(store: &Store, id: ContainerId, state: &RunState) -> Result<()> {
    let Some(device) = state.device()? else {
        return Ok(());
    };
    if users_of_dead(device)?.is_empty() {
        return Ok(());
    }
    let path = state_path(store, id);
    let mut dead = read(&path)?;
    let now = DeadMount {
        daemon: state.pid,
        device,
        boot: state.boot.clone(),
        reason: state::end_reason(store, id, state)?,
    };
    if !dead.contains(&now) {
        dead.push(now);
        write(&path, &dead)?;
    }
    Ok(())
}

/// Unmounts the mount of a daemon that died, and records it if a process uses it. The caller must hold the container's
/// lock, and decides about the state.
pub(crate) fn unmount(store: &Store, id: ContainerId, state: &RunState) -> Result<()> {
    record(store, id, state)?;
    detach(state)
}

/// Detaches a mount that no daemon serves any more, if it still exists.
pub(crate) fn detach(state: &RunState) -> Result<()> {
    if !state.is_here()? {
        return Ok(());
    }
    cowl_layers::sys::mount::unmount_lazily(&state.mountpoint)
        .map_err(|e| Error::at("unmount the dead mount at", &state.mountpoint, e))
}

/// Returns the processes on dead mounts, and drops the records of mounts that no process uses any more.
///
/// The caller must hold the container's lock.
pub fn list_stranded(store: &Store, id: ContainerId) -> Result<Vec<Stranded>> {
    let path = state_path(store, id);
    let dead = read(&path)?;
    if dead.is_empty() {
        return Ok(Vec::new());
    }
    let boot = host::boot_id()?;
    let (mut in_use, mut found) = (Vec::new(), Vec::new());
    for mount in dead.iter().filter(|mount| mount.boot == boot) {
        let users = users_of_dead(mount.device)?;
        if !users.is_empty() {
            in_use.push(mount.clone());
            found.push(Stranded {
                daemon: mount.daemon,
                reason: mount.reason.clone(),
                users,
            });
        }
    }
    if in_use != dead {
        write(&path, &in_use)?;
    }
    Ok(found)
}

/// Returns the processes that use the file system `device`, if it is dead.
///
/// The kernel reuses device numbers, so the number may belong to another file system by now.
fn users_of_dead(device: Device) -> Result<Vec<User>> {
    let mut users = users::list(device, &[std::process::id()])?;
    users.retain(|user| {
        let link = cowl_layers::sys::users::link_to(user.pid, device);
        link.is_some_and(|link| is_dead(&link))
    });
    Ok(users)
}

/// Returns whether the file system of a /proc link reports ENOTCONN: its daemon is gone.
///
/// A thread makes the call, because another file system may never answer.
fn is_dead(link: &Path) -> bool {
    const TIMEOUT: Duration = Duration::from_secs(1);
    let (send, receive) = mpsc::channel();
    let link = link.to_path_buf();
    std::thread::spawn(move || {
        let answer = rustix::fs::statfs(&link);
        if send.send(matches!(answer, Err(Errno::NOTCONN))).is_err() {
            log::debug!("{} answered after the timeout", link.shown());
        }
    });
    receive.recv_timeout(TIMEOUT).unwrap_or(false)
}

/// Returns an error if processes of the container are on a dead mount.
///
/// Commands that exchange the content of a mount check this first: such processes would not see the new content.
pub fn refuse_stranded(container: &Container<'_>) -> Result<()> {
    let found = list_stranded(container.store, container.id())?;
    let Some(first) = found.first() else {
        return Ok(());
    };
    let users: Vec<_> = found.iter().flat_map(|one| one.users.clone()).collect();
    let all = Stranded {
        users: users.clone(),
        ..first.clone()
    };
    let what = describe_stranded(container, &all);
    Err(Error::busy(what).hint(detach::unmount_hint(container, &users)))
}

/// Returns a message of the form "the daemon of web (pid 1) died; container web still runs on the dead mount
/// (pid 2 (init: root directory))".
pub fn describe_stranded(container: &Container<'_>, stranded: &Stranded) -> String {
    let (name, users) = (container.name(), users::describe(&stranded.users));
    let runs = lxc::stop_hint(container, "").is_some();
    let still = match runs {
        true => format!("container {name} still runs on the dead mount ({users})"),
        false => format!("the dead mount is still in use by {users}"),
    };
    let died = describe_end(name, stranded.daemon, stranded.reason.as_deref());
    format!("{died}; {still}")
}

/// Returns a message of the form "the daemon of web (pid 1) died".
pub fn describe_end(name: &ContainerName, daemon: u32, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("the mount of {name} has ended (pid {daemon}: {reason})"),
        None => format!("the daemon of {name} (pid {daemon}) died"),
    }
}

/// Returns the commands with which a container continues whose mount has ended.
pub fn commands(name: &ContainerName) -> String {
    format!("stop and start what runs in {name}, or type: cowl umount {name}; cowl mount {name}")
}

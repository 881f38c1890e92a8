//! Dead mounts: what a daemon that died leaves to the processes that were inside. Every call of theirs fails
//! there (ENOTCONN), also when the container is mounted anew, until they are started anew.
//!
//! Such mounts are noted in `dead.json` among the run-time files, for as long as a process uses them.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use cowl_layers::error::Errno;
use serde::{Deserialize, Serialize};

use super::state::RunState;
use super::{Container, detach, lxc};
use crate::error::{Error, Result};
use crate::host;
use crate::host::users::{self, Device, User};
use crate::store::manifest::ContainerId;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// A mount whose daemon died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DeadMount {
    daemon: u32,
    device: Device,
    boot: String,
}

/// The processes that still use a mount whose daemon died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranded {
    /// The process that the daemon was.
    pub daemon: u32,
    /// Who they are.
    pub users: Vec<User>,
}

fn file(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join("dead.json")
}

fn read(path: &Path) -> Result<Vec<DeadMount>> {
    match std::fs::read(path) {
        // What was cut short says nothing.
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_default()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::at("read", path, error)),
    }
}

fn write(path: &Path, dead: &[DeadMount]) -> Result<()> {
    if dead.is_empty() {
        return disk::remove_if_there(path);
    }
    let bytes = serde_json::to_vec(dead).map_err(|e| Error::at("write", path, e))?;
    std::fs::write(path, bytes).map_err(|e| Error::at("write", path, e))
}

/// Notes the mount of a daemon that died, if anything uses it. The caller has locked the container.
pub(crate) fn note(store: &Store, id: ContainerId, state: &RunState) -> Result<()> {
    let Some(device) = state.device()? else {
        return Ok(());
    };
    if stranded_on(device)?.is_empty() {
        return Ok(());
    }
    let path = file(store, id);
    let mut dead = read(&path)?;
    let now = DeadMount {
        daemon: state.pid,
        device,
        boot: state.boot.clone(),
    };
    if !dead.contains(&now) {
        dead.push(now);
        write(&path, &dead)?;
    }
    Ok(())
}

/// Lists the processes on dead mounts. Mounts that nothing uses any more are forgotten. The caller has locked the
/// container.
pub fn stranded(store: &Store, id: ContainerId) -> Result<Vec<Stranded>> {
    let path = file(store, id);
    let dead = read(&path)?;
    if dead.is_empty() {
        return Ok(Vec::new());
    }
    let boot = host::boot_id()?;
    let (mut kept, mut found) = (Vec::new(), Vec::new());
    for mount in dead.iter().filter(|mount| mount.boot == boot) {
        let users = stranded_on(mount.device)?;
        if !users.is_empty() {
            kept.push(mount.clone());
            found.push(Stranded {
                daemon: mount.daemon,
                users,
            });
        }
    }
    if kept != dead {
        write(&path, &kept)?;
    }
    Ok(found)
}

/// The users of a file system, if it is a dead one: its number may be another one's by now.
fn stranded_on(device: Device) -> Result<Vec<User>> {
    let mut users = users::list(device, &[std::process::id()])?;
    users.retain(|user| {
        let link = cowl_layers::sys::users::link_to(user.pid, device);
        link.is_some_and(|link| is_dead(&link))
    });
    Ok(users)
}

/// Whether the file system that a link of /proc leads to answers that its daemon is gone. Any other one may not
/// answer at all.
fn is_dead(link: &Path) -> bool {
    const PATIENCE: Duration = Duration::from_secs(1);
    let (send, receive) = mpsc::channel();
    let link = link.to_path_buf();
    std::thread::spawn(move || {
        let answer = rustix::fs::statfs(&link);
        // Nothing waits for it any more.
        if send.send(matches!(answer, Err(Errno::NOTCONN))).is_err() {
            log::debug!("an answer from {} came late", link.shown());
        }
    });
    receive.recv_timeout(PATIENCE).unwrap_or(false)
}

/// Refuses a change of what the container's processes see while some are on a dead mount: they would not see
/// it, and nothing else either.
pub fn refuse_stranded(container: &Container<'_>) -> Result<()> {
    let found = stranded(container.store, container.id())?;
    let Some(first) = found.first() else {
        return Ok(());
    };
    let users: Vec<_> = found.iter().flat_map(|one| one.users.clone()).collect();
    let what = describe_stranded(container, first.daemon, &users);
    Err(Error::busy(what).hint(detach::how_to_end(container, &users)))
}

/// "the daemon of web (pid 1) died; container web still runs on the dead mount (pid 2 (init: root directory))"
pub fn describe_stranded(container: &Container<'_>, daemon: u32, users: &[User]) -> String {
    let (name, users) = (container.name(), users::describe(users));
    let runs = lxc::how_to_stop(container, "").is_some();
    let still = match runs {
        true => format!("container {name} still runs on the dead mount ({users})"),
        false => format!("the dead mount is still in use by {users}"),
    };
    format!("the daemon of {name} (pid {daemon}) died; {still}")
}

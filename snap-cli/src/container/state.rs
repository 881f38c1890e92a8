//! What is known of a running mount: `state.json` in its run directory ([`crate::store::run`]), and the lock
//! that its daemon holds for life.
//!
//! The daemon writes the state when the mount is there; whoever ends the mount in good order removes it.
//! State without a daemon therefore means that the daemon died. Each daemon has a lock of its own, because
//! one that was unmounted may still be busy with dropping its caches when the next one serves already.

use std::os::fd::AsFd as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::daemon;
use crate::error::{Error, Result};
use crate::host;
use crate::host::mountinfo;
use crate::host::users::{self, Device};
use crate::store::lock::Lock;
use crate::store::manifest::ContainerId;
use crate::store::run::STATE;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;
use cowl_layers::sys::dir;

/// A path in JSON: text where it is text, else its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum JsonPath {
    Text(String),
    Bytes(Vec<u8>),
}

pub(super) fn to_json<S: serde::Serializer>(path: &Path, out: S) -> Result<S::Ok, S::Error> {
    match path.to_str() {
        Some(text) => JsonPath::Text(text.to_owned()),
        None => JsonPath::Bytes(path.as_os_str().as_bytes().to_vec()),
    }
    .serialize(out)
}

pub(super) fn from_json<'de, D: serde::Deserializer<'de>>(input: D) -> Result<PathBuf, D::Error> {
    Ok(match JsonPath::deserialize(input)? {
        JsonPath::Text(text) => PathBuf::from(text),
        JsonPath::Bytes(bytes) => PathBuf::from(std::ffi::OsString::from_vec(bytes)),
    })
}

/// What the daemon tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunState {
    /// Its process id.
    pub pid: u32,
    /// Where it mounted the container.
    #[serde(serialize_with = "to_json", deserialize_with = "from_json")]
    pub mountpoint: PathBuf,
    /// Names the lock that it holds for life.
    pub daemon: Uuid,
    /// The boot in which it did.
    pub boot: String,
    /// Nobody asked for the mount but a command that ran in it.
    pub transient: bool,
    /// Set-user-ID programs and device nodes have no effect in it.
    #[serde(default)]
    pub nosuid: bool,
    /// It is being taken down only to be mounted anew: the state outlives the daemon.
    pub replacing: bool,
    /// The mount's file system; daemons of earlier versions did not note it.
    #[serde(default)]
    pub device: Option<Device>,
    /// The store of the container, as [`RunDirs::key`](crate::store::run::RunDirs::key) names it; daemons of earlier versions did not note it.
    #[serde(default)]
    pub store: Option<String>,
}

impl RunState {
    /// Whether what is mounted at its place, in the mount namespace of this process, is its mount.
    pub fn is_here(&self) -> Result<bool> {
        let mounts = mountinfo::read()?;
        Ok(mountinfo::topmost(&mounts, &self.mountpoint)
            .is_some_and(|mount| is_mount_of(mount, self.device)))
    }

    /// Returns the mount's file system, by the table of mounts where the state does not name it.
    pub fn device(&self) -> Result<Option<Device>> {
        match self.device {
            Some(device) => Ok(Some(device)),
            None => users::device_at(&self.mountpoint),
        }
    }

    /// Has what programs wrote and the kernel still keeps handed to the daemon, and with it to the layers.
    pub fn flush(&self, store: &Store, id: ContainerId) -> Result<()> {
        let mut client = super::daemon::connect(store, id)?;
        match client.status() {
            // Only what is open for writing can be kept.
            Ok(status) if status.open_for_write == 0 => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(super::daemon::told(&error)),
        }
        // Begun for all files at once; the daemon then waits for one after the other.
        let at = |error: std::io::Error| Error::at("flush", &self.mountpoint, error);
        // Whatever may have taken the mount's place: only a directory is opened.
        let root = dir::open_root(&self.mountpoint).and_then(|root| dir::reopen_dir(root.as_fd()));
        let root = root.map_err(|error| at(error.errno().into()))?;
        rustix::fs::syncfs(root).map_err(|error| at(error.into()))?;
        client.flush().map_err(|error| super::daemon::told(&error))
    }
}

/// Whether a mount is that of a daemon of ours, whose file system is `device` where that is known.
pub(super) fn is_mount_of(mount: &mountinfo::Mount, device: Option<Device>) -> bool {
    mount.kind == b"fuse.cowlfs" && device.is_none_or(|device| device == mount.device)
}

/// Whether a container is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mounted {
    /// No.
    No,
    /// Yes, and its daemon lives.
    Alive(RunState),
    /// It was, and its daemon died.
    Dead(RunState),
}

fn state_file(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join(STATE)
}

/// The lock that a daemon holds for life.
pub fn daemon_lock(store: &Store, id: ContainerId, daemon: Uuid) -> PathBuf {
    store.run().dir(id).join(format!("{daemon}.lock"))
}

/// The lock that every `exec` shares while its command runs.
pub fn exec_lock(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join("exec.lock")
}

/// Determines whether the container is mounted. State of an earlier boot is removed, and that of the original
/// in a copy of a store: its mount is none of the copy's.
pub fn look(store: &Store, id: ContainerId) -> Result<Mounted> {
    let Some(state) = read(store, id)? else {
        return Ok(Mounted::No);
    };
    let path = daemon_lock(store, id, state.daemon);
    let is_of_copy = state
        .store
        .as_ref()
        .is_some_and(|of| of != store.run().key());
    let is_of_other_boot = state.boot != host::boot_id()?;
    // No lock outlives a boot. Some container managers give each container a boot id of its own, so that one
    // boot has several.
    if (is_of_copy || is_of_other_boot) && !Lock::is_held(&path)? {
        remove(store, id)?;
        return Ok(Mounted::No);
    }
    if daemon::lives(&path, &daemon::socket(store, id))? {
        return Ok(Mounted::Alive(state));
    }
    disk::remove_if_there(&path)?;
    Ok(Mounted::Dead(state))
}

/// Reads the state; what can't be read was left by a crash and says nothing.
pub fn read(store: &Store, id: ContainerId) -> Result<Option<RunState>> {
    let path = state_file(store, id);
    match disk::read_bytes(&path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(state) => Ok(Some(state)),
            Err(error) => {
                log::warn!("{}: {error}; removed", path.shown());
                disk::remove_if_there(&path)?;
                Ok(None)
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("read", &path, error)),
    }
}

/// Writes the state. It need not outlive a power cut, so nothing is synced.
pub fn write(store: &Store, id: ContainerId, state: &RunState) -> Result<()> {
    let path = state_file(store, id);
    let temporary = path.with_extension(format!("{}{}", std::process::id(), disk::TEMPORARY));
    let bytes = serde_json::to_vec(state).map_err(|e| Error::at("write", &path, e))?;
    let written =
        std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, &path));
    written.map_err(|error| {
        if let Err(left) = disk::remove_if_there(&temporary) {
            log::warn!("{left}");
        }
        Error::at("write", &path, error)
    })
}

/// Removes what killed commands left of states that they were writing. The caller has locked the container.
pub fn remove_unfinished(dir: &Path) -> Result<()> {
    for name in disk::names(dir)? {
        if name.starts_with("state.") && name.ends_with(disk::TEMPORARY) {
            disk::remove_if_there(&dir.join(name))?;
        }
    }
    Ok(())
}

/// Makes the directory for the run-time files of a container that the caller has locked.
pub fn ensure_run_dir(store: &Store, id: ContainerId) -> Result<PathBuf> {
    let dir = store.run().make(id)?;
    remove_unfinished(&dir)?;
    Ok(dir)
}

/// Forgets the state.
pub fn remove(store: &Store, id: ContainerId) -> Result<()> {
    disk::remove_if_there(&state_file(store, id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::session;

    fn state(mountpoint: PathBuf, boot: String) -> RunState {
        RunState {
            pid: 1,
            mountpoint,
            daemon: Uuid::new_v4(),
            boot,
            transient: false,
            nosuid: false,
            replacing: false,
            device: None,
            store: None,
        }
    }

    #[test]
    fn what_state_and_lock_mean() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        ensure_run_dir(&store, id).unwrap();
        assert_eq!(look(&store, id).unwrap(), Mounted::No);

        let odd = PathBuf::from(std::ffi::OsString::from_vec(b"/a\xff\nb".to_vec()));
        let now = state(odd, host::boot_id().unwrap());
        write(&store, id, &now).unwrap();
        assert_eq!(look(&store, id).unwrap(), Mounted::Dead(now.clone()));

        let mode = crate::store::lock::Mode::Exclusive;
        let lock = Lock::try_take(&daemon_lock(&store, id, now.daemon), mode, "serve").unwrap();
        assert_eq!(look(&store, id).unwrap(), Mounted::Alive(now.clone()));

        // Killed: the socket is closed, the lock is not yet let go of.
        drop(std::os::unix::net::UnixListener::bind(daemon::socket(&store, id)).unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(daemon::ENDING / 10);
                drop(lock);
            });
            assert_eq!(look(&store, id).unwrap(), Mounted::Dead(now));
        });

        write(&store, id, &state("/x".into(), "another boot".to_owned())).unwrap();
        assert_eq!(look(&store, id).unwrap(), Mounted::No);
        assert!(read(&store, id).unwrap().is_none());
    }

    #[test]
    fn a_daemon_that_holds_its_lock_lives_whatever_the_boot_id_says() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        ensure_run_dir(&store, id).unwrap();
        let now = state("/x".into(), "that of a container".to_owned());
        write(&store, id, &now).unwrap();
        let mode = crate::store::lock::Mode::Exclusive;
        let lock = Lock::try_take(&daemon_lock(&store, id, now.daemon), mode, "serve").unwrap();
        assert_eq!(look(&store, id).unwrap(), Mounted::Alive(now));
        drop(lock);
        assert_eq!(look(&store, id).unwrap(), Mounted::No);
    }

    #[test]
    fn the_state_of_another_store_is_none_of_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        ensure_run_dir(&store, id).unwrap();
        let of = |key: &str| RunState {
            store: Some(key.to_owned()),
            ..state("/x".into(), host::boot_id().unwrap())
        };
        let own = of(store.run().key());
        write(&store, id, &own).unwrap();
        assert_eq!(look(&store, id).unwrap(), Mounted::Dead(own));
        write(&store, id, &of("another")).unwrap();
        assert_eq!(look(&store, id).unwrap(), Mounted::No);
        assert!(read(&store, id).unwrap().is_none());
    }
}

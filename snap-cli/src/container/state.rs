//! The state of a running mount: `state.json` in its run directory ([`crate::store::run`]), and the lock that its
//! daemon holds during its lifetime.
//!
//! The daemon writes the state when the mount is ready, and the command or daemon that ends the mount regularly
//! removes it. So a state without a daemon means that the daemon died. Each daemon has its own lock, because an
//! unmounted daemon may still be dropping its caches while the next one already serves.
//!
//! A mount of kernel overlayfs has no daemon. The kernel itself reports whether it still exists
//! ([`crate::store::kernel`]).

use std::os::fd::AsFd as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use cowlfs::config::Passthrough;
use cowlfs::control::KernelMount;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::daemon;
use crate::error::{Error, Result};
use crate::host;
use crate::host::mountinfo;
use crate::host::users::{self, Device};
use crate::shell::quoted;
use crate::store::kernel::{self, Driver};
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, LayerId};
use crate::store::name::ContainerName;
use crate::store::run::STATE;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;
use cowl_layers::sys::dir;

/// A path in JSON: a string if it is valid UTF-8, otherwise an array of bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum JsonPath {
    Text(String),
    Bytes(Vec<u8>),
}

/// Serializes a path as a [`JsonPath`].
pub(super) fn to_json<S: serde::Serializer>(path: &Path, out: S) -> Result<S::Ok, S::Error> {
    match path.to_str() {
        Some(text) => JsonPath::Text(text.to_owned()),
        None => JsonPath::Bytes(path.as_os_str().as_bytes().to_vec()),
    }
    .serialize(out)
}

/// Deserializes a path from a [`JsonPath`].
pub(super) fn from_json<'de, D: serde::Deserializer<'de>>(input: D) -> Result<PathBuf, D::Error> {
    Ok(match JsonPath::deserialize(input)? {
        JsonPath::Text(text) => PathBuf::from(text),
        JsonPath::Bytes(bytes) => PathBuf::from(std::ffi::OsString::from_vec(bytes)),
    })
}

/// The lifetime of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Until it is unmounted.
    UntilUnmounted,
    /// Until the command that runs in it ends.
    OfCommand,
}

/// A mount of kernel overlayfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelState {
    /// The layer that it writes to.
    pub head: LayerId,
    /// The mount. Recorded once it is attached.
    pub mount: Option<KernelMount>,
}

/// The state that a daemon records, or the command that mounts with kernel overlayfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunState {
    /// The daemon's process id; 0 if there is no daemon.
    pub pid: u32,
    /// The mount point.
    #[serde(serialize_with = "to_json", deserialize_with = "from_json")]
    pub mountpoint: PathBuf,
    /// The id of the daemon, which is part of its lock's name.
    pub daemon: Uuid,
    /// The boot id when the daemon started.
    pub boot: String,
    /// Whether the mount ends with the command that runs in it.
    pub transient: bool,
    /// Whether set-user-ID programs and device nodes have no effect in the mount.
    #[serde(default)]
    pub nosuid: bool,
    /// Whether a command unmounts it only to mount it again: the state remains after the daemon has exited.
    pub replacing: bool,
    /// The mount's file system. Daemons of earlier versions did not record it.
    #[serde(default)]
    pub device: Option<Device>,
    /// Whether LXC has mounted it in the namespaces of its container, where no command can find or unmount it. It ends
    /// with these namespaces.
    #[serde(default)]
    pub in_lxc: bool,
    /// The store of the container, as [`RunDirs::key`](crate::store::run::RunDirs::key) names it. Daemons of earlier
    /// versions did not record it.
    #[serde(default)]
    pub store: Option<String>,
    /// The choice of the command that mounted it; `None`: that of the settings.
    #[serde(default)]
    pub passthrough: Option<Passthrough>,
    /// Set for a mount of kernel overlayfs.
    #[serde(default)]
    pub kernel: Option<KernelState>,
}

impl RunState {
    /// Returns whether the topmost mount at the mount point, in the caller's mount namespace, is this mount.
    pub fn is_here(&self) -> Result<bool> {
        let mounts = mountinfo::read()?;
        Ok(mountinfo::topmost(&mounts, &self.mountpoint)
            .is_some_and(|mount| is_mount_of(mount, self.driver(), self.device)))
    }

    /// Returns an error of the kind `Busy` if another file system is mounted over this mount, in the caller's mount
    /// namespace.
    pub fn refuse_covered(&self, name: &ContainerName) -> Result<()> {
        let mounts = mountinfo::read()?;
        let is_own = |mount: &mountinfo::Mount| is_mount_of(mount, self.driver(), self.device);
        let top = mountinfo::topmost(&mounts, &self.mountpoint);
        let mut below = mounts.iter().filter(|mount| mount.at == self.mountpoint);
        if top.is_some_and(is_own) || !below.any(is_own) {
            return Ok(());
        }
        Err(Error::busy(format!(
            "{name} is in use: another file system is mounted over {}",
            self.mountpoint.shown()
        ))
        .hint(format!(
            "unmount it first: umount {}",
            quoted(&self.mountpoint)
        )))
    }

    /// Returns the driver of the mount.
    pub fn driver(&self) -> Driver {
        match self.kernel {
            Some(_) => Driver::Kernel,
            None => Driver::Fuse,
        }
    }

    /// Returns the lifetime of the mount.
    pub fn lifetime(&self) -> Lifetime {
        match self.transient {
            true => Lifetime::OfCommand,
            false => Lifetime::UntilUnmounted,
        }
    }

    /// Returns the mount's file system. If the state does not contain it, the mount table is read.
    pub fn device(&self) -> Result<Option<Device>> {
        match self.device {
            Some(device) => Ok(Some(device)),
            None => users::device_at(&self.mountpoint),
        }
    }

    /// Writes dirty pages that the kernel caches for the mount back to the daemon, and so to the layers.
    ///
    /// Kernel overlayfs has no pages of its own.
    pub fn flush(&self, store: &Store, id: ContainerId) -> Result<()> {
        if self.driver() == Driver::Kernel {
            return Ok(());
        }
        let mut client = super::daemon::connect(store, id)?;
        match client.status() {
            // Only files that are open for writing have dirty pages.
            Ok(status) if status.open_for_write == 0 => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(super::daemon::to_error(&error)),
        }
        if !self.in_lxc {
            self.start_writeback()?;
        }
        client
            .flush()
            .map_err(|error| super::daemon::to_error(&error))
    }
}

impl RunState {
    /// Starts the writeback of all files at once; the daemon then waits for each file.
    fn start_writeback(&self) -> Result<()> {
        let at = |error: std::io::Error| Error::at("flush", &self.mountpoint, error);
        // Another object may have replaced the mount; only a directory is opened.
        let root = dir::open_root(&self.mountpoint).and_then(|root| dir::reopen_dir(root.as_fd()));
        let root = root.map_err(|error| at(error.errno().into()))?;
        rustix::fs::syncfs(root).map_err(|error| at(error.into()))
    }
}

/// Returns whether a mount belongs to a driver and, if `device` is known, has that device number.
pub(super) fn is_mount_of(
    mount: &mountinfo::Mount,
    driver: Driver,
    device: Option<Device>,
) -> bool {
    let kind: &[u8] = match driver {
        Driver::Fuse => b"fuse.cowlfs",
        Driver::Kernel => b"overlay",
    };
    mount.kind == kind && device.is_none_or(|device| device == mount.device)
}

/// The mount state of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mounted {
    /// The container is not mounted.
    No,
    /// The container is mounted, and its daemon is alive; or kernel overlayfs uses its head.
    Alive(RunState),
    /// The container was mounted, and its daemon died; or a command was killed before it mounted it again.
    Dead(RunState),
}

fn state_file(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join(STATE)
}

/// Returns the path of the lock that a daemon holds during its lifetime.
pub fn daemon_lock(store: &Store, id: ContainerId, daemon: Uuid) -> PathBuf {
    store.run().dir(id).join(format!("{daemon}.lock"))
}

/// Returns the path of the lock that every `exec` shares while its command runs.
pub fn exec_lock(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join("exec.lock")
}

/// Determines whether the container is mounted.
///
/// Removes the state of an earlier boot and, in a copy of a store, the state of the original: its mount does not belong
/// to the copy.
pub fn probe(store: &Store, id: ContainerId) -> Result<Mounted> {
    let Some(state) = read(store, id)? else {
        return Ok(Mounted::No);
    };
    let path = daemon_lock(store, id, state.daemon);
    let is_of_copy = state
        .store
        .as_ref()
        .is_some_and(|of| of != store.run().key());
    if let Some(kernel) = &state.kernel {
        return match is_of_copy {
            true => Ok(Mounted::No),
            false => probe_kernel(store, id, &state, kernel.head),
        };
    }
    let is_of_other_boot = state.boot != host::boot_id()?;
    // No lock outlives a boot. Some container managers give each container its own boot id, so that a different boot id
    // alone proves nothing.
    if (is_of_copy || is_of_other_boot) && !Lock::is_held(&path)? {
        refuse_network(store, id)?;
        remove(store, id)?;
        return Ok(Mounted::No);
    }
    if daemon::is_alive(&path, &daemon::socket(store, id))? {
        return Ok(Mounted::Alive(state));
    }
    // A daemon that ends normally removes the state before it releases the lock, which can have been in between.
    match read(store, id)? {
        None => return Ok(Mounted::No),
        Some(again) if again.daemon != state.daemon => return probe(store, id),
        Some(_) => {}
    }
    disk::remove_if_exists(&path)?;
    Ok(Mounted::Dead(state))
}

/// Fails if the file system of a state may be that of several machines: a lock of another machine may be invisible here.
fn refuse_network(store: &Store, id: ContainerId) -> Result<()> {
    let path = state_file(store, id);
    let found = rustix::fs::statfs(&path)
        .map_err(|error| Error::at("inspect", &path, std::io::Error::from(error)))?;
    let Some(kind) = u32::try_from(found.f_type).ok().and_then(network_name) else {
        return Ok(());
    };
    Err(Error::busy(format!(
        "the container was mounted on another machine or before this machine was started, and the store is on a network \
         file system ({kind}), which may not show the locks of other machines"
    ))
    .hint(format!(
        "unmount it on the other machine; if no machine has it mounted: rm {}",
        quoted(&path)
    )))
}

/// Returns the name of a file system with this type in statfs(2), if a lock on it proves nothing.
fn network_name(kind: u32) -> Option<&'static str> {
    Some(match kind {
        0x6969 => "nfs",
        0xff53_4d42 => "cifs",
        0xfe53_4d42 => "smb3",
        0x517b => "smb",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        0x00c3_6400 => "ceph",
        0x5346_414f => "afs",
        0x0bd0_0bd0 => "lustre",
        _ => return None,
    })
}

/// Determines whether a mount of kernel overlayfs exists.
///
/// Never removes the state: the next mount may have just written its own.
fn probe_kernel(
    store: &Store,
    id: ContainerId,
    state: &RunState,
    head: LayerId,
) -> Result<Mounted> {
    if kernel::is_in_use(store, head)? {
        return Ok(Mounted::Alive(state.clone()));
    }
    match read(store, id)? {
        Some(again) if again.daemon != state.daemon => probe(store, id),
        Some(again) if again.replacing => Ok(Mounted::Dead(again)),
        Some(_) | None => Ok(Mounted::No),
    }
}

/// Reads the state. A state that cannot be parsed was left by a crash: it is removed.
pub fn read(store: &Store, id: ContainerId) -> Result<Option<RunState>> {
    let path = state_file(store, id);
    match disk::read_bytes(&path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(state) => Ok(Some(state)),
            Err(error) => {
                log::warn!("removed {}: {error}", path.shown());
                disk::remove_if_exists(&path)?;
                Ok(None)
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("read", &path, error)),
    }
}

/// Writes the state, without a sync: it is meaningless after a power cut.
pub fn write(store: &Store, id: ContainerId, state: &RunState) -> Result<()> {
    let path = state_file(store, id);
    let temporary = path.with_extension(format!("{}{}", std::process::id(), disk::TEMPORARY));
    let bytes = serde_json::to_vec(state).map_err(|e| Error::at("write", &path, e))?;
    let written =
        std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, &path));
    written.map_err(|error| {
        if let Err(left) = disk::remove_if_exists(&temporary) {
            log::warn!("{left}");
        }
        Error::at("write", &path, error)
    })
}

/// Removes temporary files of states that killed commands were writing. The caller must hold the container's lock.
pub fn remove_unfinished(dir: &Path) -> Result<()> {
    for name in disk::names(dir)? {
        if name.starts_with("state.") && name.ends_with(disk::TEMPORARY) {
            disk::remove_if_exists(&dir.join(name))?;
        }
    }
    Ok(())
}

/// Creates the directory for the run-time files of a container. The caller must hold the container's lock.
pub fn ensure_run_dir(store: &Store, id: ContainerId) -> Result<PathBuf> {
    let dir = store.run().create(id)?;
    remove_unfinished(&dir)?;
    Ok(dir)
}

/// Removes the state.
pub fn remove(store: &Store, id: ContainerId) -> Result<()> {
    disk::remove_if_exists(&end_file(store, id))?;
    disk::remove_if_exists(&state_file(store, id))
}

/// The end of a mount whose daemon was killed and is not replaced.
#[derive(Debug, Serialize, Deserialize)]
struct RecordedEnd {
    daemon: Uuid,
    reason: String,
}

fn end_file(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join("ended.json")
}

/// Records why the mount of a daemon has ended.
pub fn record_end(store: &Store, id: ContainerId, daemon: Uuid, reason: String) -> Result<()> {
    let path = end_file(store, id);
    let bytes = serde_json::to_vec(&RecordedEnd { daemon, reason });
    let bytes = bytes.map_err(|error| Error::at("write", &path, error))?;
    std::fs::write(&path, bytes).map_err(|error| Error::at("write", &path, error))
}

/// Returns why the mount has ended, if its keeper gave it up. Otherwise its daemon was killed.
pub fn end_reason(store: &Store, id: ContainerId, state: &RunState) -> Result<Option<String>> {
    let path = end_file(store, id);
    let bytes = match disk::read_bytes(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::at("read", &path, error)),
    };
    // A partial write, left by a crash, contains nothing usable.
    let end: Option<RecordedEnd> = serde_json::from_slice(&bytes).ok();
    let end = end.filter(|end| end.daemon == state.daemon);
    Ok(end.map(|end| end.reason))
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
            in_lxc: false,
            store: None,
            passthrough: None,
            kernel: None,
        }
    }

    #[test]
    fn state_and_lock_determine_whether_a_container_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        ensure_run_dir(&store, id).unwrap();
        assert_eq!(probe(&store, id).unwrap(), Mounted::No);

        let odd = PathBuf::from(std::ffi::OsString::from_vec(b"/a\xff\nb".to_vec()));
        let now = state(odd, host::boot_id().unwrap());
        write(&store, id, &now).unwrap();
        assert_eq!(probe(&store, id).unwrap(), Mounted::Dead(now.clone()));

        let mode = crate::store::lock::Mode::Exclusive;
        let lock = Lock::try_take(&daemon_lock(&store, id, now.daemon), mode, "serve").unwrap();
        assert_eq!(probe(&store, id).unwrap(), Mounted::Alive(now.clone()));

        // The daemon was killed: its socket is closed, its lock is not released yet.
        drop(std::os::unix::net::UnixListener::bind(daemon::socket(&store, id)).unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(daemon::ENDING / 10);
                drop(lock);
            });
            assert_eq!(probe(&store, id).unwrap(), Mounted::Dead(now));
        });

        write(&store, id, &state("/x".into(), "another boot".to_owned())).unwrap();
        assert_eq!(probe(&store, id).unwrap(), Mounted::No);
        assert!(read(&store, id).unwrap().is_none());
    }

    #[test]
    fn a_daemon_that_holds_its_lock_is_alive_despite_another_boot_id() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        ensure_run_dir(&store, id).unwrap();
        let now = state("/x".into(), "that of a container".to_owned());
        write(&store, id, &now).unwrap();
        let mode = crate::store::lock::Mode::Exclusive;
        let lock = Lock::try_take(&daemon_lock(&store, id, now.daemon), mode, "serve").unwrap();
        assert_eq!(probe(&store, id).unwrap(), Mounted::Alive(now));
        drop(lock);
        assert_eq!(probe(&store, id).unwrap(), Mounted::No);
    }

    #[test]
    fn the_state_of_the_original_is_removed_in_a_copy_of_a_store() {
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
        assert_eq!(probe(&store, id).unwrap(), Mounted::Dead(own));
        write(&store, id, &of("another")).unwrap();
        assert_eq!(probe(&store, id).unwrap(), Mounted::No);
        assert!(read(&store, id).unwrap().is_none());
    }
}

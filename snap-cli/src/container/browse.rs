//! Read-only mounts of snapshots, any number at once.
//!
//! Each mount has its own daemon and its own directory `<uuid>.ro` in the container's run directory. The directory
//! contains `lock`, which the daemon holds during its lifetime, `state.json`, which it writes before it mounts, and
//! `log`. The daemon's locks on the layers protect them from garbage collection. The daemon writes to no layer, so one
//! that dies leaves only the directory and a dead mount, which the next command removes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_layers::error::Errno;
use cowlfs::config::{Config, MountPath};
use cowlfs::{Event, GiveUp, Takeover};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::detach::{Ending, Servers};
use super::served::{Owner, ServedMount};
use super::{Container, daemon, detach, launch, mount_point, state};
use crate::error::{Error, Result};
use crate::host;
use crate::host::files;
use crate::host::{mountinfo, rootless, users};
use crate::shell::quoted;
use crate::store::disk::remove_tree;
use crate::store::kernel::Driver;
use crate::store::lock::{Lock, Mode};
use crate::store::manifest::{ContainerId, SnapshotId};
use crate::store::name::SnapshotName;
use crate::store::{Store, disk};
use crate::wait::wait_until;
use cowl_layers::shown::Show as _;

/// The time that an unmount waits for the daemon to exit. A daemon that serves another mount namespace does not exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);
/// The interval between checks of whether a daemon has exited.
const PAUSE: Duration = Duration::from_millis(10);
/// The name of a daemon's socket.
const SOCKET: &str = "sock";
/// The name of the file with the reason why a mount was given up.
const END: &str = "ended";

/// A mount of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMount {
    /// The id of the mount, which names its directory.
    pub mount: Uuid,
    /// The daemon's process id.
    pub pid: u32,
    /// The boot id when it was mounted.
    boot: String,
    /// The mount point.
    #[serde(
        serialize_with = "state::to_json",
        deserialize_with = "state::from_json"
    )]
    pub mountpoint: PathBuf,
    /// The mounted snapshot.
    pub snapshot: SnapshotId,
    /// The mount's file system. Recorded once it is mounted.
    #[serde(default)]
    device: Option<users::Device>,
}

/// Returns the directory of a mount in a run directory.
fn dir_in(run: &Path, mount: Uuid) -> PathBuf {
    run.join(format!("{mount}.ro"))
}

/// Returns the directory of a mount: the existing one, else the one to create.
fn find_dir(store: &Store, id: ContainerId, mount: Uuid) -> PathBuf {
    let dirs = store.run().dirs(id).into_iter();
    let existing = dirs.map(|run| dir_in(&run, mount)).find(|it| it.is_dir());
    existing.unwrap_or_else(|| dir_in(&store.run().dir(id), mount))
}

/// Returns the socket of a mount's daemon.
pub(super) fn socket(store: &Store, id: ContainerId, mount: Uuid) -> PathBuf {
    find_dir(store, id, mount).join(SOCKET)
}

/// Returns all mounts of a container's snapshots that have a directory, dead ones included: the mount's id, its state
/// if it can be read, and whether its daemon is alive.
fn read_all(store: &Store, id: ContainerId) -> Result<Vec<(Uuid, Option<SnapshotMount>, bool)>> {
    let mut dirs = Vec::new();
    for run in store.run().dirs(id) {
        for name in disk::names(&run)? {
            let mount = name.strip_suffix(".ro");
            if let Some(mount) = mount.and_then(|id| Uuid::try_parse(id).ok()) {
                dirs.push((mount, dir_in(&run, mount)));
            }
        }
    }
    let mut found = Vec::new();
    for (mount, dir) in dirs {
        let state: Option<SnapshotMount> = match disk::read_bytes(&dir.join("state.json")) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                // A partial write, left by a crash.
                log::info!("{}: {error}", dir.shown());
                None
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::at("read", &dir, error)),
        };
        // The boot id in the state need not be checked: no lock outlives a boot.
        let alive = daemon::is_alive(&dir.join("lock"), &dir.join(SOCKET))?;
        found.push((mount, state, alive));
    }
    Ok(found)
}

/// Returns the live mounts of a container's snapshots, sorted by mount point.
pub fn mounts(store: &Store, id: ContainerId) -> Result<Vec<SnapshotMount>> {
    let mut alive: Vec<_> = read_all(store, id)?
        .into_iter()
        .filter_map(|(_, state, alive)| state.filter(|_| alive))
        .collect();
    alive.sort_unstable_by(|one, two| one.mountpoint.cmp(&two.mountpoint));
    Ok(alive)
}

/// Writes the state of a mount atomically, without a sync.
fn write(dir: &Path, browse: &SnapshotMount) -> Result<()> {
    let file = dir.join("state.json");
    let at = |error: std::io::Error| Error::at("write", &file, error);
    let bytes = serde_json::to_vec(browse).map_err(|e| at(e.into()))?;
    let temporary = file.with_extension("tmp");
    std::fs::write(&temporary, bytes).map_err(at)?;
    std::fs::rename(&temporary, &file).map_err(at)
}

/// Removes the mounts and directories that dead daemons, killed commands and earlier boots left.
///
/// The caller must hold the container's lock.
pub(crate) fn tidy(store: &Store, id: ContainerId) -> Result<()> {
    for (mount, state, alive) in read_all(store, id)? {
        if alive {
            continue;
        }
        if let Some(state) = &state {
            // Unmount only if the mount reports ENOTCONN: another file system may be mounted there by now.
            let dead = std::fs::symlink_metadata(&state.mountpoint)
                .is_err_and(|error| error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()));
            if dead {
                cowl_layers::sys::mount::unmount_lazily(&state.mountpoint)
                    .map_err(|e| Error::at("unmount the dead mount at", &state.mountpoint, e))?;
            }
            remove_mount_point(store, &state.mountpoint);
        }
        let dir = find_dir(store, id, mount);
        if let (Some(state), Some(reason)) = (&state, files::read_opt(&dir.join(END))?) {
            log::warn!(
                "the snapshot that was mounted at {} is not mounted any more: {}",
                state.mountpoint.shown(),
                reason.as_slice().shown()
            );
        }
        remove_tree(&dir)?;
    }
    Ok(())
}

/// Removes a mount point if it is in the store.
fn remove_mount_point(store: &Store, mount_point: &Path) {
    if mount_point.parent() != Some(&store.root().join("mnt")) {
        return;
    }
    match std::fs::remove_dir(mount_point) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            log::info!("cannot remove {}: {error}", mount_point.shown());
        }
        Ok(()) | Err(_) => {}
    }
}

/// Mounts a snapshot read-only at `at`, or at the snapshot's own mount point in the store. Returns the mount point.
///
/// A snapshot that is already mounted there stays mounted.
pub fn open(
    container: &Container<'_>,
    snapshot: &SnapshotName,
    at: Option<&Path>,
) -> Result<PathBuf> {
    let (store, id) = (container.store, container.id());
    let snapshot = super::find_snapshot_ref(container.manifest(), snapshot)?.id;
    let mount_point = match at {
        Some(at) => at.canonicalize().unwrap_or_else(|_| at.to_owned()),
        None => store.root().join("mnt").join(format!("{snapshot}.ro")),
    };
    let there = mounts(store, id)?;
    match there.iter().find(|browse| browse.mountpoint == mount_point) {
        Some(browse) if browse.snapshot == snapshot && is_mounted(browse)? => {
            return Ok(mount_point);
        }
        Some(browse) if is_mounted(browse)? => {
            return Err(Error::busy(format!(
                "another snapshot is mounted at {}",
                mount_point.shown()
            ))
            .hint(format!("unmount it: cowl umount {}", quoted(&mount_point))));
        }
        _ => {}
    }
    let mount_point = match at {
        Some(at) => mount_point::check_mount_point(at, store.root())?,
        None => {
            disk::ensure_dir(&mount_point)?;
            mount_point::check_empty(&mount_point)?;
            mount_point::canonical(&mount_point)?
        }
    };
    let own = Uuid::new_v4();
    let dir = dir_in(&state::ensure_run_dir(store, id)?, own);
    disk::ensure_dir(&dir)?;
    let started = launch::launch(store, &dir.join("log"), |command| {
        command.arg("--snapshot").arg(snapshot.to_string());
        command.arg("--mount").arg(own.to_string());
        command.arg(id.to_string()).arg(&mount_point);
    });
    if started.is_err() {
        tidy(store, id)?;
    }
    started?;
    rootless::hold_again().map(|()| mount_point)
}

/// Unmounts the snapshots that `selected` returns true for. Returns their number.
///
/// Fails if a process uses one of them. [`Ending::Forced`] kills a daemon that does not answer, and a keeper that is
/// stopped.
pub fn close(
    container: &Container<'_>,
    ending: Ending,
    selected: impl Fn(&SnapshotMount) -> bool,
) -> Result<usize> {
    let mut unmounted = 0;
    for browse in mounts(container.store, container.id())? {
        if selected(&browse) {
            match ending {
                Ending::Orderly => unmount_one(container, &browse, None)?,
                Ending::Forced => unmount_by_force(container, &browse)?,
            }
            unmounted += 1;
        }
    }
    Ok(unmounted)
}

fn unmount_by_force(container: &Container<'_>, browse: &SnapshotMount) -> Result<()> {
    let dir = find_dir(container.store, container.id(), browse.mount);
    let lock = dir.join("lock");
    if detach::kill_if_silent(container, &dir.join(SOCKET), &lock)? {
        return tidy(container.store, container.id());
    }
    unmount_one(container, browse, Some(Servers::find(&lock)?))
}

/// Unmounts a snapshot and waits for its daemon to exit. Kills those of `servers` that are stopped.
fn unmount_one(
    container: &Container<'_>,
    browse: &SnapshotMount,
    servers: Option<Servers>,
) -> Result<()> {
    let mount_point = &browse.mountpoint;
    let socket = find_dir(container.store, container.id(), browse.mount).join(SOCKET);
    if disk::exists(&socket)? {
        detach::unmount(
            container,
            &detach::UnmountTarget {
                server: detach::Server::Daemon(socket),
                pid: browse.pid,
                mountpoint: mount_point,
                device: browse.device,
            },
        )?;
    } else if is_mounted(browse)? {
        // A daemon of an earlier version has no socket.
        cowl_layers::sys::mount::unmount(mount_point).map_err(|error| match error.errno() {
            Errno::BUSY => Error::busy(format!("{} is in use", mount_point.shown())),
            _ => Error::at("unmount", mount_point, error),
        })?;
    }
    if let Some(servers) = servers {
        servers.kill_stopped()?;
    }
    let lock = find_dir(container.store(), container.id(), browse.mount).join("lock");
    let ended = || Ok::<_, Error>(!Lock::is_held(&lock)?);
    if !wait_until(Instant::now() + EXIT_TIMEOUT, PAUSE, ended)? {
        log::info!(
            "the daemon (pid {}) still serves the snapshot in another mount namespace",
            browse.pid
        );
        return Ok(());
    }
    tidy(container.store, container.id())
}

/// Returns whether the topmost mount at the mount point is this one.
fn is_mounted(browse: &SnapshotMount) -> Result<bool> {
    let mounts = mountinfo::read()?;
    Ok(mountinfo::topmost(&mounts, &browse.mountpoint)
        .is_some_and(|mount| state::is_mount_of(mount, Driver::Fuse, browse.device)))
}

/// Runs the daemon: mounts the snapshot at `mount_point` and serves it until it is unmounted.
pub fn serve(
    store: &Store,
    id: ContainerId,
    (snapshot, mount): (SnapshotId, Uuid),
    mount_point: &Path,
) -> Result<()> {
    let session = store.session();
    let dir = find_dir(store, id, mount);
    // The command that created the directory waits for this daemon and holds the container's lock meanwhile.
    let path = dir.join("lock");
    let alive = Lock::take(&path, Mode::Exclusive, &session.command, session.patience)?;
    let mut browse = SnapshotMount {
        mount,
        pid: std::process::id(),
        boot: host::boot_id()?,
        mountpoint: mount_point.to_owned(),
        snapshot,
        device: None,
    };
    write(&dir, &browse)?;
    let Some(record) = store.container(id)? else {
        return Err(Error::not_found(format!("there is no container {id}")));
    };
    let known = record.body.snapshots.iter().find(|s| s.id == snapshot);
    let name = known.map_or_else(|| snapshot.to_string(), |known| known.name.to_string());
    let stack = store.snapshot(id, snapshot)?.stack;
    let lowers = store.layer_trees(&stack)?;
    let mut config = Config::new(lowers, None, mount_point.to_owned());
    config.path = MountPath::Exact;
    store.session().mounts.apply(&mut config);
    config.space = Some(store.space());
    config.control = Some(dir.join(SOCKET));
    config.reach = vec![store.root().to_path_buf(), dir.clone()];
    config.mount.source = format!("{}@{name}", record.body.name);
    // The mount is only for reading files: set-user-ID programs and device nodes must not have an effect.
    config.mount.nosuid = true;
    config.mount.nodev = true;
    log::info!(
        "mounting {} at {}",
        config.mount.source,
        mount_point.shown()
    );
    let own = ServedMount::Snapshot {
        container: id,
        id: mount,
    };
    config.successor = Some(own.successor(store, vec![alive.share()?])?);
    let served = cowlfs::serve(config, |event| {
        let done = match event {
            Event::Mounted(device) => {
                browse.device = Some(device);
                write(&dir, &browse).and_then(|()| launch::report_ready())
            }
            Event::Kept => launch::release_output(),
            Event::GivenUp(reason) => record_end(&dir, reason),
            Event::TakenOver(_) | Event::Continued(_) => Ok(()),
        };
        if let Err(error) = done {
            log::error!("{error}");
        }
    });
    let cleaned = clean_up(store, mount_point, &dir, alive);
    served?;
    cleaned
}

/// Continues to serve a mounted snapshot in place of its daemon.
pub fn take_over(
    store: &Store,
    id: ContainerId,
    mount: Uuid,
    mut takeover: Takeover,
) -> Result<()> {
    let dir = find_dir(store, id, mount);
    let descriptor = takeover.take_descriptors().pop();
    let descriptor = descriptor.ok_or_else(|| Error::failed("a descriptor is missing"))?;
    let mut alive = Lock::of_predecessor(&dir.join("lock"), descriptor);
    let own = ServedMount::Snapshot {
        container: id,
        id: mount,
    };
    takeover.config_mut().successor = Some(own.successor(store, vec![alive.share()?])?);
    let bytes = disk::read_bytes(&dir.join("state.json"))
        .map_err(|error| Error::at("read the state in", &dir, error))?;
    let mut browse: SnapshotMount = serde_json::from_slice(&bytes)
        .map_err(|error| Error::at("read the state in", &dir, error))?;
    browse.pid = std::process::id();
    let command = store.session().command.clone();
    let mut owner = Owner::Predecessor;
    let served = takeover.serve(|event| {
        owner.note(&event);
        let done = match event {
            Event::TakenOver(_) | Event::Continued(_) => {
                alive.record_holder(browse.pid, &command);
                write(&dir, &browse)
            }
            Event::GivenUp(reason) => record_end(&dir, reason),
            Event::Mounted(_) | Event::Kept => Ok(()),
        };
        if let Err(error) = done {
            log::error!("{error}");
        }
    });
    if owner == Owner::Predecessor {
        return served.map_err(Error::from);
    }
    let cleaned = clean_up(store, &browse.mountpoint, &dir, alive);
    served?;
    cleaned
}

/// Records why a mount was given up. [`tidy`] reports it, when it removes the mount.
fn record_end(dir: &Path, reason: GiveUp) -> Result<()> {
    let file = dir.join(END);
    std::fs::write(&file, reason.to_string()).map_err(|error| Error::at("write", &file, error))
}

/// Removes what belongs to a mount that has ended.
fn clean_up(store: &Store, mount_point: &Path, dir: &Path, alive: Lock) -> Result<()> {
    remove_mount_point(store, mount_point);
    // This removes the lock file as well. No process waits for that lock.
    let removed = remove_tree(dir);
    drop(alive);
    removed
}

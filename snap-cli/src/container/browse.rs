//! Snapshots that are mounted to be read, any number of them at once.
//!
//! Each has a daemon and a folder `<uuid>.ro` of its own in the container's run directory: `lock`, which the daemon holds for
//! life, `state.json`, which it writes before the mount is there, and `log`. What the daemon reads is kept
//! from collection by the file system's own locks on the layers; nothing is written anywhere, so a daemon
//! that dies leaves nothing but the folder and a dead mount, which the next command takes away.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_layers::error::Errno;
use cowlfs::config::Config;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Container, daemon, detach, mount, state};
use crate::error::{Error, Result};
use crate::host;
use crate::host::{mountinfo, users};
use crate::shell::quoted;
use crate::store::disk::remove_tree;
use crate::store::lock::{Lock, Mode};
use crate::store::manifest::{ContainerId, SnapshotId};
use crate::store::name::SnapshotName;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// So long an unmount waits for its daemon to end; one that still serves another mount namespace does not.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);
/// The name of its socket.
const SOCKET: &str = "sock";

/// A mount of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Browse {
    /// Names its folder.
    pub mount: Uuid,
    /// The daemon's process id.
    pub pid: u32,
    /// The boot in which it was mounted.
    boot: String,
    /// Where.
    #[serde(
        serialize_with = "state::to_json",
        deserialize_with = "state::from_json"
    )]
    pub mountpoint: PathBuf,
    /// What.
    pub snapshot: SnapshotId,
    /// The mount's file system; written when it is mounted.
    #[serde(default)]
    device: Option<users::Device>,
}

fn folder_in(run: &Path, mount: Uuid) -> PathBuf {
    run.join(format!("{mount}.ro"))
}

/// The folder of a mount that there is.
fn folder(store: &Store, id: ContainerId, mount: Uuid) -> PathBuf {
    let folders = store.run().dirs(id).into_iter();
    let existing = folders
        .map(|run| folder_in(&run, mount))
        .find(|it| it.is_dir());
    existing.unwrap_or_else(|| folder_in(&store.run().dir(id), mount))
}

/// The mounts of a container's snapshots of which something is there: each with its folder's id, its state
/// if there is one, and whether its daemon lives.
fn look(store: &Store, id: ContainerId) -> Result<Vec<(Uuid, Option<Browse>, bool)>> {
    let mut folders = Vec::new();
    for run in store.run().dirs(id) {
        for name in disk::names(&run)? {
            let mount = name.strip_suffix(".ro");
            if let Some(mount) = mount.and_then(|id| Uuid::try_parse(id).ok()) {
                folders.push((mount, folder_in(&run, mount)));
            }
        }
    }
    let mut found = Vec::new();
    for (mount, folder) in folders {
        let state: Option<Browse> = match disk::read_bytes(&folder.join("state.json")) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                // Cut short by a crash, it says nothing.
                log::info!("{}: {error}", folder.shown());
                None
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::at("read", &folder, error)),
        };
        // Whatever boot the state names: no lock outlives one.
        let alive = daemon::lives(&folder.join("lock"), &folder.join(SOCKET))?;
        found.push((mount, state, alive));
    }
    Ok(found)
}

/// The mounts of a container's snapshots, by place.
pub fn mounts(store: &Store, id: ContainerId) -> Result<Vec<Browse>> {
    let mut alive: Vec<_> = look(store, id)?
        .into_iter()
        .filter_map(|(_, state, alive)| state.filter(|_| alive))
        .collect();
    alive.sort_unstable_by(|one, two| one.mountpoint.cmp(&two.mountpoint));
    Ok(alive)
}

fn write(folder: &Path, browse: &Browse) -> Result<()> {
    let file = folder.join("state.json");
    let at = |error: std::io::Error| Error::at("write", &file, error);
    let bytes = serde_json::to_vec(browse).map_err(|e| at(e.into()))?;
    let temporary = file.with_extension("tmp");
    std::fs::write(&temporary, bytes).map_err(at)?;
    std::fs::rename(&temporary, &file).map_err(at)
}

/// Takes away what dead daemons, killed commands and earlier boots left. The caller has locked the container.
pub(crate) fn tidy(store: &Store, id: ContainerId) -> Result<()> {
    for (mount, state, alive) in look(store, id)? {
        if alive {
            continue;
        }
        if let Some(state) = &state {
            // Only what answers that its daemon is gone: there may be another mount by now.
            let dead = std::fs::symlink_metadata(&state.mountpoint)
                .is_err_and(|error| error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()));
            if dead {
                cowl_layers::sys::mount::unmount_lazily(&state.mountpoint)
                    .map_err(|e| Error::at("unmount the dead mount at", &state.mountpoint, e))?;
            }
            remove_place(store, &state.mountpoint);
        }
        remove_tree(&folder(store, id, mount))?;
    }
    Ok(())
}

/// Removes a mount point of the store's own.
fn remove_place(store: &Store, place: &Path) {
    if place.parent() != Some(&store.root().join("mnt")) {
        return;
    }
    match std::fs::remove_dir(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            log::info!("cannot remove {}: {error}", place.shown());
        }
        Ok(()) | Err(_) => {}
    }
}

/// Mounts a snapshot to be read: at `at`, else at a place in the store that is the snapshot's own. Already
/// mounted there, it stays as it is.
pub fn open(
    container: &Container<'_>,
    snapshot: &SnapshotName,
    at: Option<&Path>,
) -> Result<PathBuf> {
    let (store, id) = (container.store, container.id());
    let snapshot = super::find_snapshot_ref(container.manifest(), snapshot)?.id;
    let place = match at {
        Some(at) => at.canonicalize().unwrap_or_else(|_| at.to_owned()),
        None => store.root().join("mnt").join(format!("{snapshot}.ro")),
    };
    let there = mounts(store, id)?;
    match there.iter().find(|browse| browse.mountpoint == place) {
        Some(browse) if browse.snapshot == snapshot && is_mounted(browse)? => return Ok(place),
        Some(browse) if is_mounted(browse)? => {
            return Err(
                Error::busy(format!("another snapshot is mounted at {}", place.shown()))
                    .hint(format!("unmount it: cowl umount {}", quoted(&place))),
            );
        }
        _ => {}
    }
    let place = match at {
        Some(at) => mount::own_place(at, store.root())?,
        None => {
            disk::ensure_dir(&place)?;
            mount::check_empty(&place)?;
            place
        }
    };
    let own = Uuid::new_v4();
    let folder = folder_in(&state::ensure_run_dir(store, id)?, own);
    disk::ensure_dir(&folder)?;
    let started = mount::launch(store, &folder.join("log"), |command| {
        command.arg("--snapshot").arg(snapshot.to_string());
        command.arg("--mount").arg(own.to_string());
        command.arg(id.to_string()).arg(&place);
    });
    if started.is_err() {
        tidy(store, id)?;
    }
    started.map(|()| place)
}

/// Unmounts those mounts of snapshots that are meant. Refused while somebody uses one. Says how many.
pub fn close(container: &Container<'_>, meant: impl Fn(&Browse) -> bool) -> Result<usize> {
    let mut ended = 0;
    for browse in mounts(container.store, container.id())? {
        if meant(&browse) {
            end(container, &browse)?;
            ended += 1;
        }
    }
    Ok(ended)
}

/// Kills those daemons of mounted snapshots that are meant and do not answer, and takes their mounts away;
/// says how many.
pub fn kill_silent(container: &Container<'_>, meant: impl Fn(&Browse) -> bool) -> Result<usize> {
    let mut killed = 0;
    for browse in mounts(container.store, container.id())?
        .iter()
        .filter(|one| meant(one))
    {
        let folder = folder(container.store, container.id(), browse.mount);
        let done = detach::kill_if_silent(container, &folder.join(SOCKET), &folder.join("lock"))?;
        killed += usize::from(done);
    }
    if killed > 0 {
        tidy(container.store, container.id())?;
    }
    Ok(killed)
}

fn end(container: &Container<'_>, browse: &Browse) -> Result<()> {
    let place = &browse.mountpoint;
    let socket = folder(container.store, container.id(), browse.mount).join(SOCKET);
    if disk::is_there(&socket)? {
        detach::unmount(
            container,
            &detach::Target {
                socket,
                pid: browse.pid,
                mountpoint: place,
                device: browse.device,
            },
        )?;
    } else if is_mounted(browse)? {
        // A daemon of an earlier version listens nowhere.
        cowl_layers::sys::mount::unmount(place).map_err(|error| match error.errno() {
            Errno::BUSY => Error::busy(format!("{} is in use", place.shown())),
            _ => Error::at("unmount", place, error),
        })?;
    }
    let until = Instant::now() + PATIENCE;
    let lock = folder(container.store, container.id(), browse.mount).join("lock");
    while Lock::is_held(&lock)? {
        if Instant::now() >= until {
            log::info!("pid {} serves it in another mount namespace", browse.pid);
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    tidy(container.store, container.id())
}

fn is_mounted(browse: &Browse) -> Result<bool> {
    let mounts = mountinfo::read()?;
    Ok(mountinfo::topmost(&mounts, &browse.mountpoint)
        .is_some_and(|mount| state::is_mount_of(mount, browse.device)))
}

/// The daemon's side: mounts the snapshot at `place` and serves it until it is unmounted.
pub fn serve(
    store: &Store,
    id: ContainerId,
    (snapshot, mount): (SnapshotId, Uuid),
    place: &Path,
) -> Result<()> {
    let session = store.session();
    let folder = folder(store, id, mount);
    // The command that made the folder waits, and keeps others from the container meanwhile.
    let path = folder.join("lock");
    let alive = Lock::take(&path, Mode::Exclusive, &session.who, session.patience)?;
    let mut browse = Browse {
        mount,
        pid: std::process::id(),
        boot: host::boot_id()?,
        mountpoint: place.to_owned(),
        snapshot,
        device: None,
    };
    write(&folder, &browse)?;
    let Some(record) = store.container(id)? else {
        return Err(Error::not_found(format!("there is no container {id}")));
    };
    let known = record.body.snapshots.iter().find(|s| s.id == snapshot);
    let name = known.map_or_else(|| snapshot.to_string(), |known| known.name.to_string());
    let stack = store.snapshot(id, snapshot)?.stack;
    let lowers = store.layer_trees(&stack)?;
    let mut config = Config::new(lowers, None, place.to_owned());
    store.session().mounts.apply(&mut config);
    config.space = Some(store.space());
    config.control = Some(folder.join(SOCKET));
    config.reach = vec![store.root().to_path_buf(), folder.clone()];
    config.mount.source = format!("{}@{name}", record.body.name);
    // It is for reading: nobody needs the rights that a container's root gave to programs in it.
    config.mount.nosuid = true;
    config.mount.nodev = true;
    log::info!("mounting {} at {}", config.mount.source, place.shown());
    let served = cowlfs::serve(config, |device| {
        browse.device = Some(device);
        if let Err(error) = write(&folder, &browse).and_then(|()| mount::say_ready()) {
            log::error!("{error}");
        }
    });
    remove_place(store, place);
    // Its folder goes with the lock in it, which nobody waits for.
    let gone = remove_tree(&folder);
    drop(alive);
    served?;
    gone
}

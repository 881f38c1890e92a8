//! Durability of acknowledged states.
//!
//! A snapshot is acknowledged once the manifest that names it is durable; the data of its layers may then still be in
//! memory. Its entry carries a [`Settling`] mark until a syncfs(2) that started after the freeze has succeeded. Order:
//! the freeze takes effect, the file system is synced, the mark is removed. So a snapshot without the mark never loses
//! data, and a snapshot with the mark of an earlier epoch may have lost some.
//!
//! The daemon syncs for a mounted container, a detached `cowl settle` for an unmounted one, and the command itself if
//! it acknowledges only durable states. No lock is held during a sync. Each sync covers all pending states, so that no
//! state becomes durable before the states below it.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use cowlfs::control::ControlError;

use super::launch::open_log;
use super::state::{self, Mounted};
use super::{Container, Swap, daemon};
use crate::error::{Error, Kind, Result};
use crate::host;
use crate::store::disk::Filesystem;
use crate::store::kernel::Driver;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, Settling, SnapshotId};
use crate::store::measure;
use crate::store::name::ContainerName;
use crate::store::outside::Moving;
use crate::store::packed;
use crate::store::synced;
use crate::store::{Store, disk};

/// The time that a command waits for the sync that it started.
///
/// A quick sync thus ends before the command, and the disk can be unmounted right after.
const FOREGROUND_WAIT: Duration = Duration::from_millis(50);
/// The interval at which a background process retries to lock a container that a command holds.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// The number of attempts to lock a container.
const LOCK_ATTEMPTS: u32 = 600;

/// The parts of a container that one sync makes durable.
#[derive(Debug, Default)]
struct Pending {
    epoch: String,
    snapshots: BTreeSet<SnapshotId>,
    /// The mark of the state below the container's head.
    basis: Option<Settling>,
    layers: Vec<LayerId>,
    /// Snapshots on layers that lost data in an earlier sync, with the sync's error.
    incomplete: Vec<(SnapshotId, String)>,
}

impl Pending {
    /// Reads the pending parts of a container.
    ///
    /// Needs no lock: all layers that a committed manifest names below its head are frozen.
    fn read(store: &Store, id: ContainerId) -> Result<Option<Self>> {
        let Some(record) = store.container(id)? else {
            return Ok(None);
        };
        let manifest = record.body;
        if matches!(manifest.moving, Some(Moving::Adopting | Moving::Releasing)) {
            return Ok(None);
        }
        let mut found = Self {
            epoch: epoch(store)?,
            ..Self::default()
        };
        let basis = manifest.settling.clone();
        found.basis = basis.filter(|mark| mark.is_pending(&found.epoch));
        let mut layers: BTreeSet<_> = manifest.below_head().iter().copied().collect();
        let mut stacks = Vec::new();
        for snapshot in manifest.snapshots.iter().filter(|s| s.settling.is_some()) {
            let stack = store.snapshot(id, snapshot.id)?.stack;
            layers.extend(&stack);
            if is_pending(snapshot.settling.as_ref(), &found.epoch) {
                found.snapshots.insert(snapshot.id);
            }
            stacks.push((snapshot, stack));
        }
        let layers: Vec<_> = layers.into_iter().collect();
        let mut unsynced = synced::unsynced(store, &layers)?;
        let own = stacks.iter().map(|(s, stack)| (s.settling.as_ref(), stack));
        let basis = (manifest.settling.as_ref(), &manifest.origin);
        for (mark, stack) in own.chain([basis]) {
            let mark = mark.filter(|mark| mark.is_in_epoch(&found.epoch));
            let Some(why) = mark.and_then(|mark| mark.failed.as_ref()) else {
                continue;
            };
            let lost = |id: &LayerId| stack.contains(id);
            let spoils =
                |stack: &[LayerId]| stack.iter().any(|id| lost(id) && unsynced.contains(id));
            for (snapshot, stack) in &stacks {
                if found.snapshots.contains(&snapshot.id) && spoils(stack) {
                    found.snapshots.remove(&snapshot.id);
                    found.incomplete.push((snapshot.id, why.clone()));
                }
            }
            unsynced.retain(|id| !lost(id));
        }
        found.layers = unsynced;
        Ok((!found.is_empty()).then_some(found))
    }

    fn is_empty(&self) -> bool {
        self.basis.is_none()
            && self.snapshots.is_empty()
            && self.layers.is_empty()
            && self.incomplete.is_empty()
    }
}

fn is_pending(settling: Option<&Settling>, epoch: &str) -> bool {
    settling.is_some_and(|settling| settling.is_pending(epoch))
}

/// Returns the current epoch of a store: the period in which unsynced data in memory survives.
///
/// Such data is lost at a reboot, when the disk is detached, and when the file system is unmounted (after it was shut
/// down by an error). The epoch consists of the boot id and, separated by slashes, the sequence numbers of the disk and
/// of the mounted file system if the kernel reports them.
pub fn epoch(store: &Store) -> Result<String> {
    let (boot, layers) = (host::boot_id()?, store.root().join("layers"));
    let text = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    let disk = text(host::disk_sequence(&layers));
    let mounted = text(host::filesystem_sequence(&layers));
    Ok(format!("{boot}/{disk}/{mounted}"))
}

/// Opens the file system that holds the layers of a store.
///
/// Its sync reports all writeback errors that occur after this call.
pub fn open_filesystem(store: &Store) -> Result<Filesystem> {
    Filesystem::open(&store.root().join("layers"))
}

/// Syncs the pending states of a container and records the result.
///
/// A failure is recorded as well: the kernel does not write a page again after a writeback error.
pub fn make_durable(store: &Store, id: ContainerId, filesystem: &Filesystem) -> Result<()> {
    let Some((pending, synced)) = sync(store, id, filesystem)? else {
        return Ok(());
    };
    record_result(store, id, &pending, synced.as_ref().err())?;
    synced
}

/// Reads the pending states of a container and syncs the file system; `None` if there are none.
fn sync(
    store: &Store,
    id: ContainerId,
    filesystem: &Filesystem,
) -> Result<Option<(Pending, Result<()>)>> {
    let Some(pending) = Pending::read(store, id)? else {
        return Ok(None);
    };
    let synced = filesystem.sync();
    Ok(Some((pending, synced)))
}

/// Records the result of a sync of `pending`.
fn record_result(
    store: &Store,
    id: ContainerId,
    pending: &Pending,
    failed: Option<&Error>,
) -> Result<()> {
    let lock = store.lock_container(id)?;
    let Some(record) = store.container(id)? else {
        return lock.remove();
    };
    let mut container = Container::from_locked(store, id, record, lock);
    // Resolve an interrupted change first: the commit below would overwrite it.
    container.resolve_pending()?;
    if failed.is_none() {
        // Excludes garbage collection.
        let _reading = store.lock_shared()?;
        for layer in &pending.layers {
            synced::record_synced(store, *layer)?;
        }
    }
    let next = with_result(container.manifest(), pending, failed);
    if next == *container.manifest() {
        return Ok(());
    }
    container.commit(next, None, |_| Ok(Swap::Done))
}

/// Returns the manifest after a sync of `pending` that succeeded, or `failed`.
fn with_result(
    manifest: &ContainerManifest,
    pending: &Pending,
    failed: Option<&Error>,
) -> ContainerManifest {
    let mut next = manifest.clone();
    let settle = |settling: &mut Option<Settling>| {
        if !is_pending(settling.as_ref(), &pending.epoch) {
            return;
        }
        match (failed, settling.as_mut()) {
            (Some(error), Some(settling)) => settling.failed = Some(error.to_string()),
            _ => *settling = None,
        }
    };
    for snapshot in &mut next.snapshots {
        if pending.snapshots.contains(&snapshot.id) {
            settle(&mut snapshot.settling);
        }
        let incomplete = pending.incomplete.iter().find(|(id, _)| *id == snapshot.id);
        if let (Some((_, why)), Some(settling)) = (incomplete, snapshot.settling.as_mut()) {
            settling.failed = Some(why.clone());
        }
    }
    // A race with a restore: the head may be over another state by now, which the sync may not have covered.
    if pending.basis.is_some() && pending.basis == next.settling {
        settle(&mut next.settling);
    }
    next
}

/// Makes the pending states of all containers of a store, or of one container, durable.
///
/// Failures are logged; the states concerned are still listed as settling.
pub fn make_all_durable(store: &Store, only: Option<&ContainerName>) -> Result<()> {
    let filesystem = open_filesystem(store)?;
    for (id, found) in store.containers()? {
        // The caller reports manifests that cannot be read.
        let Ok(found) = found else { continue };
        let name = &found.body.name;
        if only.is_some_and(|only| only != name) {
            continue;
        }
        if let Err(error) = make_durable(store, id, &filesystem) {
            log::warn!("cannot make snapshots of {name} durable: {error}");
        }
    }
    Ok(())
}

/// Starts to make a container's states durable in the background.
///
/// The daemon does so if the container is mounted, otherwise a detached process.
pub fn start(store: &Store, id: ContainerId) -> Result<()> {
    if let Mounted::Alive(state) = state::probe(store, id)?
        && state.driver() == Driver::Fuse
    {
        match daemon::connect(store, id)?.settle() {
            Ok(()) => return Ok(()),
            // The daemon is of an older version.
            Err(ControlError::NotUnderstood(why)) => log::debug!("{why}"),
            Err(error) => log::info!("{}", daemon::to_error(&error)),
        }
    }
    match Pending::read(store, id)? {
        Some(_) => start_process(store, id),
        None => Ok(()),
    }
}

/// Starts a detached `cowl settle` and waits briefly for it.
fn start_process(store: &Store, id: ContainerId) -> Result<()> {
    // `ensure_run_dir` would remove temporary files, but the caller holds no lock, and a daemon may be writing its
    // state.
    store.run().create(id)?;
    let program = store.session().program()?;
    let mut child = Command::new(&program)
        .arg("--store")
        .arg(store.root())
        .args(["settle", &id.to_string()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(open_log(&store.run().dir(id).join("log"))?)
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let Some(mut out) = child.stdout.take() else {
        return Ok(());
    };
    let (ended, wait) = channel();
    std::thread::spawn(move || {
        // The process writes nothing, so the end of the pipe is its end.
        let read = std::io::copy(&mut out, &mut std::io::sink());
        if let (Err(error), _) | (_, Err(error)) = (read, child.wait().map(|_| 0)) {
            log::debug!("cannot wait for the sync of a snapshot: {error}");
        }
        if ended.send(()).is_err() {
            log::debug!("a snapshot was synced after the command stopped waiting");
        }
    });
    if wait.recv_timeout(FOREGROUND_WAIT).is_err() {
        log::debug!("a snapshot is synced in the background");
    }
    Ok(())
}

/// Returns the file system that holds the layers of a store, which another process has opened.
pub fn inherited_filesystem(store: &Store, descriptor: OwnedFd) -> Filesystem {
    Filesystem::from_descriptor(descriptor, &store.root().join("layers"))
}

/// Makes a container's states durable, and retries while other commands hold its lock.
///
/// Background processes call this; errors go to their log.
pub fn make_durable_patiently(store: &Store, id: ContainerId, filesystem: &Filesystem) {
    let done = sync(store, id, filesystem).and_then(|found| {
        let Some((pending, synced)) = found else {
            return Ok(());
        };
        let mut tried = 0;
        loop {
            match record_result(store, id, &pending, synced.as_ref().err()) {
                Err(error) if error.kind == Kind::Busy && tried < LOCK_ATTEMPTS => tried += 1,
                Err(error) => return Err(error),
                Ok(()) => return synced,
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
    });
    if let Err(error) = done {
        log::error!("cannot make snapshots durable: {error}");
    }
}

/// Runs the thread of a daemon that makes its container's states durable.
///
/// It handles the states that are pending at its start and then one round for each request. It returns when the
/// daemon drops the sender.
pub(crate) fn serve(
    store: &Store,
    id: ContainerId,
    filesystem: &Filesystem,
    requests: &Receiver<()>,
) {
    loop {
        make_durable_patiently(store, id, filesystem);
        if requests.recv().is_err() {
            return;
        }
        // One sync covers all requests that arrived before it.
        while requests.try_recv().is_ok() {}
    }
}

/// Returns the mark for a manifest that is about to name the state with the layers `stack`; `None` if the state is
/// durable.
///
/// The container's head counts as unsynced.
pub(crate) fn settling_for(
    container: &Container<'_>,
    stack: &[LayerId],
) -> Result<Option<Settling>> {
    let manifest = container.manifest();
    if stack.first() != Some(&manifest.head)
        && synced::unsynced(container.store(), stack)?.is_empty()
    {
        return Ok(None);
    }
    epoch(container.store).map(Settling::since).map(Some)
}

/// Returns the mark of the state below the container's head, if that state has lost data.
pub(crate) fn find_loss<'c>(container: &'c Container<'_>) -> Result<Option<&'c Settling>> {
    let epoch = epoch(container.store)?;
    let mark = container.manifest().settling.as_ref();
    Ok(mark.filter(|mark| !mark.is_pending(&epoch)))
}

/// Accepts a state with its lost data: that of a snapshot, or the state below the container's head.
pub fn accept(container: &mut Container<'_>, snapshot: Option<SnapshotId>) -> Result<()> {
    let store = container.store();
    let mut next = container.manifest().clone();
    let stack = match snapshot {
        Some(id) => {
            for known in &mut next.snapshots {
                if known.id == id {
                    known.settling = None;
                }
            }
            store.snapshot(container.id, id)?.stack
        }
        None => {
            next.settling = None;
            let mut layers = container.manifest().below_head().to_vec();
            let origin = container.manifest().origin.first();
            layers.extend(origin.filter(|id| !layers.contains(id)));
            layers
        }
    };
    open_filesystem(store)?.sync()?;
    {
        let _reading = store.lock_shared()?;
        let unsynced = synced::unsynced(store, &stack)?;
        let origin = next.origin.first();
        for layer in &stack {
            let topmost = stack.first() == Some(layer) || origin == Some(layer);
            if topmost || unsynced.contains(layer) {
                measure::remeasure(store, *layer)?;
            }
        }
        packed::forget_all(store)?;
    }
    disk::remove_if_exists(&store.paths().cache_file(container.id))?;
    container.commit(next, None, |_| Ok(Swap::Done))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::manifest::LayerId;

    fn mark(source: &str) -> Settling {
        Settling {
            source: Some(source.to_owned()),
            ..Settling::since("boot/1".to_owned())
        }
    }

    #[test]
    fn a_container_that_was_restored_during_a_sync_is_not_marked_durable_by_it() {
        let (head, base) = (LayerId::fresh(), LayerId::fresh());
        let mut manifest =
            ContainerManifest::new(ContainerName::parse("web").unwrap(), head, &[base]);
        let pending = Pending {
            epoch: "boot/1".to_owned(),
            basis: Some(mark("web@a")),
            ..Pending::default()
        };
        manifest.settling = Some(mark("web@a"));
        assert_eq!(with_result(&manifest, &pending, None).settling, None);
        manifest.settling = Some(mark("web@b"));
        let next = with_result(&manifest, &pending, None);
        assert_eq!(next.settling, Some(mark("web@b")));
    }
}

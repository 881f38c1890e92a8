//! Making acknowledged states durable.
//!
//! A snapshot is acknowledged once the manifest that names it is durable; the data of its layers may then
//! still be in memory. Its entry says so ([`Settling`]) until one syncfs(2) that began after the freeze has
//! ended without an error. Order: the freeze is in force, the file system is synced, the entry is removed.
//! So an entry without it never loses a byte, and one with it, found in another epoch, may have.
//!
//! Who syncs: the daemon of a mounted container, a detached `cowl settle` for one that is not mounted, the
//! command itself where it acknowledges durable states. No lock is held while the disk works. Each round
//! covers all that is pending, so that no state becomes durable before those below it.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use cowlfs::control::ControlError;

use super::mount::open_log;
use super::state::{self, Mounted};
use super::{Container, Swap, daemon};
use crate::error::{Error, Kind, Result};
use crate::host;
use crate::store::disk::Filesystem;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, Settling, SnapshotId};
use crate::store::measure;
use crate::store::name::ContainerName;
use crate::store::outside::Moving;
use crate::store::synced;
use crate::store::{Store, disk};

/// How long a command stays for the sync that it started: what is quick has ended with it, so that the disk
/// can be unmounted.
const STAY: Duration = Duration::from_millis(50);
/// How often the background asks for a container's lock while a command holds it.
const AGAIN: Duration = Duration::from_secs(1);
const TRIES: u32 = 600;

/// The parts of a container that one sync makes durable.
#[derive(Debug, Default)]
struct Pending {
    epoch: String,
    snapshots: BTreeSet<SnapshotId>,
    /// The mark of what the container stands on.
    basis: Option<Settling>,
    layers: Vec<LayerId>,
    /// Snapshots on layers of which an earlier sync has lost a part, with its error.
    spoilt: Vec<(SnapshotId, String)>,
}

impl Pending {
    /// Reads what is pending, without a lock: all that a manifest in force names below its head is frozen.
    fn of(store: &Store, id: ContainerId) -> Result<Option<Self>> {
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
            let mark = mark.filter(|mark| mark.is_of(&found.epoch));
            let Some(why) = mark.and_then(|mark| mark.failed.as_ref()) else {
                continue;
            };
            let lost = |id: &LayerId| stack.contains(id);
            let spoils =
                |stack: &[LayerId]| stack.iter().any(|id| lost(id) && unsynced.contains(id));
            for (snapshot, stack) in &stacks {
                if found.snapshots.contains(&snapshot.id) && spoils(stack) {
                    found.snapshots.remove(&snapshot.id);
                    found.spoilt.push((snapshot.id, why.clone()));
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
            && self.spoilt.is_empty()
    }
}

fn is_pending(settling: Option<&Settling>, epoch: &str) -> bool {
    settling.is_some_and(|settling| settling.is_pending(epoch))
}

/// Returns the epoch of a store: what is in memory only lasts as long as the boot, as long as the disk is attached,
/// and as long as the file system stays mounted (one that was shut down by an error loses it when it is mounted
/// again). So it is the id of the boot and, after slashes, the sequence numbers of the disk and of the mounted file
/// system, where the kernel shows them.
pub fn epoch(store: &Store) -> Result<String> {
    let (boot, layers) = (host::boot_id()?, store.root().join("layers"));
    let text = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    let disk = text(host::disk_sequence(&layers));
    let mounted = text(host::filesystem_sequence(&layers));
    Ok(format!("{boot}/{disk}/{mounted}"))
}

/// Opens the file system that holds the layers of a store. Errors of writing that happens from here on are
/// reported by its sync.
pub fn filesystem(store: &Store) -> Result<Filesystem> {
    Filesystem::open(&store.root().join("layers"))
}

/// Syncs what is pending of a container and records that it is durable. A failed sync is recorded as well:
/// what the kernel could not write once it does not write again.
pub fn make_durable(store: &Store, id: ContainerId, filesystem: &Filesystem) -> Result<()> {
    let Some((pending, synced)) = sync(store, id, filesystem)? else {
        return Ok(());
    };
    record(store, id, &pending, synced.as_ref().err())?;
    synced
}

fn sync(
    store: &Store,
    id: ContainerId,
    filesystem: &Filesystem,
) -> Result<Option<(Pending, Result<()>)>> {
    let Some(pending) = Pending::of(store, id)? else {
        return Ok(None);
    };
    let synced = filesystem.sync();
    Ok(Some((pending, synced)))
}

/// Records how a sync of `pending` ended.
fn record(store: &Store, id: ContainerId, pending: &Pending, failed: Option<&Error>) -> Result<()> {
    let lock = store.lock_container(id)?;
    let Some(record) = store.container(id)? else {
        return lock.remove();
    };
    let mut container = Container::from_locked(store, id, record, lock);
    // An interrupted change comes first: the commit below would drop it.
    container.resolve_pending()?;
    if failed.is_none() {
        // Nothing is collected meanwhile.
        let _reading = store.share()?;
        for layer in &pending.layers {
            synced::note_synced(store, *layer)?;
        }
    }
    let next = recorded(container.manifest(), pending, failed);
    if next == *container.manifest() {
        return Ok(());
    }
    container.commit(next, None, |_| Ok(Swap::Done))
}

fn recorded(
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
        let spoilt = pending.spoilt.iter().find(|(id, _)| *id == snapshot.id);
        if let (Some((_, why)), Some(settling)) = (spoilt, snapshot.settling.as_mut()) {
            settling.failed = Some(why.clone());
        }
    }
    // Restored during the sync, it stands on another state by now, which the sync may not have reached.
    if pending.basis.is_some() && pending.basis == next.settling {
        settle(&mut next.settling);
    }
    next
}

/// Makes durable what is pending of the containers of a store, or of one of them. What fails is logged:
/// it stays as it is, and is listed so.
pub fn make_all_durable(store: &Store, only: Option<&ContainerName>) -> Result<()> {
    let filesystem = filesystem(store)?;
    for (id, found) in store.containers()? {
        // One that cannot be read is reported by the caller.
        let Ok(found) = found else { continue };
        let name = &found.body.name;
        if only.is_some_and(|only| only != name) {
            continue;
        }
        if let Err(error) = make_durable(store, id, &filesystem) {
            log::warn!("snapshots of {name} stay settling: {error}");
        }
    }
    Ok(())
}

/// Starts making a container's states durable in the background: by its daemon, or by a process of its own
/// where it is not mounted.
pub fn begin(store: &Store, id: ContainerId) -> Result<()> {
    if let Mounted::Alive(_) = state::look(store, id)? {
        match daemon::connect(store, id)?.settle() {
            Ok(()) => return Ok(()),
            // Of an older version.
            Err(ControlError::NotUnderstood(why)) => log::debug!("{why}"),
            Err(error) => log::info!("{}", daemon::told(&error)),
        }
    }
    match Pending::of(store, id)? {
        Some(_) => start_process(store, id),
        None => Ok(()),
    }
}

fn start_process(store: &Store, id: ContainerId) -> Result<()> {
    // Not the one that removes unfinished files: no lock is held, and a daemon may be writing its state.
    store.run().make(id)?;
    let program = std::env::current_exe()
        .map_err(|e| Error::failed("cannot find the cowl program itself").because(e))?;
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
        // It writes nothing: its end is the end of the pipe.
        let read = std::io::copy(&mut out, &mut std::io::sink());
        if let (Err(error), _) | (_, Err(error)) = (read, child.wait().map(|_| 0)) {
            log::debug!("cannot wait for the sync of a snapshot: {error}");
        }
        if ended.send(()).is_err() {
            log::debug!("a snapshot was synced after the command had gone on");
        }
    });
    if wait.recv_timeout(STAY).is_err() {
        log::debug!("a snapshot is synced in the background");
    }
    Ok(())
}

/// Makes a container's states durable, and waits while other commands hold its lock. For processes in the
/// background: errors go to their log.
pub fn make_durable_patiently(store: &Store, id: ContainerId, filesystem: &Filesystem) {
    let done = sync(store, id, filesystem).and_then(|found| {
        let Some((pending, synced)) = found else {
            return Ok(());
        };
        let mut tried = 0;
        loop {
            match record(store, id, &pending, synced.as_ref().err()) {
                Err(error) if error.kind == Kind::Busy && tried < TRIES => tried += 1,
                Err(error) => return Err(error),
                Ok(()) => return synced,
            }
            std::thread::sleep(AGAIN);
        }
    });
    if let Err(error) = done {
        log::error!("snapshots stay settling: {error}");
    }
}

/// The thread of a daemon that makes its container's states durable: those that it finds, and those that it
/// is told of. It ends with the daemon.
pub(crate) fn serve(store: &Store, id: ContainerId, filesystem: &Filesystem, told: &Receiver<()>) {
    loop {
        make_durable_patiently(store, id, filesystem);
        if told.recv().is_err() {
            return;
        }
        // One round covers all who asked before it began.
        while told.try_recv().is_ok() {}
    }
}

/// Says of a state whose layers are `stack` whether it is durable, for the manifest that is about to
/// name it. The head counts as written to until now.
pub(crate) fn settling_of(
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

/// The mark of what the container stands on, if a part of that is lost.
pub(crate) fn loss<'c>(container: &'c Container<'_>) -> Result<Option<&'c Settling>> {
    let epoch = epoch(container.store)?;
    let mark = container.manifest().settling.as_ref();
    Ok(mark.filter(|mark| !mark.is_pending(&epoch)))
}

/// Accepts a state as it is, with all that was lost of it: of one snapshot, or of what the container
/// stands on.
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
    filesystem(store)?.sync()?;
    {
        let _reading = store.share()?;
        let unsynced = synced::unsynced(store, &stack)?;
        let origin = next.origin.first();
        for layer in &stack {
            let topmost = stack.first() == Some(layer) || origin == Some(layer);
            if topmost || unsynced.contains(layer) {
                measure::measure_again(store, *layer)?;
            }
        }
    }
    disk::remove_if_there(&store.paths().cache_file(container.id))?;
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
        assert_eq!(recorded(&manifest, &pending, None).settling, None);
        manifest.settling = Some(mark("web@b"));
        let next = recorded(&manifest, &pending, None);
        assert_eq!(next.settling, Some(mark("web@b")));
    }
}

//! The phases of the moves of files at a snapshot (docs/format.md), in a store that is in use, and after a power cut.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::disk::Log;

/// The part of the moves that is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// There are copies, but no list, or no longer.
    Copied,
    /// The files must be linked into the new layer.
    Listed,
    /// Some of the files are linked, but the list does not show it.
    Linking,
    /// The files must be replaced in the frozen layer.
    Linked,
    /// The snapshot has failed, and no file is in the new layer.
    Undone,
    /// The snapshot has failed, and files must be removed from the new layer.
    Unlinking,
}

/// The phases of a snapshot that succeeds, and of one that fails after the files were linked.
pub const PHASES: [Phase; 5] = [
    Phase::Copied,
    Phase::Listed,
    Phase::Linking,
    Phase::Linked,
    Phase::Unlinking,
];

/// A moment at which a phase was durable.
#[derive(Debug, Clone, Copy)]
pub struct Aim {
    /// The phase.
    pub phase: Phase,
    /// The time of the disk.
    pub moment: u64,
    /// The number of the snapshot that was attempted.
    pub snapshot: usize,
}

impl Phase {
    /// Returns the phase of the moves in a store; `None` if there are none.
    #[must_use]
    pub fn of(store: &Path) -> Option<Phase> {
        let layers = std::fs::read_dir(store.join("layers")).ok()?;
        layers.flatten().find_map(|layer| {
            let dir = layer.path().join("work/moves");
            // An empty file only reserves a name.
            let has = |name: &str| {
                let found = dir.join(name).symlink_metadata();
                found.is_ok_and(|meta| meta.len() > 0)
            };
            let found = match (has("undone"), has("linked"), has("list")) {
                (true, ..) => [Phase::Undone, Phase::Unlinking],
                (_, true, _) => [Phase::Linked, Phase::Linked],
                (.., true) => [Phase::Listed, Phase::Linking],
                _ => return dir.is_dir().then_some(Phase::Copied),
            };
            // A new layer has only directories and the files that move, at least one of which is in the root directory.
            let is_file =
                |entry: std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_file());
            let mut entries = std::fs::read_dir(layer.path().join("tree")).ok()?.flatten();
            let [without, with] = found;
            Some(if entries.any(is_file) { with } else { without })
        })
    }
}

/// Syncs the file system in each phase of each snapshot, and adds the moments to `aims`. `current` is the number of the
/// snapshot that is attempted.
pub(super) fn sync_in_each(
    store: &Path,
    log: &Log,
    (current, over): (&AtomicUsize, &AtomicBool),
    aims: &Mutex<Vec<Aim>>,
) {
    let file_system = std::fs::File::open(store).expect("opening the store");
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_micros(300));
        let Some(phase) = Phase::of(store) else {
            continue;
        };
        let snapshot = current.load(Ordering::SeqCst);
        let is_known = |aim: &Aim| (aim.snapshot, aim.phase) == (snapshot, phase);
        if aims.lock().expect("the moments").iter().any(is_known) {
            continue;
        }
        rustix::fs::syncfs(&file_system).expect("syncing the file system");
        let moment = log.now();
        if Phase::of(store) == Some(phase) && current.load(Ordering::SeqCst) == snapshot {
            aims.lock().expect("the moments").push(Aim {
                phase,
                moment,
                snapshot,
            });
        }
    }
}

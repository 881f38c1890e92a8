//! The phases of the moves of files at a snapshot (docs/format.md), in a store that is in use, and after a power cut.

use std::path::Path;
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
    /// The files must be replaced in the frozen layer.
    Linked,
    /// The files must be removed from the new layer, because the snapshot has failed.
    Undone,
}

/// The phases of a snapshot that succeeds.
pub const PHASES: [Phase; 3] = [Phase::Copied, Phase::Listed, Phase::Linked];

/// A moment at which a phase was durable.
#[derive(Debug, Clone, Copy)]
pub struct Aim {
    /// The phase.
    pub phase: Phase,
    /// The time of the disk.
    pub moment: u64,
    /// The number of the snapshot.
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
            match (has("undone"), has("linked"), has("list")) {
                (true, ..) => Some(Phase::Undone),
                (_, true, _) => Some(Phase::Linked),
                (.., true) => Some(Phase::Listed),
                _ => dir.is_dir().then_some(Phase::Copied),
            }
        })
    }
}

/// Syncs the file system in each phase of each snapshot, and records the moments. `current` is the number of the
/// snapshot that is being taken.
pub(super) fn sync_in_each(
    store: &Path,
    log: &Log,
    (current, over): (&AtomicUsize, &AtomicBool),
) -> Vec<Aim> {
    let file_system = std::fs::File::open(store).expect("opening the store");
    let mut aims: Vec<Aim> = Vec::new();
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_micros(300));
        let Some(phase) = Phase::of(store) else {
            continue;
        };
        let snapshot = current.load(Ordering::SeqCst);
        let is_known = |aim: &Aim| (aim.snapshot, aim.phase) == (snapshot, phase);
        if aims.iter().any(is_known) {
            continue;
        }
        rustix::fs::syncfs(&file_system).expect("syncing the file system");
        let moment = log.now();
        if Phase::of(store) == Some(phase) && current.load(Ordering::SeqCst) == snapshot {
            aims.push(Aim {
                phase,
                moment,
                snapshot,
            });
        }
    }
    aims
}

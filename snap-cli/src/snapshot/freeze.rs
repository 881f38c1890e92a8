//! Freezes the head of a container: its layer is never written again, and a new, empty layer becomes the head.

use std::path::Path;
use std::time::Instant;

use cowlfs::control::{Client, ControlError, PushReport, RunningWriters};

use crate::container::pause::stop_programs;
use crate::container::state::Mounted;
use crate::container::{Container, Swap, daemon, kernel};
use crate::error::Result;
use crate::store::creation::Creation;
use crate::store::manifest::{ContainerManifest, LayerId};
use crate::store::synced;

/// The maximum number of bytes that are copied while the programs of a container are stopped, if the file system cannot
/// share blocks.
const MAX_COPIED: u64 = 256 << 20;

/// The time in seconds from which the end of a push, which removes the copies, is reported as delayed.
const NOTABLE_DELAY: f64 = 0.1;

/// A frozen state and the stack that follows it.
#[derive(Debug)]
pub struct Frozen {
    /// The layers of the state, topmost first, all frozen once the manifest is committed.
    pub state: Vec<LayerId>,
    /// The next head; the same layer as before if nothing was written to it.
    pub head: LayerId,
    /// The next stack.
    pub stack: Vec<LayerId>,
}

/// Prepares freezing the head.
///
/// A head without changes stays the head, and its lower layers are the frozen state.
pub fn plan(container: &Container<'_>, creation: &mut Creation<'_>) -> Result<Frozen> {
    kernel::refuse(container, "take a snapshot of")?;
    flush_mappings(container)?;
    let manifest = container.manifest();
    let below = manifest.below_head();
    if let Some(top) = below.first()
        && container.store().is_untouched(manifest.head, *top)?
    {
        return Ok(Frozen {
            state: below.to_vec(),
            head: manifest.head,
            stack: manifest.stack.clone(),
        });
    }
    let state = manifest.stack.clone();
    // Heads that older versions created lack this note.
    synced::record_unsynced(container.store(), manifest.head)?;
    let head =
        creation.create_head(&state, &container.store().paths().layer_tree(manifest.head))?;
    let mut stack = vec![head];
    stack.extend_from_slice(&state);
    Ok(Frozen { state, head, stack })
}

/// Freezes the current state without a snapshot, and returns its layers.
pub fn freeze(container: &mut Container<'_>) -> Result<Vec<LayerId>> {
    let mut creation = Creation::begin(container.store())?;
    let frozen = plan(container, &mut creation)?;
    if frozen.head == container.manifest().head {
        creation.finish()?;
    } else {
        let next = ContainerManifest {
            head: frozen.head,
            stack: frozen.stack,
            ..container.manifest().clone()
        };
        commit(container, next, Some(creation))?;
    }
    Ok(frozen.state)
}

/// Flushes writes through shared mappings to the layers of a mounted container.
///
/// They belong to the state that is about to be frozen, and without them a head may appear unchanged.
fn flush_mappings(container: &Container<'_>) -> Result<()> {
    let Mounted::Alive(run) = container.mounted()? else {
        return Ok(());
    };
    run.flush(container.store(), container.id())
}

/// Commits a manifest whose head may be a new layer on top of the current one.
///
/// A running daemon switches to the new layer before the change takes effect.
pub fn commit(
    container: &mut Container<'_>,
    next: ContainerManifest,
    creation: Option<Creation<'_>>,
) -> Result<()> {
    let head = next.head;
    let pushes_layer = head != container.manifest().head;
    container.commit(next, creation, |container| {
        let Mounted::Alive(_) = container.mounted()? else {
            return Ok(Swap::Done);
        };
        if !pushes_layer {
            return Ok(Swap::Done);
        }
        let store = container.store();
        let mut client = daemon::connect(store, container.id())?;
        // If a power cut after the swap lost this file, no manifest would reference the layer that the daemon
        // writes to.
        container.sync_pending()?;
        let (tree, work) = (
            store.paths().layer_tree(head),
            store.paths().layer_work(head),
        );
        match push(container, &mut client, (&tree, &work)) {
            Ok(report) => {
                describe(&report);
                Ok(Swap::Done)
            }
            // The daemon responded with an error, so it did not switch.
            Err(
                error @ (ControlError::Failed(_)
                | ControlError::Unattended(_)
                | ControlError::NotUnderstood(_)
                | ControlError::Busy { .. }
                | ControlError::InUse { .. }),
            ) => Ok(Swap::Refused(daemon::to_error(&error))),
            // It is unknown whether the daemon switched.
            Err(
                error @ (ControlError::Io(_)
                | ControlError::Silent { .. }
                | ControlError::Ending { .. }),
            ) => Err(daemon::to_error(&error)),
        }
    })
}

/// Pushes a layer. If programs write to files by passthrough without a pause, the programs of an LXC container are
/// stopped for the push.
fn push(
    container: &Container<'_>,
    client: &mut Client,
    (tree, work): (&Path, &Path),
) -> std::result::Result<PushReport, ControlError> {
    let pushed = client.push_layer(tree, work, RunningWriters::Running);
    let Err(ControlError::Unattended(why)) = &pushed else {
        return pushed;
    };
    log::info!("the first attempt failed: {why}");
    let begin = Instant::now();
    let stopped = match stop_programs(container) {
        Ok(Some(stopped)) => stopped,
        Ok(None) => return pushed,
        Err(error) => {
            log::warn!("{error}");
            return pushed;
        }
    };
    let writers = RunningWriters::Stopped {
        max_bytes: MAX_COPIED,
    };
    let pushed = client.push_layer(tree, work, writers);
    drop(stopped);
    let time = begin.elapsed().as_secs_f64() * 1e3;
    log::info!("the programs in the container were stopped for up to {time:.1} ms");
    pushed
}

/// Logs what a push of a layer had to wait for.
fn describe(report: &PushReport) {
    let PushReport {
        copied,
        bytes,
        rounds,
        pause,
        waited,
        delayed,
        attempts,
        shares_blocks,
    } = *report;
    if attempts == 0 {
        // The daemon has pushed the layer before, or is of a version that does not report it.
        return;
    }
    if copied > 0 {
        let how = match shares_blocks {
            true => "sharing their blocks",
            false => "while the programs were stopped",
        };
        log::info!(
            "{copied} files that programs access by passthrough were copied ({bytes} bytes), {how}, in {rounds} rounds"
        );
    }
    if attempts > 1 {
        log::info!("names changed at the same time: the layer was pushed in attempt {attempts}");
    }
    if delayed >= NOTABLE_DELAY {
        log::info!(
            "programs that did not end their writes delayed the snapshot by {:.1} ms more, while requests were answered",
            delayed * 1e3
        );
    }
    log::info!(
        "the snapshot waited {:.1} ms for running requests; other requests waited for {:.1} ms",
        waited * 1e3,
        (waited + pause) * 1e3
    );
}

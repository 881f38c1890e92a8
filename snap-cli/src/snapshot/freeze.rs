//! Freezes the head of a container: its layer is never written again, and a new, empty layer becomes the head.

use cowlfs::control::ControlError;

use crate::container::state::Mounted;
use crate::container::{Container, Swap, daemon, kernel};
use crate::error::Result;
use crate::store::creation::Creation;
use crate::store::manifest::{ContainerManifest, LayerId};
use crate::store::synced;

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
        match client.push_layer(&tree, &work) {
            Ok(()) => Ok(Swap::Done),
            // The daemon responded with an error, so it did not switch.
            Err(
                error @ (ControlError::Failed(_)
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

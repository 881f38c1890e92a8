//! Freezing the head of a container: its layer is never written again, and a new, empty layer becomes the head.

use cowlfs::control::ControlError;

use crate::container::state::Mounted;
use crate::container::{Container, Swap, daemon};
use crate::error::Result;
use crate::store::making::Making;
use crate::store::manifest::{ContainerManifest, LayerId};
use crate::store::synced;

/// The head as a state that will not change.
#[derive(Debug)]
pub struct Frozen {
    /// The layers of the state, topmost first, all frozen once the manifest is committed.
    pub state: Vec<LayerId>,
    /// The head that comes after; the same as before when nothing had been written to it.
    pub head: LayerId,
    /// The stack that comes after.
    pub stack: Vec<LayerId>,
}

/// Prepares freezing the head. A head that nothing was written to is shared, not stacked.
pub fn plan(container: &Container<'_>, making: &mut Making<'_>) -> Result<Frozen> {
    flush_writers(container)?;
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
    // Older versions make heads without the note.
    synced::record_unsynced(container.store(), manifest.head)?;
    let head = making.create_head(&state, &container.store().paths().layer_tree(manifest.head))?;
    let mut stack = vec![head];
    stack.extend_from_slice(&state);
    Ok(Frozen { state, head, stack })
}

/// Freezes what the container is now, without a snapshot, and gives the layers of that state.
pub fn freeze(container: &mut Container<'_>) -> Result<Vec<LayerId>> {
    let mut making = Making::begin(container.store())?;
    let frozen = plan(container, &mut making)?;
    if frozen.head == container.manifest().head {
        making.finish()?;
    } else {
        let next = ContainerManifest {
            head: frozen.head,
            stack: frozen.stack,
            ..container.manifest().clone()
        };
        commit(container, next, Some(making))?;
    }
    Ok(frozen.state)
}

/// Has what programs stored through mappings handed to the layers, where any may have: it belongs to what
/// is about to be frozen, and a head may look untouched without it.
fn flush_writers(container: &Container<'_>) -> Result<()> {
    let Mounted::Alive(run) = container.mounted()? else {
        return Ok(());
    };
    run.flush(container.store(), container.id())
}

/// Commits a manifest whose head may be a new layer over the present one; a running daemon is told to
/// go on in that layer before the change is in force.
pub fn commit(
    container: &mut Container<'_>,
    next: ContainerManifest,
    making: Option<Making<'_>>,
) -> Result<()> {
    let head = next.head;
    let pushes = head != container.manifest().head;
    container.commit(next, making, |container| {
        let Mounted::Alive(_) = container.mounted()? else {
            return Ok(Swap::Done);
        };
        if !pushes {
            return Ok(Swap::Done);
        }
        let store = container.store();
        let mut client = daemon::connect(store, container.id())?;
        // Were it lost in a power cut after the swap, nothing would name what the daemon writes to.
        container.sync_pending()?;
        let (tree, work) = (
            store.paths().layer_tree(head),
            store.paths().layer_work(head),
        );
        match client.push_layer(&tree, &work) {
            Ok(()) => Ok(Swap::Done),
            // It answered, so it did nothing.
            Err(
                error @ (ControlError::Failed(_)
                | ControlError::NotUnderstood(_)
                | ControlError::Busy { .. }
                | ControlError::InUse { .. }),
            ) => Ok(Swap::Refused(daemon::to_error(&error))),
            // What became of it is not known.
            Err(
                error @ (ControlError::Io(_)
                | ControlError::Silent { .. }
                | ControlError::Ending { .. }),
            ) => Err(daemon::to_error(&error)),
        }
    })
}

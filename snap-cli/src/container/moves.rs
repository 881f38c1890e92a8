//! Files that an interrupted push of a layer was moving to the new head (docs/decisions/0043).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use cowl_layers::layer::{Upper, moves};

use super::Container;
use super::state::Mounted;
use crate::error::{Error, Result};
use crate::store::disk;
use crate::store::manifest::ContainerManifest;

/// Completes the moves, unless a daemon does it. The layer below the head must not be read before that.
pub(crate) fn complete(container: &Container<'_>) -> Result<()> {
    let (store, manifest) = (container.store(), container.manifest());
    let work = store.paths().layer_work(manifest.head);
    if !disk::exists(&work.join(OsStr::from_bytes(moves::DIR)))? {
        return Ok(());
    }
    if let Mounted::Alive(_) = container.mounted()? {
        return Ok(());
    }
    let tree = store.paths().layer_tree(manifest.head);
    let below = store.open_layers(manifest.below_head().get(..1).unwrap_or_default())?;
    let upper = Upper::open(&tree, &work, store.space())?;
    moves::complete(&upper, below.first())
        .map_err(|error| Error::at("complete the move of files to", &tree, error))
}

/// Removes what a killed daemon left in the head for a push of the head of `next`, which is discarded.
///
/// Only warns of an error: what is left is invisible.
pub(crate) fn abandon_or_warn(container: &Container<'_>, next: &ContainerManifest) {
    if let Err(error) = abandon(container, next) {
        log::warn!(
            "cannot remove placeholders of files of {}: {error}",
            container.name()
        );
    }
}

fn abandon(container: &Container<'_>, next: &ContainerManifest) -> Result<()> {
    let (store, head) = (container.store(), container.manifest().head);
    let work = store.paths().layer_work(next.head);
    if next.head == head || !disk::exists(&work.join(OsStr::from_bytes(moves::DIR)))? {
        return Ok(());
    }
    for layer in store.open_layers(&[head])? {
        moves::abandon(&work, &layer)
            .map_err(|error| Error::at("read", &work.join(OsStr::from_bytes(moves::DIR)), error))?;
    }
    Ok(())
}

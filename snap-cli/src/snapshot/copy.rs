//! Copying a state, so that it stands on layers of its own and on nothing of what it came from.

use cowl_layers::view::View;

use crate::error::Result;
use crate::store::Store;
use crate::store::layers::Making;
use crate::store::manifest::{LayerId, LayerKind};
use crate::tree::error::{OnProgress, Progress};

/// Makes one base of all layers of a state. The caller keeps those from collection.
pub(super) fn base(
    store: &Store,
    making: &mut Making<'_>,
    stack: &[LayerId],
    progress: OnProgress<'_>,
) -> Result<LayerId> {
    let view = View::new(store.open_layers(stack)?);
    let base = making.layer(LayerKind::Base, &[], &[])?;
    let tree = store.layer_tree(base);
    let total = store.known_size(stack)?;
    let mut progress = |done| progress(Progress { total, ..done });
    crate::delta::flatten(&view, None, &tree, &mut progress)?;
    // A container must not be there before its data is.
    making.sync_content()?;
    Ok(base)
}

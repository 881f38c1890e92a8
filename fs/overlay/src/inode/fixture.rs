//! Inodes for unit tests.

use std::path::Path;
use std::sync::Arc;

use smallvec::SmallVec;

use super::{FileState, Identity, Inode, InodeState};
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::Loc;

/// Returns an inode of a metacopy whose content is at `name` in `layer`.
pub(crate) fn metacopy(ino: u64, layer: &Path, identity: Identity) -> Arc<Inode> {
    let loc = Loc {
        dir: Layer::open(layer, XattrSpace::User).unwrap().root_dir(),
        name: Name::new(b"name").unwrap(),
    };
    let state = InodeState::File(FileState {
        data: Some(Box::new(loc.clone())),
        loc,
        redirect: None,
        aliases: SmallVec::new(),
        orphan: false,
        anchor: None,
        visible: None,
        identity,
    });
    Inode::new(ino, FileKind::Regular, state)
}

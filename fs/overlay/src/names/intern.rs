//! Insertion of objects that were looked up or created into the inode table.

use std::sync::Arc;

use super::locate::{Locator, dir_state, file_state};
use crate::inode::{Alias, Identity, Inode, InodeState, OnConflict};
use cowl_layers::error::Result;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::Stat;
use cowl_layers::view::{DirNode, FileNode};

/// Returns the inode of a directory, which is inserted into the table if it is new. `None` only with
/// [`OnConflict::Defer`].
pub(crate) fn intern_dir(
    locator: &Locator<'_>,
    (parent, name): (&Arc<Inode>, &Name),
    node: DirNode,
    on_conflict: OnConflict,
) -> Result<Option<Arc<Inode>>> {
    let (number, stat) = (node.ino, node.stat);
    let state = |alias| dir_state(node, alias);
    intern(locator, (parent, name), (number, &stat), on_conflict, state)
}

/// Returns the inode of an object other than a directory, which is inserted into the table if it is new. `None` only
/// with [`OnConflict::Defer`].
pub(crate) fn intern_file(
    locator: &Locator<'_>,
    (parent, name): (&Arc<Inode>, &Name),
    node: FileNode,
    on_conflict: OnConflict,
) -> Result<Option<Arc<Inode>>> {
    let (number, stat) = (node.ino, node.stat);
    let state = |alias| file_state(node, alias);
    intern(locator, (parent, name), (number, &stat), on_conflict, state)
}

fn intern(
    locator: &Locator<'_>,
    (parent, name): (&Arc<Inode>, &Name),
    (number, stat): (u64, &Stat),
    on_conflict: OnConflict,
    state: impl FnOnce(Alias) -> InodeState,
) -> Result<Option<Arc<Inode>>> {
    let identity = Identity::from_stat(stat);
    let alias = Alias {
        parent: parent.clone(),
        name: name.clone(),
    };
    let _located = locator.locate_number(identity, number)?;
    let interned = locator.inodes.intern(number, identity, on_conflict, |ino| {
        Inode::new(ino, stat.kind(), state(alias.clone()))
    });
    let Some((inode, new)) = interned else {
        return Ok(None);
    };
    if !new {
        inode.add_alias(alias);
    }
    Ok(Some(inode))
}

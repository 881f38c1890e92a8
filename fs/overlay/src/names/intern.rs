//! Insertion of objects that were looked up or created into the inode table.

use std::sync::Arc;

use smallvec::smallvec;

use crate::inode::{
    Alias, DirState, FileState, Identity, Inode, InodeState, InodeTable, OnConflict,
};
use cowl_layers::name::Name;
use cowl_layers::sys::stat::Stat;
use cowl_layers::view::{DirNode, FileNode};

/// Returns the inode of a directory, which is inserted into the table if it is new. `None` only with
/// [`OnConflict::Defer`].
pub(crate) fn intern_dir(
    inodes: &InodeTable,
    (parent, name): (&Arc<Inode>, &Name),
    node: DirNode,
    on_conflict: OnConflict,
) -> Option<Arc<Inode>> {
    let (number, stat) = (node.ino, node.stat);
    let state = |alias, identity| {
        InodeState::Dir(DirState {
            locs: node.locs.into(),
            redirect: node.redirect,
            alias: Some(alias),
            removed: false,
            identity,
        })
    };
    intern(inodes, (parent, name), (number, &stat), on_conflict, state)
}

/// Returns the inode of an object other than a directory, which is inserted into the table if it is new. `None` only
/// with [`OnConflict::Defer`].
pub(crate) fn intern_file(
    inodes: &InodeTable,
    (parent, name): (&Arc<Inode>, &Name),
    node: FileNode,
    on_conflict: OnConflict,
) -> Option<Arc<Inode>> {
    let (number, stat) = (node.ino, node.stat);
    let state = |alias, identity| {
        InodeState::File(FileState {
            loc: node.loc,
            data: node.data.map(Box::new),
            redirect: node.redirect.map(Box::new),
            aliases: smallvec![alias],
            orphan: false,
            anchor: None,
            visible: None,
            identity,
        })
    };
    intern(inodes, (parent, name), (number, &stat), on_conflict, state)
}

fn intern(
    inodes: &InodeTable,
    (parent, name): (&Arc<Inode>, &Name),
    (number, stat): (u64, &Stat),
    on_conflict: OnConflict,
    state: impl FnOnce(Alias, Identity) -> InodeState,
) -> Option<Arc<Inode>> {
    let identity = Identity::from_stat(stat);
    let alias = Alias {
        parent: parent.clone(),
        name: name.clone(),
    };
    let (inode, new) = inodes.intern(number, identity, on_conflict, |ino| {
        Inode::new(ino, stat.kind(), state(alias.clone(), identity))
    })?;
    if !new {
        inode.add_alias(alias);
    }
    Some(inode)
}

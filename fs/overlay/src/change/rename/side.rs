//! The source and the target of a rename.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::inode::{Alias, DirState, Inode, InodeState};
use crate::ledger::{Change, Intent};
use crate::plan::NameState;
use crate::reach::Stack;
use cowl_layers::error::Result;
use cowl_layers::layer::{LayerDir, Moving};
use cowl_layers::name::Name;
use cowl_layers::view::Loc;

/// The source or the target of a rename. The `names` of its directory are locked.
pub(super) struct Side<'a> {
    pub(super) parent: &'a Arc<Inode>,
    pub(super) name: &'a Name,
    pub(super) dir: DirState,
    pub(super) upper_dir: Arc<LayerDir>,
    /// A descriptor of `upper_dir`.
    ///
    /// It must be opened before any object is moved, because opening reads the locations of the directories above,
    /// which are locked during the move.
    pub(super) fd: Arc<OwnedFd>,
    pub(super) state: NameState,
}

impl Side<'_> {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Returns the location of a directory in the upper layer; `None` for any other object.
pub(super) fn own_location(stack: &Stack, inode: &Inode) -> Result<Option<Arc<LayerDir>>> {
    if !inode.is_dir() {
        return Ok(None);
    }
    Ok(stack.upper_dir(&inode.dir()?).cloned())
}

/// Returns the intent of a rename of `inode`.
pub(super) fn intent<'a>(
    change: Change,
    inode: &Inode,
    from: &Side<'a>,
    to: &Side<'a>,
) -> Intent<'a> {
    Intent {
        change,
        parents: (from.parent.ino(), to.parent.ino()),
        names: (from.name.as_bytes(), to.name.as_bytes()),
        object: inode.ino(),
    }
}

/// Records an object's new name and its new location in the upper layer.
pub(super) fn record_move(
    state: &mut InodeState,
    location: Option<Moving<'_>>,
    from: &Side<'_>,
    to: &Side<'_>,
) {
    let alias = Alias {
        parent: to.parent.clone(),
        name: to.name.clone(),
    };
    if let Some(location) = location {
        location.to(&to.upper_dir, to.name.clone());
    }
    match state {
        InodeState::Dir(dir) => dir.alias = Some(alias),
        InodeState::File(file) => {
            file.aliases
                .retain(|a| !(a.name == *from.name && Arc::ptr_eq(&a.parent, from.parent)));
            file.aliases.push(alias);
            file.loc = Loc {
                dir: to.upper_dir.clone(),
                name: to.name.clone(),
            };
        }
    }
}

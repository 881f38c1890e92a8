//! The end of a name, by a removal or because a rename replaces it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::copy_up::{CopyExtent, CopyUp};
use crate::inode::{Inode, InodeState, InodeTable};
use crate::reach::{Context, access_path};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::view::Loc;

/// The steps before and after a name ends.
#[derive(Clone, Copy)]
pub(crate) struct NameRemoval<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) inodes: &'o InodeTable,
    pub(crate) copy_up: CopyUp<'o>,
}

impl NameRemoval<'_> {
    /// Copies up a file with several names, with all of them, before one is removed or moved: so the link count
    /// is right from here on, and the rest stays one file.
    pub(super) fn gather_links(&self, inode: &Arc<Inode>) -> Result<()> {
        let file = inode.file()?;
        if self.cx.stack.is_in_upper(&file) || file.orphan {
            return Ok(());
        }
        // Since a snapshot it may be a file of a lower that only its anchor leads to.
        if sys::stat::stat_fd(&*access_path(inode)?)?.nlink > 1 {
            self.copy_up.file_up(inode, CopyExtent::Metadata)?;
        }
        Ok(())
    }

    /// Returns a descriptor that leads to a file after its last known name is removed, for processes that have it
    /// open. `None` if another name leads to it.
    pub(super) fn anchor(
        &self,
        inode: &Arc<Inode>,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<Arc<OwnedFd>>> {
        let file = inode.file()?;
        if !self.cx.stack.is_in_upper(&file) || file.anchor.is_some() {
            return Ok(None);
        }
        let others = file
            .aliases
            .iter()
            .filter(|a| !(a.name == *name && Arc::ptr_eq(&a.parent, parent)));
        for other in others {
            // Another name leads to it from here on.
            if let Some(up) = self.cx.stack.upper_dir(&other.parent.dir()?) {
                let loc = Loc {
                    dir: up.clone(),
                    name: other.name.clone(),
                };
                if loc.stat().is_ok_and(|stat| stat.ino == file.identity.ino) {
                    inode.update_file(|file| file.loc = loc)?;
                    return Ok(None);
                }
            }
        }
        Ok(Some(Arc::new(file.loc.open_path()?)))
    }

    /// Releases the identity of an object that has no name any more: another one may get it.
    pub(super) fn note_removed(&self, inode: &Arc<Inode>) {
        let gone = if inode.is_dir() {
            inode.dir().is_ok_and(|dir| dir.removed)
        } else {
            inode.file().is_ok_and(|file| file.orphan)
        };
        if gone {
            self.inodes.remove_substitute(inode.identity());
        }
        // The kernel decrements the count of one link that every file shows.
        if self.cx.options.static_nlink && !inode.is_dir() {
            self.cx.note_stale(inode);
        }
    }
}

/// Removes a name from a file's state. `anchor` leads to a file of which no other name is known; a file without
/// any name is an orphan.
pub(super) fn forget_name(
    state: &mut InodeState,
    parent: &Arc<Inode>,
    name: &Name,
    anchor: Option<Arc<OwnedFd>>,
) -> Result<()> {
    let InodeState::File(file) = state else {
        return Err(Error::Errno(Errno::ISDIR));
    };
    file.aliases
        .retain(|a| !(a.name == *name && Arc::ptr_eq(&a.parent, parent)));
    if anchor.is_some() {
        file.anchor = anchor;
    }
    // Not all names of a file are known: the link count on disk shows whether one is left.
    let left = match &file.anchor {
        Some(anchor) => Some(sys::stat::stat_fd(&**anchor)?.nlink),
        None => None,
    };
    file.orphan = left.map_or(file.aliases.is_empty(), |left| left == 0);
    Ok(())
}

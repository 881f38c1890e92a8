//! Removal of a file's name, by unlink or because a rename replaces it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::copy_up::{CopyExtent, CopyUp};
use crate::inode::{Inode, InodeState, InodeTable, Nameless};
use crate::reach::{Context, access_path};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::view::Loc;

/// The steps before and after the removal of a name.
#[derive(Clone, Copy)]
pub(crate) struct NameRemoval<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) inodes: &'o InodeTable,
    pub(crate) copy_up: CopyUp<'o>,
}

impl NameRemoval<'_> {
    /// Copies up a lower file with several names under all of them, before one is removed or moved.
    ///
    /// The link count on disk is then correct, and the remaining names stay links to one file.
    pub(super) fn copy_up_all_links(&self, inode: &Arc<Inode>) -> Result<()> {
        let file = inode.file()?;
        if self.cx.stack.is_in_upper(&file) || file.orphan {
            return Ok(());
        }
        // After a snapshot, the anchor may be the only access to a file of the former upper layer.
        if sys::stat::stat_fd(&*access_path(inode)?)?.nlink > 1 {
            self.copy_up.copy_up_file(inode, CopyExtent::Metadata)?;
        }
        Ok(())
    }

    /// Opens a descriptor that keeps a file accessible after its last known name is removed.
    ///
    /// Processes may still have the file open. Returns `None` if it is accessible otherwise: through another name,
    /// an existing anchor, or its location in a lower layer.
    pub(super) fn open_anchor(
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
            // Use another name in the upper layer as the file's location from here on.
            if let Some(upper_dir) = self.cx.stack.upper_dir(&other.parent.dir()?) {
                let loc = Loc {
                    dir: upper_dir.clone(),
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

    /// Records, for a successor, where an object is found once this name, which is about to be removed, is gone.
    ///
    /// This is needed for every object, because a process can refer to one without a request: by an O_PATH descriptor,
    /// as its working directory, or as the program that it executes.
    ///
    /// `descriptor` is that of an object in the upper layer whose last known name it is.
    pub(super) fn prepare(
        &self,
        inode: &Arc<Inode>,
        (parent, name): (&Arc<Inode>, &Name),
        descriptor: Option<&Arc<OwnedFd>>,
    ) {
        self.inodes.prepare_nameless(inode, || {
            let descriptor = descriptor.cloned();
            if inode.is_dir() {
                return Nameless::removed_dir(&inode.dir()?, descriptor);
            }
            let mut file = inode.file()?;
            file.aliases
                .retain(|a| !(a.name == *name && Arc::ptr_eq(&a.parent, parent)));
            if descriptor.is_some() {
                file.anchor.clone_from(&descriptor);
            }
            file.orphan = file.aliases.is_empty();
            let descriptor = file.anchor.clone();
            Nameless::of(InodeState::File(file), descriptor)
        });
    }

    /// Releases the identity of an object without names, because the file system may reuse its inode number.
    pub(super) fn note_removed(&self, inode: &Arc<Inode>) {
        let removed = if inode.is_dir() {
            inode.dir().is_ok_and(|dir| dir.removed)
        } else {
            inode.file().is_ok_and(|file| file.orphan)
        };
        self.inodes.note_removed_name(inode);
        if removed {
            self.inodes.remove_substitute(inode.identity());
        }
        // Every file reports one link, but the kernel decrements its cached count after an unlink.
        if self.cx.options.static_nlink && !inode.is_dir() {
            self.cx.note_stale(inode);
        }
    }
}

/// Removes a name from a file's state, and marks the file as an orphan if none is left.
///
/// `anchor` must be a descriptor of the file if no other name of it is known.
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
    // The state holds only some names of a file: only the link count on disk shows whether one is left.
    let links = match &file.anchor {
        Some(anchor) => Some(sys::stat::stat_fd(&**anchor)?.nlink),
        None => None,
    };
    file.orphan = links.map_or(file.aliases.is_empty(), |links| links == 0);
    Ok(())
}

//! The commit of a staged copy: it replaces the original in the merged view.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::dirs::parent_in_upper;
use super::stage::StagedFile;
use super::times::preserve_times;
use super::zero_device::prepare_dir_for;
use crate::inode::{Alias, FileState, Identity, Inode, InodeTable, NumberStorage};
use crate::reach::Context;
use cowl_layers::error::Result;
use cowl_layers::format::{Redirect, XattrSpace};
use cowl_layers::name::Name;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::Loc;

/// The location of a file after its copy-up.
pub(super) struct CopiedFile {
    pub(super) loc: Loc,
    /// The content stays in the lower layer.
    pub(super) metacopy: bool,
    pub(super) stat: Stat,
    pub(super) redirect: Option<Redirect>,
    /// A descriptor of a copy without a name.
    pub(super) orphan: Option<Arc<OwnedFd>>,
}

/// The final step of the copy-up of one file.
#[derive(Clone, Copy)]
pub(super) struct Commit<'o> {
    pub(super) cx: &'o Context<'o>,
    pub(super) inodes: &'o InodeTable,
}

impl Commit<'_> {
    /// Renames a staged copy to the file's only name.
    pub(super) fn commit_one(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        copy: StagedFile,
        alias: &Alias,
    ) -> Result<()> {
        let names = alias.parent.names()?.lock();
        let now = inode.file()?;
        let is_alias = |a: &Alias| a.name == alias.name && Arc::ptr_eq(&a.parent, &alias.parent);
        if now.orphan || !now.aliases.iter().any(is_alias) {
            // Race: the name was removed while the content was copied.
            drop(names);
            return self.adopt_orphan(inode, file, copy);
        }
        let parent = parent_in_upper(&self.cx.stack, alias)?;
        preserve_times(self.cx, self.inodes, &alias.parent, &parent, |fd| {
            prepare_dir_for(self.cx, inode, fd)?;
            copy.staged.commit(fd, &alias.name)
        })?;
        let to = CopiedFile {
            loc: Loc {
                dir: parent,
                name: alias.name.clone(),
            },
            metacopy: copy.metacopy,
            stat: copy.stat,
            redirect: None,
            orphan: None,
        };
        self.record_copy(inode, file, to)?;
        alias.parent.advance_generation();
        Ok(())
    }

    /// Uses a staged copy for a file without a name.
    pub(super) fn adopt_orphan(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        copy: StagedFile,
    ) -> Result<()> {
        let anchor = Arc::new(copy.staged.open_path()?);
        let dir = self.cx.stack.upper()?.layer.root_dir();
        // The location is a placeholder: all access goes through the anchor. Dropping the staged copy removes its
        // name, so that it is unlinked like the original.
        let loc = Loc {
            dir,
            name: Name::new(copy.staged.name())?,
        };
        let to = CopiedFile {
            loc,
            metacopy: copy.metacopy,
            stat: copy.stat,
            redirect: None,
            orphan: Some(anchor),
        };
        self.record_copy(inode, file, to)
    }

    /// Records that the inode's object is in the upper layer from here on.
    pub(super) fn record_copy(
        &self,
        inode: &Arc<Inode>,
        before: &FileState,
        to: CopiedFile,
    ) -> Result<()> {
        let identity = Identity::from_stat(&to.stat);
        // Only regular files and directories can have user.* xattrs, such as the marker with the inode number.
        let space = self.cx.stack.upper()?.layer.space();
        let storage = if space == XattrSpace::Trusted || inode.kind() == FileKind::Regular {
            NumberStorage::OnDisk
        } else {
            NumberStorage::InMemory
        };
        inode.flags().set_unsynced_name();
        let data = to.metacopy.then(|| Box::new(before.data_loc().clone()));
        let content_moves = data.is_none();
        let change = |file: &mut FileState| {
            file.loc = to.loc;
            file.data = data;
            file.redirect = to.redirect.map(Box::new);
            if to.orphan.is_some() {
                file.anchor = to.orphan;
                file.orphan = true;
                file.aliases.clear();
            } else if !file.orphan {
                // The anchor refers to the original.
                file.anchor = None;
            }
            // The count holds only for a lower file: in the upper layer, names can change.
            file.visible = None;
            file.identity = identity;
        };
        self.inodes.relocate(inode, identity, storage, || {
            if content_moves {
                inode.update_content(change)
            } else {
                inode.update_file(change)
            }
        })
    }
}

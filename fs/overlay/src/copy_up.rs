//! Bringing an object into the layer that is written.
//!
//! Everything is made in the work folder and gets its name by one call, so that a crash leaves the
//! old object or the new one. The object's own lock is held meanwhile, and no other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::Op;
use super::stage::{CopyUp, StagedFile};
use crate::inode::{Alias, DirState, FileState, Identity, Inode};
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::{Redirect, XattrSpace};
use cowl_layers::layer::LayerDir;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::node::RenameHow;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::Loc;

/// Where file capabilities are kept.
pub(super) const CAPABILITY: &[u8] = b"security.capability";

/// Where a file lies once it was copied up.
pub(super) struct Copied {
    pub(super) loc: Loc,
    /// The content stays where it was.
    pub(super) metacopy: bool,
    pub(super) stat: Stat,
    pub(super) redirect: Option<Redirect>,
    /// Leads to a copy without a name.
    pub(super) orphan: Option<Arc<OwnedFd>>,
}

impl Op<'_> {
    /// Brings a folder up and returns its state, with its place in the upper.
    pub(super) fn dir_up(&self, inode: &Arc<Inode>) -> Result<(DirState, Arc<LayerDir>)> {
        let dir = inode.dir()?;
        if let Some(up) = self.cx.stack.upper_dir(&dir) {
            let up = up.clone();
            return Ok((dir, up));
        }
        self.cx.stack.upper()?;
        // From the topmost folder that is not up yet downwards, without recursion.
        let mut way = vec![inode.clone()];
        while let Some(lowest) = way.last() {
            let dir = lowest.dir()?;
            let Some(alias) = dir.alias.as_ref() else {
                // The root is always up; a removed folder takes nothing in.
                return Err(Error::NOT_FOUND);
            };
            let parent = alias.parent.clone();
            if self.cx.stack.upper_dir(&parent.dir()?).is_some() {
                break;
            }
            way.push(parent);
        }
        while let Some(next) = way.pop() {
            let _copying = next.copying.lock();
            if self.cx.stack.upper_dir(&next.dir()?).is_none() {
                self.keeping_ctime(&next, |_, _| self.one_dir_up(&next))?;
            }
        }
        let dir = inode.dir()?;
        let up = self
            .cx
            .stack
            .upper_dir(&dir)
            .cloned()
            .ok_or(Error::NOT_FOUND)?;
        Ok((dir, up))
    }

    /// Brings one folder up, whose parent is up and whose `copying` is held.
    fn one_dir_up(&self, inode: &Arc<Inode>) -> Result<()> {
        let dir = inode.dir()?;
        let (staged, stat) = self.stage_dir(dir.top()?)?;
        let alias = dir.alias.ok_or(Error::NOT_FOUND)?;
        let _names = alias.parent.names.lock();
        let dir = inode.dir()?;
        if dir.removed {
            return Err(Error::NOT_FOUND);
        }
        // It may have been moved since; only the place that counts now is used.
        let alias = match dir.alias {
            Some(now) if Arc::ptr_eq(&now.parent, &alias.parent) => now,
            _ => return Err(Error::Errno(Errno::STALE)),
        };
        let parent = self.parent_up(&alias)?;
        let up = LayerDir::child(&parent, alias.name.clone(), stat.ino);
        self.keeping_times(&alias.parent, &parent, |fd| {
            staged.commit(fd, &alias.name, RenameHow::NoReplace)
        })?;
        self.overlay
            .inodes
            .moving(inode, Identity::of(&stat), true, || {
                inode.change_dir(|dir| {
                    dir.locs = std::iter::once(up)
                        .chain(dir.locs.iter().cloned())
                        .collect();
                    dir.redirect = None;
                    dir.identity = Identity::of(&stat);
                })
            })?;
        alias.parent.next_turn();
        inode.next_turn();
        Ok(())
    }

    /// The place in the upper of the folder that holds `alias`; it was brought up before.
    fn parent_up(&self, alias: &Alias) -> Result<Arc<LayerDir>> {
        let parent = alias.parent.dir()?;
        self.cx
            .stack
            .upper_dir(&parent)
            .cloned()
            .ok_or(Error::Errno(Errno::STALE))
    }

    /// Brings what is no folder up, as far as `how` asks.
    pub(super) fn file_up(&self, inode: &Arc<Inode>, how: CopyUp) -> Result<FileState> {
        let file = inode.file()?;
        if self.is_up(&file, how) {
            return Ok(file);
        }
        self.cx.stack.upper()?;
        let _copying = inode.copying.lock();
        let file = inode.file()?;
        if self.is_up(&file, how) {
            return Ok(file);
        }
        self.keeping_ctime(inode, |fd, stat| {
            if self.cx.stack.in_upper(&file) {
                self.fill(inode, &file)
            } else {
                self.first_up(inode, &file, (fd, stat), how)
            }
        })?;
        inode.file()
    }

    /// A folder that was removed and lay only below: its copy has no name either, and takes nothing in.
    fn removed_dir_up(&self, inode: &Arc<Inode>) -> Result<()> {
        let _copying = inode.copying.lock();
        let dir = inode.dir()?;
        if self.cx.stack.upper_dir(&dir).is_some() {
            return Ok(());
        }
        let (staged, stat) = self.stage_dir(dir.top()?)?;
        let fd = Arc::new(staged.open_path()?);
        let name = cowl_layers::name::Name::new(staged.name())?;
        let up = LayerDir::child(&self.cx.stack.upper()?.layer.root_dir(), name, stat.ino);
        up.gone(fd);
        self.overlay
            .inodes
            .moving(inode, Identity::of(&stat), true, || {
                inode.change_dir(|dir| {
                    dir.locs = Arc::from([up]);
                    dir.identity = Identity::of(&stat);
                })
            })
    }

    /// Brings anything up, for a change of its attributes.
    pub(super) fn any_up(&self, inode: &Arc<Inode>) -> Result<()> {
        if inode.is_dir() {
            if inode.dir()?.removed {
                return self.removed_dir_up(inode);
            }
            self.dir_up(inode).map(drop)
        } else {
            self.file_up(inode, CopyUp::Metadata).map(drop)
        }
    }

    /// Whether an object, of any kind, lies in the upper.
    pub(super) fn is_any_up(&self, inode: &Inode) -> Result<bool> {
        if inode.is_dir() {
            Ok(self.cx.stack.upper_dir(&inode.dir()?).is_some())
        } else {
            Ok(self.cx.stack.in_upper(&inode.file()?))
        }
    }

    fn is_up(&self, file: &FileState, how: CopyUp) -> bool {
        self.cx.stack.in_upper(file) && (how == CopyUp::Metadata || file.data.is_none())
    }

    /// The content of a metacopy, into the file that is already in the upper. Its mark goes last: a
    /// crash before that leaves a metacopy, whose content is below and whole. Also for a file that is
    /// about to be cut to nothing, because a metacopy of no size would be a torn one, and without its
    /// mark one of holes.
    fn fill(&self, inode: &Arc<Inode>, file: &FileState) -> Result<()> {
        // Not by the name that `file` has: it may be another file's by now, and that would be lost.
        let target = sys::content::reopen((*reach::access_path(inode)?).as_fd(), OFlags::RDWR)?;
        let before = sys::stat::stat_fd(&target)?;
        // Writing takes a file's capabilities away; only a user's writing may.
        let capability = sys::xattr::get(target.as_fd(), CAPABILITY)?;
        let data = file.data_loc().open_read()?;
        let waited_for = !self.cx.behaviour.volatile;
        let (from, to) = (data.as_fd(), target.as_fd());
        let copied = sys::copy::copy_content(from, to, before.size, waited_for)?;
        if let Some(value) = capability {
            sys::xattr::set(target.as_fd(), CAPABILITY, &value)?;
        }
        sys::attr::utimens(
            target.as_fd(),
            SetTime::At(before.atime),
            SetTime::At(before.mtime),
        )?;
        self.cx.order()?.content_first(&target, copied)?;
        let space = self.cx.stack.upper()?.layer.space();
        // An attempt that failed between the two may have taken the first.
        remove_mark(target.as_fd(), space.metacopy())?;
        if file.redirect.is_some() {
            remove_mark(target.as_fd(), space.redirect())?;
        }
        inode.named_anew();
        inode.change_content(|file| {
            file.data = None;
            file.redirect = None;
        })
    }

    fn first_up(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        source: (&OwnedFd, &Stat),
        how: CopyUp,
    ) -> Result<()> {
        if file.orphan {
            return self.orphan_up(inode, file, source, how);
        }
        let aliases = self.visible_names_of(inode, file, source.1)?;
        for alias in &aliases {
            self.dir_up(&alias.parent)?;
        }
        let made = self.stage_file(inode.kind(), file, source, how)?;
        match aliases.as_slice() {
            [] => self.orphan_up(inode, file, source, how),
            [only] => self.commit_one(inode, file, made, only),
            several => self.commit_group(inode, file, made, several),
        }
    }

    fn commit_one(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        made: StagedFile,
        alias: &Alias,
    ) -> Result<()> {
        let names = alias.parent.names.lock();
        let still = inode.file()?;
        let there = |a: &Alias| a.name == alias.name && Arc::ptr_eq(&a.parent, &alias.parent);
        if still.orphan || !still.aliases.iter().any(there) {
            // Its name was removed while its content was copied.
            drop(names);
            return self.adopt_orphan(inode, file, made);
        }
        let parent = self.parent_up(alias)?;
        self.keeping_times(&alias.parent, &parent, |fd| {
            self.ready_for(inode, fd)?;
            made.staged.commit(fd, &alias.name, RenameHow::NoReplace)
        })?;
        let loc = Loc {
            dir: parent,
            name: alias.name.clone(),
        };
        let to = Copied {
            loc,
            metacopy: made.metacopy,
            stat: made.stat,
            redirect: None,
            orphan: None,
        };
        self.switch(inode, file, to)?;
        alias.parent.next_turn();
        Ok(())
    }

    /// Records that the inode lies in the upper layer from here on.
    pub(super) fn switch(&self, inode: &Arc<Inode>, before: &FileState, to: Copied) -> Result<()> {
        let identity = Identity::of(&to.stat);
        // Only regular files and directories can have user.* attributes, such as the mark with the inode number.
        let marked = self.cx.stack.upper()?.layer.space() == XattrSpace::Trusted
            || inode.kind() == FileKind::Regular;
        inode.named_anew();
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
                // It led to the original.
                file.anchor = None;
            }
            // Counted for the place below; here the names will change.
            file.visible = None;
            file.identity = identity;
        };
        self.overlay.inodes.moving(inode, identity, marked, || {
            if content_moves {
                inode.change_content(change)
            } else {
                inode.change_file(change)
            }
        })
    }

    /// A file that is open but has no name left: its copy has none either.
    fn orphan_up(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        source: (&OwnedFd, &Stat),
        how: CopyUp,
    ) -> Result<()> {
        let how = if how == CopyUp::Metadata && inode.kind() == FileKind::Regular {
            CopyUp::Data
        } else {
            how
        };
        let made = self.stage_file(inode.kind(), file, source, how)?;
        self.adopt_orphan(inode, file, made)
    }

    fn adopt_orphan(&self, inode: &Arc<Inode>, file: &FileState, made: StagedFile) -> Result<()> {
        let anchor = Arc::new(made.staged.open_path()?);
        let dir = self.cx.stack.upper()?.layer.root_dir();
        // The place is a formality: everything goes by the anchor. Removing the staged name leaves
        // an object without names, as the original is.
        let loc = Loc {
            dir,
            name: cowl_layers::name::Name::new(made.staged.name())?,
        };
        let to = Copied {
            loc,
            metacopy: made.metacopy,
            stat: made.stat,
            redirect: None,
            orphan: Some(anchor),
        };
        self.switch(inode, file, to)
    }
}

fn remove_mark(fd: BorrowedFd<'_>, mark: &str) -> Result<()> {
    match sys::xattr::remove(fd, mark.as_bytes()) {
        Err(error) if error.errno() != Errno::NODATA => Err(error),
        _ => Ok(()),
    }
}

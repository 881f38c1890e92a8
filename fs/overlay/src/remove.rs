//! Removing names.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Op;
use super::create::{live, lock_both};
use super::lookup::Hit;
use super::plan::{self, NameState, RemovePlan, UpperHas};
use super::stage::CopyUp;
use crate::inode::{DirState, Inode, State};
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameHow;
use cowl_layers::view::{Found, Loc};

impl Op<'_> {
    /// Removes a name that is no folder.
    pub fn unlink(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        let up = match self.cx.stack.upper_dir(&live(parent)?) {
            Some(up) => up.clone(),
            None => {
                // The folder is not brought up for a name that can't be removed.
                let inode = self.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
                refuse_dir(&inode)?;
                self.cx.stack.upper()?;
                self.dir_up(parent)?.1
            }
        };
        let find = || {
            let hit = self.find_locked(parent, name)?.ok_or(Error::NOT_FOUND)?;
            refuse_dir(&hit.inode)?;
            Ok::<_, Error>(hit)
        };
        let names = parent.names.lock();
        let hit = find()?;
        let (_names, hit) = if !hit.in_top && hit.stat.nlink > 1 {
            drop(names);
            self.gather_links(&hit.inode)?;
            (parent.names.lock(), find()?)
        } else {
            (names, hit)
        };
        let dir = live(parent)?;
        let state = self.state_of(&hit, &dir, &up, name)?;
        let inode = hit.inode;
        let keeper = self.keeper(&inode, parent, name)?;
        inode.change_name(None, |file, _| {
            self.remove_name(&up, name, state)?;
            forget_name(file, parent, name, keeper)
        })?;
        inode.changed();
        parent.changed();
        self.note_gone(&inode);
        Ok(())
    }

    /// An object that has no name any more leaves its place on the disk to others.
    pub(super) fn note_gone(&self, inode: &Arc<Inode>) {
        let gone = if inode.is_dir() {
            inode.dir().is_ok_and(|dir| dir.removed)
        } else {
            inode.file().is_ok_and(|file| file.orphan)
        };
        if gone {
            self.overlay.inodes.gone(inode.identity());
        }
        // The kernel counts the name down from the one link that every file shows.
        if self.cx.behaviour.static_nlink && !inode.is_dir() {
            self.cx.note_stale(inode);
        }
    }

    /// Removes an empty folder.
    pub fn rmdir(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        let inode = self.lookup(parent, name)?.ok_or(Error::NOT_FOUND)?;
        let gone = inode.dir()?;
        self.cx.stack.upper()?;
        let (_, up) = self.dir_up(parent)?;
        // Both: nothing can be made in a folder while it is being removed.
        let _names = lock_both(parent, &inode);
        let dir = live(parent)?;
        if !self.shows_nothing(&inode)? {
            return Err(Error::Errno(Errno::NOTEMPTY));
        }
        let state = self.name_state(&dir, &up, name)?;
        let kept = match self.cx.stack.upper_dir(&gone) {
            Some(up) => Some((up, up.fd()?)),
            None => None,
        };
        inode.change_name(None, |dir, _| {
            let moving = kept.map(|(up, fd)| (up.moving(), fd));
            self.remove_name(&up, name, state)?;
            if let Some((moving, fd)) = moving {
                moving.gone(fd);
            }
            dir.removed();
            Ok(())
        })?;
        inode.changed();
        parent.changed();
        self.overlay.links.note_removed(&inode);
        self.note_gone(&inode);
        Ok(())
    }

    /// Before a name of a file with several is removed or moved: the file comes up with all of them, so
    /// that the link count is right from here on and the rest stays one file.
    pub(super) fn gather_links(&self, inode: &Arc<Inode>) -> Result<()> {
        let file = inode.file()?;
        if self.cx.stack.in_upper(&file) || file.orphan {
            return Ok(());
        }
        // Since a snapshot it may be a file of a lower that only its anchor leads to.
        if sys::stat::stat_fd(&*reach::access_path(inode)?)?.nlink > 1 {
            self.file_up(inode, CopyUp::Metadata)?;
        }
        Ok(())
    }

    /// What the layers have under a name.
    pub(super) fn name_state(
        &self,
        dir: &DirState,
        up: &LayerDir,
        name: &Name,
    ) -> Result<NameState> {
        Ok(NameState {
            upper: self.upper_has(up, name)?,
            below: matches!(self.below(dir, name)?, Found::Dir(_) | Found::File(_)),
        })
    }

    /// The same for a name at which something was just found, with the folder's `names` held.
    fn state_of(&self, hit: &Hit, dir: &DirState, up: &LayerDir, name: &Name) -> Result<NameState> {
        if up.layer().is_foreign() {
            // There may be more to it than was found.
            return self.name_state(dir, up, name);
        }
        Ok(if hit.in_top {
            NameState {
                upper: UpperHas::Object,
                below: matches!(self.below(dir, name)?, Found::Dir(_) | Found::File(_)),
            }
        } else {
            NameState {
                upper: UpperHas::Nothing,
                below: true,
            }
        })
    }

    fn remove_name(&self, up: &LayerDir, name: &Name, state: NameState) -> Result<()> {
        let fd = up.fd()?;
        let fd = (*fd).as_fd();
        let upper = self.cx.stack.upper()?;
        match plan::remove(state) {
            RemovePlan::Absent => Err(Error::NOT_FOUND),
            RemovePlan::Hide => upper.whiteout_new(fd, name),
            RemovePlan::ReplaceByWhiteout => {
                let whiteout = upper.stage_whiteout(fd)?;
                // An exchange takes the place of files and folders alike; what was there goes with
                // the staged name.
                whiteout.commit(fd, name, RenameHow::Exchange)
            }
            RemovePlan::Remove => self.remove_in_upper(fd, name),
        }
    }

    fn remove_in_upper(&self, dir: BorrowedFd<'_>, name: &Name) -> Result<()> {
        match sys::node::unlink(dir, name) {
            Err(error) if matches!(error.errno(), Errno::ISDIR | Errno::PERM) => {}
            other => return other,
        }
        match sys::node::rmdir(dir, name) {
            // Whiteouts may be left in it, which nobody sees: out of sight first, then away.
            Err(error) if error.errno() == Errno::NOTEMPTY => {
                let (staged, ()) = self.cx.stack.upper()?.work.stage(|work, tmp| {
                    sys::node::rename(dir, name, work, tmp, RenameHow::NoReplace)
                })?;
                drop(staged);
                Ok(())
            }
            other => other,
        }
    }

    /// Before a file's last known name goes: something that still leads to it, for those who have it
    /// open. `None` where another name does.
    pub(super) fn keeper(
        &self,
        inode: &Arc<Inode>,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<Arc<OwnedFd>>> {
        let file = inode.file()?;
        if !self.cx.stack.in_upper(&file) || file.anchor.is_some() {
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
                    inode.change_file(|file| file.loc = loc)?;
                    return Ok(None);
                }
            }
        }
        Ok(Some(Arc::new(file.loc.open_path()?)))
    }
}

fn refuse_dir(inode: &Inode) -> Result<()> {
    if inode.is_dir() {
        return Err(Error::Errno(Errno::ISDIR));
    }
    Ok(())
}

/// Drops a name that is gone. `keeper` leads to a file of which no other name is known; one that has
/// none is an orphan.
pub(super) fn forget_name(
    state: &mut State,
    parent: &Arc<Inode>,
    name: &Name,
    keeper: Option<Arc<OwnedFd>>,
) -> Result<()> {
    let State::File(file) = state else {
        return Err(Error::Errno(Errno::ISDIR));
    };
    file.aliases
        .retain(|a| !(a.name == *name && Arc::ptr_eq(&a.parent, parent)));
    if keeper.is_some() {
        file.anchor = keeper;
    }
    // Not all names of a file need be known: the disk tells whether there is one left.
    let left = match &file.anchor {
        Some(anchor) => Some(sys::stat::stat_fd(&**anchor)?.nlink),
        None => None,
    };
    file.orphan = left.map_or(file.aliases.is_empty(), |left| left == 0);
    Ok(())
}

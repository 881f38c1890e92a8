//! New names: files, folders, nodes, symbolic links, hard links.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::MutexGuard;
use rustix::fs::OFlags;

use super::files::{FileHandle, OpenHow};
use super::plan::UpperHas;
use super::stage::CopyUp;
use super::{Attr, Caller, Op};
use crate::inode::{Alias, BARE, DirState, Inode};
use crate::reach;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::format::foreign::is_mark;
use cowl_layers::layer::zero_device::{self, is_zero_device};
use cowl_layers::layer::{LayerDir, Seen, probe};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameHow;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::resolve::join;
use cowl_layers::view::{DirNode, FileNode, Found, Loc};

impl Op<'_> {
    /// Makes a folder.
    pub fn mkdir(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
    ) -> Result<Arc<Inode>> {
        self.make(caller, parent, name, true, |dir, name| {
            sys::node::mkdir(dir, name, mode & 0o7777)
        })
        .map(|(inode, _)| inode)
    }

    /// Makes an empty file, a fifo, a socket or a device.
    pub fn mknod(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        rdev: u64,
    ) -> Result<Arc<Inode>> {
        let kind = FileKind::from_mode(mode);
        if is_zero_device(kind, rdev) {
            return self.make_zero_device(caller, parent, name, mode & 0o7777);
        }
        self.make(caller, parent, name, false, |dir, name| {
            sys::node::mknod(dir, name, kind, mode & 0o7777, rdev)
        })
        .map(|(inode, _)| inode)
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        target: &[u8],
    ) -> Result<Arc<Inode>> {
        self.make(caller, parent, name, false, |dir, name| {
            sys::node::symlink(dir, name, target)
        })
        .map(|(inode, _)| inode)
    }

    /// Makes a regular file and opens it.
    pub fn create(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        how: OpenHow,
    ) -> Result<(Arc<Inode>, Arc<FileHandle>)> {
        let (inode, handle, _) = self.create_attr(caller, parent, name, mode, how)?;
        Ok((inode, handle))
    }

    /// The same with what stat shows of it.
    pub fn create_attr(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        mode: u32,
        how: OpenHow,
    ) -> Result<(Arc<Inode>, Arc<FileHandle>, Attr)> {
        // The descriptor that makes the file is kept: its access was granted with the creation,
        // whatever the mode says.
        let mut opened: Option<OwnedFd> = None;
        let (inode, stat) = self.make(caller, parent, name, false, |dir, name| {
            opened = Some(sys::node::create(dir, name, mode & 0o7777, OFlags::RDWR)?);
            Ok(())
        })?;
        let fd = match opened {
            Some(fd) => fd,
            None => return Err(Error::Errno(Errno::IO)),
        };
        // It is nobody's yet.
        inode.found(inode.known(), BARE);
        let attr = self.attr_as_found(&inode, stat)?;
        let handle = self.handle(&inode, Some((fd, inode.data_turn())), how);
        Ok((inode, handle, attr))
    }

    /// Gives a file one more name.
    pub fn link(&self, inode: &Arc<Inode>, parent: &Arc<Inode>, name: &Name) -> Result<Arc<Inode>> {
        if inode.is_dir() {
            return Err(Error::Errno(Errno::PERM));
        }
        self.file_up(inode, CopyUp::Metadata)?;
        self.anchor_redirect(inode)?;
        let (_, up) = self.dir_up(parent)?;
        let _names = parent.names.lock();
        let dir = live(parent)?;
        let fd = up.fd()?;
        let fd = (*fd).as_fd();
        refuse_mark(&up, name)?;
        self.ready_for(inode, fd)?;
        // Not by a name: the directory that has it is not locked, and it may be another file's by now. Where no name
        // is left the kernel says ENOENT, as for any file.
        let source = reach::access_path(inode)?;
        let link_to =
            |dir: BorrowedFd<'_>, name: &[u8]| sys::node::link_fd(source.as_fd(), dir, name);
        match self.upper_has(&up, name)? {
            UpperHas::Object => return Err(Error::Errno(Errno::EXIST)),
            UpperHas::Nothing => {
                self.must_be_free_below(&dir, name)?;
                link_to(fd, name)?;
            }
            UpperHas::Whiteout => {
                let (staged, ()) = self
                    .cx
                    .stack
                    .upper()?
                    .work
                    .stage(|work, tmp| link_to(work, tmp))?;
                staged.commit(fd, name, RenameHow::Replace)?;
            }
        }
        inode.add_alias(Alias {
            parent: parent.clone(),
            name: name.clone(),
        });
        inode.changed();
        parent.changed();
        Ok(inode.clone())
    }

    /// Before a metacopy file gets another name: says on it where its content is, because that was
    /// found by the name so far.
    pub(super) fn anchor_redirect(&self, inode: &Arc<Inode>) -> Result<()> {
        let file = inode.file()?;
        if file.data.is_none() || matches!(file.redirect.as_deref(), Some(Redirect::Path(_))) {
            return Ok(());
        }
        let alias = file.aliases.first().ok_or(Error::NOT_FOUND)?;
        let last = match file.redirect.as_deref() {
            Some(Redirect::Sibling(name)) => name.clone(),
            _ => alias.name.clone(),
        };
        let path = join(&self.path_below(&alias.parent)?, &last);
        let redirect = Redirect::Path(path.into());
        let mark = self.cx.stack.upper()?.layer.space().redirect().as_bytes();
        match sys::xattr::set(
            (*reach::access_path(inode)?).as_fd(),
            mark,
            &redirect.to_value(),
        ) {
            Ok(()) => inode.change_file(|file| file.redirect = Some(Box::new(redirect))),
            // A path of thousands of bytes does not fit: then the content comes up and needs no mark.
            Err(Error::Errno(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE)) => {
                self.file_up(inode, CopyUp::Data).map(drop)
            }
            Err(error) => Err(error),
        }
    }

    /// What the upper has under a name.
    pub(super) fn upper_has(&self, up: &LayerDir, name: &Name) -> Result<UpperHas> {
        if up.layer().is_foreign() {
            self.cx.stack.upper()?.settle(up, name)?;
        }
        Ok(match probe(up, name, true)? {
            None => UpperHas::Nothing,
            Some(found) if found.seen == Seen::Whiteout => UpperHas::Whiteout,
            Some(_) => UpperHas::Object,
        })
    }

    fn must_be_free_below(&self, dir: &DirState, name: &Name) -> Result<()> {
        match self.below(dir, name)? {
            Found::Absent | Found::Whiteout => Ok(()),
            Found::Dir(_) | Found::File(_) => Err(Error::Errno(Errno::EXIST)),
        }
    }

    /// Makes something new as the caller: right in its folder where the name is free, else in the work
    /// folder, from where it takes the whiteout's place.
    fn make(
        &self,
        caller: Caller,
        parent: &Arc<Inode>,
        name: &Name,
        is_dir: bool,
        mut how: impl FnMut(BorrowedFd<'_>, &[u8]) -> Result<()>,
    ) -> Result<(Arc<Inode>, Stat)> {
        live(parent)?;
        let (_, up) = self.dir_up(parent)?;
        let _names = parent.names.lock();
        let dir = live(parent)?;
        let fd = up.fd()?;
        let fd = (*fd).as_fd();
        refuse_mark(&up, name)?;
        self.must_be_free(&dir, &up, name)?;
        match self.cx.as_creator(caller, || how(fd, name)) {
            Ok(()) => {}
            Err(error) if error.errno() == Errno::EXIST => {
                if self.upper_has(&up, name)? != UpperHas::Whiteout {
                    return Err(error);
                }
                let staged = self.stage_in_twin(caller, fd, |twin| how(twin, b"new"))?;
                if is_dir {
                    self.set_opaque(staged.open_path()?.as_fd())?;
                    staged.commit(fd, name, RenameHow::Exchange)?;
                } else {
                    staged.commit(fd, name, RenameHow::Replace)?;
                }
            }
            Err(error) => return Err(error),
        }
        parent.changed();
        self.take_new(parent, &up, name, false)
    }

    /// A name that only a lower layer has is taken, though the upper's folder would let it be made.
    pub(super) fn must_be_free(&self, dir: &DirState, up: &LayerDir, name: &Name) -> Result<()> {
        // A foreign mark is more than a name that is taken.
        let known = !up.layer().is_foreign() && self.overlay.absent.was(&dir.locs, name);
        if dir.locs.len() > 1 && !known && self.upper_has(up, name)? == UpperHas::Nothing {
            self.must_be_free_below(dir, name)?;
        }
        Ok(())
    }

    /// Takes in what was just made. `zero_device`: it shows as a device 0:0.
    pub(super) fn take_new(
        &self,
        parent: &Arc<Inode>,
        up: &Arc<LayerDir>,
        name: &Name,
        zero_device: bool,
    ) -> Result<(Arc<Inode>, Stat)> {
        let mut stat = sys::stat::stat_at((*up.fd()?).as_fd(), name)?;
        if zero_device {
            stat = zero_device::shown(stat);
        }
        let ino = self.cx.stack.view().number(up.layer(), &stat, None);
        if stat.kind() == FileKind::Directory {
            let node = DirNode {
                locs: vec![LayerDir::child(up, name.clone(), stat.ino)],
                below: None,
                redirect: None,
                stat,
                ino,
            };
            let inode = self.take_dir(parent, name, node, true);
            return Ok((inode.ok_or(Error::Errno(Errno::STALE))?, stat));
        }
        let node = FileNode {
            loc: Loc {
                dir: up.clone(),
                name: name.clone(),
            },
            data: None,
            data_missing: false,
            below: None,
            redirect: None,
            stat,
            ino,
        };
        let inode = self.take_file(parent, name, node, true);
        Ok((inode.ok_or(Error::Errno(Errno::STALE))?, stat))
    }
}

/// EINVAL for a name that would be a mark in a layer where names are marks.
pub(super) fn refuse_mark(up: &LayerDir, name: &Name) -> Result<()> {
    if up.layer().is_foreign() && is_mark(name) {
        return Err(Error::Errno(Errno::INVAL));
    }
    Ok(())
}

/// A folder that was not removed.
pub(super) fn live(inode: &Inode) -> Result<DirState> {
    let dir = inode.dir()?;
    if dir.removed {
        return Err(Error::NOT_FOUND);
    }
    Ok(dir)
}

/// Both folders' locks, always in the same order.
pub(super) fn lock_both<'a>(
    one: &'a Arc<Inode>,
    two: &'a Arc<Inode>,
) -> (MutexGuard<'a, ()>, Option<MutexGuard<'a, ()>>) {
    if Arc::ptr_eq(one, two) {
        return (one.names.lock(), None);
    }
    let (first, second) = if one.ino() < two.ino() {
        (one, two)
    } else {
        (two, one)
    };
    (first.names.lock(), Some(second.names.lock()))
}

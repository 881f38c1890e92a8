//! Making, in the work folder, what a copy-up or a creation puts in place.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;

use super::{Caller, Op};
use crate::inode::FileState;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::foreign::is_attribute;
use cowl_layers::format::{NumberMark, OPAQUE, OPAQUE_XATTR_WHITEOUTS};
use cowl_layers::layer::{Layer, LayerDir, Staged, zero_device};
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Stat};

/// How much of a file is copied up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CopyUp {
    /// Everything.
    Data,
    /// Owner, mode, times and attributes; the content stays below where the mount allows that.
    Metadata,
    /// As `Data`, but the content is about to be cut to nothing: none is copied.
    Truncate,
}

/// A file ready to be put in place.
pub(super) struct StagedFile {
    pub staged: Staged,
    /// Its content is still below.
    pub metacopy: bool,
    pub stat: Stat,
}

impl Op<'_> {
    /// Makes a copy of `file`, which `source` leads to, with everything that belongs to it.
    pub(super) fn stage_file(
        &self,
        kind: FileKind,
        file: &FileState,
        (source, stat): (&OwnedFd, &Stat),
        how: CopyUp,
    ) -> Result<StagedFile> {
        let upper = self.cx.stack.upper()?;
        let metacopy = kind == FileKind::Regular
            && how == CopyUp::Metadata
            && stat.size > 0
            && self.cx.behaviour.metacopy;
        let mut copied = None;
        let (staged, target) = upper.work.stage(|dir, name| match kind {
            FileKind::Regular => {
                let new = sys::node::create(dir, name, 0o600, OFlags::RDWR)?;
                if metacopy {
                    sys::attr::truncate(&new, stat.size)?;
                } else if how != CopyUp::Truncate && stat.size > 0 {
                    let data = match (&file.data, &file.anchor) {
                        // Its name is another's now, or a whiteout.
                        (None, Some(anchor)) => {
                            sys::content::reopen((**anchor).as_fd(), OFlags::RDONLY)?
                        }
                        _ => file.data_loc().open_read()?,
                    };
                    let (from, to, waited_for) =
                        (data.as_fd(), new.as_fd(), !self.cx.behaviour.volatile);
                    copied = Some(sys::copy::copy_content(from, to, stat.size, waited_for)?);
                }
                Ok(new)
            }
            FileKind::Symlink => {
                let to = match &file.anchor {
                    Some(anchor) => sys::dir::readlink_fd(anchor)?,
                    None => file.loc.readlink()?,
                };
                sys::node::symlink(dir, name, &to)?;
                sys::dir::open_path(dir, name)
            }
            _ if stat.kind() != kind => {
                // A device 0:0 as it lies on disk.
                sys::node::mknod(dir, name, FileKind::Regular, 0o600, 0)?;
                let new = sys::dir::open_path(dir, name)?;
                zero_device::mark(new.as_fd(), upper.layer.space())?;
                Ok(new)
            }
            _ => {
                sys::node::mknod(dir, name, kind, 0o600, stat.rdev)?;
                sys::dir::open_path(dir, name)
            }
        })?;
        let layer = file.loc.dir.layer();
        // The cut is a change of the content, and it shows with the name already.
        let cut = how == CopyUp::Truncate;
        let mtime = if cut {
            SetTime::Now
        } else {
            SetTime::At(stat.mtime)
        };
        let made = self.copy_attributes(layer, source.as_fd(), stat, target.as_fd(), mtime)?;
        if metacopy {
            let mark = upper.layer.space().metacopy().as_bytes();
            sys::xattr::set(target.as_fd(), mark, b"")?;
        }
        if kind == FileKind::Regular {
            match copied {
                // Or a power cut could leave an empty file over a good one.
                Some(copied) => self.cx.order()?.content_first(&target, copied)?,
                // Where no data was copied there is none to lose.
                None => self.cx.order()?.attributes_first(&target)?,
            }
        }
        Ok(StagedFile {
            staged,
            metacopy,
            stat: made,
        })
    }

    /// Makes an empty folder with everything that belongs to `source`, but for what is in it.
    pub(super) fn stage_dir(&self, source: &LayerDir) -> Result<(Staged, Stat)> {
        let upper = self.cx.stack.upper()?;
        let fd = source.fd()?;
        let stat = sys::stat::stat_fd(&*fd)?;
        let (staged, target) = upper.work.stage(|dir, name| {
            sys::node::mkdir(dir, name, 0o700)?;
            sys::dir::open_dir(dir, name)
        })?;
        let (layer, mtime) = (source.layer(), SetTime::At(stat.mtime));
        let made = self.copy_attributes(layer, (*fd).as_fd(), &stat, target.as_fd(), mtime)?;
        Ok((staged, made))
    }

    /// A folder in the work folder in which a new object comes out as it would in `parent`: with its
    /// group, its setgid bit and its default ACL.
    pub(super) fn stage_in_twin(
        &self,
        caller: Caller,
        parent: BorrowedFd<'_>,
        mut make: impl FnMut(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<Staged> {
        const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";
        let upper = self.cx.stack.upper()?;
        let stat = sys::stat::stat_fd(parent)?;
        let (twin, fd) = upper.work.stage(|dir, name| {
            sys::node::mkdir(dir, name, 0o700)?;
            sys::dir::open_dir(dir, name)
        })?;
        sys::attr::chown(fd.as_fd(), Some(stat.uid), Some(stat.gid))?;
        if let Some(acl) = sys::xattr::get(parent, DEFAULT_ACL)? {
            sys::xattr::set(fd.as_fd(), DEFAULT_ACL, &acl)?;
        }
        sys::attr::chmod(fd.as_fd(), stat.perm() | 0o700)?;
        self.cx.as_creator(caller, || make(fd.as_fd()))?;
        let (staged, ()) = upper.work.stage(|dir, name| {
            sys::node::rename(
                fd.as_fd(),
                b"new",
                dir,
                name,
                sys::node::RenameHow::NoReplace,
            )
        })?;
        drop(twin);
        Ok(staged)
    }

    /// Marks a folder that is in the upper alone as hiding what lies below it.
    pub(super) fn set_opaque(&self, dir: BorrowedFd<'_>) -> Result<()> {
        let space = self.cx.stack.upper()?.layer.space();
        let mark = space.opaque().as_bytes();
        if sys::xattr::get(dir, mark)?.is_some_and(|old| old == OPAQUE_XATTR_WHITEOUTS) {
            // One mark can't say both, and marked files in a folder without theirs would show.
            for entry in sys::dir::entries(dir)? {
                let whiteout = space.whiteout().as_bytes();
                if sys::xattr::get_at(dir, &entry.name, whiteout)?.is_some()
                    && sys::stat::stat_at(dir, &entry.name)?.kind() == FileKind::Regular
                {
                    sys::node::unlink(dir, &entry.name)?;
                }
            }
        }
        sys::xattr::set(dir, mark, OPAQUE)
    }

    /// Owner, attributes, mode and times, in an order in which the copy is never open to more than
    /// the original: it was made for us alone, and the mode comes after the owner and the ACL. Each is
    /// a change of its own in the journal below, so what is there already is not set. Returns which object
    /// the copy is, as it was made.
    fn copy_attributes(
        &self,
        layer: &Layer,
        source: BorrowedFd<'_>,
        stat: &Stat,
        target: BorrowedFd<'_>,
        mtime: SetTime,
    ) -> Result<Stat> {
        let made = sys::stat::stat_fd(target)?;
        if (made.uid, made.gid) != (stat.uid, stat.gid) {
            sys::attr::chown(target, Some(stat.uid), Some(stat.gid))?;
        }
        let lent = self.copy_xattrs(layer, source, stat, target)?;
        if stat.kind() != FileKind::Symlink {
            sys::attr::chmod(target, stat.perm())?;
        }
        let mark = self.cx.stack.upper()?.layer.space().ino().as_bytes();
        match sys::xattr::set(target, mark, &lent.to_value()) {
            Ok(()) => {}
            // user.* attributes exist on regular files and folders only. Without the mark the object
            // has another number after a new mount; nothing else depends on it.
            Err(Error::Errno(Errno::PERM | Errno::OPNOTSUPP))
                if !matches!(stat.kind(), FileKind::Regular | FileKind::Directory) => {}
            Err(error) => return Err(error),
        }
        sys::attr::utimens(target, SetTime::At(stat.atime), mtime)?;
        Ok(made)
    }

    /// The attributes that are a user's. Returns which object's number the copy shows.
    fn copy_xattrs(
        &self,
        layer: &Layer,
        source: BorrowedFd<'_>,
        stat: &Stat,
        target: BorrowedFd<'_>,
    ) -> Result<NumberMark> {
        let mut lent = NumberMark {
            layer: layer.id(),
            ino: stat.ino,
        };
        let all = sys::xattr::all(source)?;
        let value = |name: &str| {
            let found = all.iter().find(|(other, _)| other == name.as_bytes());
            Ok::<_, Error>(found.map(|(_, value)| value.clone()))
        };
        let ours = layer.space().not_a_users(value)?;
        for (name, value) in &all {
            if ours.is_some_and(|ours| name == ours.as_bytes()) {
                continue;
            }
            if name == layer.space().ino().as_bytes() {
                // Already borrowed: it stays with its first owner, as long as that one is there.
                if let Some(mark) = NumberMark::parse(value)?
                    && self
                        .cx
                        .stack
                        .view()
                        .layers()
                        .iter()
                        .any(|l| l.id() == mark.layer)
                {
                    lent = mark;
                }
                continue;
            }
            if layer.is_foreign() && is_attribute(name) {
                continue;
            }
            // The other marks are about the source's own layer; escaped ones are a user's.
            if layer.space().to_mount(name).is_none() {
                continue;
            }
            sys::xattr::set(target, name, value)?;
        }
        Ok(lent)
    }
}

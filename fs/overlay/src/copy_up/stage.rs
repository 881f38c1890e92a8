//! Making objects in the work directory, for a copy-up or a creation to put in place.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;

use crate::inode::FileState;
use crate::reach::{Caller, Context};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::foreign::is_attribute;
use cowl_layers::format::{ACL_DEFAULT, NumberMark, OPAQUE, OPAQUE_XATTR_WHITEOUTS};
use cowl_layers::layer::{Layer, LayerDir, Staged, zero_device};
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Stat};

/// How much of a file is copied up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyExtent {
    /// Everything.
    Data,
    /// Owner, mode, times and xattrs; the content stays below if the mount allows that.
    Metadata,
    /// As `Data`, but the content is about to be truncated: none is copied.
    Truncate,
}

/// A copy that is ready to be put in place.
pub(super) struct StagedFile {
    pub(super) staged: Staged,
    /// Its content is still below.
    pub(super) metacopy: bool,
    pub(super) stat: Stat,
}

/// Stages a copy of `file`, which `source` leads to, with all its attributes and xattrs.
pub(super) fn stage_file(
    cx: &Context<'_>,
    kind: FileKind,
    file: &FileState,
    (source, stat): (&OwnedFd, &Stat),
    extent: CopyExtent,
) -> Result<StagedFile> {
    let upper = cx.stack.upper()?;
    let metacopy = kind == FileKind::Regular
        && extent == CopyExtent::Metadata
        && stat.size > 0
        && cx.options.metacopy;
    let mut copied = None;
    let (staged, target) = upper.work.stage(|dir, name| match kind {
        FileKind::Regular => {
            let new = sys::node::create(dir, name, 0o600, OFlags::RDWR)?;
            if metacopy {
                sys::attr::truncate(&new, stat.size)?;
            } else if extent != CopyExtent::Truncate && stat.size > 0 {
                let data = match (&file.data, &file.anchor) {
                    // Its name is another file's now, or a whiteout.
                    (None, Some(anchor)) => {
                        sys::content::reopen((**anchor).as_fd(), OFlags::RDONLY)?
                    }
                    _ => file.data_loc().open_read()?,
                };
                let (from, to) = (data.as_fd(), new.as_fd());
                let write_back = cx.write_back();
                copied = Some(sys::copy::copy_content(from, to, stat.size, write_back)?);
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
    // The truncation is a change of the content, and it shows with the name already.
    let cut = extent == CopyExtent::Truncate;
    let mtime = if cut {
        SetTime::Now
    } else {
        SetTime::At(stat.mtime)
    };
    let made = copy_attributes(cx, layer, source.as_fd(), stat, target.as_fd(), mtime)?;
    if metacopy {
        let mark = upper.layer.space().metacopy().as_bytes();
        sys::xattr::set(target.as_fd(), mark, b"")?;
    }
    if kind == FileKind::Regular {
        match copied {
            // Or a power cut could leave an empty file over a good one.
            Some(copied) => cx.order()?.content_first(&target, copied)?,
            // Where no data was copied there is none to lose.
            None => cx.order()?.attributes_first(&target)?,
        }
    }
    Ok(StagedFile {
        staged,
        metacopy,
        stat: made,
    })
}

/// Stages an empty directory with the attributes and xattrs of `source`.
pub(crate) fn stage_dir(cx: &Context<'_>, source: &LayerDir) -> Result<(Staged, Stat)> {
    let upper = cx.stack.upper()?;
    let fd = source.fd()?;
    let stat = sys::stat::stat_fd(&*fd)?;
    let (staged, target) = upper.work.stage(|dir, name| {
        sys::node::mkdir(dir, name, 0o700)?;
        sys::dir::open_dir(dir, name)
    })?;
    let (layer, mtime) = (source.layer(), SetTime::At(stat.mtime));
    let made = copy_attributes(cx, layer, (*fd).as_fd(), &stat, target.as_fd(), mtime)?;
    Ok((staged, made))
}

/// Stages a new object in a directory that is made like `parent`, so that it gets the same group, setgid bit
/// and ACL as it would there. `make` makes it under the name `new`.
pub(crate) fn stage_in_twin(
    cx: &Context<'_>,
    caller: Caller,
    parent: BorrowedFd<'_>,
    mut make: impl FnMut(BorrowedFd<'_>) -> Result<()>,
) -> Result<Staged> {
    let upper = cx.stack.upper()?;
    let stat = sys::stat::stat_fd(parent)?;
    let (twin, fd) = upper.work.stage(|dir, name| {
        sys::node::mkdir(dir, name, 0o700)?;
        sys::dir::open_dir(dir, name)
    })?;
    sys::attr::chown(fd.as_fd(), Some(stat.uid), Some(stat.gid))?;
    if let Some(acl) = sys::xattr::get(parent, ACL_DEFAULT)? {
        sys::xattr::set(fd.as_fd(), ACL_DEFAULT, &acl)?;
    }
    sys::attr::chmod(fd.as_fd(), stat.perm() | 0o700)?;
    cx.as_creator(caller, || make(fd.as_fd()))?;
    let (staged, ()) = upper.work.stage(|dir, name| {
        sys::node::rename(
            fd.as_fd(),
            b"new",
            dir,
            name,
            sys::node::RenameMode::NoReplace,
        )
    })?;
    drop(twin);
    Ok(staged)
}

/// Makes a directory opaque that is in the upper alone: it hides the directories below it.
pub(crate) fn set_opaque(cx: &Context<'_>, dir: BorrowedFd<'_>) -> Result<()> {
    let space = cx.stack.upper()?.layer.space();
    let mark = space.opaque().as_bytes();
    if sys::xattr::get(dir, mark)?.is_some_and(|old| old == OPAQUE_XATTR_WHITEOUTS) {
        // The xattr has one value for both, and marked files in a directory without theirs would show.
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

/// Copies owner, xattrs, mode and times, in an order in which the copy never allows more than the original: it
/// was made for this process alone, and the mode is set after the owner and the ACL. Each is a change of its
/// own in the journal below, so equal values are not set. Returns the attributes of the copy as it was made.
fn copy_attributes(
    cx: &Context<'_>,
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
    let lent = copy_xattrs(cx, layer, source, stat, target)?;
    if stat.kind() != FileKind::Symlink {
        sys::attr::chmod(target, stat.perm())?;
    }
    let mark = cx.stack.upper()?.layer.space().ino().as_bytes();
    match sys::xattr::set(target, mark, &lent.to_value()) {
        Ok(()) => {}
        // user.* xattrs exist on regular files and directories only. Without the marker the object has
        // another number after a remount; nothing else depends on it.
        Err(Error::Errno(Errno::PERM | Errno::OPNOTSUPP))
            if !matches!(stat.kind(), FileKind::Regular | FileKind::Directory) => {}
        Err(error) => return Err(error),
    }
    sys::attr::utimens(target, SetTime::At(stat.atime), mtime)?;
    Ok(made)
}

/// Copies the xattrs that a user can see. Returns the object whose number the copy shows.
fn copy_xattrs(
    cx: &Context<'_>,
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
            // A number that was inherited already stays its first owner's, as long as that layer is in the stack.
            if let Some(mark) = NumberMark::parse(value)?
                && cx
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
        // The other markers concern the source's own layer; escaped ones are a user's.
        if layer.space().to_mount(name).is_none() {
            continue;
        }
        sys::xattr::set(target, name, value)?;
    }
    Ok(lent)
}

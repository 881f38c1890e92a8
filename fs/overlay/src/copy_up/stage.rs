//! Staging: objects are created in the work directory, and later committed by a copy-up or a creation.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;

use crate::inode::FileState;
use crate::reach::{Caller, Context};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::foreign::is_marker_xattr;
use cowl_layers::format::{ACL_DEFAULT, InodeNumberXattr, OPAQUE, OPAQUE_XATTR_WHITEOUTS};
use cowl_layers::layer::{Layer, LayerDir, RecordedAttributes, Staged, zero_device};
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Stat};

/// The extent of a file's copy-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyExtent {
    /// The content and all metadata.
    Data,
    /// Owner, mode, times and xattrs. The content stays in the lower layer if the mount has metacopy enabled.
    Metadata,
    /// All metadata but no content, because the file is about to be truncated to size 0.
    Truncate,
}

/// A staged copy of a file, ready for its commit.
pub(super) struct StagedFile {
    pub(super) staged: Staged,
    /// The content stays in the lower layer.
    pub(super) metacopy: bool,
    pub(super) stat: Stat,
}

/// Stages a copy of `file` with its attributes and xattrs. `source` is a descriptor of it.
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
                    // The name no longer refers to the file: it has a whiteout or another file.
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
            // On disk, a device 0:0 is a regular file with a marker xattr.
            sys::node::mknod(dir, name, FileKind::Regular, 0o600, 0)?;
            let new = sys::dir::open_path(dir, name)?;
            zero_device::mark_file(new.as_fd(), upper.layer.space())?;
            Ok(new)
        }
        _ => {
            sys::node::mknod(dir, name, kind, 0o600, stat.rdev)?;
            sys::dir::open_path(dir, name)
        }
    })?;
    let layer = file.loc.dir.layer();
    // The truncation becomes visible together with the copy, so it sets the modification time here.
    let truncated = extent == CopyExtent::Truncate;
    let mtime = if truncated {
        SetTime::Now
    } else {
        SetTime::At(stat.mtime)
    };
    let new_stat = copy_attributes(cx, layer, source.as_fd(), stat, target.as_fd(), mtime)?;
    if metacopy {
        let marker = upper.layer.space().metacopy().as_bytes();
        sys::xattr::set(target.as_fd(), marker, b"")?;
    }
    if kind == FileKind::Regular {
        match copied {
            // Otherwise a power cut could replace the complete original with an empty file.
            Some(copied) => cx.order()?.content_first(&target, copied)?,
            // No data was copied, so only the attributes must be ordered before the rename.
            None => cx.order()?.attributes_first(&target)?,
        }
    }
    Ok(StagedFile {
        staged,
        metacopy,
        stat: new_stat,
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
    let new_stat = copy_attributes(cx, layer, (*fd).as_fd(), &stat, target.as_fd(), mtime)?;
    Ok((staged, new_stat))
}

/// Stages a new object in a temporary directory with the attributes of `parent`.
///
/// So the object inherits the group, setgid bit and ACL that it would inherit in `parent`. `make` must create it under
/// the name `new`, with the mode that it gets.
pub(crate) fn stage_in_temp_dir(
    cx: &Context<'_>,
    caller: Caller,
    parent: BorrowedFd<'_>,
    mode: u32,
    mut make: impl FnMut(BorrowedFd<'_>, u32) -> Result<()>,
) -> Result<Staged> {
    let upper = cx.stack.upper()?;
    let stat = sys::stat::stat_fd(parent)?;
    let (temp_dir, fd) = upper.work.stage(|dir, name| {
        sys::node::mkdir(dir, name, 0o700)?;
        sys::dir::open_dir(dir, name)
    })?;
    sys::attr::chown(fd.as_fd(), Some(stat.uid), Some(stat.gid))?;
    if let Some(acl) = sys::xattr::get(parent, ACL_DEFAULT)? {
        sys::xattr::set(fd.as_fd(), ACL_DEFAULT, &acl)?;
    }
    sys::attr::chmod(fd.as_fd(), stat.perm() | 0o700)?;
    cx.as_creator(caller, mode, |mode| make(fd.as_fd(), mode))?;
    let (staged, ()) = upper.work.stage(|dir, name| {
        sys::node::rename(
            fd.as_fd(),
            b"new",
            dir,
            name,
            sys::node::RenameMode::NoReplace,
        )
    })?;
    drop(temp_dir);
    Ok(staged)
}

/// Sets the opaque marker on a directory that is only in the upper layer, so that it hides lower directories at its path.
pub(crate) fn set_opaque(cx: &Context<'_>, dir: BorrowedFd<'_>) -> Result<()> {
    let space = cx.stack.upper()?.layer.space();
    let marker = space.opaque().as_bytes();
    if sys::xattr::get(dir, marker)?.is_some_and(|old| old == OPAQUE_XATTR_WHITEOUTS) {
        // The value of the same xattr also enables xattr whiteouts. Remove these whiteouts first, because they
        // would become visible files.
        for entry in sys::dir::entries(dir)? {
            let whiteout = space.whiteout().as_bytes();
            if sys::xattr::get_at(dir, &entry.name, whiteout)?.is_some()
                && sys::stat::stat_at(dir, &entry.name)?.kind() == FileKind::Regular
            {
                sys::node::unlink(dir, &entry.name)?;
            }
        }
    }
    sys::xattr::set(dir, marker, OPAQUE)
}

/// Copies owner, xattrs, mode and times, and returns the attributes that the copy had before.
///
/// This order ensures that the copy never grants more access than the original: it is created with a private mode, and
/// the mode is set after the owner and the ACL. An owner that is already correct is not set, because each change adds
/// an entry to the file system's journal.
pub(crate) fn copy_attributes(
    cx: &Context<'_>,
    layer: &Layer,
    source: BorrowedFd<'_>,
    stat: &Stat,
    target: BorrowedFd<'_>,
    mtime: SetTime,
) -> Result<Stat> {
    let created = sys::stat::stat_fd(target)?;
    if (created.uid, created.gid) != (stat.uid, stat.gid) {
        sys::attr::chown(target, Some(stat.uid), Some(stat.gid))?;
    }
    let number = copy_xattrs(cx, layer, source, stat, target)?;
    if stat.kind() != FileKind::Symlink {
        sys::attr::chmod(target, stat.perm())?;
    }
    let marker = cx.stack.upper()?.layer.space().ino().as_bytes();
    match sys::xattr::set(target, marker, &number.to_value()) {
        Ok(()) => {}
        // Only regular files and directories can have user.* xattrs. Without the marker, the object has a
        // different inode number after a remount; nothing else depends on it.
        Err(Error::Errno(Errno::PERM | Errno::OPNOTSUPP))
            if !matches!(stat.kind(), FileKind::Regular | FileKind::Directory) => {}
        Err(error) => return Err(error),
    }
    sys::attr::utimens(target, SetTime::At(stat.atime), mtime)?;
    Ok(created)
}

/// Copies the xattrs that are visible through the mount.
///
/// Returns the inode number that the copy must report, as the layer and the inode number of its first owner.
fn copy_xattrs(
    cx: &Context<'_>,
    layer: &Layer,
    source: BorrowedFd<'_>,
    stat: &Stat,
    target: BorrowedFd<'_>,
) -> Result<InodeNumberXattr> {
    let mut number = InodeNumberXattr {
        layer: layer.id(),
        ino: stat.ino,
    };
    let all = sys::xattr::all(source)?;
    let value = |name: &str| {
        let found = all.iter().find(|(other, _)| other == name.as_bytes());
        Ok::<_, Error>(found.map(|(_, value)| value.clone()))
    };
    let internal = layer.space().internal_xattr(value)?;
    for (name, value) in &all {
        if internal.is_some_and(|internal| name == internal.as_bytes()) {
            continue;
        }
        if name == layer.space().ino().as_bytes() {
            // An inherited number continues to refer to its first owner while that layer is in the stack.
            if let Some(inherited) = InodeNumberXattr::parse(value)?
                && cx
                    .stack
                    .view()
                    .layers()
                    .iter()
                    .any(|l| l.id() == inherited.layer)
            {
                number = inherited;
            }
            continue;
        }
        if layer.is_foreign() && is_marker_xattr(name) {
            continue;
        }
        if name == layer.space().recorded().as_bytes() {
            // The copy gets the attributes on which the record depends, so the record continues to apply.
            match RecordedAttributes::parse(value) {
                Ok(_) => sys::xattr::set(target, name, value)?,
                Err(why) => log::debug!("a record of attributes is ignored: {why}"),
            }
            continue;
        }
        // The other markers apply only to the source's layer. Escaped ones belong to the user and are copied.
        if layer.space().to_mount(name).is_none() {
            continue;
        }
        sys::xattr::set(target, name, value)?;
    }
    Ok(number)
}

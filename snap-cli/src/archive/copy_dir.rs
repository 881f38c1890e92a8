//! Copies a directory into a new tree, which is that of a layer or a plain directory.
//!
//! The copy is exact: owners, modes, times, hard links, devices, xattrs and holes. It stays on one file system. It
//! works with directory descriptors, so that paths of any length work and a concurrent exchange of a directory for a
//! symbolic link cannot redirect the copy.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::sys::{content, copy, dir, node, stat, xattr};
use rustix::fs::OFlags;

use super::report::TransferReport;
use crate::tree::attrs::{self, Attrs};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::hard_links::HardLinks;
use crate::tree::omissions::{OBJECT_UNSUPPORTED, Omissions};
use crate::tree::{create, position};

/// The number of directories of the current path that stay open on each side. Those above are reopened through ".."
/// when the copy returns to them.
const OPEN_LEVELS: usize = 8;

/// A directory whose content is being copied.
struct CopyLevel {
    stat: Stat,
    attrs: Attrs,
    /// The names that remain to be copied; the next one is the last.
    todo: Vec<Vec<u8>>,
    source: Option<OwnedFd>,
    target: Option<OwnedFd>,
    target_id: (u64, u64),
    /// The length of the parent's path.
    parent_length: usize,
}

struct Copy<'a> {
    levels: Vec<CopyLevel>,
    /// The path of the deepest level.
    path: Vec<u8>,
    /// The device of the source. Other file systems are not copied.
    dev: u64,
    linked: HardLinks,
    /// The xattr namespace of the layer; `None` for a plain directory, which has no marker xattrs.
    space: Option<XattrSpace>,
    omissions: Omissions,
    progress: OnProgress<'a>,
    out: TransferReport,
}

/// Copies the content of the directory `source` into the empty directory `target`.
///
/// `space` is the xattr namespace of the layer that `target` belongs to, or `None` if it is a plain directory.
pub(super) fn copy(
    source: &Path,
    target: &Path,
    space: Option<XattrSpace>,
    omissions: Omissions,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let name = source.as_os_str().as_bytes();
    let from = dir::open_root(source).context("cannot open the source directory", name)?;
    let to = dir::open_root(target).context(
        "cannot open the target directory",
        target.as_os_str().as_bytes(),
    )?;
    let from_stat = stat::stat_fd(&from).context("cannot read the source directory", name)?;
    refuse_overlap(&from_stat, &to, name)?;
    create::prepare_root(to.as_fd())?;
    let mut copy = Copy {
        levels: Vec::new(),
        path: Vec::new(),
        dev: from_stat.dev,
        linked: HardLinks::new(to.as_fd())?,
        space,
        omissions,
        progress,
        out: TransferReport::default(),
    };
    copy.enter(0, from_stat, from, to, b".")?;
    while !copy.levels.is_empty() {
        copy.step()?;
    }
    (copy.progress)(copy.out.done);
    copy.out.notes.append(copy.omissions.notes);
    Ok(copy.out)
}

/// Returns the device and inode number of a directory.
fn dir_id(fd: &impl AsFd) -> Result<(u64, u64)> {
    let stat = stat::stat_fd(fd).context("cannot read a directory", b"")?;
    Ok((stat.dev, stat.ino))
}

/// Refuses a source that contains the target, because the copy would copy itself.
///
/// A target that contains the source needs no check here, because a target must be empty.
fn refuse_overlap(source: &Stat, target: &OwnedFd, name: &[u8]) -> Result<()> {
    let mut at = target
        .try_clone()
        .context("cannot open the target directory", name)?;
    let mut previous = None;
    loop {
        let here = dir_id(&at)?;
        if here == (source.dev, source.ino) {
            let what = "the source contains the target of the copy";
            return Err(TreeError::new(ErrorKind::Overlap, what).at(name));
        }
        // The root is its own parent.
        if previous == Some(here) {
            return Ok(());
        }
        previous = Some(here);
        at = position::open_parent(&at)
            .context("cannot open a parent directory of the target", name)?;
    }
}

impl Copy<'_> {
    /// Copies the next entry of the deepest directory, or completes that directory.
    fn step(&mut self) -> Result<()> {
        let Some(level) = self.levels.last_mut() else {
            return Ok(());
        };
        let Some(name) = level.todo.pop() else {
            return self.leave();
        };
        let (parent_length, depth) = (self.path.len(), self.levels.len());
        let mut path = std::mem::take(&mut self.path);
        if parent_length > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(&name);
        let result = self.copy_entry(&name, &path, parent_length);
        if self.levels.len() == depth {
            path.truncate(parent_length);
        }
        self.path = path;
        result
    }

    fn copy_entry(&mut self, name: &[u8], path: &[u8], parent_length: usize) -> Result<()> {
        let (source, target) = open_dirs(&self.levels, path)?;
        let found = match dir::open_path(source, name) {
            Ok(fd) => fd,
            // The entry was removed after the directory was read.
            Err(error) if error.errno() == Errno::NOENT => return Ok(()),
            Err(error) => return Err(error).context("cannot open", path),
        };
        let stat = stat::stat_fd(&found).context("cannot read", path)?;
        let inner = match stat.kind() {
            FileKind::Directory => match create::dir(target, name, path) {
                Ok(inner) => Some(inner),
                Err(error) => {
                    return self
                        .omissions
                        .unsupported(error, OBJECT_UNSUPPORTED, path, b"");
                }
            },
            _ => None,
        };
        self.out.done.entries += 1;
        if self.out.done.entries.is_multiple_of(64) {
            (self.progress)(self.out.done);
        }
        if let Some(inner) = inner {
            return self.enter(parent_length, stat, found, inner, path);
        }
        if stat.dev != self.dev {
            let why = "a mount point in the source: not copied";
            self.out.notes.add(why, path);
            return Ok(());
        }
        if let Some(first) = self.linked.find(&stat)? {
            let (_, target) = open_dirs(&self.levels, path)?;
            let linked = match self.space {
                Some(space) => create::link(first.as_fd(), target, name, space, path),
                None => create::created(
                    node::link_fd(first.as_fd(), target, name),
                    "cannot create the hard link",
                    path,
                ),
            };
            return linked.or_else(|error| self.omit_object(error, name, path));
        }
        let (source, target) = open_dirs(&self.levels, path)?;
        let from = CopySource {
            parent: source,
            found: &found,
            stat: &stat,
        };
        let copied = copy_one(&from, (target, name), self.space, path, &mut self.omissions);
        let bytes = match copied {
            Ok(bytes) => bytes,
            Err(error) => return self.omit_object(error, name, path),
        };
        let Some(CopyLevel {
            target: Some(target),
            ..
        }) = self.levels.last()
        else {
            return Err(closed(path));
        };
        let location = (target.as_fd(), name);
        self.linked
            .record(&stat, location, path, self.levels.len())?;
        self.out.done.bytes = self.out.done.bytes.saturating_add(bytes);
        if bytes > 0 {
            (self.progress)(self.out.done);
        }
        Ok(())
    }

    /// Omits an object that the target cannot store, and removes what was created of it.
    fn omit_object(&mut self, error: TreeError, name: &[u8], path: &[u8]) -> Result<()> {
        self.omissions
            .unsupported(error, OBJECT_UNSUPPORTED, path, b"")?;
        let (_, target) = open_dirs(&self.levels, path)?;
        create::remove_partial(target, name, path)
    }

    /// Enters a directory. The copy of a directory on another file system stays empty.
    fn enter(
        &mut self,
        parent_length: usize,
        stat: Stat,
        source: OwnedFd,
        target: OwnedFd,
        path: &[u8],
    ) -> Result<()> {
        let xattrs = xattr::all(source.as_fd()).context("cannot read the xattrs", path)?;
        let xattrs = to_target_xattrs(self.space, xattrs);
        let mut todo = Vec::new();
        if stat.dev == self.dev {
            let entries =
                dir::entries(source.as_fd()).context("cannot read the directory", path)?;
            todo.extend(entries.into_iter().map(|entry| entry.name.into_vec()));
            // `step` pops from the end.
            todo.sort_unstable_by(|a, b| b.cmp(a));
        } else {
            let why = "a mount point in the source: an empty directory in the copy";
            self.out.notes.add(why, path);
        }
        let target_id = dir_id(&target)?;
        self.levels.push(CopyLevel {
            parent_length,
            attrs: Attrs::from_stat(&stat, xattrs),
            stat,
            todo,
            source: Some(source),
            target: Some(target),
            target_id,
        });
        let depth = self.levels.len();
        // The descriptors of the root stay open, and those of the intermediate directories are closed.
        if let Some(far) = depth.checked_sub(OPEN_LEVELS).filter(|&far| far > 0)
            && let Some(level) = self.levels.get_mut(far)
        {
            level.source = None;
            level.target = None;
        }
        Ok(())
    }

    /// Sets the attributes of a directory whose content is complete, and returns to its parent.
    fn leave(&mut self) -> Result<()> {
        let path = std::mem::take(&mut self.path);
        let Some(level) = self.levels.pop() else {
            return Ok(());
        };
        let (source, target) = level
            .source
            .zip(level.target)
            .ok_or_else(|| closed(&path))?;
        if let Some(parent) = self.levels.last_mut()
            && parent.source.is_none()
        {
            // This precedes `apply`, whose mode may deny the owner a lookup of "..".
            let what = "cannot return to the parent directory";
            let from = position::open_parent(&source).context(what, &path)?;
            let to = position::open_parent(&target).context(what, &path)?;
            let is_same = dir_id(&from)? == (parent.stat.dev, parent.stat.ino)
                && dir_id(&to)? == parent.target_id;
            if !is_same {
                let what = "the directory was moved while it was copied";
                return Err(TreeError::new(ErrorKind::Io, what).at(path));
            }
            parent.source = Some(from);
            parent.target = Some(to);
        }
        if self.levels.is_empty() {
            self.linked.finish()?;
        }
        let kind = FileKind::Directory;
        let omissions = &mut self.omissions;
        attrs::apply_except(target.as_fd(), kind, &level.attrs, &path, omissions)?;
        self.path = path;
        self.path.truncate(level.parent_length);
        Ok(())
    }
}

/// Returns the descriptors of the deepest directory in source and target.
fn open_dirs<'a>(levels: &'a [CopyLevel], path: &[u8]) -> Result<(BorrowedFd<'a>, BorrowedFd<'a>)> {
    let level = levels.last();
    let source = level.and_then(|level| level.source.as_ref());
    let target = level.and_then(|level| level.target.as_ref());
    let (source, target) = source.zip(target).ok_or_else(|| closed(path))?;
    Ok((source.as_fd(), target.as_fd()))
}

fn closed(path: &[u8]) -> TreeError {
    TreeError::new(
        ErrorKind::Io,
        "internal error: a directory was closed too early",
    )
    .at(path)
}

/// Returns the xattrs that the copy gets: in a layer, those that look like markers are escaped.
fn to_target_xattrs(space: Option<XattrSpace>, xattrs: attrs::Xattrs) -> attrs::Xattrs {
    match space {
        Some(space) => attrs::escape_markers(space, xattrs),
        None => xattrs,
    }
}

/// An object to copy.
struct CopySource<'a> {
    parent: BorrowedFd<'a>,
    found: &'a OwnedFd,
    stat: &'a Stat,
}

/// Copies anything but a directory, and returns the size of its content in bytes.
fn copy_one(
    source: &CopySource<'_>,
    (target, name): (BorrowedFd<'_>, &[u8]),
    space: Option<XattrSpace>,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<u64> {
    let CopySource {
        parent,
        found,
        stat,
    } = source;
    let xattrs = xattr::all(found.as_fd()).context("cannot read the xattrs", path)?;
    let attrs = Attrs::from_stat(stat, to_target_xattrs(space, xattrs));
    let kind = stat.kind();
    match kind {
        FileKind::Regular => {
            let from = open_without_atime(found).context("cannot open the file", path)?;
            let to = create::file(target, name, path)?;
            let copied = copy::copy_data(from.as_fd(), to.as_fd(), stat.size);
            create::created(copied, "cannot copy the content", path)?;
            attrs::apply_except(to.as_fd(), kind, &attrs, path, omissions)?;
            return Ok(stat.size);
        }
        FileKind::Symlink => {
            let link =
                dir::readlink(*parent, name).context("cannot read the symbolic link", path)?;
            create::symlink(target, name, &link, (&attrs, omissions), path)?;
        }
        FileKind::CharDevice | FileKind::BlockDevice | FileKind::Fifo | FileKind::Socket => {
            let node = (kind, stat.rdev);
            let attrs = (&attrs, omissions);
            match space {
                Some(space) => create::special(target, name, node, attrs, space, path)?,
                None => create::node(target, name, node, attrs, path)?,
            }
        }
        FileKind::Directory => {}
    }
    Ok(0)
}

/// Opens a file for reading, without an update of its atime where the caller has the permission (O_NOATIME).
fn open_without_atime(found: &OwnedFd) -> cowl_layers::error::Result<OwnedFd> {
    match content::reopen(found.as_fd(), OFlags::RDONLY | OFlags::NOATIME) {
        Err(error) if error.errno() == Errno::PERM => {
            content::reopen(found.as_fd(), OFlags::RDONLY)
        }
        other => other,
    }
}

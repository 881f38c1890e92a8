//! Copying a folder of this machine into a new tree, a layer's or a plain one, exactly: owners, modes, times, links, devices,
//! attributes, holes. Stays on one file system. Works by folder descriptors, so that no path is too
//! long and nobody can lead the copy astray by exchanging a folder for a link meanwhile.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::sys::{content, copy, dir, node, stat, xattr};
use rustix::fs::OFlags;

use super::report::Report;
use crate::tree::attrs::{self, Attrs};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::hard_links::HardLinks;
use crate::tree::{create, position};

/// How many folders of the present path are kept open on each side; those above are opened again,
/// through "..", when the copy comes back to them.
const KEPT: usize = 8;

/// A folder that is being copied.
struct Level {
    stat: Stat,
    attrs: Attrs,
    /// What is still to be copied, the next one last.
    todo: Vec<Vec<u8>>,
    source: Option<OwnedFd>,
    target: Option<OwnedFd>,
    target_id: (u64, u64),
    /// The length of the path of the one above.
    above: usize,
}

struct Copy<'a> {
    levels: Vec<Level>,
    /// The path of the deepest level.
    path: Vec<u8>,
    /// The device that is not left.
    dev: u64,
    linked: HardLinks,
    /// Of the layer that is filled; `None` for a plain folder, in which nothing is a mark.
    space: Option<XattrSpace>,
    progress: OnProgress<'a>,
    out: Report,
}

/// Copies everything in `source` into the empty folder `target`.
pub(super) fn copy(
    source: &Path,
    target: &Path,
    space: Option<XattrSpace>,
    progress: OnProgress<'_>,
) -> Result<Report> {
    let name = source.as_os_str().as_bytes();
    let from = dir::open_root(source).context("can't open the source folder", name)?;
    let to = dir::open_root(target).context(
        "can't open the target folder",
        target.as_os_str().as_bytes(),
    )?;
    let from_stat = stat::stat_fd(&from).context("can't read the source folder", name)?;
    refuse_overlap(&from_stat, &to, name)?;
    create::prepare_root(to.as_fd())?;
    let mut copy = Copy {
        levels: Vec::new(),
        path: Vec::new(),
        dev: from_stat.dev,
        linked: HardLinks::new(to.as_fd())?,
        space,
        progress,
        out: Report::default(),
    };
    copy.enter(0, from_stat, from, to, b".")?;
    while !copy.levels.is_empty() {
        copy.step()?;
    }
    (copy.progress)(copy.out.done);
    Ok(copy.out)
}

fn id(fd: &impl AsFd) -> Result<(u64, u64)> {
    let stat = stat::stat_fd(fd).context("can't read a folder", b"")?;
    Ok((stat.dev, stat.ino))
}

/// Refuses a source that contains the target: the copy would copy itself. (A target that contains
/// the source is not empty, and is refused for that.)
fn refuse_overlap(source: &Stat, target: &OwnedFd, name: &[u8]) -> Result<()> {
    let mut at = target
        .try_clone()
        .context("can't keep the target folder open", name)?;
    let mut seen = None;
    loop {
        let here = id(&at)?;
        if here == (source.dev, source.ino) {
            let what = "the source contains the place where the copy would be made";
            return Err(TreeError::new(ErrorKind::Overlap, what).at(name));
        }
        if seen == Some(here) {
            return Ok(());
        }
        seen = Some(here);
        at = position::open_parent(&at).context("can't open the folder above the target", name)?;
    }
}

impl Copy<'_> {
    /// Copies the next entry of the deepest folder, or finishes that folder.
    fn step(&mut self) -> Result<()> {
        let Some(level) = self.levels.last_mut() else {
            return Ok(());
        };
        let Some(name) = level.todo.pop() else {
            return self.leave();
        };
        let (above, depth) = (self.path.len(), self.levels.len());
        let mut path = std::mem::take(&mut self.path);
        if above > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(&name);
        let done = self.entry(&name, &path, above);
        if self.levels.len() == depth {
            path.truncate(above);
        }
        self.path = path;
        done
    }

    fn entry(&mut self, name: &[u8], path: &[u8], above: usize) -> Result<()> {
        let (source, target) = self.here().ok_or_else(|| closed(path))?;
        let found = match dir::open_path(source, name) {
            Ok(fd) => fd,
            // Removed since the folder was read: it is not part of the copy.
            Err(error) if error.errno() == Errno::NOENT => return Ok(()),
            Err(error) => return Err(error).context("can't open", path),
        };
        let stat = stat::stat_fd(&found).context("can't read", path)?;
        let inner = match stat.kind() {
            FileKind::Directory => Some(create::dir(target, name, path)?),
            _ => None,
        };
        self.out.done.entries += 1;
        if self.out.done.entries.is_multiple_of(64) {
            (self.progress)(self.out.done);
        }
        if let Some(inner) = inner {
            return self.enter(above, stat, found, inner, path);
        }
        if stat.dev != self.dev {
            let why = "a mount point in the source: not copied";
            self.out.notes.push((path.to_vec(), why));
            return Ok(());
        }
        if let Some(first) = self.linked.find(&stat)? {
            let (_, target) = self.here().ok_or_else(|| closed(path))?;
            return match self.space {
                Some(space) => create::link(first.as_fd(), target, name, space, path),
                None => node::link_fd(first.as_fd(), target, name)
                    .context("can't make the hard link", path),
            };
        }
        let (source, target) = self.here().ok_or_else(|| closed(path))?;
        let bytes = copy_one(source, target, name, &found, &stat, self.space, path)?;
        let Some(Level {
            target: Some(target),
            ..
        }) = self.levels.last()
        else {
            return Err(closed(path));
        };
        let place = (target.as_fd(), name);
        self.linked.record(&stat, place, path, self.levels.len())?;
        self.out.done.bytes = self.out.done.bytes.saturating_add(bytes);
        if bytes > 0 {
            (self.progress)(self.out.done);
        }
        Ok(())
    }

    fn here(&self) -> Option<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        let level = self.levels.last()?;
        Some((
            level.source.as_ref()?.as_fd(),
            level.target.as_ref()?.as_fd(),
        ))
    }

    /// Goes into a folder. One on another file system stays empty.
    fn enter(
        &mut self,
        above: usize,
        stat: Stat,
        source: OwnedFd,
        target: OwnedFd,
        path: &[u8],
    ) -> Result<()> {
        let xattrs = xattr::all(source.as_fd()).context("can't read the attributes", path)?;
        let xattrs = kept(self.space, xattrs);
        let mut todo = Vec::new();
        if stat.dev == self.dev {
            let entries = dir::entries(source.as_fd()).context("can't read the folder", path)?;
            todo.extend(entries.into_iter().map(|entry| entry.name.into_vec()));
            // The next one is taken from the end.
            todo.sort_unstable_by(|a, b| b.cmp(a));
        } else {
            let why = "a mount point in the source: an empty folder in the copy";
            self.out.notes.push((path.to_vec(), why));
        }
        let target_id = id(&target)?;
        self.levels.push(Level {
            above,
            attrs: Attrs::from_stat(&stat, xattrs),
            stat,
            todo,
            source: Some(source),
            target: Some(target),
            target_id,
        });
        let depth = self.levels.len();
        // The root's descriptors stay, those of the middle go.
        if let Some(far) = depth.checked_sub(KEPT).filter(|&far| far > 0)
            && let Some(level) = self.levels.get_mut(far)
        {
            level.source = None;
            level.target = None;
        }
        Ok(())
    }

    /// Gives a folder whose content is complete its attributes, and goes back to the one above.
    fn leave(&mut self) -> Result<()> {
        let path = std::mem::take(&mut self.path);
        let Some(level) = self.levels.pop() else {
            return Ok(());
        };
        let (source, target) = level
            .source
            .zip(level.target)
            .ok_or_else(|| closed(&path))?;
        if let Some(above) = self.levels.last_mut()
            && above.source.is_none()
        {
            // Before its owner may be shut out of the one that is left.
            let what = "can't go back to the folder above";
            let from = position::open_parent(&source).context(what, &path)?;
            let to = position::open_parent(&target).context(what, &path)?;
            let same =
                id(&from)? == (above.stat.dev, above.stat.ino) && id(&to)? == above.target_id;
            if !same {
                let what = "the folder was moved while it was copied";
                return Err(TreeError::new(ErrorKind::Io, what).at(path));
            }
            above.source = Some(from);
            above.target = Some(to);
        }
        if self.levels.is_empty() {
            self.linked.finish()?;
        }
        attrs::apply(target.as_fd(), FileKind::Directory, &level.attrs, &path)?;
        self.path = path;
        self.path.truncate(level.above);
        Ok(())
    }
}

fn closed(path: &[u8]) -> TreeError {
    TreeError::new(ErrorKind::Io, "a folder was closed too early").at(path)
}

/// The attributes as the copy keeps them.
fn kept(space: Option<XattrSpace>, xattrs: attrs::Xattrs) -> attrs::Xattrs {
    match space {
        Some(space) => attrs::escape_markers(space, xattrs),
        None => xattrs,
    }
}

/// Copies anything but a folder, and says how many bytes of content it has.
fn copy_one(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    name: &[u8],
    found: &OwnedFd,
    stat: &Stat,
    space: Option<XattrSpace>,
    path: &[u8],
) -> Result<u64> {
    let xattrs = xattr::all(found.as_fd()).context("can't read the attributes", path)?;
    let attrs = Attrs::from_stat(stat, kept(space, xattrs));
    let kind = stat.kind();
    match kind {
        FileKind::Regular => {
            let from = open_quietly(found).context("can't open the file", path)?;
            let to = create::file(target, name, path)?;
            copy::copy_data(from.as_fd(), to.as_fd(), stat.size)
                .context("can't copy the content", path)?;
            attrs::apply(to.as_fd(), kind, &attrs, path)?;
            return Ok(stat.size);
        }
        FileKind::Symlink => {
            let link = dir::readlink(source, name).context("can't read the symbolic link", path)?;
            create::symlink(target, name, &link, &attrs, path)?;
        }
        FileKind::CharDevice | FileKind::BlockDevice | FileKind::Fifo | FileKind::Socket => {
            let what = (kind, stat.rdev);
            match space {
                Some(space) => create::special(target, name, what, &attrs, space, path)?,
                None => create::node(target, name, what, &attrs, path)?,
            }
        }
        FileKind::Directory => {}
    }
    Ok(0)
}

/// Opens for reading, leaving the last-read time alone where that is allowed.
fn open_quietly(found: &OwnedFd) -> cowl_layers::error::Result<OwnedFd> {
    match content::reopen(found.as_fd(), OFlags::RDONLY | OFlags::NOATIME) {
        Err(error) if error.errno() == Errno::PERM => {
            content::reopen(found.as_fd(), OFlags::RDONLY)
        }
        other => other,
    }
}

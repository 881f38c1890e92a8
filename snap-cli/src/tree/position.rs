//! A position in a tree: a directory and the path to it.
//!
//! A step down or up is one open at any depth, and at most [`OPEN`] descriptors are held. Directories further up are
//! reopened through `..`; if one is not the same inode, that is an error.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::{dir, stat};
use rustix::fs::OFlags;

use super::path::common;

/// How many directories of the path stay open.
pub(crate) const OPEN: usize = 8;

/// A position in a tree.
pub(crate) struct Position {
    root: OwnedFd,
    path: Vec<u8>,
    stages: Vec<Stage>,
}

/// A directory on the path. The last one is open, and so are the nearest ones above it.
struct Stage {
    /// The end of its name in the path.
    end: usize,
    id: (u64, u64),
    fd: Option<OwnedFd>,
}

impl Position {
    /// Creates a position at the root of a tree.
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self {
            root,
            path: Vec::new(),
            stages: Vec::new(),
        }
    }

    /// Returns the root.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Returns the current directory.
    pub(crate) fn here(&self) -> BorrowedFd<'_> {
        let last = self.stages.last().and_then(|stage| stage.fd.as_ref());
        last.map_or(self.root.as_fd(), |fd| fd.as_fd())
    }

    /// Returns the depth of the current directory below the root.
    pub(crate) fn depth(&self) -> usize {
        self.stages.len()
    }

    /// Returns the device and inode of the directory at `depth` on the path.
    pub(crate) fn id_at(&self, depth: usize) -> Option<(u64, u64)> {
        self.stages.get(depth.checked_sub(1)?).map(|stage| stage.id)
    }

    /// Enters a directory that was opened by `name` in the current one.
    pub(crate) fn push(&mut self, name: &[u8], fd: OwnedFd) -> Result<()> {
        let id = id(&fd)?;
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        self.stages.push(Stage {
            end: self.path.len(),
            id,
            fd: Some(fd),
        });
        if let Some(far) = self.stages.len().checked_sub(OPEN + 1)
            && let Some(far) = self.stages.get_mut(far)
        {
            far.fd = None;
        }
        Ok(())
    }

    /// Goes up to the common prefix with a normalized path, and returns the rest of that path.
    pub(crate) fn towards<'p>(&mut self, path: &'p [u8]) -> Result<&'p [u8]> {
        let depth = self.shared(path);
        self.back_to(depth)?;
        let rest = path.get(self.path.len()..).unwrap_or_default();
        Ok(rest.strip_prefix(b"/").unwrap_or(rest))
    }

    /// Leaves the directory at a normalized path and everything below it, because it may be replaced.
    pub(crate) fn forget(&mut self, path: &[u8]) -> Result<()> {
        let depth = self.shared(path);
        match self.stages.get(..depth).and_then(<[_]>::last) {
            Some(stage) if stage.end == path.len() => self.back_to(depth - 1),
            _ => Ok(()),
        }
    }

    /// Returns how many directories of the position are on a path.
    fn shared(&self, path: &[u8]) -> usize {
        let same = common(&self.path, path);
        let depth = self.stages.partition_point(|stage| stage.end <= same);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        match self.stages.get(..depth).and_then(<[_]>::last) {
            Some(stage) if !ends_here(stage.end) => depth - 1,
            _ => depth,
        }
    }

    /// Opens the parent of the current directory, so that the current one may become unsearchable before it is left.
    pub(crate) fn open_above(&mut self) -> Result<()> {
        if let [.., above, last] = self.stages.as_mut_slice()
            && above.fd.is_none()
        {
            let fd = last.fd.as_ref().ok_or(Error::Errno(Errno::STALE))?;
            above.fd = Some(up(fd, above.id)?);
        }
        Ok(())
    }

    /// Goes up to this depth, through `..`, or from the root if that is closer.
    pub(crate) fn back_to(&mut self, depth: usize) -> Result<()> {
        let is_open = |stage: &Stage| stage.fd.is_some();
        let wanted = depth.checked_sub(1).and_then(|at| self.stages.get(at));
        if wanted.is_none_or(is_open) {
            self.cut(depth);
            return Ok(());
        }
        let lowest = self.stages.iter().skip(depth).position(is_open);
        match lowest {
            Some(steps) if steps < depth => {
                let first = self.stages.get_mut(depth + steps);
                let first = first.and_then(|stage| stage.fd.take());
                let mut fd = first.ok_or(Error::Errno(Errno::STALE))?;
                for at in (depth..=depth + steps).rev() {
                    fd = up(&fd, self.id_at(at).unwrap_or_default())?;
                }
                self.cut(depth);
                if let Some(stage) = self.stages.last_mut() {
                    stage.fd = Some(fd);
                }
                Ok(())
            }
            _ => {
                let path = std::mem::take(&mut self.path);
                let stages = std::mem::take(&mut self.stages);
                let mut begin = 0;
                for stage in stages.iter().take(depth) {
                    let name = path.get(begin..stage.end).unwrap_or_default();
                    let fd = dir::open_dir(self.here(), name)?;
                    self.push(name, fd)?;
                    if self.id_at(self.depth()) != Some(stage.id) {
                        return Err(Error::Errno(Errno::STALE));
                    }
                    begin = stage.end + 1;
                }
                Ok(())
            }
        }
    }

    fn cut(&mut self, depth: usize) {
        self.stages.truncate(depth);
        let end = self.stages.last().map_or(0, |stage| stage.end);
        self.path.truncate(end);
    }
}

/// Opens the parent of the directory behind `fd`.
pub(crate) fn open_parent(fd: impl AsFd) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(fd, "..", flags, rustix::fs::Mode::empty())
}

/// Opens the parent directory and verifies its identity.
fn up(fd: &OwnedFd, expected: (u64, u64)) -> Result<OwnedFd> {
    let above = dir::open_dir(fd.as_fd(), b"..")?;
    match id(&above)? == expected {
        true => Ok(above),
        false => Err(Error::Errno(Errno::STALE)),
    }
}

fn id(fd: &OwnedFd) -> Result<(u64, u64)> {
    let stat = stat::stat_fd(fd)?;
    Ok((stat.dev, stat.ino))
}

#[cfg(test)]
impl Position {
    /// Returns how many descriptors are held besides that of the root.
    pub(crate) fn descriptors(&self) -> usize {
        self.stages
            .iter()
            .filter(|stage| stage.fd.is_some())
            .count()
    }
}

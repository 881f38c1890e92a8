//! A position in a tree: the directory at a path, with those above it, of which the nearest ones are open.
//!
//! A step down or up is one open, whatever the depth, and no more than [`OPEN`] descriptors are held. Those
//! above are opened again through `..`, and are the same inodes then or it is an error.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_fs::error::{Errno, Error, Result};
use cowl_fs::sys::{dir, stat};

use super::path_map::common;

/// How many directories of the present way are kept open.
pub(crate) const OPEN: usize = 8;

/// A position in a tree.
pub(crate) struct Way {
    root: OwnedFd,
    path: Vec<u8>,
    stages: Vec<Stage>,
}

/// A directory on the way. The last one is open, and of those above it the nearest ones are.
struct Stage {
    /// Where its name ends in the path.
    end: usize,
    id: (u64, u64),
    fd: Option<OwnedFd>,
}

impl Way {
    /// In the root of a tree.
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self {
            root,
            path: Vec::new(),
            stages: Vec::new(),
        }
    }

    /// The root.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The directory in which it stands.
    pub(crate) fn here(&self) -> BorrowedFd<'_> {
        let last = self.stages.last().and_then(|stage| stage.fd.as_ref());
        last.map_or(self.root.as_fd(), |fd| fd.as_fd())
    }

    /// How many directories it stands below the root.
    pub(crate) fn depth(&self) -> usize {
        self.stages.len()
    }

    /// The device and inode of a directory on the way, by its depth.
    pub(crate) fn id_at(&self, depth: usize) -> Option<(u64, u64)> {
        self.stages.get(depth.checked_sub(1)?).map(|stage| stage.id)
    }

    /// Steps down into a directory that was opened by this name in the one in which it stands.
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

    /// Goes back to what the way has in common with a clean path, and gives the rest of that.
    pub(crate) fn towards<'p>(&mut self, path: &'p [u8]) -> Result<&'p [u8]> {
        let depth = self.shared(path);
        self.back_to(depth)?;
        let rest = path.get(self.path.len()..).unwrap_or_default();
        Ok(rest.strip_prefix(b"/").unwrap_or(rest))
    }

    /// Leaves a directory at a clean path, and what lies below it: something else may be there soon.
    pub(crate) fn forget(&mut self, path: &[u8]) -> Result<()> {
        let depth = self.shared(path);
        match self.stages.get(..depth).and_then(<[_]>::last) {
            Some(stage) if stage.end == path.len() => self.back_to(depth - 1),
            _ => Ok(()),
        }
    }

    /// How many directories of the way lie on a path.
    fn shared(&self, path: &[u8]) -> usize {
        let same = common(&self.path, path);
        let depth = self.stages.partition_point(|stage| stage.end <= same);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        match self.stages.get(..depth).and_then(<[_]>::last) {
            Some(stage) if !ends_here(stage.end) => depth - 1,
            _ => depth,
        }
    }

    /// Opens the directory above the one in which it stands, so that that may be closed to its owner before it
    /// is left.
    pub(crate) fn open_above(&mut self) -> Result<()> {
        if let [.., above, last] = self.stages.as_mut_slice()
            && above.fd.is_none()
        {
            let fd = last.fd.as_ref().ok_or(Error::Errno(Errno::STALE))?;
            above.fd = Some(up(fd, above.id)?);
        }
        Ok(())
    }

    /// Goes back up to this depth: by `..`, or from the root where that is nearer.
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

/// Opens the directory above, which must be this one.
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
impl Way {
    /// How many descriptors it holds besides the root's.
    pub(crate) fn open(&self) -> usize {
        self.stages
            .iter()
            .filter(|stage| stage.fd.is_some())
            .count()
    }
}

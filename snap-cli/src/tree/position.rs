//! A current directory in a tree, together with the path to it.
//!
//! Entering or leaving a directory is a single open at any depth, and at most [`OPEN`] descriptors are held besides that
//! of the root. Directories further up are reopened through `..`; if one is not the same inode any more, because it was
//! moved meanwhile, the operation fails with ESTALE.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::{dir, stat};
use rustix::fs::OFlags;

use super::path::common_prefix;

/// The maximum number of directories of the path that stay open.
pub(crate) const OPEN: usize = 8;

/// A current directory in a tree.
pub(crate) struct TreePosition {
    root: OwnedFd,
    path: Vec<u8>,
    components: Vec<PathComponent>,
}

/// A directory on the path. The last one is open, and so are the nearest ones above it.
struct PathComponent {
    /// The end of its name in the path.
    end: usize,
    /// The device and inode number.
    id: (u64, u64),
    fd: Option<OwnedFd>,
}

impl TreePosition {
    /// Creates a position at the root of a tree.
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self {
            root,
            path: Vec::new(),
            components: Vec::new(),
        }
    }

    /// Returns the root.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Returns the current directory.
    pub(crate) fn here(&self) -> BorrowedFd<'_> {
        let last = self
            .components
            .last()
            .and_then(|component| component.fd.as_ref());
        last.map_or(self.root.as_fd(), |fd| fd.as_fd())
    }

    /// Returns the depth of the current directory below the root.
    pub(crate) fn depth(&self) -> usize {
        self.components.len()
    }

    /// Returns the device and inode of the directory at `depth` on the path.
    pub(crate) fn id_at(&self, depth: usize) -> Option<(u64, u64)> {
        self.components
            .get(depth.checked_sub(1)?)
            .map(|component| component.id)
    }

    /// Enters a directory that was opened by `name` in the current one.
    pub(crate) fn push(&mut self, name: &[u8], fd: OwnedFd) -> Result<()> {
        let id = id(&fd)?;
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        self.components.push(PathComponent {
            end: self.path.len(),
            id,
            fd: Some(fd),
        });
        if let Some(far) = self.components.len().checked_sub(OPEN + 1)
            && let Some(far) = self.components.get_mut(far)
        {
            far.fd = None;
        }
        Ok(())
    }

    /// Ascends to the common ancestor with a normalized path, and returns the rest of that path.
    pub(crate) fn ascend_towards<'p>(&mut self, path: &'p [u8]) -> Result<&'p [u8]> {
        let depth = self.common_depth(path);
        self.ascend_to(depth)?;
        let rest = path.get(self.path.len()..).unwrap_or_default();
        Ok(rest.strip_prefix(b"/").unwrap_or(rest))
    }

    /// Leaves the directory at a normalized path and everything below it, because it may be replaced.
    pub(crate) fn forget(&mut self, path: &[u8]) -> Result<()> {
        let depth = self.common_depth(path);
        match self.components.get(..depth).and_then(<[_]>::last) {
            Some(component) if component.end == path.len() => self.ascend_to(depth - 1),
            _ => Ok(()),
        }
    }

    /// Returns how many directories of the current path are on `path` too.
    fn common_depth(&self, path: &[u8]) -> usize {
        let same = common_prefix(&self.path, path);
        let depth = self
            .components
            .partition_point(|component| component.end <= same);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        match self.components.get(..depth).and_then(<[_]>::last) {
            Some(component) if !ends_here(component.end) => depth - 1,
            _ => depth,
        }
    }

    /// Opens the parent of the current directory if it is closed.
    ///
    /// To be called before the current directory may become unsearchable, because `..` cannot be opened then.
    pub(crate) fn open_above(&mut self) -> Result<()> {
        if let [.., above, last] = self.components.as_mut_slice()
            && above.fd.is_none()
        {
            let fd = last.fd.as_ref().ok_or(Error::Errno(Errno::STALE))?;
            above.fd = Some(open_verified_parent(fd, above.id)?);
        }
        Ok(())
    }

    /// Ascends to this depth, through `..`, or by descending again from the root if that is shorter.
    pub(crate) fn ascend_to(&mut self, depth: usize) -> Result<()> {
        let is_open = |component: &PathComponent| component.fd.is_some();
        let wanted = depth.checked_sub(1).and_then(|at| self.components.get(at));
        if wanted.is_none_or(is_open) {
            self.truncate(depth);
            return Ok(());
        }
        let lowest = self.components.iter().skip(depth).position(is_open);
        match lowest {
            Some(steps) if steps < depth => {
                let first = self.components.get_mut(depth + steps);
                let first = first.and_then(|component| component.fd.take());
                let mut fd = first.ok_or(Error::Errno(Errno::STALE))?;
                for at in (depth..=depth + steps).rev() {
                    fd = open_verified_parent(&fd, self.id_at(at).unwrap_or_default())?;
                }
                self.truncate(depth);
                if let Some(component) = self.components.last_mut() {
                    component.fd = Some(fd);
                }
                Ok(())
            }
            _ => {
                let path = std::mem::take(&mut self.path);
                let components = std::mem::take(&mut self.components);
                let mut start = 0;
                for component in components.iter().take(depth) {
                    let name = path.get(start..component.end).unwrap_or_default();
                    let fd = dir::open_dir(self.here(), name)?;
                    self.push(name, fd)?;
                    if self.id_at(self.depth()) != Some(component.id) {
                        return Err(Error::Errno(Errno::STALE));
                    }
                    start = component.end + 1;
                }
                Ok(())
            }
        }
    }

    /// Closes the directories below a depth.
    fn truncate(&mut self, depth: usize) {
        self.components.truncate(depth);
        let end = self.components.last().map_or(0, |component| component.end);
        self.path.truncate(end);
    }
}

/// Opens the parent of the directory behind `fd`.
pub(crate) fn open_parent(fd: impl AsFd) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(fd, "..", flags, rustix::fs::Mode::empty())
}

/// Opens the parent directory and verifies its identity.
fn open_verified_parent(fd: &OwnedFd, expected: (u64, u64)) -> Result<OwnedFd> {
    let above = dir::open_dir(fd.as_fd(), b"..")?;
    match id(&above)? == expected {
        true => Ok(above),
        false => Err(Error::Errno(Errno::STALE)),
    }
}

/// Returns the device and inode number of a descriptor.
fn id(fd: &OwnedFd) -> Result<(u64, u64)> {
    let stat = stat::stat_fd(fd)?;
    Ok((stat.dev, stat.ino))
}

#[cfg(test)]
impl TreePosition {
    /// Returns the number of descriptors that are held besides that of the root.
    pub(crate) fn descriptors(&self) -> usize {
        self.components
            .iter()
            .filter(|component| component.fd.is_some())
            .count()
    }
}

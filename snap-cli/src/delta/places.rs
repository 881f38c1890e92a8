//! Finding folders in a tree that is being made: one component at a time and following no link, so
//! that nothing can ever be written outside the tree.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_fs::error::Errno;
use cowl_fs::sys::stat::FileKind;
use cowl_fs::sys::{dir, stat};

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::make;

/// How many folders on the way to the last place are kept open.
const KEPT: usize = 100;

/// Finds folders below the target's root; the last way there is kept open, because entries mostly
/// come folder by folder.
pub(crate) struct Places {
    root: OwnedFd,
    way: Vec<(Vec<u8>, OwnedFd)>,
}

/// A folder that was found: kept here or opened for this once.
pub(crate) enum Place<'a> {
    Kept(BorrowedFd<'a>),
    Once(OwnedFd),
}

impl Place<'_> {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Kept(fd) => *fd,
            Self::Once(fd) => fd.as_fd(),
        }
    }
}

impl Places {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self {
            root,
            way: Vec::new(),
        }
    }

    /// The root.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Forgets open folders at or below a clean path that is about to be replaced.
    pub(crate) fn forget(&mut self, path: &[u8]) {
        let depth = path.split(|&byte| byte == b'/').count();
        let same = self
            .way
            .iter()
            .zip(path.split(|&byte| byte == b'/'))
            .take_while(|((kept, _), part)| kept.as_slice() == *part)
            .count();
        if same >= depth {
            self.way.truncate(depth - 1);
        }
    }

    /// The folder with this clean path. With `create`, missing ones are made as tar does (mode
    /// 0755, root's or the caller's).
    pub(crate) fn folder(&mut self, path: &[u8], create: bool) -> Result<Place<'_>> {
        let parts: Vec<&[u8]> = path
            .split(|&byte| byte == b'/')
            .filter(|p| !p.is_empty())
            .collect();
        let same = self
            .way
            .iter()
            .zip(&parts)
            .take_while(|((kept, _), part)| kept.as_slice() == **part)
            .count();
        self.way.truncate(same);
        let mut once: Option<OwnedFd> = None;
        for (depth, part) in parts.iter().enumerate().skip(same) {
            let from = match (&once, self.way.last()) {
                (Some(fd), _) | (None, Some((_, fd))) => fd.as_fd(),
                (None, None) => self.root.as_fd(),
            };
            let next = step(from, part, create, path)?;
            if depth < KEPT {
                self.way.push((part.to_vec(), next));
            } else {
                once = Some(next);
            }
        }
        Ok(match (once, self.way.last()) {
            (Some(fd), _) => Place::Once(fd),
            (None, Some((_, fd))) => Place::Kept(fd.as_fd()),
            (None, None) => Place::Kept(self.root.as_fd()),
        })
    }
}

fn step(from: BorrowedFd<'_>, part: &[u8], create: bool, path: &[u8]) -> Result<OwnedFd> {
    match dir::open_dir(from, part) {
        Ok(fd) => Ok(fd),
        Err(error) if error.errno() == Errno::NOENT && create => {
            let fd = make::folder(from, part, path)?;
            cowl_fs::sys::attr::chmod(fd.as_fd(), make::IMPLIED_PERM)
                .context("can't set the mode", path)?;
            Ok(fd)
        }
        Err(error) if matches!(error.errno(), Errno::NOTDIR | Errno::LOOP) => {
            let found = stat::stat_at(from, part).context("can't read", path)?;
            let what = match found.kind() {
                FileKind::Symlink => "the path passes through a symbolic link",
                _ => "the path passes through what is no folder",
            };
            Err(TreeError::new(ErrorKind::Refused, what).at(path))
        }
        Err(error) => Err(error).context("can't open the folder", path),
    }
}

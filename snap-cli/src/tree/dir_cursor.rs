//! Opens directories in a tree that is being created.
//!
//! A path is opened component by component without following symbolic links, so that nothing can be written outside
//! the tree.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_layers::error::Errno;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{dir, stat};

use super::create;
use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::position::TreePosition;

/// A cursor over the directories of a tree.
///
/// It stays in the directory that was opened last, because consecutive entries are mostly in one directory.
pub(crate) struct DirCursor(TreePosition);

const ASCEND: &str = "cannot open the parent directory";

impl DirCursor {
    /// Creates a cursor at the root of a tree.
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self(TreePosition::new(root))
    }

    /// Returns the root.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.0.root()
    }

    /// Returns the current directory.
    pub(crate) fn here(&self) -> BorrowedFd<'_> {
        self.0.here()
    }

    /// Closes the directories at or below a normalized path that is about to be replaced.
    pub(crate) fn forget(&mut self, path: &[u8]) -> Result<()> {
        self.0.forget(path).context(ASCEND, path)
    }

    /// Enters a subdirectory of the current directory.
    pub(crate) fn enter(&mut self, name: &[u8], path: &[u8]) -> Result<()> {
        let fd = open_component(self.here(), name, Missing::Refuse, path)?;
        self.0.push(name, fd).context("cannot read", path)
    }

    /// Calls `finish` for the current directory and returns to its parent; the path is for messages.
    ///
    /// `finish` may make the directory unsearchable for its owner.
    pub(crate) fn leave(
        &mut self,
        path: &[u8],
        finish: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        self.0.open_above().context(ASCEND, path)?;
        finish(self.here())?;
        let depth = self.0.depth().saturating_sub(1);
        self.0.ascend_to(depth).context(ASCEND, path)
    }

    /// Moves to the directory at this normalized path, and returns its descriptor.
    pub(crate) fn open(&mut self, path: &[u8]) -> Result<BorrowedFd<'_>> {
        self.go_to(path, Missing::Refuse)
    }

    /// Moves to the directory at this normalized path, and returns its descriptor.
    ///
    /// Missing directories are created with mode 0755, as by tar.
    pub(crate) fn open_or_create(&mut self, path: &[u8]) -> Result<BorrowedFd<'_>> {
        self.go_to(path, Missing::Create)
    }

    /// Moves towards the directory at a normalized path, and returns what prevents the cursor from reaching it.
    pub(crate) fn reach(&mut self, path: &[u8]) -> Result<Option<Obstacle>> {
        let rest = self.0.ascend_towards(path).context(ASCEND, path)?;
        let mut start = path.len() - rest.len();
        for part in rest.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            let end = start + part.len();
            match dir::open_dir(self.here(), part) {
                Ok(fd) => self.0.push(part, fd).context("cannot read", path)?,
                Err(error) if matches!(error.errno(), Errno::NOENT | Errno::NAMETOOLONG) => {
                    return Ok(Some(Obstacle::Missing));
                }
                Err(error) if matches!(error.errno(), Errno::NOTDIR | Errno::LOOP) => {
                    let found = stat::stat_at(self.here(), part).context("cannot read", path)?;
                    if found.kind() != FileKind::Symlink {
                        return Ok(Some(Obstacle::NotADirectory));
                    }
                    let target = dir::readlink(self.here(), part)
                        .context("cannot read the symbolic link", path)?;
                    return Ok(Some(Obstacle::Link { start, end, target }));
                }
                Err(error) => return Err(error).context("cannot open the directory", path),
            }
            start = end + 1;
        }
        Ok(None)
    }

    /// Moves to the directory at a normalized path.
    fn go_to(&mut self, path: &[u8], missing: Missing) -> Result<BorrowedFd<'_>> {
        let rest = self.0.ascend_towards(path).context(ASCEND, path)?;
        for part in rest.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            let fd = open_component(self.here(), part, missing, path)?;
            self.0.push(part, fd).context("cannot read", path)?;
        }
        Ok(self.here())
    }
}

/// A component of a path that is not a directory.
pub(crate) enum Obstacle {
    Missing,
    NotADirectory,
    /// A symbolic link, with the position of its name in the path.
    Link {
        start: usize,
        end: usize,
        target: Vec<u8>,
    },
}

/// The treatment of a missing directory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Refuse,
    Create,
}

/// Opens one component of a path in `from`; the whole path is for messages.
fn open_component(
    from: BorrowedFd<'_>,
    part: &[u8],
    missing: Missing,
    path: &[u8],
) -> Result<OwnedFd> {
    match dir::open_dir(from, part) {
        Ok(fd) => Ok(fd),
        Err(error) if error.errno() == Errno::NOENT && missing == Missing::Create => {
            let fd = create::dir(from, part, path)?;
            cowl_layers::sys::attr::chmod(fd.as_fd(), create::IMPLIED_PERM)
                .context("cannot set the mode", path)?;
            Ok(fd)
        }
        Err(error) if matches!(error.errno(), Errno::NOTDIR | Errno::LOOP) => {
            let found = stat::stat_at(from, part).context("cannot read", path)?;
            let message = match found.kind() {
                FileKind::Symlink => "a component of the path is a symbolic link",
                _ => "a component of the path is not a directory",
            };
            Err(TreeError::new(ErrorKind::Refused, message).at(path))
        }
        Err(error) => Err(error).context("cannot open the directory", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves between directories of a tree that is deeper than the number of open descriptors.
    #[test]
    fn moves_to_the_requested_directory_at_any_depth() {
        let top = tempfile::tempdir().unwrap();
        let mut cursor = DirCursor::new(dir::open_root(top.path()).unwrap());
        let deep = |branch: &str, depth: usize| {
            let path = format!("{branch}{}", "/d".repeat(depth));
            path.into_bytes()
        };
        let visited: Vec<_> = [("a", 300), ("b", 200), ("a", 150), ("a", 20), ("b", 0)]
            .map(|(branch, depth)| deep(branch, depth))
            .into_iter()
            .chain([Vec::new()])
            .collect();
        let mut ids = Vec::new();
        for path in &visited {
            let fd = cursor.open_or_create(path).unwrap();
            let stat = stat::stat_fd(fd).unwrap();
            ids.push((stat.dev, stat.ino));
            assert!(cursor.0.descriptors() <= super::super::position::OPEN);
        }
        for (path, expected) in visited.iter().zip(&ids).rev() {
            let mut fresh = DirCursor::new(dir::open_root(top.path()).unwrap());
            let stat = stat::stat_fd(fresh.open(path).unwrap()).unwrap();
            assert_eq!((stat.dev, stat.ino), *expected);
            let stat = stat::stat_fd(cursor.open(path).unwrap()).unwrap();
            assert_eq!((stat.dev, stat.ino), *expected);
        }
        // Ascend step by step, from far below the directories that are open.
        cursor.open(&deep("a", 300)).unwrap();
        for _ in 0..=300 {
            cursor.leave(b"", |_| Ok(())).unwrap();
        }
        let (here, root) = (stat::stat_fd(cursor.here()), stat::stat_fd(cursor.root()));
        assert_eq!(here.unwrap().ino, root.unwrap().ino);
    }

    #[test]
    fn a_moved_ancestor_is_detected() {
        let top = tempfile::tempdir().unwrap();
        let mut cursor = DirCursor::new(dir::open_root(top.path()).unwrap());
        let path = format!("a{}", "/d".repeat(200)).into_bytes();
        cursor.open_or_create(&path).unwrap();
        std::fs::create_dir(top.path().join("b")).unwrap();
        std::fs::rename(top.path().join("a/d/d"), top.path().join("b/d")).unwrap();
        let detected = (0..=200).any(|_| cursor.leave(&path, |_| Ok(())).is_err());
        assert!(detected);
    }
}

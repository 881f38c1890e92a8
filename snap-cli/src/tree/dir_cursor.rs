//! Opens directories in a tree that is being created: one component at a time and following no symbolic link, so that
//! nothing can be written outside the tree.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_layers::error::Errno;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{dir, stat};

use super::create;
use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::position::Position;

/// A cursor over the directories of a tree. It stays in one of them, because entries mostly come directory by directory.
pub(crate) struct DirCursor(Position);

const BACK: &str = "cannot go back to the directory above";

impl DirCursor {
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self(Position::new(root))
    }

    /// Returns the root.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.0.root()
    }

    /// Returns the current directory.
    pub(crate) fn here(&self) -> BorrowedFd<'_> {
        self.0.here()
    }

    /// Forgets open directories at or below a normalized path that is about to be replaced.
    pub(crate) fn forget(&mut self, path: &[u8]) -> Result<()> {
        self.0.forget(path).context(BACK, path)
    }

    /// Enters a subdirectory of the current directory.
    pub(crate) fn enter(&mut self, name: &[u8], path: &[u8]) -> Result<()> {
        let fd = step(self.here(), name, Missing::Refuse, path)?;
        self.0.push(name, fd).context("can't read", path)
    }

    /// Leaves the current directory (its path is for messages), which `finish` may make unsearchable for its owner.
    pub(crate) fn leave(
        &mut self,
        path: &[u8],
        finish: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        self.0.open_above().context(BACK, path)?;
        finish(self.here())?;
        let depth = self.0.depth().saturating_sub(1);
        self.0.back_to(depth).context(BACK, path)
    }

    /// Goes to the directory with this normalized path, and returns its descriptor.
    pub(crate) fn open(&mut self, path: &[u8]) -> Result<BorrowedFd<'_>> {
        self.go_to(path, Missing::Refuse)
    }

    /// Like [`Self::open`]; missing directories are created with mode 0755, as by tar.
    pub(crate) fn open_or_create(&mut self, path: &[u8]) -> Result<BorrowedFd<'_>> {
        self.go_to(path, Missing::Create)
    }

    fn go_to(&mut self, path: &[u8], missing: Missing) -> Result<BorrowedFd<'_>> {
        let rest = self.0.towards(path).context(BACK, path)?;
        for part in rest.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            let fd = step(self.here(), part, missing, path)?;
            self.0.push(part, fd).context("can't read", path)?;
        }
        Ok(self.here())
    }
}

/// The treatment of a missing directory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Refuse,
    Create,
}

fn step(from: BorrowedFd<'_>, part: &[u8], missing: Missing, path: &[u8]) -> Result<OwnedFd> {
    match dir::open_dir(from, part) {
        Ok(fd) => Ok(fd),
        Err(error) if error.errno() == Errno::NOENT && missing == Missing::Create => {
            let fd = create::dir(from, part, path)?;
            cowl_layers::sys::attr::chmod(fd.as_fd(), create::IMPLIED_PERM)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way between directories of a tree that is deeper than what is kept open leads to the right one.
    #[test]
    fn it_stands_where_it_was_sent() {
        let top = tempfile::tempdir().unwrap();
        let mut places = DirCursor::new(dir::open_root(top.path()).unwrap());
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
            let fd = places.open_or_create(path).unwrap();
            let stat = stat::stat_fd(fd).unwrap();
            ids.push((stat.dev, stat.ino));
            assert!(places.0.descriptors() <= super::super::position::OPEN);
        }
        for (path, expected) in visited.iter().zip(&ids).rev() {
            let mut fresh = DirCursor::new(dir::open_root(top.path()).unwrap());
            let stat = stat::stat_fd(fresh.open(path).unwrap()).unwrap();
            assert_eq!((stat.dev, stat.ino), *expected);
            let stat = stat::stat_fd(places.open(path).unwrap()).unwrap();
            assert_eq!((stat.dev, stat.ino), *expected);
        }
        // Step by step up, from far below what is open.
        places.open(&deep("a", 300)).unwrap();
        for _ in 0..=300 {
            places.leave(b"", |_| Ok(())).unwrap();
        }
        let (here, root) = (stat::stat_fd(places.here()), stat::stat_fd(places.root()));
        assert_eq!(here.unwrap().ino, root.unwrap().ino);
    }

    #[test]
    fn one_that_was_moved_is_noticed() {
        let top = tempfile::tempdir().unwrap();
        let mut places = DirCursor::new(dir::open_root(top.path()).unwrap());
        let path = format!("a{}", "/d".repeat(200)).into_bytes();
        places.open_or_create(&path).unwrap();
        std::fs::create_dir(top.path().join("b")).unwrap();
        std::fs::rename(top.path().join("a/d/d"), top.path().join("b/d")).unwrap();
        let noticed = (0..=200).any(|_| places.leave(&path, |_| Ok(())).is_err());
        assert!(noticed);
    }
}

//! A map from directories of a tree to values.
//!
//! Each name is stored once, in its parent directory, rather than as a path, so the memory for a directory does not
//! depend on its depth. The size of the map is bounded by the number of directories on disk.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_layers::sys::dir;

use super::limits;
use crate::tree::error::{Context as _, Result};
use crate::tree::{path, position};

/// The number of a directory; that of the root is 0.
type DirId = u32;

const ROOT: DirId = 0;

/// The number of descriptors that stay open during a visit.
const OPEN: usize = 8;

/// A callback that gets a value, its directory, and the path of the directory.
type Visit<'a, T> = dyn FnMut(T, BorrowedFd<'_>, &[u8]) -> Result<()> + 'a;

/// Values by directory.
#[derive(Debug)]
pub(super) struct DirMap<T> {
    children: BTreeMap<(DirId, Box<[u8]>), DirId>,
    values: Vec<Option<T>>,
    /// The numbers of removed directories, to be reused.
    unused: Vec<DirId>,
}

impl<T> Default for DirMap<T> {
    fn default() -> Self {
        Self {
            children: BTreeMap::new(),
            values: vec![None],
            unused: Vec::new(),
        }
    }
}

impl<T> DirMap<T> {
    /// Sets the value of the directory at this normalized path.
    pub(super) fn set(&mut self, path: &[u8], value: T) -> Result<()> {
        self.change(path, |slot| *slot = Some(value))
    }

    /// Updates the value of the directory at this normalized path.
    pub(super) fn change(
        &mut self,
        path: &[u8],
        change: impl FnOnce(&mut Option<T>),
    ) -> Result<()> {
        let mut id = ROOT;
        for name in components(path) {
            let key = (id, Box::from(name));
            id = match self.children.get(&key) {
                Some(&id) => id,
                None => {
                    let new = self.number(path)?;
                    self.children.insert(key, new);
                    new
                }
            };
        }
        if let Some(slot) = self.values.get_mut(id as usize) {
            change(slot);
        }
        Ok(())
    }

    fn number(&mut self, path: &[u8]) -> Result<DirId> {
        if let Some(id) = self.unused.pop() {
            return Ok(id);
        }
        let id = DirId::try_from(self.values.len())
            .map_err(|_| limits::exceeded("the archive has more than 2^32 directories", path))?;
        self.values.push(None);
        Ok(id)
    }

    /// Removes a directory and everything in it.
    pub(super) fn forget(&mut self, path: &[u8]) {
        let mut found = None;
        let mut id = ROOT;
        for name in components(path) {
            let key = (id, Box::from(name));
            let Some(&next) = self.children.get(&key) else {
                return;
            };
            id = next;
            found = Some(key);
        }
        let Some(key) = found else {
            return;
        };
        self.children.remove(&key);
        let mut todo = vec![id];
        while let Some(id) = todo.pop() {
            while let Some((name, child)) = self.child_after(id, None) {
                self.children.remove(&(id, name));
                todo.push(child);
            }
            if let Some(slot) = self.values.get_mut(id as usize) {
                *slot = None;
            }
            self.unused.push(id);
        }
    }

    fn child_after(&self, id: DirId, name: Option<Box<[u8]>>) -> Option<(Box<[u8]>, DirId)> {
        let from = match name {
            Some(name) => Bound::Excluded((id, name)),
            None => Bound::Included((id, Box::default())),
        };
        let (key, child) = self.children.range((from, Bound::Unbounded)).next()?;
        (key.0 == id).then(|| (key.1.clone(), *child))
    }

    /// Calls `visit` with each value, its directory, and the path, for each directory after all directories in it.
    pub(super) fn visit(mut self, root: BorrowedFd<'_>, visit: &mut Visit<'_, T>) -> Result<()> {
        let what = "cannot open the directory";
        // The current path. Only the last descriptors stay open; the others are reopened through "..".
        let mut levels: Vec<DirLevel> = Vec::new();
        let mut last = None;
        let mut path = Vec::new();
        loop {
            let (id, fd) = match levels.last() {
                Some(DirLevel {
                    id, fd: Some(fd), ..
                }) => (*id, fd.as_fd()),
                _ => (ROOT, root),
            };
            if let Some((name, id)) = self.child_after(id, last.take()) {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(&name);
                let fd = Some(dir::open_dir(fd, &name).context(what, &path)?);
                levels.push(DirLevel { id, name, fd });
                if let Some(far) = levels.len().checked_sub(OPEN + 1)
                    && let Some(level) = levels.get_mut(far)
                {
                    level.fd = None;
                }
                continue;
            }
            let above = levels.len().checked_sub(2);
            let is_closed = |at: usize| levels.get(at).is_some_and(|level| level.fd.is_none());
            // Reopen it before `visit` may make this directory unsearchable for its owner.
            let reopened = match above.is_some_and(is_closed) {
                true => Some(position::open_parent(fd).context(what, &path)?),
                false => None,
            };
            if let Some(value) = self.values.get_mut(id as usize).and_then(Option::take) {
                visit(value, fd, &path)?;
            }
            if let (Some(at), Some(fd)) = (above, reopened)
                && let Some(level) = levels.get_mut(at)
            {
                level.fd = Some(fd);
            }
            let Some(level) = levels.pop() else {
                return Ok(());
            };
            path.truncate(path::split(&path).0.len());
            last = Some(level.name);
        }
    }
}

struct DirLevel {
    id: DirId,
    name: Box<[u8]>,
    fd: Option<OwnedFd>,
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visited(dirs: DirMap<u32>, root: &std::path::Path) -> Vec<(String, u32)> {
        let fd = dir::open_root(root).unwrap();
        let mut seen = Vec::new();
        dirs.visit(fd.as_fd(), &mut |value, fd, path| {
            let here = cowl_layers::sys::stat::stat_fd(fd).unwrap().ino;
            let path = str::from_utf8(path).unwrap();
            use std::os::unix::fs::MetadataExt as _;
            let meta = std::fs::metadata(root.join(path)).unwrap();
            assert_eq!(here, meta.ino(), "{path}");
            seen.push((path.to_owned(), value));
            Ok(())
        })
        .unwrap();
        seen
    }

    #[test]
    fn directories_are_visited_after_their_subdirectories_at_any_depth() {
        let root = tempfile::tempdir().unwrap();
        let deep = vec!["d"; 300].join("/");
        for path in ["a/b", "a/c", "e", &deep] {
            std::fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let mut dirs = DirMap::default();
        for (path, value) in [("", 0), ("a", 1), ("a/c", 2), ("a/b", 3), ("e", 4)] {
            dirs.set(path.as_bytes(), value).unwrap();
        }
        dirs.set(deep.as_bytes(), 5).unwrap();
        dirs.set(b"d/d", 6).unwrap();
        dirs.set(b"a", 7).unwrap();
        let want = [
            ("a/b", 3),
            ("a/c", 2),
            ("a", 7),
            (deep.as_str(), 5),
            ("d/d", 6),
            ("e", 4),
            ("", 0),
        ];
        assert_eq!(
            visited(dirs, root.path()),
            want.map(|(path, value)| (path.to_owned(), value))
        );
    }

    #[test]
    fn forgotten_directories_are_not_visited_and_their_memory_is_reused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a/b")).unwrap();
        let mut dirs = DirMap::default();
        for round in 0..100 {
            dirs.set(b"a/b", round).unwrap();
            dirs.set(b"a/removed", round).unwrap();
            dirs.forget(b"a/removed/further");
            dirs.forget(b"a");
            dirs.forget(b"missing");
        }
        assert_eq!((dirs.children.len(), dirs.values.len()), (0, 4));
        dirs.set(b"a/b", 1).unwrap();
        assert_eq!(visited(dirs, root.path()), [("a/b".to_owned(), 1)]);
    }
}

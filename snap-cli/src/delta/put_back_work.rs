//! Executes a plan of [`super::put_back`] through a [`Target`]. A file or a whole directory is staged next to its
//! destination and renamed over it.

use std::collections::HashMap;

use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{Found, LayerPath, View};
use uuid::Uuid;

use crate::tree::attrs::{Attrs, space_of};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use crate::tree::find::Finder;
use crate::tree::path::{is_within, join, split};
use crate::tree::target::Target;
use crate::tree::walk::{self, Item, Visitor};

/// The prefix of the names of staged objects.
const STAGED: &[u8] = b".cowl-";

/// The state of an execution: the objects that were created, and the one being created.
pub(super) struct Work<'a> {
    old: Finder<'a>,
    target: &'a dyn Target,
    /// The paths at which files with several names were created.
    made: HashMap<(u64, u64), LayerPath>,
    /// The path that is being created, and its staging path.
    staging: Option<(Vec<u8>, Vec<u8>)>,
    done: Progress,
    progress: OnProgress<'a>,
}

impl<'a> Work<'a> {
    pub(super) fn new(old: &'a View, target: &'a dyn Target, progress: OnProgress<'a>) -> Self {
        Self {
            old: Finder::new(old),
            target,
            made: HashMap::new(),
            staging: None,
            done: Progress::default(),
            progress,
        }
    }
}

impl Work<'_> {
    /// Returns the type and attributes of a path in the old state.
    pub(super) fn of(&mut self, path: &[u8]) -> Result<Option<(FileKind, Attrs)>> {
        let space = space_of(self.old.view());
        let found = self.old.at(path)?;
        let Some(item) = Item::of(path, &found, space)? else {
            return Ok(None);
        };
        Ok(Some((item.kind(), Attrs::of(&item.stat, item.xattrs()?))))
    }

    /// Returns an unused name next to a path.
    fn beside(path: &[u8]) -> Vec<u8> {
        let id = Uuid::new_v4().simple().to_string();
        join(split(path).0, &[STAGED, id.as_bytes()].concat())
    }

    /// Removes staged objects of an interrupted operation.
    pub(super) fn clear_staged(&mut self, folder: &[u8]) -> Result<()> {
        let what = "cannot read the directory";
        let found = self.target.stat(folder).context(what, folder)?;
        if found.is_none_or(|stat| stat.kind() != FileKind::Directory) {
            return Ok(());
        }
        for name in self.target.names(folder).context(what, folder)? {
            let path = join(folder, &name);
            let ours = name
                .strip_prefix(STAGED)
                .is_some_and(|id| id.len() == 32 && id.iter().all(u8::is_ascii_hexdigit));
            if ours && matches!(self.old.at(&path)?, Found::Absent | Found::Whiteout) {
                self.remove_tree(&path)?;
            }
        }
        Ok(())
    }

    /// Returns the current location of a path.
    fn place(&self, path: &[u8]) -> Vec<u8> {
        match &self.staging {
            Some((top, staged)) if is_within(path, top) => {
                let rest = path.get(top.len()..).unwrap_or_default();
                [staged, rest].concat()
            }
            _ => path.to_vec(),
        }
    }

    /// Creates missing parent directories.
    pub(super) fn parents(&mut self, path: &[u8]) -> Result<()> {
        let mut missing = Vec::new();
        let mut parent = split(path).0;
        while !parent.is_empty() {
            let found = self.target.stat(parent).context("cannot read", parent)?;
            match found.map(|stat| stat.kind()) {
                Some(FileKind::Directory) => break,
                Some(_) => {
                    let what = "the parent is no longer a directory";
                    return Err(TreeError::new(ErrorKind::Refused, what).at(parent));
                }
                None => missing.push(parent),
            }
            parent = split(parent).0;
        }
        while let Some(parent) = missing.pop() {
            let Some((kind, attrs)) = self.of(parent)? else {
                return Ok(());
            };
            self.staged(parent, |work| {
                let at = work.place(parent);
                work.target
                    .mkdir(&at)
                    .context("cannot make the directory", parent)?;
                work.attrs((&at, parent), kind, &attrs)
            })?;
        }
        Ok(())
    }

    pub(super) fn put(&mut self, path: &[u8]) -> Result<()> {
        self.staged(path, |work| work.fill(path))
    }

    /// Stages an object with `make` and renames it to its destination.
    fn staged(&mut self, path: &[u8], make: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let at = Self::beside(path);
        self.staging = Some((path.to_vec(), at.clone()));
        let made = make(self).and_then(|()| self.exchange(&at, path));
        self.staging = None;
        if made.is_err()
            && let Err(error) = self.remove_tree(&at)
        {
            log::warn!("{error}");
        }
        made
    }

    fn exchange(&self, at: &[u8], path: &[u8]) -> Result<()> {
        let what = "cannot put back";
        let is_folder = |stat: &Stat| stat.kind() == FileKind::Directory;
        let made = self.target.stat(at).context(what, path)?;
        let there = self.target.stat(path).context(what, path)?;
        let how = match &there {
            None => RenameMode::NoReplace,
            Some(there) if is_folder(there) || made.as_ref().is_some_and(is_folder) => {
                RenameMode::Exchange
            }
            Some(_) => RenameMode::Replace,
        };
        self.target.rename(at, path, how).context(what, path)?;
        match how {
            RenameMode::Exchange => self.remove_tree(at),
            RenameMode::NoReplace | RenameMode::Replace | RenameMode::Whiteout => Ok(()),
        }
    }

    /// Creates the object at a path of the old state, with everything below it.
    fn fill(&mut self, path: &[u8]) -> Result<()> {
        let (view, found) = (self.old.view(), self.old.at(path)?);
        let mut filling = Filling {
            top: LayerPath::from(path),
            work: self,
            levels: Vec::new(),
        };
        walk::below(view, path, &found, &mut filling)
    }

    /// Creates one entry, whose own path is `own`.
    fn one(&mut self, item: &Item<'_>, own: LayerPath) -> Result<()> {
        let (path, at) = (item.path, self.place(item.path));
        let (kind, target) = (item.kind(), self.target);
        self.done.entries += 1;
        if kind == FileKind::Directory {
            return target.mkdir(&at).context("cannot make the directory", path);
        }
        let key = (item.stat.dev, item.stat.ino);
        if let Some(first) = self.made.get(&key) {
            return target
                .link(&self.place(&first.to_bytes()), &at)
                .context("cannot make the hard link", path);
        }
        match kind {
            FileKind::Regular => {
                let size = item.stat.size;
                let content = match size {
                    0 => None,
                    _ => Some((item.open()?, size)),
                };
                target
                    .file(&at, content)
                    .context("cannot copy the content", path)?;
                self.done.bytes += size;
            }
            FileKind::Symlink => target
                .symlink(&at, &item.target()?)
                .context("cannot make the symbolic link", path)?,
            _ => target
                .node(&at, kind, item.stat.rdev)
                .context("cannot make", path)?,
        }
        let attrs = Attrs::of(&item.stat, item.xattrs()?);
        self.attrs((&at, path), kind, &attrs)?;
        if item.stat.nlink > 1 {
            self.made.insert(key, own);
        }
        (self.progress)(self.done);
        Ok(())
    }

    /// Sets the attributes of the object at one path to those of another.
    pub(super) fn attrs(
        &self,
        (at, path): (&[u8], &[u8]),
        kind: FileKind,
        attrs: &Attrs,
    ) -> Result<()> {
        self.target
            .attrs(at, kind, attrs)
            .context("cannot set the attributes of", path)
    }

    /// Removes a path. A directory with several entries is renamed first, so that it disappears in one step.
    pub(super) fn remove(&self, path: &[u8]) -> Result<()> {
        let what = "cannot remove";
        let Some(stat) = self.target.stat(path).context(what, path)? else {
            return Ok(());
        };
        if stat.kind() != FileKind::Directory {
            return self.target.unlink(path).context(what, path);
        }
        let aside = Self::beside(path);
        self.target
            .rename(path, &aside, RenameMode::NoReplace)
            .context(what, path)?;
        self.remove_tree(&aside)
    }

    fn remove_tree(&self, path: &[u8]) -> Result<()> {
        let what = "cannot remove";
        let mut path = path.to_vec();
        // The remaining names of each directory on the way, and the length of its path.
        let mut levels: Vec<(Vec<Vec<u8>>, usize)> = Vec::new();
        loop {
            let found = self.target.stat(&path).context(what, &path)?;
            match found.map(|stat| stat.kind()) {
                None => {}
                Some(FileKind::Directory) => {
                    let names = self.target.names(&path).context(what, &path)?;
                    levels.push((names, path.len()));
                }
                Some(_) => self.target.unlink(&path).context(what, &path)?,
            }
            loop {
                let Some((names, length)) = levels.last_mut() else {
                    return Ok(());
                };
                path.truncate(*length);
                if let Some(name) = names.pop() {
                    path.push(b'/');
                    path.extend_from_slice(&name);
                    break;
                }
                self.target.rmdir(&path).context(what, &path)?;
                levels.pop();
            }
        }
    }
}

/// Creates the objects that a walk visits.
struct Filling<'w, 'a> {
    work: &'w mut Work<'a>,
    /// The path at which the walk begins.
    top: LayerPath,
    /// The directories above the current one, and the attributes that they get at the end.
    levels: Vec<(LayerPath, Attrs)>,
}

impl Visitor for Filling<'_, '_> {
    fn item(&mut self, item: &Item<'_>) -> Result<()> {
        let own = match self.levels.last() {
            Some((above, _)) => above.join(item.name()),
            None => self.top.clone(),
        };
        self.work.one(item, own.clone())?;
        if item.kind() == FileKind::Directory {
            let attrs = Attrs::of(&item.stat, item.xattrs()?);
            self.levels.push((own, attrs));
        }
        Ok(())
    }

    fn leave(&mut self, path: &[u8]) -> Result<()> {
        let Some((_, attrs)) = self.levels.pop() else {
            return Ok(());
        };
        let at = self.work.place(path);
        self.work.attrs((&at, path), FileKind::Directory, &attrs)
    }
}

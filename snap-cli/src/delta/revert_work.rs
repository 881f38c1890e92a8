//! Executes a [`super::revert::RevertPlan`] through a [`WritableTree`].
//!
//! A file or a whole directory is staged next to its destination and renamed over it.

use std::collections::HashMap;

use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{Found, LayerPath, View};
use uuid::Uuid;

use super::revert_records::TargetLayer;
use crate::tree::attrs::{Attrs, marker_space};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use crate::tree::find::Finder;
use crate::tree::path::{is_within, join, split};
use crate::tree::walk::{self, Item, Visitor};
use crate::tree::writable::WritableTree;

/// The prefix of the names of staged objects.
const STAGED: &[u8] = b".cowl-";

/// The type and the attributes of an object of the old state.
pub(super) struct OldObject {
    kind: FileKind,
    attrs: Attrs,
    /// The record of attributes that could not be stored.
    record: Option<Vec<u8>>,
}

impl OldObject {
    fn read(item: &Item<'_>) -> Result<Self> {
        Ok(Self {
            kind: item.kind(),
            attrs: Attrs::from_stat(&item.stat, item.xattrs()?),
            record: item.record()?,
        })
    }
}

/// The state of an execution: the objects that were created, and the one that is being created.
pub(super) struct Work<'a> {
    old: Finder<'a>,
    target: &'a dyn WritableTree,
    layer: &'a TargetLayer,
    /// The paths at which files with several names were created, by their device and inode number in the old state.
    created: HashMap<(u64, u64), LayerPath>,
    /// The path that is being created, and its staging path.
    staging: Option<(Vec<u8>, Vec<u8>)>,
    done: Progress,
    progress: OnProgress<'a>,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        old: &'a View,
        (target, layer): (&'a dyn WritableTree, &'a TargetLayer),
        progress: OnProgress<'a>,
    ) -> Self {
        Self {
            old: Finder::new(old),
            target,
            layer,
            created: HashMap::new(),
            staging: None,
            done: Progress::default(),
            progress,
        }
    }
}

impl Work<'_> {
    /// Returns the type and attributes of a path in the old state.
    pub(super) fn old_attrs(&mut self, path: &[u8]) -> Result<Option<OldObject>> {
        let space = marker_space(self.old.view());
        let found = self.old.find(path)?;
        let Some(item) = Item::from_found(path, &found, space)? else {
            return Ok(None);
        };
        OldObject::read(&item).map(Some)
    }

    /// Returns a staging path next to a path.
    fn staging_path(path: &[u8]) -> Vec<u8> {
        let id = Uuid::new_v4().simple().to_string();
        join(split(path).0, &[STAGED, id.as_bytes()].concat())
    }

    /// Removes the objects in a directory that an interrupted operation had staged.
    pub(super) fn remove_staged(&mut self, dir: &[u8]) -> Result<()> {
        let message = "cannot read the directory";
        let found = self.target.stat(dir).context(message, dir)?;
        if found.is_none_or(|stat| stat.kind() != FileKind::Directory) {
            return Ok(());
        }
        for name in self.target.list(dir).context(message, dir)? {
            let path = join(dir, &name);
            let is_staged = name
                .strip_prefix(STAGED)
                .is_some_and(|id| id.len() == 32 && id.iter().all(u8::is_ascii_hexdigit));
            if is_staged && matches!(self.old.find(&path)?, Found::Absent | Found::Whiteout) {
                self.remove_tree(&path)?;
            }
        }
        Ok(())
    }

    /// Returns the current path of an object: its staging path while it is staged.
    fn current_path(&self, path: &[u8]) -> Vec<u8> {
        match &self.staging {
            Some((top, staged)) if is_within(path, top) => {
                let rest = path.get(top.len()..).unwrap_or_default();
                [staged, rest].concat()
            }
            _ => path.to_vec(),
        }
    }

    /// Creates the missing parent directories of a path.
    pub(super) fn create_parents(&mut self, path: &[u8]) -> Result<()> {
        let mut missing = Vec::new();
        let mut parent = split(path).0;
        while !parent.is_empty() {
            let found = self.target.stat(parent).context("cannot read", parent)?;
            match found.map(|stat| stat.kind()) {
                Some(FileKind::Directory) => break,
                Some(_) => {
                    let message = "the parent is no longer a directory";
                    return Err(TreeError::new(ErrorKind::Refused, message).at(parent));
                }
                None => missing.push(parent),
            }
            parent = split(parent).0;
        }
        while let Some(parent) = missing.pop() {
            let Some(object) = self.old_attrs(parent)? else {
                return Ok(());
            };
            self.stage(parent, |work| {
                let at = work.current_path(parent);
                work.target
                    .mkdir(&at)
                    .context("cannot create the directory", parent)?;
                work.set_attrs((&at, parent), &object)
            })?;
        }
        Ok(())
    }

    /// Recreates the object at a path of the old state, with everything below it.
    pub(super) fn recreate(&mut self, path: &[u8]) -> Result<()> {
        self.stage(path, |work| work.create_staged(path))
    }

    /// Creates a staged object with `create` and renames it to its destination.
    fn stage(&mut self, path: &[u8], create: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let at = Self::staging_path(path);
        self.staging = Some((path.to_vec(), at.clone()));
        let result = create(self).and_then(|()| self.commit(&at, path));
        self.staging = None;
        if result.is_err()
            && let Err(error) = self.remove_tree(&at)
        {
            log::warn!("{error}");
        }
        result
    }

    /// Renames a staged object to its destination and removes the object that it replaces.
    fn commit(&self, at: &[u8], path: &[u8]) -> Result<()> {
        let message = "cannot revert";
        let is_dir = |stat: &Stat| stat.kind() == FileKind::Directory;
        let staged = self.target.stat(at).context(message, path)?;
        let replaced = self.target.stat(path).context(message, path)?;
        let mode = match &replaced {
            None => RenameMode::NoReplace,
            Some(replaced) if is_dir(replaced) || staged.as_ref().is_some_and(is_dir) => {
                RenameMode::Exchange
            }
            Some(_) => RenameMode::Replace,
        };
        self.target.rename(at, path, mode).context(message, path)?;
        match mode {
            RenameMode::Exchange => self.remove_tree(at),
            RenameMode::NoReplace | RenameMode::Replace | RenameMode::Whiteout => Ok(()),
        }
    }

    /// Creates the staged object for a path of the old state, with everything below it.
    fn create_staged(&mut self, path: &[u8]) -> Result<()> {
        let (view, found) = (self.old.view(), self.old.find(path)?);
        let mut creator = Creator {
            top: LayerPath::from(path),
            work: self,
            levels: Vec::new(),
        };
        walk::visit_below(view, path, &found, &mut creator)
    }

    /// Creates one object; `layer_path` is its path again, in a form that shares memory with the other paths.
    fn create_item(&mut self, item: &Item<'_>, layer_path: LayerPath) -> Result<()> {
        let (path, at) = (item.path, self.current_path(item.path));
        let (kind, target) = (item.kind(), self.target);
        self.done.entries += 1;
        if kind == FileKind::Directory {
            return target
                .mkdir(&at)
                .context("cannot create the directory", path);
        }
        let key = (item.stat.dev, item.stat.ino);
        if let Some(first) = self.created.get(&key) {
            return target
                .link(&self.current_path(&first.to_bytes()), &at)
                .context("cannot create the hard link", path);
        }
        match kind {
            FileKind::Regular => {
                let size = item.stat.size;
                let content = match size {
                    0 => None,
                    _ => Some((item.open()?, size)),
                };
                target
                    .create_file(&at, content)
                    .context("cannot copy the content", path)?;
                self.done.bytes += size;
            }
            FileKind::Symlink => target
                .symlink(&at, &item.target()?)
                .context("cannot create the symbolic link", path)?,
            _ => target
                .mknod(&at, kind, item.stat.rdev)
                .context("cannot create", path)?,
        }
        self.set_attrs((&at, path), &OldObject::read(item)?)?;
        if item.stat.nlink > 1 {
            self.created.insert(key, layer_path);
        }
        (self.progress)(self.done);
        Ok(())
    }

    /// Sets the attributes of the object at the path `at`; `path` is for messages.
    pub(super) fn set_attrs(&self, (at, path): (&[u8], &[u8]), object: &OldObject) -> Result<()> {
        self.target
            .set_attrs(at, object.kind, &object.attrs)
            .context("cannot set the attributes", path)?;
        self.layer.set_record(at, object.record.as_deref())
    }

    /// Removes a path. A directory is renamed to a staging path first, so that it disappears in one step.
    pub(super) fn remove(&self, path: &[u8]) -> Result<()> {
        let message = "cannot remove";
        let Some(stat) = self.target.stat(path).context(message, path)? else {
            return Ok(());
        };
        if stat.kind() != FileKind::Directory {
            return self.target.unlink(path).context(message, path);
        }
        let staged = Self::staging_path(path);
        self.target
            .rename(path, &staged, RenameMode::NoReplace)
            .context(message, path)?;
        self.remove_tree(&staged)
    }

    /// Removes an object with everything below it, without recursion.
    fn remove_tree(&self, path: &[u8]) -> Result<()> {
        let message = "cannot remove";
        let mut path = path.to_vec();
        // The remaining names of each directory above the current path, and the length of its path.
        let mut levels: Vec<(Vec<Vec<u8>>, usize)> = Vec::new();
        loop {
            let found = self.target.stat(&path).context(message, &path)?;
            match found.map(|stat| stat.kind()) {
                None => {}
                Some(FileKind::Directory) => {
                    let names = self.target.list(&path).context(message, &path)?;
                    levels.push((names, path.len()));
                }
                Some(_) => self.target.unlink(&path).context(message, &path)?,
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
                self.target.rmdir(&path).context(message, &path)?;
                levels.pop();
            }
        }
    }
}

/// Creates the objects that a walk visits.
struct Creator<'w, 'a> {
    work: &'w mut Work<'a>,
    /// The path at which the walk begins.
    top: LayerPath,
    /// The directories above the current one, and the attributes that they get at the end.
    levels: Vec<(LayerPath, OldObject)>,
}

impl Visitor for Creator<'_, '_> {
    fn visit(&mut self, item: &Item<'_>) -> Result<()> {
        let layer_path = match self.levels.last() {
            Some((above, _)) => above.join(item.name()),
            None => self.top.clone(),
        };
        self.work.create_item(item, layer_path.clone())?;
        if item.kind() == FileKind::Directory {
            self.levels.push((layer_path, OldObject::read(item)?));
        }
        Ok(())
    }

    fn leave(&mut self, path: &[u8]) -> Result<()> {
        let Some((_, object)) = self.levels.pop() else {
            return Ok(());
        };
        let at = self.work.current_path(path);
        self.work.set_attrs((&at, path), &object)
    }
}

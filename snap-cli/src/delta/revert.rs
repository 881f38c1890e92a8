//! Reverts the changes between two states: all of them, or those at or below some paths.
//!
//! The work is planned from both states, and then executed through a [`WritableTree`]. A file, or a whole directory that
//! is recreated, is staged next to its destination and renamed over it. A directory that exists in both states is
//! changed entry by entry. Objects are recreated before others are removed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::convert::Infallible;

use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{Found, View};

use super::diff::{Change, Status, diff};
use super::revert_records::TargetLayer;
use super::revert_work::Work;
pub use super::scope::Scope;
use crate::tree::error::{Context as _, OnProgress, Result, TreeError};
use crate::tree::find::{Finder, find, topmost};
use crate::tree::path::{is_within, split};
use crate::tree::path_map::PathMap;
use crate::tree::walk::{self, Item, ItemAttributes, Visitor};
use crate::tree::writable::WritableTree;

/// The action that reverts a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RevertAction {
    /// Remove an object that did not exist in the old state.
    Remove,
    /// Recreate an object that no longer exists.
    Recreate,
    /// Revert an object that differs.
    Revert,
    /// Give a renamed object its old name.
    RenameBack,
}

/// A step of a plan, for display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RevertStep {
    /// The path in bytes, without a leading slash; empty for the root.
    pub path: Vec<u8>,
    /// The action.
    pub action: RevertAction,
    /// The current path of an object that is renamed.
    pub from: Option<Vec<u8>>,
}

/// A plan that reverts changes.
#[derive(Debug, Default)]
pub struct RevertPlan {
    /// The steps, for display.
    pub steps: Vec<RevertStep>,
    /// The paths that are removed.
    remove: PathMap<()>,
    /// The paths that are recreated as in the old state, with everything below them.
    recreate: PathMap<()>,
    /// The directories of which only the attributes are reverted.
    attrs_only: PathMap<()>,
    /// The old and new paths of objects that were renamed within the scope.
    renames: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The stat fields in the old state of all directories in the scope, for their times.
    dirs: PathMap<Stat>,
    scope: Scope,
}

/// Whether the directory of a path was renamed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ParentDir {
    Unmoved,
    Moved,
}

/// The directories of a state in a scope, and its files with several names.
#[derive(Default)]
struct Survey {
    dirs: PathMap<Stat>,
    /// The index of the file to which each name belongs. Only files with several names are recorded.
    file_of_name: PathMap<usize>,
    /// The number of names of each file.
    name_counts: Vec<usize>,
    /// The index of each file, by device and inode number.
    by_inode: HashMap<(u64, u64), usize>,
}

impl Survey {
    fn new(view: &View, scope: &Scope) -> Result<Self> {
        let mut survey = Self::default();
        if scope.is_all() {
            walk::visit_state(view, ItemAttributes::Stored, &mut survey)?;
        }
        for top in topmost(scope.0.clone()) {
            walk::visit_below(view, &top, &find(view, &top)?, &mut survey)?;
        }
        Ok(survey)
    }

    /// Returns the number of names of a file.
    fn name_count(&self, file: usize) -> usize {
        self.name_counts.get(file).copied().unwrap_or_default()
    }
}

impl Visitor for Survey {
    fn visit(&mut self, item: &Item<'_>) -> Result<()> {
        if item.kind() == FileKind::Directory {
            self.dirs.insert(item.path, item.stat);
        } else if item.stat.nlink > 1 {
            let key = (item.stat.dev, item.stat.ino);
            let file = *self.by_inode.entry(key).or_insert(self.name_counts.len());
            match self.name_counts.get_mut(file) {
                Some(count) => *count += 1,
                None => self.name_counts.push(1),
            }
            self.file_of_name.insert(item.path, file);
        }
        Ok(())
    }
}

impl RevertPlan {
    /// Creates the plan that makes `new` equal to `old` in the scope.
    pub fn new(old: &View, new: &View, scope: &Scope) -> Result<Self> {
        let mut plan = Self::default();
        let (mut changed, mut moved) = (BTreeSet::new(), BTreeSet::new());
        for change in diff(old, new)? {
            plan.add_change(change, scope, &mut changed, &mut moved);
        }
        let (mut old_finder, mut new_finder) = (Finder::new(old), Finder::new(new));
        for path in changed.union(&moved) {
            // Changes below a renamed directory are reported at its current path, and are reverted together with it.
            if !path.is_empty() && plan.remove.covers(split(path).0) {
                if changed.contains(path) {
                    plan.push_step(path, RevertAction::Revert);
                }
                continue;
            }
            let parent = match moved.contains(path) {
                true => ParentDir::Moved,
                false => ParentDir::Unmoved,
            };
            plan.add_path(&mut old_finder, &mut new_finder, path, parent)?;
        }
        let (then, now) = (Survey::new(old, scope)?, Survey::new(new, scope)?);
        plan.add_links(&then, &now);
        if plan.steps.is_empty() {
            let steps = &mut plan.steps;
            then.dirs.each_with(&now.dirs, |path, stat, now| {
                if now.is_some_and(|now| now.mtime != stat.mtime) {
                    steps.push(RevertStep::new(path.to_vec(), RevertAction::Revert));
                }
                Ok::<_, TreeError>(())
            })?;
        }
        plan.steps.sort_by(|a, b| a.path.cmp(&b.path));
        plan.dirs = then.dirs;
        plan.scope = scope.clone();
        Ok(plan)
    }

    /// Returns the scope that the plan was created for.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Returns whether there is nothing to revert.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    fn push_step(&mut self, path: &[u8], action: RevertAction) {
        self.steps.push(RevertStep::new(path.to_vec(), action));
    }

    /// Plans a path according to the objects that both states have there.
    fn add_path(
        &mut self,
        old: &mut Finder<'_>,
        new: &mut Finder<'_>,
        path: &[u8],
        parent: ParentDir,
    ) -> Result<()> {
        let is_absent = |found: &Found| matches!(found, Found::Absent | Found::Whiteout);
        let (then, now) = (old.find(path)?, new.find(path)?);
        match (is_absent(&then), is_absent(&now)) {
            (true, true) => {}
            (true, false) => {
                self.push_step(path, RevertAction::Remove);
                self.remove.insert(path, ());
            }
            (false, true) => {
                self.push_step(path, RevertAction::Recreate);
                self.recreate.insert(path, ());
            }
            (false, false) => {
                self.push_step(path, RevertAction::Revert);
                let both_dirs = matches!((then, now), (Found::Dir(_), Found::Dir(_)));
                // If the parent was renamed, the directory at this path may be another one.
                match both_dirs && parent == ParentDir::Unmoved {
                    true => self.attrs_only.insert(path, ()),
                    false => self.recreate.insert(path, ()),
                };
            }
        }
        Ok(())
    }

    /// Adds a change to the plan.
    ///
    /// Paths that must be planned from both states are added to `changed`, or to `moved` if they are paths of the scope
    /// below a renamed directory that is not in the scope itself.
    fn add_change(
        &mut self,
        change: Change,
        scope: &Scope,
        changed: &mut BTreeSet<Vec<u8>>,
        moved: &mut BTreeSet<Vec<u8>>,
    ) {
        // `.` is the root.
        let path = match change.path.as_slice() {
            b"." => Vec::new(),
            _ => change.path,
        };
        let is_new_in_scope = scope.contains(&path);
        match (change.status, change.from) {
            (Status::Renamed, Some(from)) => {
                let is_old_in_scope = scope.contains(&from);
                match (is_new_in_scope, is_old_in_scope) {
                    (true, true) => {
                        self.steps.push(RevertStep {
                            path: from.clone(),
                            action: RevertAction::RenameBack,
                            from: Some(path.clone()),
                        });
                        self.renames.insert(from.clone(), path.clone());
                    }
                    (true, false) => self.push_step(&path, RevertAction::Remove),
                    (false, true) => self.push_step(&from, RevertAction::Recreate),
                    (false, false) => {}
                }
                for (in_scope, path) in [(is_new_in_scope, &path), (is_old_in_scope, &from)] {
                    if !in_scope {
                        moved.extend(scope.below(path).cloned());
                    }
                }
                if is_new_in_scope {
                    self.remove.insert(&path, ());
                }
                if is_old_in_scope {
                    self.recreate.insert(&from, ());
                }
            }
            (Status::Added | Status::Renamed, _) if is_new_in_scope => {
                self.push_step(&path, RevertAction::Remove);
                self.remove.insert(&path, ());
            }
            (Status::Deleted, _) if is_new_in_scope => {
                self.push_step(&path, RevertAction::Recreate);
                self.recreate.insert(&path, ());
            }
            (Status::TypeChanged | Status::Modified, _) if is_new_in_scope => {
                changed.insert(path);
            }
            _ => {}
        }
    }

    /// Plans names of which the hard links differ: names of one file in the old state become names of one file again,
    /// and other names do not.
    fn add_links(&mut self, then: &Survey, now: &Survey) {
        let remains = |path: &[u8]| !self.remove.covers(path);
        // The number of remaining names of each file of the new state, and the number of names that a file of the old
        // state and a file of the new state have in common.
        let mut remaining = HashMap::<usize, usize>::new();
        let mut shared = HashMap::<(usize, usize), usize>::new();
        each(&now.file_of_name, |path, new| {
            if remains(path) {
                *remaining.entry(*new).or_default() += 1;
                if let Some(old) = then.file_of_name.get(path) {
                    *shared.entry((*old, *new)).or_default() += 1;
                }
            }
        });
        let count = |new: usize| remaining.get(&new).copied().unwrap_or_default();
        let mut names = PathMap::default();
        let mut incomplete = HashSet::new();
        each(&then.file_of_name, |path, old| {
            let is_same = match now.file_of_name.get(path) {
                None => then.name_count(*old) == 1,
                Some(new) => {
                    let both = shared.get(&(*old, *new)).copied().unwrap_or_default();
                    both == then.name_count(*old) && count(*new) == both
                }
            };
            if remains(path) && !is_same {
                incomplete.insert(*old);
            }
        });
        each(&now.file_of_name, |path, new| {
            if remains(path) && !then.file_of_name.has(path) && count(*new) != 1 {
                names.insert(path, ());
            }
        });
        each(&then.file_of_name, |path, old| {
            if self.is_recreated(path) || names.has(path) {
                incomplete.insert(*old);
            }
        });
        each(&then.file_of_name, |path, old| {
            if incomplete.contains(old) {
                names.insert(path, ());
            }
        });
        each(&names, |path, ()| {
            if !self.is_recreated(path) {
                self.push_step(path, RevertAction::Revert);
                self.recreate.insert(path, ());
            }
        });
    }

    /// Returns whether the path, or a directory above it, is recreated.
    fn is_recreated(&self, path: &[u8]) -> bool {
        self.recreate.covers(path)
    }

    /// Gives renamed objects their old names where a single rename suffices; the others are copied by [`Self::execute`].
    ///
    /// If it returns true, it renamed something. Then the plan is stale, and the caller must create another one.
    pub(crate) fn revert_renames(&self, target: &dyn WritableTree) -> Result<bool> {
        let message = "cannot restore the old name";
        let mut has_renamed = false;
        for (old, new) in &self.renames {
            let parent = split(old).0;
            let is_free = target.stat(old).context(message, old)?.is_none();
            let is_dir =
                |stat: Option<Stat>| stat.is_some_and(|stat| stat.kind() == FileKind::Directory);
            if is_free
                && !is_within(old, new)
                && is_dir(target.stat(parent).context(message, old)?)
                && target.stat(new).context(message, new)?.is_some()
            {
                target
                    .rename(new, old, RenameMode::NoReplace)
                    .context(message, old)?;
                has_renamed = true;
            }
        }
        Ok(has_renamed)
    }

    /// Executes the plan through `target`, which writes to `layer`, with the objects of the old state.
    pub(crate) fn execute(
        &self,
        old: &View,
        (target, layer): (&dyn WritableTree, &TargetLayer),
        progress: OnProgress<'_>,
    ) -> Result<()> {
        let mut work = Work::new(old, (target, layer), progress);
        let mut parents = PathMap::default();
        for paths in [&self.recreate, &self.remove] {
            each(paths, |path, ()| {
                parents.insert(split(path).0, ());
            });
        }
        parents.each(|dir, ()| work.remove_staged(dir))?;
        self.recreate.each(|path, ()| {
            if self.is_recreated(split(path).0) {
                return Ok(());
            }
            work.create_parents(path)?;
            work.recreate(path)
        })?;
        self.remove.each(|path, ()| {
            match self.is_recreated(path) || self.remove.covers(split(path).0) {
                true => Ok(()),
                false => work.remove(path),
            }
        })?;
        self.attrs_only.each(|path, ()| {
            if !self.is_recreated(path)
                && let Some(object) = work.old_attrs(path)?
            {
                work.set_attrs((path, path), &object)?;
            }
            Ok::<_, TreeError>(())
        })?;
        // Any order is correct, because setting the times of a directory does not change those of another one.
        self.dirs.each_upward(|path, stat| {
            let message = "cannot set the times";
            let now = target.stat(path).context(message, path)?;
            if now.is_some_and(|now| now.kind() == FileKind::Directory && now.mtime != stat.mtime) {
                let (atime, mtime) = (SetTime::At(stat.atime), SetTime::At(stat.mtime));
                target
                    .set_times(path, atime, mtime)
                    .context(message, path)?;
            }
            Ok(())
        })
    }
}

fn each<T>(map: &PathMap<T>, mut each: impl FnMut(&[u8], &T)) {
    let Ok(()) = map.each(|path, value| {
        each(path, value);
        Ok::<_, Infallible>(())
    });
}

impl RevertStep {
    fn new(path: Vec<u8>, action: RevertAction) -> Self {
        Self {
            path,
            action,
            from: None,
        }
    }
}

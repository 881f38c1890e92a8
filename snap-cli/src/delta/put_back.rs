//! Putting back what changed between two states: all of it, or what lies at or below some paths.
//!
//! What is done is planned first, from both states, and then done through a [`Target`]. A file is made
//! beside its place and renamed over it, and so is a whole folder that comes back; a folder that is there in
//! both is changed entry by entry. What comes back comes before what goes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::convert::Infallible;

use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::node::RenameMode;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{Found, View};

use super::diff::{Change, Status, diff};
use super::put_back_work::Work;
pub use super::scope::Scope;
use crate::tree::error::{Context as _, OnProgress, Result, TreeError};
use crate::tree::find::{Finder, at as find, topmost};
use crate::tree::path::{is_within, split};
use crate::tree::path_map::PathMap;
use crate::tree::target::Target;
use crate::tree::walk::{self, Item, Visitor};

/// What is done to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It was not there then: it goes.
    Remove,
    /// It was there then: it comes back.
    BringBack,
    /// It becomes what it was.
    PutBack,
    /// It gets its old name back.
    RenameBack,
}

/// One thing to do, for people to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The path (bytes, no leading slash; the root's is empty).
    pub path: Vec<u8>,
    /// What is done.
    pub what: What,
    /// The name that it has now, where it gets an old one back.
    pub from: Option<Vec<u8>>,
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// In words.
    pub steps: Vec<Step>,
    /// Paths that go.
    remove: PathMap<()>,
    /// Paths that become what they were, with everything below.
    whole: PathMap<()>,
    /// Folders whose attributes alone do.
    attributes: PathMap<()>,
    /// Old and new names of what was renamed within the scope.
    renames: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The times of all folders of the scope, as they were.
    times: PathMap<Stat>,
    scope: Scope,
}

/// Whether a path lies below a directory that was renamed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Position {
    InPlace,
    Moved,
}

/// What a walk over a state finds in a scope.
#[derive(Default)]
struct Survey {
    folders: PathMap<Stat>,
    /// Which file each name of a file with several names is, and how many names of each there are.
    grouped: PathMap<usize>,
    sizes: Vec<usize>,
    by_inode: HashMap<(u64, u64), usize>,
}

impl Survey {
    fn of(view: &View, scope: &Scope) -> Result<Self> {
        let mut survey = Self::default();
        if scope.is_all() {
            walk::state(view, &mut survey)?;
        }
        for top in topmost(scope.0.clone()) {
            walk::below(view, &top, &find(view, &top)?, &mut survey)?;
        }
        Ok(survey)
    }

    /// How many names a file has.
    fn size(&self, group: usize) -> usize {
        self.sizes.get(group).copied().unwrap_or_default()
    }
}

impl Visitor for Survey {
    fn item(&mut self, item: &Item<'_>) -> Result<()> {
        if item.kind() == FileKind::Directory {
            self.folders.insert(item.path, item.stat);
        } else if item.stat.nlink > 1 {
            let key = (item.stat.dev, item.stat.ino);
            let group = *self.by_inode.entry(key).or_insert(self.sizes.len());
            match self.sizes.get_mut(group) {
                Some(size) => *size += 1,
                None => self.sizes.push(1),
            }
            self.grouped.insert(item.path, group);
        }
        Ok(())
    }
}

impl Plan {
    /// What makes `new` in the scope what `old` was there.
    pub fn new(old: &View, new: &View, scope: &Scope) -> Result<Self> {
        let mut plan = Self::default();
        let (mut changed, mut moved) = (BTreeSet::new(), BTreeSet::new());
        for change in diff(old, new)? {
            plan.take(change, scope, &mut changed, &mut moved);
        }
        let (mut before, mut now) = (Finder::new(old), Finder::new(new));
        for path in changed.union(&moved) {
            // What is in a renamed folder is told by its path of today, and goes with that.
            if !path.is_empty() && plan.remove.covers(split(path).0) {
                if changed.contains(path) {
                    plan.step(path, What::PutBack);
                }
                continue;
            }
            let position = match moved.contains(path) {
                true => Position::Moved,
                false => Position::InPlace,
            };
            plan.as_both_say(&mut before, &mut now, path, position)?;
        }
        let (then, now) = (Survey::of(old, scope)?, Survey::of(new, scope)?);
        plan.links(&then, &now);
        if plan.steps.is_empty() {
            let steps = &mut plan.steps;
            then.folders.each_with(&now.folders, |path, stat, now| {
                if now.is_some_and(|now| now.mtime != stat.mtime) {
                    steps.push(Step::new(path.to_vec(), What::PutBack));
                }
                Ok::<_, TreeError>(())
            })?;
        }
        plan.steps.sort_by(|a, b| a.path.cmp(&b.path));
        plan.times = then.folders;
        plan.scope = scope.clone();
        Ok(plan)
    }

    /// What it was made for.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    fn step(&mut self, path: &[u8], what: What) {
        self.steps.push(Step::new(path.to_vec(), what));
    }

    /// Plans a path by what both states have there.
    fn as_both_say(
        &mut self,
        old: &mut Finder<'_>,
        new: &mut Finder<'_>,
        path: &[u8],
        position: Position,
    ) -> Result<()> {
        let gone = |found: &Found| matches!(found, Found::Absent | Found::Whiteout);
        let (then, now) = (old.at(path)?, new.at(path)?);
        match (gone(&then), gone(&now)) {
            (true, true) => {}
            (true, false) => {
                self.step(path, What::Remove);
                self.remove.insert(path, ());
            }
            (false, true) => {
                self.step(path, What::BringBack);
                self.whole.insert(path, ());
            }
            (false, false) => {
                self.step(path, What::PutBack);
                let both = matches!((then, now), (Found::Dir(_), Found::Dir(_)));
                // Where a folder was moved away, another one may lie in its place.
                match both && position == Position::InPlace {
                    true => self.attributes.insert(path, ()),
                    false => self.whole.insert(path, ()),
                };
            }
        }
        Ok(())
    }

    /// `changed`: paths whose state is told by both views. `moved`: the same, for what lies below a folder
    /// that was renamed and is all of it that anybody asked for.
    fn take(
        &mut self,
        change: Change,
        scope: &Scope,
        changed: &mut BTreeSet<Vec<u8>>,
        moved: &mut BTreeSet<Vec<u8>>,
    ) {
        // The root itself.
        let path = match change.path.as_slice() {
            b"." => Vec::new(),
            _ => change.path,
        };
        let here = scope.holds(&path);
        match (change.status, change.from) {
            (Status::Renamed, Some(from)) => {
                let there = scope.holds(&from);
                match (here, there) {
                    (true, true) => {
                        self.steps.push(Step {
                            path: from.clone(),
                            what: What::RenameBack,
                            from: Some(path.clone()),
                        });
                        self.renames.insert(from.clone(), path.clone());
                    }
                    (true, false) => self.step(&path, What::Remove),
                    (false, true) => self.step(&from, What::BringBack),
                    (false, false) => {}
                }
                for (whole, place) in [(here, &path), (there, &from)] {
                    if !whole {
                        moved.extend(scope.below(place).cloned());
                    }
                }
                if here {
                    self.remove.insert(&path, ());
                }
                if there {
                    self.whole.insert(&from, ());
                }
            }
            (Status::Added | Status::Renamed, _) if here => {
                self.step(&path, What::Remove);
                self.remove.insert(&path, ());
            }
            (Status::Deleted, _) if here => {
                self.step(&path, What::BringBack);
                self.whole.insert(&path, ());
            }
            (Status::TypeChanged | Status::Modified, _) if here => {
                changed.insert(path);
            }
            _ => {}
        }
    }

    /// Names that were one file are one file again, and those that were not are not.
    fn links(&mut self, then: &Survey, now: &Survey) {
        let stays = |path: &[u8]| !self.remove.covers(path);
        // Of each file of today the names that stay; and of each file of then and one of today those that both
        // have.
        let mut left = HashMap::<usize, usize>::new();
        let mut shared = HashMap::<(usize, usize), usize>::new();
        each(&now.grouped, |path, is| {
            if stays(path) {
                *left.entry(*is).or_default() += 1;
                if let Some(was) = then.grouped.get(path) {
                    *shared.entry((*was, *is)).or_default() += 1;
                }
            }
        });
        let count = |is: usize| left.get(&is).copied().unwrap_or_default();
        let mut more = PathMap::default();
        let mut anew = HashSet::new();
        each(&then.grouped, |path, was| {
            let same = match now.grouped.get(path) {
                None => then.size(*was) == 1,
                Some(is) => {
                    let both = shared.get(&(*was, *is)).copied().unwrap_or_default();
                    both == then.size(*was) && count(*is) == both
                }
            };
            if stays(path) && !same {
                anew.insert(*was);
            }
        });
        each(&now.grouped, |path, is| {
            if stays(path) && !then.grouped.has(path) && count(*is) != 1 {
                more.insert(path, ());
            }
        });
        each(&then.grouped, |path, was| {
            if self.is_whole(path) || more.has(path) {
                anew.insert(*was);
            }
        });
        each(&then.grouped, |path, was| {
            if anew.contains(was) {
                more.insert(path, ());
            }
        });
        each(&more, |path, ()| {
            if !self.is_whole(path) {
                self.steps.push(Step::new(path.to_vec(), What::PutBack));
                self.whole.insert(path, ());
            }
        });
    }

    /// Whether the path, or a folder that it is in, is made anew.
    fn is_whole(&self, path: &[u8]) -> bool {
        self.whole.covers(path)
    }

    /// Gives what was renamed its old name back where that can be done at once; true when something was
    /// done, and the plan is of no use any more. What is left is copied.
    pub(crate) fn rename_back(&self, target: &dyn Target) -> Result<bool> {
        let what = "can't give back its name to";
        let mut done = false;
        for (old, new) in &self.renames {
            let parent = split(old).0;
            let is_free = target.stat(old).context(what, old)?.is_none();
            let is_folder =
                |stat: Option<Stat>| stat.is_some_and(|stat| stat.kind() == FileKind::Directory);
            if is_free
                && !is_within(old, new)
                && is_folder(target.stat(parent).context(what, old)?)
                && target.stat(new).context(what, new)?.is_some()
            {
                target
                    .rename(new, old, RenameMode::NoReplace)
                    .context(what, old)?;
                done = true;
            }
        }
        Ok(done)
    }

    /// Does it.
    pub(crate) fn carry_out(
        &self,
        old: &View,
        target: &dyn Target,
        progress: OnProgress<'_>,
    ) -> Result<()> {
        let mut work = Work::new(old, target, progress);
        let mut folders = PathMap::default();
        for places in [&self.whole, &self.remove] {
            each(places, |path, ()| {
                folders.insert(split(path).0, ());
            });
        }
        folders.each(|folder, ()| work.clear_staged(folder))?;
        self.whole.each(|path, ()| {
            if self.is_whole(split(path).0) {
                return Ok(());
            }
            work.parents(path)?;
            work.put(path)
        })?;
        self.remove.each(|path, ()| {
            match self.is_whole(path) || self.remove.covers(split(path).0) {
                true => Ok(()),
                false => work.remove(path),
            }
        })?;
        self.attributes.each(|path, ()| {
            if !self.is_whole(path)
                && let Some((kind, attrs)) = work.of(path)?
            {
                work.attrs((path, path), kind, &attrs)?;
            }
            Ok::<_, TreeError>(())
        })?;
        // The deepest first, for order's sake only: setting times changes no other folder's.
        self.times.each_upward(|path, stat| {
            let what = "can't set the times of";
            let now = target.stat(path).context(what, path)?;
            if now.is_some_and(|now| now.kind() == FileKind::Directory && now.mtime != stat.mtime) {
                let (atime, mtime) = (SetTime::At(stat.atime), SetTime::At(stat.mtime));
                target.times(path, atime, mtime).context(what, path)?;
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

impl Step {
    fn new(path: Vec<u8>, what: What) -> Self {
        Self {
            path,
            what,
            from: None,
        }
    }
}

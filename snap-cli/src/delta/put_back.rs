//! Putting back what changed between two states: all of it, or what lies at or below some paths.
//!
//! What is done is planned first, from both states, and then done through a [`Target`]. A file is made
//! beside its place and renamed over it, and so is a whole folder that comes back; a folder that is there in
//! both is changed entry by entry. What comes back comes before what goes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use cowl_fs::sys::attr::SetTime;
use cowl_fs::sys::node::RenameHow;
use cowl_fs::sys::stat::{FileKind, Stat};
use cowl_fs::view::{Found, View};
use uuid::Uuid;

use super::diff::{Change, Status, diff};
use super::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use super::find::at as find;
use super::make::{Attrs, join, split};
pub use super::scope::Scope;
use super::scope::{covers, is_within};
use super::target::Target;
use super::walk::{self, Item};

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
    remove: BTreeSet<Vec<u8>>,
    /// Paths that become what they were, with everything below.
    whole: BTreeSet<Vec<u8>>,
    /// Folders whose attributes alone do.
    attributes: BTreeSet<Vec<u8>>,
    /// Old and new names of what was renamed within the scope.
    renames: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The times of all folders of the scope, as they were.
    times: BTreeMap<Vec<u8>, Stat>,
    scope: Scope,
}

/// What a walk over a state finds in a scope.
#[derive(Default)]
struct Survey {
    folders: BTreeMap<Vec<u8>, Stat>,
    /// Files with several names, by device and inode.
    linked: HashMap<(u64, u64), BTreeSet<Vec<u8>>>,
}

impl Survey {
    fn of(view: &View, scope: &Scope) -> Result<Self> {
        let mut survey = Self::default();
        walk::state(view, &mut |item| {
            if !scope.holds(&item.path) {
                return Ok(());
            }
            if item.kind() == FileKind::Directory {
                survey.folders.insert(item.path, item.stat);
            } else if item.stat.nlink > 1 {
                let key = (item.stat.dev, item.stat.ino);
                survey.linked.entry(key).or_default().insert(item.path);
            }
            Ok(())
        })?;
        Ok(survey)
    }

    /// Which names each name shares its file with, itself among them.
    fn groups(&self) -> BTreeMap<&[u8], &BTreeSet<Vec<u8>>> {
        let each = self.linked.values();
        each.flat_map(|group| group.iter().map(move |path| (path.as_slice(), group)))
            .collect()
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
        for path in changed.union(&moved) {
            // What is in a renamed folder is told by its path of today, and goes with that.
            if !path.is_empty() && covers(&plan.remove, split(path).0) {
                if changed.contains(path) {
                    plan.step(path, What::PutBack);
                }
                continue;
            }
            plan.as_both_say(old, new, path, moved.contains(path))?;
        }
        let (then, now) = (Survey::of(old, scope)?, Survey::of(new, scope)?);
        plan.links(&then, &now);
        let differs = |(path, stat): &(&Vec<u8>, &Stat)| {
            let now = now.folders.get(*path);
            now.is_some_and(|now| now.mtime != stat.mtime)
        };
        if plan.steps.is_empty() {
            let times = then.folders.iter().filter(differs);
            let steps = times.map(|(path, _)| Step::new(path.clone(), What::PutBack));
            plan.steps = steps.collect();
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

    /// What is done to a path follows from what both states have there.
    fn as_both_say(&mut self, old: &View, new: &View, path: &[u8], moved: bool) -> Result<()> {
        let gone = |found: &Found| matches!(found, Found::Absent | Found::Whiteout);
        let (then, now) = (find(old, path)?, find(new, path)?);
        match (gone(&then), gone(&now)) {
            (true, true) => {}
            (true, false) => {
                self.step(path, What::Remove);
                self.remove.insert(path.to_vec());
            }
            (false, true) => {
                self.step(path, What::BringBack);
                self.whole.insert(path.to_vec());
            }
            (false, false) => {
                self.step(path, What::PutBack);
                let both = matches!((then, now), (Found::Dir(_), Found::Dir(_)));
                // Where a folder was moved away, another one may lie in its place.
                match both && !moved {
                    true => self.attributes.insert(path.to_vec()),
                    false => self.whole.insert(path.to_vec()),
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
                    self.remove.insert(path);
                }
                if there {
                    self.whole.insert(from);
                }
            }
            (Status::Added | Status::Renamed, _) if here => {
                self.step(&path, What::Remove);
                self.remove.insert(path);
            }
            (Status::Deleted, _) if here => {
                self.step(&path, What::BringBack);
                self.whole.insert(path);
            }
            (Status::TypeChanged | Status::Modified, _) if here => {
                changed.insert(path);
            }
            _ => {}
        }
    }

    /// Names that were one file are one file again, and those that were not are not.
    fn links(&mut self, then: &Survey, now: &Survey) {
        let (old, new) = (then.groups(), now.groups());
        let alone = |path: &[u8]| BTreeSet::from([path.to_vec()]);
        let mut more = BTreeSet::new();
        let there = old.keys().chain(new.keys());
        for path in there.filter(|path| !covers(&self.remove, path)) {
            let was = old.get(path).map_or_else(|| alone(path), |g| (*g).clone());
            let is = new.get(path).map_or_else(|| alone(path), |g| (*g).clone());
            let stays = is.into_iter().filter(|path| !covers(&self.remove, path));
            let is: BTreeSet<_> = stays.collect();
            if was != is {
                more.extend(was);
            }
        }
        for group in then.linked.values() {
            if group
                .iter()
                .any(|path| self.is_whole(path) || more.contains(path))
            {
                more.extend(group.iter().cloned());
            }
        }
        for path in more {
            if !self.is_whole(&path) {
                self.step(&path, What::PutBack);
                self.whole.insert(path);
            }
        }
    }

    /// Whether the path, or a folder that it is in, is made anew.
    fn is_whole(&self, path: &[u8]) -> bool {
        covers(&self.whole, path)
    }

    /// Gives what was renamed its old name back where that can be done at once; true when something was
    /// done, and the plan is of no use any more. What is left is copied.
    pub(crate) fn rename_back(&self, target: &dyn Target) -> Result<bool> {
        let what = "can't give back its name to";
        let mut done = false;
        for (old, new) in &self.renames {
            let parent = split(old).0;
            let is_free = target.look(old).context(what, old)?.is_none();
            let is_folder =
                |stat: Option<Stat>| stat.is_some_and(|stat| stat.kind() == FileKind::Directory);
            if is_free
                && !is_within(old, new)
                && is_folder(target.look(parent).context(what, old)?)
                && target.look(new).context(what, new)?.is_some()
            {
                target
                    .rename(new, old, RenameHow::NoReplace)
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
        let mut work = Work {
            old,
            target,
            made: HashMap::new(),
            staging: None,
            done: Progress::default(),
            progress,
        };
        let places = self.whole.iter().chain(&self.remove);
        for folder in places.map(|path| split(path).0).collect::<BTreeSet<_>>() {
            work.clear_staged(folder)?;
        }
        for path in &self.whole {
            if !self.is_whole(split(path).0) {
                work.parents(path)?;
                work.put(path)?;
            }
        }
        for path in &self.remove {
            if !self.is_whole(path) && !covers(&self.remove, split(path).0) {
                work.remove(path)?;
            }
        }
        for path in &self.attributes {
            if !self.is_whole(path)
                && let Some(item) = work.item(path)?
            {
                work.attrs(path, &item)?;
            }
        }
        // The deepest first, for order's sake only: setting times changes no other folder's.
        for (path, stat) in self.times.iter().rev() {
            let what = "can't set the times of";
            let now = target.look(path).context(what, path)?;
            if now.is_some_and(|now| now.kind() == FileKind::Directory && now.mtime != stat.mtime) {
                let (atime, mtime) = (SetTime::At(stat.atime), SetTime::At(stat.mtime));
                target.times(path, atime, mtime).context(what, path)?;
            }
        }
        Ok(())
    }
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

/// What the names of things on their way begin with.
const STAGED: &[u8] = b".cowl-";

struct Work<'a> {
    old: &'a View,
    target: &'a dyn Target,
    /// Where files with several names were made.
    made: HashMap<(u64, u64), Vec<u8>>,
    /// The path that is being made, and where.
    staging: Option<(Vec<u8>, Vec<u8>)>,
    done: Progress,
    progress: OnProgress<'a>,
}

impl Work<'_> {
    fn item(&self, path: &[u8]) -> Result<Option<Item>> {
        let space = self.old.layers().first().map(|layer| layer.space());
        Item::of(path.to_vec(), find(self.old, path)?, space)
    }

    /// A name beside a path that nobody has.
    fn beside(path: &[u8]) -> Vec<u8> {
        let id = Uuid::new_v4().simple().to_string();
        join(split(path).0, &[STAGED, id.as_bytes()].concat())
    }

    /// Removes what a killed command left beside its place.
    fn clear_staged(&self, folder: &[u8]) -> Result<()> {
        let what = "can't read the folder";
        let found = self.target.look(folder).context(what, folder)?;
        if found.is_none_or(|stat| stat.kind() != FileKind::Directory) {
            return Ok(());
        }
        for name in self.target.names(folder).context(what, folder)? {
            let path = join(folder, &name);
            let ours = name
                .strip_prefix(STAGED)
                .is_some_and(|id| id.len() == 32 && id.iter().all(u8::is_ascii_hexdigit));
            if ours && matches!(find(self.old, &path)?, Found::Absent | Found::Whiteout) {
                self.remove_tree(&path)?;
            }
        }
        Ok(())
    }

    /// Where a path lies at this moment.
    fn place(&self, path: &[u8]) -> Vec<u8> {
        match &self.staging {
            Some((top, staged)) if is_within(path, top) => {
                let rest = path.get(top.len()..).unwrap_or_default();
                [staged, rest].concat()
            }
            _ => path.to_vec(),
        }
    }

    /// Makes folders on the way that are missing.
    fn parents(&mut self, path: &[u8]) -> Result<()> {
        let (parent, _) = split(path);
        if parent.is_empty() {
            return Ok(());
        }
        let found = self.target.look(parent).context("can't read", parent)?;
        match found.map(|stat| stat.kind()) {
            Some(FileKind::Directory) => Ok(()),
            Some(_) => Err(TreeError::new(
                ErrorKind::Refused,
                "what it is to be put back into is no folder now",
            )
            .at(parent)),
            None => {
                self.parents(parent)?;
                let Some(item) = self.item(parent)? else {
                    return Ok(());
                };
                self.staged(parent, |work| {
                    let at = work.place(parent);
                    work.target
                        .mkdir(&at)
                        .context("can't make the folder", parent)?;
                    work.attrs(&at, &item)
                })
            }
        }
    }

    fn put(&mut self, path: &[u8]) -> Result<()> {
        self.staged(path, |work| work.fill(path))
    }

    /// Has something made beside its place, and puts it there.
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
        let what = "can't put back";
        let is_folder = |stat: &Stat| stat.kind() == FileKind::Directory;
        let made = self.target.look(at).context(what, path)?;
        let there = self.target.look(path).context(what, path)?;
        let how = match &there {
            None => RenameHow::NoReplace,
            Some(there) if is_folder(there) || made.as_ref().is_some_and(is_folder) => {
                RenameHow::Exchange
            }
            Some(_) => RenameHow::Replace,
        };
        self.target.rename(at, path, how).context(what, path)?;
        match how {
            RenameHow::Exchange => self.remove_tree(at),
            RenameHow::NoReplace | RenameHow::Replace | RenameHow::Whiteout => Ok(()),
        }
    }

    /// Makes what the old state has at a path, with everything below.
    fn fill(&mut self, path: &[u8]) -> Result<()> {
        let space = self.old.layers().first().map(|layer| layer.space());
        let mut todo = vec![(path.to_vec(), find(self.old, path)?)];
        let mut folders = Vec::new();
        while let Some((path, found)) = todo.pop() {
            if let Found::Dir(dir) = &found {
                todo.extend(walk::children(self.old, dir, &path)?.into_iter().rev());
            }
            let Some(item) = Item::of(path, found, space)? else {
                continue;
            };
            self.one(&item)?;
            if item.kind() == FileKind::Directory {
                folders.push(item);
            }
        }
        for folder in folders.iter().rev() {
            self.attrs(&self.place(&folder.path), folder)?;
        }
        Ok(())
    }

    fn one(&mut self, item: &Item) -> Result<()> {
        let (path, at) = (item.path.as_slice(), self.place(&item.path));
        let (kind, target) = (item.kind(), self.target);
        self.done.entries += 1;
        if kind == FileKind::Directory {
            return target.mkdir(&at).context("can't make the folder", path);
        }
        let key = (item.stat.dev, item.stat.ino);
        if let Some(first) = self.made.get(&key) {
            return target
                .link(&self.place(first), &at)
                .context("can't make the hard link", path);
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
                    .context("can't copy the content", path)?;
                self.done.bytes += size;
            }
            FileKind::Symlink => target
                .symlink(&at, &item.target()?)
                .context("can't make the symbolic link", path)?,
            _ => target
                .node(&at, kind, item.stat.rdev)
                .context("can't make", path)?,
        }
        self.attrs(&at, item)?;
        if item.stat.nlink > 1 {
            self.made.insert(key, path.to_vec());
        }
        (self.progress)(self.done);
        Ok(())
    }

    fn attrs(&self, at: &[u8], item: &Item) -> Result<()> {
        let attrs = Attrs::of(&item.stat, item.xattrs()?);
        self.target
            .attrs(at, item.kind(), &attrs)
            .context("can't set the attributes of", &item.path)
    }

    /// Removes a path: what has more than one entry under another name first, so that it goes at once.
    fn remove(&self, path: &[u8]) -> Result<()> {
        let what = "can't remove";
        let Some(stat) = self.target.look(path).context(what, path)? else {
            return Ok(());
        };
        if stat.kind() != FileKind::Directory {
            return self.target.unlink(path).context(what, path);
        }
        let aside = Self::beside(path);
        self.target
            .rename(path, &aside, RenameHow::NoReplace)
            .context(what, path)?;
        self.remove_tree(&aside)
    }

    fn remove_tree(&self, path: &[u8]) -> Result<()> {
        let what = "can't remove";
        let mut todo = vec![(path.to_vec(), false)];
        while let Some((path, emptied)) = todo.pop() {
            let Some(stat) = self.target.look(&path).context(what, &path)? else {
                continue;
            };
            if stat.kind() != FileKind::Directory {
                self.target.unlink(&path).context(what, &path)?;
            } else if emptied {
                self.target.rmdir(&path).context(what, &path)?;
            } else {
                let names = self.target.names(&path).context(what, &path)?;
                todo.push((path.clone(), true));
                todo.extend(names.iter().map(|name| (join(&path, name), false)));
            }
        }
        Ok(())
    }
}

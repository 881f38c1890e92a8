//! The list of paths that differ between two states.
//!
//! Every path that differs is listed, including those below a directory that was removed or added. A directory that
//! consists of the same directories of the same layers in both states is not entered. A file is modified if its type,
//! mode, owner, modification time, link target, device number, content or xattrs differ; a copy-up alone is not a
//! modification. A directory is modified if its mode, owner or xattrs differ. Its modification time is ignored, because
//! it changes with the entries, which are listed themselves.
//!
//! A removed path and an added path are reported as a rename if they are the same object: both show the same inode
//! number, or the redirect of the new directory (or the data of the new file) refers to the location of the old one.
//! A renamed directory is one change, and only differences are listed below it. A renamed object may also be modified.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::fmt;

use cowl_layers::name::Name;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{DirNode, Found, LayerPath, View};

use super::compare::{Differences, Pair};
use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};
use crate::tree::find;

/// The kind of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// The path was added.
    Added,
    /// The object exists in both states and differs.
    Modified,
    /// The path was removed.
    Deleted,
    /// The file type is different.
    TypeChanged,
    /// The object had a different path.
    Renamed,
}

impl Status {
    /// Returns the letter for the kind: A, M, D, T or R.
    pub fn letter(self) -> char {
        match self {
            Self::Added => 'A',
            Self::Modified => 'M',
            Self::Deleted => 'D',
            Self::TypeChanged => 'T',
            Self::Renamed => 'R',
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.letter())
    }
}

/// A path that differs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The path in the second state, or in the first one if it was removed. Bytes without a leading slash; `.` is the
    /// root.
    pub path: Vec<u8>,
    /// The kind of the change.
    pub status: Status,
    /// The path of a renamed object in the first state.
    pub from: Option<Vec<u8>>,
    /// The size in the first state: that of a file's content or of a symbolic link's target.
    pub old_size: Option<u64>,
    /// The size in the second state: that of a file's content or of a symbolic link's target.
    pub new_size: Option<u64>,
    /// The differences, if the type is the same. They are complete only with [`DiffOptions::thorough`].
    pub differences: Differences,
}

/// Options of a comparison of two states.
#[derive(Clone, Debug, Default)]
pub struct DiffOptions {
    /// The paths ([`find::normalize`]) to which the comparison is restricted, with everything below them; if empty, it is
    /// not restricted. Other paths are not read.
    pub paths: Vec<Vec<u8>>,
    /// Whether all differences of each path are determined. This reads the contents of files even if another
    /// difference is already known.
    pub thorough: bool,
    /// Whether renames are reported as a removal and an addition.
    pub no_renames: bool,
}

/// Returns the changes that lead from the state `a` to the state `b`, sorted by path.
pub fn diff(a: &View, b: &View) -> Result<Vec<Change>> {
    diff_with(a, b, &DiffOptions::default())
}

/// Returns the changes that lead from the state `a` to the state `b` according to `options`, sorted by path.
pub fn diff_with(a: &View, b: &View, options: &DiffOptions) -> Result<Vec<Change>> {
    let mut diff = Diff {
        pair: Pair {
            a,
            b,
            thorough: options.thorough,
        },
        changes: Vec::new(),
        removed: Vec::new(),
        added: Vec::new(),
        keys: HashMap::new(),
        levels: Vec::new(),
    };
    if options.paths.is_empty() {
        diff.compare_roots()?;
    }
    for path in find::topmost(options.paths.clone()) {
        diff.compare_path(&path)?;
    }
    if !options.no_renames {
        diff.match_renames()?;
    }
    for node in std::mem::take(&mut diff.added) {
        if node.is_unmatched {
            diff.push_change(&node.path, Status::Added, (None, Some(&node.found)));
        }
    }
    for node in std::mem::take(&mut diff.removed) {
        if node.is_unmatched {
            diff.push_change(&node.path, Status::Deleted, (Some(&node.found), None));
        }
    }
    diff.changes.sort_unstable();
    Ok(diff.changes)
}

/// A key by which an object is recognized at another path. Two names of one object have at least one key in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    /// The visible inode number.
    VisibleInode(FileKind, u64),
    /// The id of a layer and the inode number in it.
    LayerInode(FileKind, u64, u64),
}

/// An object that only one of the states has. In a list, a directory precedes its entries.
struct OneSided {
    path: LayerPath,
    found: Found,
    /// The indexes of the directory's entries, sorted by name.
    entries: Vec<usize>,
    /// Whether no counterpart in the other state has been found so far.
    is_unmatched: bool,
}

/// A directory of both states whose entries are being compared.
struct CommonDir {
    a: DirNode,
    b: DirNode,
    path: LayerPath,
    /// The remaining names in reverse order, each with flags that say whether `a` and `b` contain it.
    names: Vec<(Name, bool, bool)>,
}

struct Diff<'a> {
    pair: Pair<'a>,
    changes: Vec<Change>,
    /// The objects that only `a` has, including everything below them.
    removed: Vec<OneSided>,
    /// The objects that only `b` has, including everything below them.
    added: Vec<OneSided>,
    /// The indexes of the objects in `removed` that have a key.
    keys: HashMap<Key, VecDeque<usize>>,
    levels: Vec<CommonDir>,
}

impl Diff<'_> {
    /// Records the change of a path.
    fn push_change(
        &mut self,
        path: &LayerPath,
        status: Status,
        sides: (Option<&Found>, Option<&Found>),
    ) {
        self.changes.push(Change {
            path: path.to_bytes(),
            status,
            from: None,
            old_size: sides.0.and_then(size),
            new_size: sides.1.and_then(size),
            differences: Differences::default(),
        });
    }

    /// Records the modification of an object that both states have, if there are differences.
    fn push_modified(&mut self, path: Vec<u8>, differences: Differences, sides: (&Found, &Found)) {
        if !differences.is_empty() {
            self.changes.push(Change {
                path,
                status: Status::Modified,
                from: None,
                old_size: size(sides.0),
                new_size: size(sides.1),
                differences,
            });
        }
    }

    /// Compares the whole states.
    fn compare_roots(&mut self) -> Result<()> {
        let root = |view: &View| view.root().context("cannot read the root directory", b".");
        let (a, b) = (root(self.pair.a)?, root(self.pair.b)?);
        let path = LayerPath::default();
        let differences = self.pair.compare_dirs(&a, &b, &path)?;
        let (old, new) = (Found::Dir(a.clone()), Found::Dir(b.clone()));
        self.push_modified(b".".to_vec(), differences, (&old, &new));
        self.enter(path, a, b)?;
        self.walk()
    }

    /// Compares one path of both states, with everything below it.
    fn compare_path(&mut self, path: &[u8]) -> Result<()> {
        if path.is_empty() {
            return self.compare_roots();
        }
        let old = find::find(self.pair.a, path)?;
        let new = find::find(self.pair.b, path)?;
        let is_absent = |found: &Found| matches!(found, Found::Absent | Found::Whiteout);
        if is_absent(&old) && is_absent(&new) {
            let message = "neither state has this path";
            return Err(TreeError::new(ErrorKind::NotFound, message).at(path));
        }
        self.compare_found(LayerPath::from(path), old, new)?;
        self.walk()
    }

    /// Compares the entries of the directories that were entered.
    fn walk(&mut self) -> Result<()> {
        while let Some(level) = self.levels.last_mut() {
            let Some((name, in_a, in_b)) = level.names.pop() else {
                level.a.leave();
                level.b.leave();
                self.levels.pop();
                continue;
            };
            let path = level.path.join(&name);
            let found = |view: &View, dir: &DirNode, is_in: bool| match is_in {
                true => view.lookup(dir, &name).context_at("cannot read", &path),
                false => Ok(Found::Absent),
            };
            let old = found(self.pair.a, &level.a, in_a)?;
            let new = found(self.pair.b, &level.b, in_b)?;
            self.compare_found(path, old, new)?;
        }
        Ok(())
    }

    /// Enters a directory of both states, unless both have it from the same layers.
    fn enter(&mut self, path: LayerPath, a: DirNode, b: DirNode) -> Result<()> {
        if a.is_same_location(&b) {
            return Ok(());
        }
        let names = |view: &View, dir: &DirNode| -> Result<Vec<Name>> {
            let listed = view
                .list(dir)
                .context_at("cannot read the directory", &path)?;
            Ok(listed.into_iter().map(|entry| entry.name).collect())
        };
        let (old, new) = (names(self.pair.a, &a)?, names(self.pair.b, &b)?);
        let mut names = merge_sorted(old, new, Ord::cmp);
        names.reverse();
        let names = names.into_iter().filter_map(|(old, new)| {
            let both = (old.is_some(), new.is_some());
            Some((old.or(new)?, both.0, both.1))
        });
        let names = names.collect();
        self.levels.push(CommonDir { a, b, path, names });
        Ok(())
    }

    /// Compares two objects at one path, with everything below them.
    fn compare_found(&mut self, path: LayerPath, old: Found, new: Found) -> Result<()> {
        match (&old, &new) {
            (Found::Absent | Found::Whiteout, Found::Absent | Found::Whiteout) => {}
            (Found::Absent | Found::Whiteout, _) => self.add_one_sided(Side::Added, path, new)?,
            (_, Found::Absent | Found::Whiteout) => self.add_one_sided(Side::Removed, path, old)?,
            _ => {
                self.compare(&path, &old, &new)?;
                match (old, new) {
                    (Found::Dir(one), Found::Dir(two)) => self.enter(path, one, two)?,
                    (Found::Dir(one), _) => self.add_below(Side::Removed, &path, one)?,
                    (_, Found::Dir(two)) => self.add_below(Side::Added, &path, two)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Compares two objects at one path, without the entries of directories.
    fn compare(&mut self, path: &LayerPath, old: &Found, new: &Found) -> Result<()> {
        let differences = match (old, new) {
            (Found::Dir(one), Found::Dir(two)) => self.pair.compare_dirs(one, two, path)?,
            (Found::File(one), Found::File(two)) if one.stat.kind() == two.stat.kind() => {
                self.pair.compare_files(one, two, path)?
            }
            _ => {
                self.push_change(path, Status::TypeChanged, (Some(old), Some(new)));
                return Ok(());
            }
        };
        self.push_modified(path.to_bytes(), differences, (old, new));
        Ok(())
    }

    /// Records an object that only one of the states has, with everything below it.
    fn add_one_sided(&mut self, side: Side, path: LayerPath, found: Found) -> Result<()> {
        let dir = match &found {
            Found::Dir(dir) => Some(dir.clone()),
            Found::Absent | Found::Whiteout | Found::File(_) => None,
        };
        let top = self.record(side, path.clone(), found)?;
        match dir {
            Some(dir) => self.add_entries(side, Some(top), path, dir),
            None => Ok(()),
        }
    }

    /// Records everything in a directory that has a different type in the other state.
    fn add_below(&mut self, side: Side, path: &LayerPath, dir: DirNode) -> Result<()> {
        self.add_entries(side, None, path.clone(), dir)
    }

    /// Records one object that only one of the states has, and returns its index.
    fn record(&mut self, side: Side, path: LayerPath, found: Found) -> Result<usize> {
        let nodes = match side {
            Side::Removed => &mut self.removed,
            Side::Added => &mut self.added,
        };
        let at = nodes.len();
        if side == Side::Removed {
            for key in keys(&found, &path)? {
                self.keys.entry(key).or_default().push_back(at);
            }
        }
        nodes.push(OneSided {
            path,
            found,
            entries: Vec::new(),
            is_unmatched: true,
        });
        Ok(at)
    }

    /// Records everything in a directory, whose own index is `node` if it is recorded.
    fn add_entries(
        &mut self,
        side: Side,
        node: Option<usize>,
        path: LayerPath,
        dir: DirNode,
    ) -> Result<()> {
        let view = match side {
            Side::Removed => self.pair.a,
            Side::Added => self.pair.b,
        };
        let list = |dir: &DirNode, path: &LayerPath| -> Result<Vec<Name>> {
            let listed = view
                .list(dir)
                .context_at("cannot read the directory", path)?;
            Ok(listed.into_iter().rev().map(|entry| entry.name).collect())
        };
        let names = list(&dir, &path)?;
        let mut levels = vec![(node, path, dir, names)];
        while let Some((node, path, dir, names)) = levels.last_mut() {
            let Some(name) = names.pop() else {
                dir.leave();
                levels.pop();
                continue;
            };
            let inner = path.join(&name);
            let found = view.lookup(dir, &name).context_at("cannot read", &inner)?;
            let inner_dir = match &found {
                Found::Absent | Found::Whiteout => continue,
                Found::Dir(dir) => Some(dir.clone()),
                Found::File(_) => None,
            };
            let at = self.record(side, inner.clone(), found)?;
            let nodes = match side {
                Side::Removed => &mut self.removed,
                Side::Added => &mut self.added,
            };
            if let Some(above) = node.and_then(|node| nodes.get_mut(node)) {
                above.entries.push(at);
            }
            if let Some(dir) = inner_dir {
                let names = list(&dir, &inner)?;
                levels.push((Some(at), inner, dir, names));
            }
        }
        Ok(())
    }

    /// Finds renames, of directories before those of their entries.
    fn match_renames(&mut self) -> Result<()> {
        for at in 0..self.added.len() {
            let Some(node) = self.added.get(at).filter(|node| node.is_unmatched) else {
                continue;
            };
            let (path, found) = (node.path.clone(), node.found.clone());
            let Some(old_at) = self.find_removed(&found, &path)? else {
                continue;
            };
            let Some(old) = self.removed.get(old_at) else {
                continue;
            };
            let (old_path, old) = (old.path.clone(), old.found.clone());
            let differences = match (&old, &found) {
                (Found::Dir(one), Found::Dir(two)) => self.pair.compare_dirs(one, two, &path)?,
                (Found::File(one), Found::File(two)) => self.pair.compare_files(one, two, &path)?,
                _ => Differences::default(),
            };
            self.changes.push(Change {
                path: path.to_bytes(),
                status: Status::Renamed,
                from: Some(old_path.to_bytes()),
                old_size: size(&old),
                new_size: size(&found),
                differences,
            });
            self.set_matched(old_at, at);
            self.match_below(old_at, at)?;
        }
        Ok(())
    }

    /// Marks a removed and an added object as one renamed object.
    fn set_matched(&mut self, old: usize, new: usize) {
        if let Some(node) = self.removed.get_mut(old) {
            node.is_unmatched = false;
        }
        if let Some(node) = self.added.get_mut(new) {
            node.is_unmatched = false;
        }
    }

    /// Compares the entries of a renamed directory, as those of a directory that has the same path in both states.
    ///
    /// Entries that were matched with another path, or have no counterpart, remain as they were recorded.
    fn match_below(&mut self, old: usize, new: usize) -> Result<()> {
        let mut pending = vec![(old, new)];
        while let Some((old, new)) = pending.pop() {
            let (Some(one), Some(two)) = (self.removed.get(old), self.added.get(new)) else {
                continue;
            };
            let (Found::Dir(dir_one), Found::Dir(dir_two)) = (&one.found, &two.found) else {
                continue;
            };
            let is_same = dir_one.is_same_location(dir_two);
            let (one, two) = (one.entries.clone(), two.entries.clone());
            let name = |nodes: &[OneSided], at: usize| {
                let node = nodes.get(at).and_then(|node| node.path.split_last());
                node.map(|(_, name)| name.to_vec())
            };
            let pairs = merge_sorted(one, two, |a, b| {
                name(&self.removed, *a).cmp(&name(&self.added, *b))
            });
            for (old, new) in pairs {
                let (Some(old), Some(new)) = (old, new) else {
                    continue;
                };
                let (Some(one), Some(two)) = (self.removed.get(old), self.added.get(new)) else {
                    continue;
                };
                if !(is_same || one.is_unmatched && two.is_unmatched) {
                    continue;
                }
                if !is_same {
                    let path = two.path.clone();
                    let (one, two) = (one.found.clone(), two.found.clone());
                    self.compare(&path, &one, &two)?;
                }
                self.set_matched(old, new);
                pending.push((old, new));
            }
        }
        Ok(())
    }

    /// Returns the index of an unmatched removed object that is the same object as `found`.
    fn find_removed(&mut self, found: &Found, path: &LayerPath) -> Result<Option<usize>> {
        for key in keys(found, path)? {
            let Some(candidates) = self.keys.get_mut(&key) else {
                continue;
            };
            // An object never becomes unmatched again, so matched ones can be removed from the queue.
            while let Some(at) = candidates.front() {
                if self.removed.get(*at).is_some_and(|node| node.is_unmatched) {
                    return Ok(Some(*at));
                }
                candidates.pop_front();
            }
        }
        Ok(None)
    }
}

/// The state that has an object that the other state lacks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The old state.
    Removed,
    /// The new state.
    Added,
}

/// Merges two sorted lists into one in which equal elements are paired.
fn merge_sorted<T>(
    one: Vec<T>,
    two: Vec<T>,
    order: impl Fn(&T, &T) -> Ordering,
) -> Vec<(Option<T>, Option<T>)> {
    let mut both = Vec::with_capacity(one.len().max(two.len()));
    let (mut one, mut two) = (one.into_iter().peekable(), two.into_iter().peekable());
    loop {
        let next = match (one.peek(), two.peek()) {
            (None, None) => return both,
            (Some(a), Some(b)) => order(a, b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
        };
        both.push(match next {
            Ordering::Less => (one.next(), None),
            Ordering::Equal => (one.next(), two.next()),
            Ordering::Greater => (None, two.next()),
        });
    }
}

/// Returns the size of an object; `None` for a type without a reported size.
fn size(found: &Found) -> Option<u64> {
    let reported = |stat: &Stat| match stat.kind() {
        FileKind::Regular | FileKind::Symlink => Some(stat.size),
        _ => None,
    };
    match found {
        Found::File(file) => reported(&file.stat),
        Found::Absent | Found::Whiteout | Found::Dir(_) => None,
    }
}

/// Returns the keys by which an object is recognized at another path.
fn keys(found: &Found, path: &LayerPath) -> Result<Vec<Key>> {
    Ok(match found {
        Found::Absent | Found::Whiteout => Vec::new(),
        Found::Dir(dir) => {
            let kind = FileKind::Directory;
            let mut keys = vec![Key::VisibleInode(kind, dir.ino)];
            keys.extend(
                dir.locs
                    .iter()
                    .map(|loc| Key::LayerInode(kind, loc.layer().id(), loc.ino())),
            );
            keys
        }
        Found::File(file) => {
            let kind = file.stat.kind();
            let layer = |loc: &cowl_layers::view::Loc| loc.dir.layer().id();
            let mut keys = vec![
                Key::VisibleInode(kind, file.ino),
                Key::LayerInode(kind, layer(&file.loc), file.stat.ino),
            ];
            if let Some(data) = &file.data {
                let ino = data.stat().context_at("cannot read", path)?.ino;
                keys.push(Key::LayerInode(kind, layer(data), ino));
            }
            keys
        }
    })
}

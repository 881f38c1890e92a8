//! What differs between two states.
//!
//! Every path that differs is listed, those below a folder that was removed or added too. A folder
//! that both states have at the same places of the same layers is not entered. A file is changed when
//! its type, mode, owner, modification time, link target, device number, content or attributes differ:
//! that it was copied up is no change. A folder is changed when its mode, owner or attributes differ;
//! its time changes with what is in it, which is listed anyway.
//!
//! Renamed is what is gone at one path, new at another, and the same object: it shows the same inode
//! number, or the new folder's redirect (or the new file's content) lies where the old one lay. A
//! renamed folder is one line; below it only what differs within. A renamed thing may be changed too.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::fmt;

use cowl_layers::name::Name;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{DirNode, Found, LayerPath, View};

use super::compare::{Pair, What};
use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};
use crate::tree::find;

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// It is new.
    Added,
    /// It is there in both and differs.
    Modified,
    /// It is gone.
    Deleted,
    /// It is of another type.
    TypeChanged,
    /// It had another path.
    Renamed,
}

impl Status {
    /// The one letter that stands for it: A, M, D, T or R.
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

/// One path that differs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The path (bytes, no leading slash; `.` is the root): in the second state, or in the first when it
    /// is gone.
    pub path: Vec<u8>,
    /// What happened.
    pub status: Status,
    /// The path in the first state of what was renamed.
    pub from: Option<Vec<u8>>,
    /// Its size in the first state: of a file its content's, of a symbolic link its target's.
    pub old_size: Option<u64>,
    /// The same in the second state.
    pub new_size: Option<u64>,
    /// What of it differs, where it is of one type in both. Not everything, unless that was asked for.
    pub what: What,
}

/// How two states are compared.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Only these paths ([`find::plain`]) with what is below them; none: everything. Nothing else is read.
    pub paths: Vec<Vec<u8>>,
    /// Everything that differs is said of each path, not only that something does: contents are read
    /// also of files whose times differ.
    pub thorough: bool,
    /// What was renamed is told as gone and new.
    pub no_renames: bool,
}

/// What leads from the state `a` to the state `b`, sorted by path.
pub fn diff(a: &View, b: &View) -> Result<Vec<Change>> {
    diff_of(a, b, &Wish::default())
}

/// The same, as it is wished.
pub fn diff_of(a: &View, b: &View, wish: &Wish) -> Result<Vec<Change>> {
    let mut diff = Diff {
        pair: Pair {
            a,
            b,
            thorough: wish.thorough,
        },
        changes: Vec::new(),
        gone: Vec::new(),
        new: Vec::new(),
        keys: HashMap::new(),
        levels: Vec::new(),
    };
    if wish.paths.is_empty() {
        diff.roots()?;
    }
    for path in find::topmost(wish.paths.clone()) {
        diff.only(&path)?;
    }
    if !wish.no_renames {
        diff.match_renames()?;
    }
    for node in std::mem::take(&mut diff.new) {
        if node.open {
            diff.change(&node.path, Status::Added, (None, Some(&node.found)));
        }
    }
    for node in std::mem::take(&mut diff.gone) {
        if node.open {
            diff.change(&node.path, Status::Deleted, (Some(&node.found), None));
        }
    }
    diff.changes.sort_unstable();
    Ok(diff.changes)
}

/// Two names of one object have a key in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    /// The inode number that it shows.
    Shown(FileKind, u64),
    /// A layer's id and the inode there.
    Place(FileKind, u64, u64),
}

/// What only one of the two has, in a list in which a directory comes before what is in it.
struct Node {
    path: LayerPath,
    found: Found,
    /// What is in it, sorted by name.
    below: Vec<usize>,
    /// What became of it is not known yet.
    open: bool,
}

/// A directory that both have, in which the comparison is.
struct Level {
    a: DirNode,
    b: DirNode,
    path: LayerPath,
    /// The names in it, each with whether `a` and `b` have it. The next one is taken from the end.
    names: Vec<(Name, bool, bool)>,
}

struct Diff<'a> {
    pair: Pair<'a>,
    changes: Vec<Change>,
    /// What only `a` has, and what only `b` has, with everything below.
    gone: Vec<Node>,
    new: Vec<Node>,
    /// Which of what only `a` has.
    keys: HashMap<Key, VecDeque<usize>>,
    levels: Vec<Level>,
}

impl Diff<'_> {
    fn change(
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
            what: What::default(),
        });
    }

    /// Adds what is in both, if it differs.
    fn modified(&mut self, path: Vec<u8>, what: What, sides: (&Found, &Found)) {
        if what.any() {
            self.changes.push(Change {
                path,
                status: Status::Modified,
                from: None,
                old_size: size(sides.0),
                new_size: size(sides.1),
                what,
            });
        }
    }

    fn roots(&mut self) -> Result<()> {
        let root = |view: &View| view.root().context("can't read the root folder", b".");
        let (a, b) = (root(self.pair.a)?, root(self.pair.b)?);
        let path = LayerPath::default();
        let what = self.pair.folders(&a, &b, &path)?;
        let (old, new) = (Found::Dir(a.clone()), Found::Dir(b.clone()));
        self.modified(b".".to_vec(), what, (&old, &new));
        self.enter(path, a, b)?;
        self.walk()
    }

    /// One path of both states.
    fn only(&mut self, path: &[u8]) -> Result<()> {
        if path.is_empty() {
            return self.roots();
        }
        let old = find::at(self.pair.a, path)?;
        let new = find::at(self.pair.b, path)?;
        let none = |found: &Found| matches!(found, Found::Absent | Found::Whiteout);
        if none(&old) && none(&new) {
            let what = "neither state has this path";
            return Err(TreeError::new(ErrorKind::NotFound, what).at(path));
        }
        self.both(LayerPath::from(path), old, new)?;
        self.walk()
    }

    /// Compares what is in the directories that were entered.
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
                true => view.lookup(dir, &name).context_at("can't read", &path),
                false => Ok(Found::Absent),
            };
            let old = found(self.pair.a, &level.a, in_a)?;
            let new = found(self.pair.b, &level.b, in_b)?;
            self.both(path, old, new)?;
        }
        Ok(())
    }

    /// Goes into a directory of both, unless it is the same one.
    fn enter(&mut self, path: LayerPath, a: DirNode, b: DirNode) -> Result<()> {
        if a.is_same_location(&b) {
            return Ok(());
        }
        let names = |view: &View, dir: &DirNode| -> Result<Vec<Name>> {
            let listed = view.list(dir).context_at("can't read the folder", &path)?;
            Ok(listed.into_iter().map(|entry| entry.name).collect())
        };
        let (old, new) = (names(self.pair.a, &a)?, names(self.pair.b, &b)?);
        let mut names = joined(old, new, Ord::cmp);
        names.reverse();
        let names = names.into_iter().filter_map(|(old, new)| {
            let both = (old.is_some(), new.is_some());
            Some((old.or(new)?, both.0, both.1))
        });
        let names = names.collect();
        self.levels.push(Level { a, b, path, names });
        Ok(())
    }

    fn both(&mut self, path: LayerPath, old: Found, new: Found) -> Result<()> {
        match (&old, &new) {
            (Found::Absent | Found::Whiteout, Found::Absent | Found::Whiteout) => {}
            (Found::Absent | Found::Whiteout, _) => self.add(Side::New, path, new)?,
            (_, Found::Absent | Found::Whiteout) => self.add(Side::Gone, path, old)?,
            _ => {
                self.compare(&path, &old, &new)?;
                match (old, new) {
                    (Found::Dir(one), Found::Dir(two)) => self.enter(path, one, two)?,
                    (Found::Dir(one), _) => self.add_below(Side::Gone, &path, one)?,
                    (_, Found::Dir(two)) => self.add_below(Side::New, &path, two)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// In what two objects at one path differ, apart from what is in them.
    fn compare(&mut self, path: &LayerPath, old: &Found, new: &Found) -> Result<()> {
        let what = match (old, new) {
            (Found::Dir(one), Found::Dir(two)) => self.pair.folders(one, two, path)?,
            (Found::File(one), Found::File(two)) if one.stat.kind() == two.stat.kind() => {
                self.pair.files(one, two, path)?
            }
            _ => {
                self.change(path, Status::TypeChanged, (Some(old), Some(new)));
                return Ok(());
            }
        };
        if what.any() {
            self.modified(path.to_bytes(), what, (old, new));
        }
        Ok(())
    }

    /// Notes what only one of the two has, with everything below it.
    fn add(&mut self, side: Side, path: LayerPath, found: Found) -> Result<()> {
        let inside = match &found {
            Found::Dir(dir) => Some(dir.clone()),
            Found::Absent | Found::Whiteout | Found::File(_) => None,
        };
        let top = self.note(side, path.clone(), found)?;
        match inside {
            Some(dir) => self.fill(side, Some(top), path, dir),
            None => Ok(()),
        }
    }

    /// Notes everything in a directory in whose place the other has something else.
    fn add_below(&mut self, side: Side, path: &LayerPath, dir: DirNode) -> Result<()> {
        self.fill(side, None, path.clone(), dir)
    }

    fn note(&mut self, side: Side, path: LayerPath, found: Found) -> Result<usize> {
        let nodes = match side {
            Side::Gone => &mut self.gone,
            Side::New => &mut self.new,
        };
        let at = nodes.len();
        if side == Side::Gone {
            for key in keys(&found, &path)? {
                self.keys.entry(key).or_default().push_back(at);
            }
        }
        nodes.push(Node {
            path,
            found,
            below: Vec::new(),
            open: true,
        });
        Ok(at)
    }

    /// Notes everything in a directory; `node` is its own.
    fn fill(
        &mut self,
        side: Side,
        node: Option<usize>,
        path: LayerPath,
        dir: DirNode,
    ) -> Result<()> {
        let view = match side {
            Side::Gone => self.pair.a,
            Side::New => self.pair.b,
        };
        let list = |dir: &DirNode, path: &LayerPath| -> Result<Vec<Name>> {
            let listed = view.list(dir).context_at("can't read the folder", path)?;
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
            let found = view.lookup(dir, &name).context_at("can't read", &inner)?;
            let inside = match &found {
                Found::Absent | Found::Whiteout => continue,
                Found::Dir(dir) => Some(dir.clone()),
                Found::File(_) => None,
            };
            let at = self.note(side, inner.clone(), found)?;
            let nodes = match side {
                Side::Gone => &mut self.gone,
                Side::New => &mut self.new,
            };
            if let Some(above) = node.and_then(|node| nodes.get_mut(node)) {
                above.below.push(at);
            }
            if let Some(dir) = inside {
                let names = list(&dir, &inner)?;
                levels.push((Some(at), inner, dir, names));
            }
        }
        Ok(())
    }

    /// Finds what was renamed, folders before what is in them; what is left was added.
    fn match_renames(&mut self) -> Result<()> {
        for at in 0..self.new.len() {
            let Some(node) = self.new.get(at).filter(|node| node.open) else {
                continue;
            };
            let (path, found) = (node.path.clone(), node.found.clone());
            let Some(old_at) = self.find_gone(&found, &path)? else {
                continue;
            };
            let Some(old) = self.gone.get(old_at) else {
                continue;
            };
            let (old_path, old) = (old.path.clone(), old.found.clone());
            let what = match (&old, &found) {
                (Found::Dir(one), Found::Dir(two)) => self.pair.folders(one, two, &path)?,
                (Found::File(one), Found::File(two)) => self.pair.files(one, two, &path)?,
                _ => What::default(),
            };
            self.changes.push(Change {
                path: path.to_bytes(),
                status: Status::Renamed,
                from: Some(old_path.to_bytes()),
                old_size: size(&old),
                new_size: size(&found),
                what,
            });
            self.settle(old_at, at);
            self.pair_below(old_at, at)?;
        }
        Ok(())
    }

    fn settle(&mut self, old: usize, new: usize) {
        if let Some(node) = self.gone.get_mut(old) {
            node.open = false;
        }
        if let Some(node) = self.new.get_mut(new) {
            node.open = false;
        }
    }

    /// What lies below a renamed directory is compared as below one that both have. What was found again
    /// elsewhere, or has no counterpart, is left as it was noted.
    fn pair_below(&mut self, old: usize, new: usize) -> Result<()> {
        let mut todo = vec![(old, new)];
        while let Some((old, new)) = todo.pop() {
            let (Some(one), Some(two)) = (self.gone.get(old), self.new.get(new)) else {
                continue;
            };
            let (Found::Dir(dir_one), Found::Dir(dir_two)) = (&one.found, &two.found) else {
                continue;
            };
            let same = dir_one.is_same_location(dir_two);
            let (one, two) = (one.below.clone(), two.below.clone());
            let name = |nodes: &[Node], at: usize| {
                let node = nodes.get(at).and_then(|node| node.path.split_last());
                node.map(|(_, name)| name.to_vec())
            };
            let pairs = joined(one, two, |a, b| {
                name(&self.gone, *a).cmp(&name(&self.new, *b))
            });
            for (old, new) in pairs {
                let (Some(old), Some(new)) = (old, new) else {
                    continue;
                };
                let (Some(one), Some(two)) = (self.gone.get(old), self.new.get(new)) else {
                    continue;
                };
                if !(same || one.open && two.open) {
                    continue;
                }
                if !same {
                    let path = two.path.clone();
                    let (one, two) = (one.found.clone(), two.found.clone());
                    self.compare(&path, &one, &two)?;
                }
                self.settle(old, new);
                todo.push((old, new));
            }
        }
        Ok(())
    }

    fn find_gone(&mut self, found: &Found, path: &LayerPath) -> Result<Option<usize>> {
        for key in keys(found, path)? {
            let Some(known) = self.keys.get_mut(&key) else {
                continue;
            };
            // What is settled stays so.
            while let Some(at) = known.front() {
                if self.gone.get(*at).is_some_and(|node| node.open) {
                    return Ok(Some(*at));
                }
                known.pop_front();
            }
        }
        Ok(None)
    }
}

/// Which of the two states has an object that the other lacks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The old one.
    Gone,
    /// The new one.
    New,
}

/// Two sorted lists as one: equal ones together.
fn joined<T>(
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

/// The size that is told of an object.
fn size(found: &Found) -> Option<u64> {
    let told = |stat: &Stat| match stat.kind() {
        FileKind::Regular | FileKind::Symlink => Some(stat.size),
        _ => None,
    };
    match found {
        Found::File(file) => told(&file.stat),
        Found::Absent | Found::Whiteout | Found::Dir(_) => None,
    }
}

/// By what an object is recognised under another name.
fn keys(found: &Found, path: &LayerPath) -> Result<Vec<Key>> {
    Ok(match found {
        Found::Absent | Found::Whiteout => Vec::new(),
        Found::Dir(dir) => {
            let kind = FileKind::Directory;
            let mut keys = vec![Key::Shown(kind, dir.ino)];
            keys.extend(
                dir.locs
                    .iter()
                    .map(|loc| Key::Place(kind, loc.layer().id(), loc.ino())),
            );
            keys
        }
        Found::File(file) => {
            let kind = file.stat.kind();
            let layer = |loc: &cowl_layers::view::Loc| loc.dir.layer().id();
            let mut keys = vec![
                Key::Shown(kind, file.ino),
                Key::Place(kind, layer(&file.loc), file.stat.ino),
            ];
            if let Some(data) = &file.data {
                let ino = data.stat().context_at("can't read", path)?.ino;
                keys.push(Key::Place(kind, layer(data), ino));
            }
            keys
        }
    })
}

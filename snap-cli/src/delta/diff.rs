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

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use cowl_fs::sys::stat::{FileKind, Stat};
use cowl_fs::view::{DirNode, Found, View};

use super::compare::{Pair, What};
use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::find;
use super::walk::children;

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
        gone: BTreeMap::new(),
        new: BTreeMap::new(),
        keys: HashMap::new(),
        taken: HashSet::new(),
        pairs: Vec::new(),
    };
    if wish.paths.is_empty() {
        diff.roots()?;
    }
    for path in find::topmost(wish.paths.clone()) {
        diff.only(path)?;
    }
    diff.drain_pairs()?;
    if !wish.no_renames {
        diff.match_renames()?;
    }
    for (path, found) in std::mem::take(&mut diff.new) {
        diff.change(path, Status::Added, (None, Some(&found)));
    }
    for (path, found) in std::mem::take(&mut diff.gone) {
        diff.change(path, Status::Deleted, (Some(&found), None));
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

struct Diff<'a> {
    pair: Pair<'a>,
    changes: Vec<Change>,
    /// What only `a` has, and what only `b` has, with everything below.
    gone: BTreeMap<Vec<u8>, Found>,
    new: BTreeMap<Vec<u8>, Found>,
    keys: HashMap<Key, BTreeSet<Vec<u8>>>,
    /// Paths of `a` that were found again elsewhere.
    taken: HashSet<Vec<u8>>,
    pairs: Vec<(Vec<u8>, DirNode, Vec<u8>, DirNode)>,
}

impl Diff<'_> {
    fn change(&mut self, path: Vec<u8>, status: Status, sides: (Option<&Found>, Option<&Found>)) {
        self.changes.push(Change {
            path,
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
        let what = self.pair.folders(&a, &b, b".")?;
        let (old, new) = (Found::Dir(a.clone()), Found::Dir(b.clone()));
        self.modified(b".".to_vec(), what, (&old, &new));
        self.pairs.push((Vec::new(), a, Vec::new(), b));
        Ok(())
    }

    /// One path of both states.
    fn only(&mut self, path: Vec<u8>) -> Result<()> {
        if path.is_empty() {
            return self.roots();
        }
        let old = find::at(self.pair.a, &path)?;
        let new = find::at(self.pair.b, &path)?;
        let none = |found: &Found| matches!(found, Found::Absent | Found::Whiteout);
        if none(&old) && none(&new) {
            let what = "neither state has this path";
            return Err(TreeError::new(ErrorKind::NotFound, what).at(path));
        }
        self.both(path.clone(), old, path, new)
    }

    fn drain_pairs(&mut self) -> Result<()> {
        while let Some((path_a, dir_a, path_b, dir_b)) = self.pairs.pop() {
            if !dir_a.same_place(&dir_b) {
                self.folders(&path_a, &dir_a, &path_b, &dir_b)?;
            }
        }
        Ok(())
    }

    fn folders(
        &mut self,
        path_a: &[u8],
        dir_a: &DirNode,
        path_b: &[u8],
        dir_b: &DirNode,
    ) -> Result<()> {
        let mut old: BTreeMap<Vec<u8>, (Vec<u8>, Found)> = children(self.pair.a, dir_a, path_a)?
            .into_iter()
            .map(|(path, found)| (last(&path).to_vec(), (path, found)))
            .collect();
        for (path, new) in children(self.pair.b, dir_b, path_b)? {
            match old.remove(last(&path)) {
                None => self.add_new(path, new)?,
                // What was here is known to be elsewhere: this is another.
                Some((old_path, _)) if self.taken.contains(&old_path) => self.add_new(path, new)?,
                Some((old_path, old)) => self.both(old_path, old, path, new)?,
            }
        }
        for (path, found) in old.into_values() {
            self.add_gone(path, found)?;
        }
        Ok(())
    }

    fn both(&mut self, old_path: Vec<u8>, old: Found, path: Vec<u8>, new: Found) -> Result<()> {
        match (&old, &new) {
            (Found::Dir(one), Found::Dir(two)) => {
                let what = self.pair.folders(one, two, &path)?;
                self.modified(path.clone(), what, (&old, &new));
                self.pairs.push((old_path, one.clone(), path, two.clone()));
            }
            (Found::File(one), Found::File(two)) => {
                if one.stat.kind() == two.stat.kind() {
                    let what = self.pair.files(one, two, &path)?;
                    self.modified(path, what, (&old, &new));
                } else {
                    self.change(path, Status::TypeChanged, (Some(&old), Some(&new)));
                }
            }
            (Found::Dir(one), Found::File(_)) => {
                self.change(path, Status::TypeChanged, (Some(&old), Some(&new)));
                for (inner, found) in children(self.pair.a, one, &old_path)? {
                    self.add_gone(inner, found)?;
                }
            }
            (Found::File(_), Found::Dir(two)) => {
                self.change(path.clone(), Status::TypeChanged, (Some(&old), Some(&new)));
                for (inner, found) in children(self.pair.b, two, &path)? {
                    self.add_new(inner, found)?;
                }
            }
            (Found::Absent | Found::Whiteout, _) => self.add_new(path, new)?,
            (_, Found::Absent | Found::Whiteout) => self.add_gone(old_path, old)?,
        }
        Ok(())
    }

    /// Notes what only `a` has, with everything below it.
    fn add_gone(&mut self, path: Vec<u8>, found: Found) -> Result<()> {
        let mut todo = vec![(path, found)];
        while let Some((path, found)) = todo.pop() {
            // What is left of a folder that was found again was noted when it was.
            if matches!(found, Found::Absent | Found::Whiteout) || self.taken.contains(&path) {
                continue;
            }
            if let Found::Dir(dir) = &found {
                todo.extend(children(self.pair.a, dir, &path)?);
            }
            for key in keys(&found, &path)? {
                self.keys.entry(key).or_default().insert(path.clone());
            }
            self.gone.insert(path, found);
        }
        Ok(())
    }

    /// Notes what only `b` has, with everything below it.
    fn add_new(&mut self, path: Vec<u8>, found: Found) -> Result<()> {
        let mut todo = vec![(path, found)];
        while let Some((path, found)) = todo.pop() {
            if let Found::Dir(dir) = &found {
                todo.extend(children(self.pair.b, dir, &path)?);
            }
            if !matches!(found, Found::Absent | Found::Whiteout) {
                self.new.insert(path, found);
            }
        }
        Ok(())
    }

    /// Finds what was renamed, folders before what is in them; what is left was added.
    fn match_renames(&mut self) -> Result<()> {
        while let Some((path, found)) = self.new.pop_first() {
            let old = match self.find_gone(&found, &path)? {
                Some(old_path) => self.gone.remove(&old_path).map(|old| (old_path, old)),
                None => None,
            };
            let Some((old_path, old)) = old else {
                self.change(path, Status::Added, (None, Some(&found)));
                continue;
            };
            self.taken.insert(old_path.clone());
            let what = match (&old, &found) {
                (Found::Dir(one), Found::Dir(two)) => {
                    // What lies below is compared as below a folder that both have.
                    self.forget_gone_below(&old_path);
                    remove_below(&mut self.new, &path, |_| true);
                    let (one, two) = (one.clone(), two.clone());
                    let what = self.pair.folders(&one, &two, &path)?;
                    self.pairs.push((old_path.clone(), one, path.clone(), two));
                    self.drain_pairs()?;
                    what
                }
                (Found::File(one), Found::File(two)) => self.pair.files(one, two, &path)?,
                _ => What::default(),
            };
            self.changes.push(Change {
                path,
                status: Status::Renamed,
                from: Some(old_path),
                old_size: size(&old),
                new_size: size(&found),
                what,
            });
        }
        Ok(())
    }

    /// Takes back what was noted below a folder, but for what is below another that was found again.
    fn forget_gone_below(&mut self, folder: &[u8]) {
        let taken = &self.taken;
        remove_below(&mut self.gone, folder, |path| {
            let mut above = super::make::split(path).0;
            while above.len() > folder.len() {
                if taken.contains(above) {
                    return false;
                }
                above = super::make::split(above).0;
            }
            true
        });
    }

    fn find_gone(&self, found: &Found, path: &[u8]) -> Result<Option<Vec<u8>>> {
        for key in keys(found, path)? {
            let known = self.keys.get(&key).into_iter().flatten();
            for old in known {
                if self.gone.contains_key(old) {
                    return Ok(Some(old.clone()));
                }
            }
        }
        Ok(None)
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

fn last(path: &[u8]) -> &[u8] {
    super::make::split(path).1
}

fn remove_below(map: &mut BTreeMap<Vec<u8>, Found>, path: &[u8], which: impl Fn(&[u8]) -> bool) {
    let start = [path, b"/"].concat();
    // '0' comes after '/'.
    let end = [path, b"0"].concat();
    let below = map.range(start..end).map(|(path, _)| path);
    let below: Vec<_> = below.filter(|path| which(path)).cloned().collect();
    for path in below {
        map.remove(&path);
    }
}

/// By what an object is recognised under another name.
fn keys(found: &Found, path: &[u8]) -> Result<Vec<Key>> {
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
            let layer = |loc: &cowl_fs::view::Loc| loc.dir.layer().id();
            let mut keys = vec![
                Key::Shown(kind, file.ino),
                Key::Place(kind, layer(&file.loc), file.stat.ino),
            ];
            if let Some(data) = &file.data {
                let ino = data.stat().context("can't read", path)?.ino;
                keys.push(Key::Place(kind, layer(data), ino));
            }
            keys
        }
    })
}

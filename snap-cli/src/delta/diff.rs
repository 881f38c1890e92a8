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
use cowl_fs::view::{DirNode, FileNode, Found, View, user_xattrs};

use super::content;
use super::error::{Context as _, Result};
use super::make::Xattrs;
use super::walk::{children, open_content};

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
    /// The path (bytes, no leading slash): in the second state, or in the first when it is gone.
    pub path: Vec<u8>,
    /// What happened.
    pub status: Status,
    /// The path in the first state of what was renamed.
    pub from: Option<Vec<u8>>,
}

/// What leads from the state `a` to the state `b`, sorted by path.
pub fn diff(a: &View, b: &View) -> Result<Vec<Change>> {
    let mut diff = Diff {
        a,
        b,
        changes: Vec::new(),
        gone: BTreeMap::new(),
        new: BTreeMap::new(),
        keys: HashMap::new(),
        taken: HashSet::new(),
        pairs: Vec::new(),
    };
    let (root_a, root_b) = (
        a.root().context("can't read the root folder", b".")?,
        b.root().context("can't read the root folder", b".")?,
    );
    if diff.folder_differs(&root_a, &root_b, b".")? {
        diff.change(b".".to_vec(), Status::Modified, None);
    }
    diff.pairs.push((Vec::new(), root_a, Vec::new(), root_b));
    diff.drain_pairs()?;
    diff.match_renames()?;
    let gone = std::mem::take(&mut diff.gone);
    for path in gone.into_keys() {
        diff.change(path, Status::Deleted, None);
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
    a: &'a View,
    b: &'a View,
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
    fn change(&mut self, path: Vec<u8>, status: Status, from: Option<Vec<u8>>) {
        self.changes.push(Change { path, status, from });
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
        let mut old: BTreeMap<Vec<u8>, (Vec<u8>, Found)> = children(self.a, dir_a, path_a)?
            .into_iter()
            .map(|(path, found)| (last(&path).to_vec(), (path, found)))
            .collect();
        for (path, new) in children(self.b, dir_b, path_b)? {
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
        match (old, new) {
            (Found::Dir(old), Found::Dir(new)) => {
                if self.folder_differs(&old, &new, &path)? {
                    self.change(path.clone(), Status::Modified, None);
                }
                self.pairs.push((old_path, old, path, new));
            }
            (Found::File(old), Found::File(new)) => {
                if old.stat.kind() != new.stat.kind() {
                    self.change(path, Status::TypeChanged, None);
                } else if self.file_differs(&old, &new, &path)? {
                    self.change(path, Status::Modified, None);
                }
            }
            (Found::Dir(old), Found::File(_)) => {
                self.change(path, Status::TypeChanged, None);
                for (inner, found) in children(self.a, &old, &old_path)? {
                    self.add_gone(inner, found)?;
                }
            }
            (Found::File(_), Found::Dir(new)) => {
                self.change(path.clone(), Status::TypeChanged, None);
                for (inner, found) in children(self.b, &new, &path)? {
                    self.add_new(inner, found)?;
                }
            }
            (Found::Absent | Found::Whiteout, new) => self.add_new(path, new)?,
            (old, Found::Absent | Found::Whiteout) => self.add_gone(old_path, old)?,
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
                todo.extend(children(self.a, dir, &path)?);
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
                todo.extend(children(self.b, dir, &path)?);
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
            let Some(old_path) = self.find_gone(&found, &path)? else {
                self.change(path, Status::Added, None);
                continue;
            };
            let old = self.gone.remove(&old_path);
            self.taken.insert(old_path.clone());
            if let (Some(Found::Dir(old)), Found::Dir(new)) = (old, found) {
                // What lies below is compared as below a folder that both have.
                self.forget_gone_below(&old_path);
                remove_below(&mut self.new, &path, |_| true);
                self.pairs.push((old_path.clone(), old, path.clone(), new));
                self.drain_pairs()?;
            }
            self.change(path, Status::Renamed, Some(old_path));
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

    fn folder_differs(&self, a: &DirNode, b: &DirNode, path: &[u8]) -> Result<bool> {
        if a.same_place(b) {
            return Ok(false);
        }
        if (a.stat.mode, a.stat.uid, a.stat.gid) != (b.stat.mode, b.stat.uid, b.stat.gid) {
            return Ok(true);
        }
        let what = "can't read the attributes";
        let one = shown(self.a, a.xattrs().context(what, path)?);
        Ok(one != shown(self.b, b.xattrs().context(what, path)?))
    }

    /// Whether two files of one type differ.
    fn file_differs(&self, a: &FileNode, b: &FileNode, path: &[u8]) -> Result<bool> {
        if a.loc.same_place(&b.loc) && a.data_loc().same_place(b.data_loc()) {
            return Ok(false);
        }
        let plain = |s: &Stat| (s.mode, s.uid, s.gid, s.rdev, s.mtime);
        if plain(&a.stat) != plain(&b.stat) {
            return Ok(true);
        }
        let what = "can't read the attributes";
        let one = shown(self.a, a.loc.xattrs().context(what, path)?);
        if one != shown(self.b, b.loc.xattrs().context(what, path)?) {
            return Ok(true);
        }
        let read = |error: cowl_fs::error::Result<bool>| error.context("can't compare", path);
        match a.stat.kind() {
            FileKind::Regular if a.stat.size != b.stat.size => Ok(true),
            FileKind::Regular if a.data_loc().same_place(b.data_loc()) => Ok(false),
            FileKind::Regular => read((|| {
                let one = open_content(a.data_loc())?;
                let two = open_content(b.data_loc())?;
                content::same(one, two, a.stat.size).map(|same| !same)
            })()),
            FileKind::Symlink => read((|| Ok(a.loc.readlink()? != b.loc.readlink()?))()),
            _ => Ok(false),
        }
    }
}

fn shown(view: &View, on_disk: Xattrs) -> Xattrs {
    let space = view.layers().first().map(|layer| layer.space());
    let mut shown = match space {
        Some(space) => user_xattrs(space, on_disk),
        None => on_disk,
    };
    shown.sort_unstable();
    shown
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

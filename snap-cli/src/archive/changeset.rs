//! Writing what leads from one state to another as a tar archive, in the form of the layers of container
//! images (OCI): what is new or different is there whole, what is gone is an empty file `.wh.NAME`, and a
//! folder that took the place of another holds `.wh..wh..opq`.
//!
//! Unpacked over the first state it gives the second to the last attribute. So the folders above
//! everything that differs come too: unpacking changes their times.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;

use cowl_layers::format::foreign;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::{DirNode, FileNode, Found, View};

use super::compress::{Compression, Encoder};
use super::export::with_entries;
use super::report::Report;
use super::writer::{Holes, Writer};
use crate::tree::attrs::{self, space_of};
use crate::tree::content;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::path::{join, split};
use crate::tree::walk::{Item, open_content};

/// Writes what leads from `old` (nothing, without one) to `new`.
pub fn tar(
    old: Option<&View>,
    new: &View,
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<Report> {
    let mut delta = Delta {
        old,
        new,
        related: old.is_some_and(|old| share_layers(old, new)),
        levels: Vec::new(),
        written: 0,
        path: Vec::new(),
        linked: HashMap::new(),
        enters_all: false,
    };
    // Looked at first: a file of which one name is new comes with all its names.
    delta.run(&mut Out::<Vec<u8>>::Nowhere)?;
    delta.enters_all = delta.linked.values().any(|(names, told)| told < names);
    with_entries(output, compression, Holes::Filled, progress, |writer| {
        delta.run(&mut Out::Archive(writer))
    })
}

/// Where entries go.
enum Out<'w, 'p, W: Write> {
    Nowhere,
    Archive(&'w mut Writer<'p, Encoder<W>>),
}

/// Whether what lies in another layer than before was replaced; states that have no layer in common (one
/// of them was merged) can only be compared by what they show.
fn share_layers(one: &View, two: &View) -> bool {
    let ids: Vec<u64> = one.layers().iter().map(|layer| layer.id()).collect();
    two.layers().iter().any(|layer| ids.contains(&layer.id()))
}

/// A directory of the new state in which the walk is.
struct Level {
    new: DirNode,
    /// What the old state has there, where what is in it is compared.
    old: Option<DirNode>,
    /// The names in it, each with whether the old state has it. The next one is taken from the end.
    names: Vec<(Name, bool)>,
    /// The length of its path.
    path: usize,
}

/// Whether the entry of a directory was written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DirEntry {
    Written,
    /// It is written if something below it is.
    Pending,
}

struct Delta<'a> {
    old: Option<&'a View>,
    new: &'a View,
    related: bool,
    levels: Vec<Level>,
    /// How many of them were written. The others do not differ themselves, and are written when something
    /// below them is.
    written: usize,
    /// Of the present entry.
    path: Vec<u8>,
    /// Files with several names that are written: how many they have, and how many were written.
    linked: HashMap<(u64, u64), (u64, u64)>,
    /// Names of such files may lie in folders in which nothing else differs.
    enters_all: bool,
}

impl Delta<'_> {
    fn run<W: Write>(&mut self, out: &mut Out<'_, '_, W>) -> Result<()> {
        let what = "can't read the root folder";
        let old = match self.old {
            Some(old) => Some(Found::Dir(old.root().context(what, b".")?)),
            None => None,
        };
        let new = Found::Dir(self.new.root().context(what, b".")?);
        self.path.clear();
        self.pair(out, old, new)?;
        while let Some(level) = self.levels.last_mut() {
            self.path.truncate(level.path);
            let Some((name, in_old)) = level.names.pop() else {
                level.new.leave();
                level.old.iter().for_each(DirNode::leave);
                self.levels.pop();
                self.written = self.written.min(self.levels.len());
                continue;
            };
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(&name);
            let new = self.new.lookup(&level.new, &name);
            let new = new.context("can't read", &self.path)?;
            let old = match (self.old, &level.old) {
                (Some(view), Some(dir)) if in_old => {
                    let old = view.lookup(dir, &name);
                    Some(old.context("can't read", &self.path)?)
                }
                _ => None,
            };
            self.pair(out, old, new)?;
        }
        Ok(())
    }

    fn pair<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        old: Option<Found>,
        new: Found,
    ) -> Result<()> {
        match (old, new) {
            (Some(Found::File(old)), Found::File(new)) => {
                if self.same_file(&old, &new, &self.path)? {
                    return Ok(());
                }
                self.emit(out, &Found::File(new))
            }
            (Some(Found::Dir(old)), Found::Dir(new)) => self.folders(out, old, new),
            (_, new) => {
                self.emit(out, &new)?;
                match new {
                    Found::Dir(new) => self.enter(out, None, new, DirEntry::Written),
                    Found::Absent | Found::Whiteout | Found::File(_) => Ok(()),
                }
            }
        }
    }

    fn folders<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        old: DirNode,
        new: DirNode,
    ) -> Result<()> {
        if new.is_same_location(&old) && !self.enters_all {
            return Ok(());
        }
        let merges = |new: &DirNode| {
            let known = |loc| old.locs.iter().any(|other| other.is_same_location(loc));
            new.locs.iter().any(|loc| known(loc))
        };
        let opaque = self.related && !merges(&new);
        let differs = opaque || self.folder_differs(&old, &new, &self.path)?;
        if differs {
            self.emit(out, &Found::Dir(new.clone()))?;
        }
        if opaque {
            self.mark(out, foreign::OPAQUE_NAME)?;
        }
        let entry = match differs {
            true => DirEntry::Written,
            false => DirEntry::Pending,
        };
        self.enter(out, Some(old).filter(|_| !opaque), new, entry)
    }

    /// Goes into a directory: marks what is gone, and notes what is there now for later.
    fn enter<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        old: Option<DirNode>,
        new: DirNode,
        entry: DirEntry,
    ) -> Result<()> {
        let what = "can't read the folder";
        let mut before: BTreeSet<Name> = match (self.old, &old) {
            (Some(view), Some(old)) => {
                let listed = view.list(old).context(what, &self.path)?;
                listed.into_iter().map(|entry| entry.name).collect()
            }
            _ => BTreeSet::new(),
        };
        let listed = self.new.list(&new).context(what, &self.path)?;
        let with_old = |name: Name| {
            let in_old = before.remove(&name);
            (name, in_old)
        };
        let mut names: Vec<_> = listed.into_iter().map(|e| e.name).map(with_old).collect();
        names.reverse();
        if entry == DirEntry::Written {
            self.written = self.levels.len() + 1;
        }
        self.levels.push(Level {
            new,
            old,
            names,
            path: self.path.len(),
        });
        for gone in before {
            let mark = foreign::whiteout_name(&gone).ok_or_else(|| {
                let what = "a layer archive can't say that a file of this name is gone";
                TreeError::new(ErrorKind::Refused, what).at(join(&self.path, &gone))
            })?;
            self.mark(out, &mark)?;
        }
        Ok(())
    }

    /// Writes the directories of the way here that were not written.
    fn write_above<W: Write>(&mut self, writer: &mut Writer<'_, Encoder<W>>) -> Result<()> {
        for level in self.levels.iter().skip(self.written) {
            let path = self.path.get(..level.path).unwrap_or_default();
            let dir = Found::Dir(level.new.clone());
            if let Some(item) = Item::of(path, &dir, space_of(self.new))? {
                writer.item(&item)?;
            }
        }
        self.written = self.levels.len();
        Ok(())
    }

    fn emit<W: Write>(&mut self, out: &mut Out<'_, '_, W>, found: &Found) -> Result<()> {
        if foreign::is_marker(split(&self.path).1) {
            let what = "a layer archive can't hold a file whose name begins with .wh., for there it is a \
                        deletion";
            return Err(TreeError::new(ErrorKind::Refused, what).at(self.path.as_slice()));
        }
        let Out::Archive(writer) = out else {
            if let Found::File(file) = found
                && file.stat.nlink > 1
            {
                let names = (file.stat.nlink, 0);
                self.linked.entry(inode(file)).or_insert(names).1 += 1;
            }
            return Ok(());
        };
        self.write_above(writer)?;
        match Item::of(&self.path, found, space_of(self.new))? {
            Some(item) => writer.item(&item),
            None => Ok(()),
        }
    }

    /// Writes a mark into the directory with the present path.
    fn mark<W: Write>(&mut self, out: &mut Out<'_, '_, W>, name: &[u8]) -> Result<()> {
        let Out::Archive(writer) = out else {
            return Ok(());
        };
        self.write_above(writer)?;
        let path = join(&self.path, name);
        writer.own_file(&[b"./", path.as_slice()].concat(), 0o600, b"")
    }

    fn folder_differs(&self, old: &DirNode, new: &DirNode, path: &[u8]) -> Result<bool> {
        let plain = |dir: &DirNode| (dir.stat.mode, dir.stat.uid, dir.stat.gid, dir.stat.mtime);
        let what = "can't read the attributes";
        Ok(plain(old) != plain(new)
            || attrs::shown(
                self.old.and_then(space_of),
                old.xattrs().context(what, path)?,
            ) != attrs::shown(space_of(self.new), new.xattrs().context(what, path)?))
    }

    /// Whether nothing of the file need be written. One that has other names, and lies elsewhere than
    /// before, is written with all of them, so that they are one file again.
    fn same_file(&self, old: &FileNode, new: &FileNode, path: &[u8]) -> Result<bool> {
        if self.linked.contains_key(&inode(new)) {
            return Ok(false);
        }
        if old.loc.is_same_location(&new.loc) && old.data_loc().is_same_location(new.data_loc()) {
            return Ok(true);
        }
        let plain = |file: &FileNode| {
            let stat = &file.stat;
            (
                stat.mode, stat.uid, stat.gid, stat.rdev, stat.mtime, stat.size,
            )
        };
        if old.stat.nlink > 1 || new.stat.nlink > 1 || plain(old) != plain(new) {
            return Ok(false);
        }
        let what = "can't read the attributes";
        if attrs::shown(
            self.old.and_then(space_of),
            old.loc.xattrs().context(what, path)?,
        ) != attrs::shown(space_of(self.new), new.loc.xattrs().context(what, path)?)
        {
            return Ok(false);
        }
        let read = || match new.stat.kind() {
            FileKind::Regular if old.data_loc().is_same_location(new.data_loc()) => Ok(true),
            FileKind::Regular => {
                let (one, two) = (open_content(old.data_loc())?, open_content(new.data_loc())?);
                content::same(one, two, new.stat.size)
            }
            FileKind::Symlink => Ok(old.loc.readlink()? == new.loc.readlink()?),
            _ => Ok(true),
        };
        read().context("can't compare", path)
    }
}

fn inode(file: &FileNode) -> (u64, u64) {
    (file.stat.dev, file.stat.ino)
}

//! Writes the difference between two states as a tar archive, in the form of a layer of a container image (OCI).
//!
//! New and changed files are contained completely. A removed file is represented by an empty file `.wh.NAME`, and a
//! directory that replaces another one contains `.wh..wh..opq`.
//!
//! Applied to the first state, the archive results in the second one, including all attributes. The directories above
//! every difference are therefore contained, too, because unpacking changes their times.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;

use cowl_layers::format::foreign;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::{DirNode, FileNode, Found, View};

use super::compress::{Compression, Encoder};
use super::export::write_entries;
use super::report::TransferReport;
use super::writer::{Holes, Writer};
use crate::tree::attrs::{self, marker_space};
use crate::tree::content;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::path::{join, split};
use crate::tree::walk::{Item, open_content};

/// Writes the difference between `old` (an empty tree if `None`) and `new`.
pub fn tar(
    old: Option<&View>,
    new: &View,
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
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
    // A first pass without output finds the hard links: if one name of a file is new, all its names are written.
    delta.run(&mut Out::<Vec<u8>>::Discard)?;
    delta.enters_all = delta.linked.values().any(|(names, found)| found < names);
    write_entries(output, compression, Holes::Zeros, progress, |writer| {
        delta.run(&mut Out::Archive(writer))
    })
}

/// The output of a pass.
enum Out<'w, 'p, W: Write> {
    Discard,
    Archive(&'w mut Writer<'p, Encoder<W>>),
}

/// Returns whether two states have a layer in common.
///
/// Only then does an object in another layer than before mean a replacement. States without a common layer, for example
/// after a flatten, can only be compared by their content.
fn share_layers(left: &View, right: &View) -> bool {
    let ids: Vec<u64> = left.layers().iter().map(|layer| layer.id()).collect();
    right.layers().iter().any(|layer| ids.contains(&layer.id()))
}

/// A directory of the current path in the new state.
struct DeltaLevel {
    new: DirNode,
    /// The directory of the old state with which the content is compared.
    old: Option<DirNode>,
    /// The remaining names, each with whether the old state has it. The next one is the last.
    names: Vec<(Name, bool)>,
    /// The length of its path.
    path_length: usize,
}

/// Whether the entry of a directory was written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum DirOutput {
    Written,
    /// The entry is written as soon as an entry below it is.
    Pending,
}

struct Delta<'a> {
    old: Option<&'a View>,
    new: &'a View,
    related: bool,
    levels: Vec<DeltaLevel>,
    /// The number of levels whose entries were written. The others do not differ themselves.
    written: usize,
    /// The path of the current entry.
    path: Vec<u8>,
    /// The hard-linked files that must be written, by inode: the number of their names, and of the names found.
    linked: HashMap<(u64, u64), (u64, u64)>,
    /// Whether unchanged directories must be entered, too, because they may contain names of such files.
    enters_all: bool,
}

impl Delta<'_> {
    fn run<W: Write>(&mut self, out: &mut Out<'_, '_, W>) -> Result<()> {
        let what = "cannot read the root directory";
        let old = match self.old {
            Some(old) => Some(Found::Dir(old.root().context(what, b".")?)),
            None => None,
        };
        let new = Found::Dir(self.new.root().context(what, b".")?);
        self.path.clear();
        self.compare_nodes(out, old, new)?;
        while let Some(level) = self.levels.last_mut() {
            self.path.truncate(level.path_length);
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
            let new = new.context("cannot read", &self.path)?;
            let old = match (self.old, &level.old) {
                (Some(view), Some(dir)) if in_old => {
                    let old = view.lookup(dir, &name);
                    Some(old.context("cannot read", &self.path)?)
                }
                _ => None,
            };
            self.compare_nodes(out, old, new)?;
        }
        Ok(())
    }

    fn compare_nodes<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        old: Option<Found>,
        new: Found,
    ) -> Result<()> {
        match (old, new) {
            (Some(Found::File(old)), Found::File(new)) => {
                if self.is_same_file(&old, &new, &self.path)? {
                    return Ok(());
                }
                self.write_node(out, &Found::File(new))
            }
            (Some(Found::Dir(old)), Found::Dir(new)) => self.compare_dirs(out, old, new),
            (_, new) => {
                self.write_node(out, &new)?;
                match new {
                    Found::Dir(new) => self.enter(out, None, new, DirOutput::Written),
                    Found::Absent | Found::Whiteout | Found::File(_) => Ok(()),
                }
            }
        }
    }

    fn compare_dirs<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        old: DirNode,
        new: DirNode,
    ) -> Result<()> {
        if new.is_same_location(&old) && !self.enters_all {
            return Ok(());
        }
        let merges_old = |new: &DirNode| {
            let is_in_old = |loc| old.locs.iter().any(|other| other.is_same_location(loc));
            new.locs.iter().any(|loc| is_in_old(loc))
        };
        let opaque = self.related && !merges_old(&new);
        let differs = opaque || self.dir_differs(&old, &new, &self.path)?;
        if differs {
            self.write_node(out, &Found::Dir(new.clone()))?;
        }
        if opaque {
            self.write_marker(out, foreign::OPAQUE_NAME)?;
        }
        let entry = match differs {
            true => DirOutput::Written,
            false => DirOutput::Pending,
        };
        self.enter(out, Some(old).filter(|_| !opaque), new, entry)
    }

    /// Enters a directory: writes whiteouts for removed names, and collects the present names.
    fn enter<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        old: Option<DirNode>,
        new: DirNode,
        entry: DirOutput,
    ) -> Result<()> {
        let what = "cannot read the directory";
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
        if entry == DirOutput::Written {
            self.written = self.levels.len() + 1;
        }
        self.levels.push(DeltaLevel {
            new,
            old,
            names,
            path_length: self.path.len(),
        });
        for removed in before {
            let whiteout = foreign::whiteout_name(&removed).ok_or_else(|| {
                let what = "a layer archive cannot represent the removal of a file with this name";
                TreeError::new(ErrorKind::Refused, what).at(join(&self.path, &removed))
            })?;
            self.write_marker(out, &whiteout)?;
        }
        Ok(())
    }

    /// Writes the pending directories of the current path.
    fn write_pending_dirs<W: Write>(&mut self, writer: &mut Writer<'_, Encoder<W>>) -> Result<()> {
        for level in self.levels.iter().skip(self.written) {
            let path = self.path.get(..level.path_length).unwrap_or_default();
            let dir = Found::Dir(level.new.clone());
            if let Some(item) = self.item(path, &dir)? {
                writer.write_item(&item)?;
            }
        }
        self.written = self.levels.len();
        Ok(())
    }

    fn write_node<W: Write>(&mut self, out: &mut Out<'_, '_, W>, found: &Found) -> Result<()> {
        if foreign::is_marker(split(&self.path).1) {
            let what = "a layer archive cannot contain a file whose name begins with .wh., which denotes a \
                        removal";
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
        self.write_pending_dirs(writer)?;
        match self.item(&self.path, found)? {
            Some(item) => writer.write_item(&item),
            None => Ok(()),
        }
    }

    /// Returns an entry of the new state, with its original attributes.
    fn item<'p>(&self, path: &'p [u8], found: &Found) -> Result<Option<Item<'p>>> {
        let space = marker_space(self.new);
        match (Item::from_found(path, found, space)?, space) {
            (Some(item), Some(space)) => item.with_original_attributes(space).map(Some),
            (item, _) => Ok(item),
        }
    }

    /// Writes an empty marker file into the directory at the current path.
    fn write_marker<W: Write>(&mut self, out: &mut Out<'_, '_, W>, name: &[u8]) -> Result<()> {
        let Out::Archive(writer) = out else {
            return Ok(());
        };
        self.write_pending_dirs(writer)?;
        let path = join(&self.path, name);
        writer.write_own_file(&[b"./", path.as_slice()].concat(), 0o600, b"")
    }

    fn dir_differs(&self, old: &DirNode, new: &DirNode, path: &[u8]) -> Result<bool> {
        let plain = |dir: &DirNode| (dir.stat.mode, dir.stat.uid, dir.stat.gid, dir.stat.mtime);
        let what = "cannot read the xattrs";
        Ok(plain(old) != plain(new)
            || attrs::compared_xattrs(
                self.old.and_then(marker_space),
                old.xattrs().context(what, path)?,
            ) != attrs::compared_xattrs(
                marker_space(self.new),
                new.xattrs().context(what, path)?,
            ))
    }

    /// Returns whether a file is unchanged and need not be written.
    ///
    /// A hard-linked file whose location changed is written with all its names, so that they are one file after
    /// unpacking.
    fn is_same_file(&self, old: &FileNode, new: &FileNode, path: &[u8]) -> Result<bool> {
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
        let what = "cannot read the xattrs";
        if attrs::compared_xattrs(
            self.old.and_then(marker_space),
            old.loc.xattrs().context(what, path)?,
        ) != attrs::compared_xattrs(
            marker_space(self.new),
            new.loc.xattrs().context(what, path)?,
        ) {
            return Ok(false);
        }
        let read = || match new.stat.kind() {
            FileKind::Regular if old.data_loc().is_same_location(new.data_loc()) => Ok(true),
            FileKind::Regular => {
                let (one, two) = (open_content(old.data_loc())?, open_content(new.data_loc())?);
                content::is_same(one, two, new.stat.size)
            }
            FileKind::Symlink => Ok(old.loc.readlink()? == new.loc.readlink()?),
            _ => Ok(true),
        };
        read().context("cannot compare", path)
    }
}

fn inode(file: &FileNode) -> (u64, u64) {
    (file.stat.dev, file.stat.ino)
}

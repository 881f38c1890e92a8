//! Writing what leads from one state to another as a tar archive, in the form of the layers of container
//! images (OCI): what is new or different is there whole, what is gone is an empty file `.wh.NAME`, and a
//! folder that took the place of another holds `.wh..wh..opq`.
//!
//! Unpacked over the first state it gives the second to the last attribute. So the folders above
//! everything that differs come too: unpacking changes their times.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;

use cowl_fs::format::{XattrSpace, foreign};
use cowl_fs::sys::stat::FileKind;
use cowl_fs::view::{DirNode, FileNode, Found, View, Xattrs, user_xattrs};

use super::compress::{Compression, Encoder};
use super::export::{Exported, with_entries};
use super::writer::{Holes, Writer};
use crate::delta::content;
use crate::delta::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::delta::make::{join, split};
use crate::delta::walk::{Item, children, open_content};

/// Writes what leads from `old` (nothing, without one) to `new`.
pub fn tar(
    old: Option<&View>,
    new: &View,
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<Exported> {
    let mut delta = Delta {
        old,
        new,
        related: old.is_some_and(|old| share_layers(old, new)),
        above: Vec::new(),
        todo: Vec::new(),
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

/// What two states have at one path.
struct Pair {
    path: Vec<u8>,
    old: Option<Found>,
    new: Found,
}

struct Delta<'a> {
    old: Option<&'a View>,
    new: &'a View,
    related: bool,
    /// Folders on the way here that do not differ themselves, the deepest last. They are written when
    /// something below them is.
    above: Vec<Item>,
    /// The next one is taken from the end.
    todo: Vec<Pair>,
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
        self.above.clear();
        self.todo.push(Pair {
            path: Vec::new(),
            old,
            new: Found::Dir(self.new.root().context(what, b".")?),
        });
        while let Some(pair) = self.todo.pop() {
            while self
                .above
                .last()
                .is_some_and(|folder| !lies_in(&pair.path, &folder.path))
            {
                self.above.pop();
            }
            match (pair.old, pair.new) {
                (Some(Found::File(old)), Found::File(new)) => {
                    if !self.same_file(&old, &new, &pair.path)? {
                        self.emit(out, pair.path, Found::File(new))?;
                    }
                }
                (Some(Found::Dir(old)), Found::Dir(new)) => {
                    self.folders(out, pair.path, &old, new)?
                }
                (_, Found::Dir(new)) => {
                    self.emit(out, pair.path.clone(), Found::Dir(new.clone()))?;
                    self.push_children(out, &pair.path, &new, BTreeMap::new())?;
                }
                (_, new) => self.emit(out, pair.path, new)?,
            }
        }
        Ok(())
    }

    fn folders<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        path: Vec<u8>,
        old: &DirNode,
        new: DirNode,
    ) -> Result<()> {
        if new.same_place(old) && !self.enters_all {
            return Ok(());
        }
        let merges = |new: &DirNode| {
            let known = |loc| old.locs.iter().any(|other| other.same_place(loc));
            new.locs.iter().any(|loc| known(loc))
        };
        let opaque = self.related && !merges(&new);
        if opaque || self.folder_differs(old, &new, &path)? {
            self.emit(out, path.clone(), Found::Dir(new.clone()))?;
        } else {
            self.above.extend(Item::of(
                path.clone(),
                Found::Dir(new.clone()),
                space(self.new),
            )?);
        }
        if opaque {
            self.mark(out, join(&path, foreign::OPAQUE_NAME))?;
            return self.push_children(out, &path, &new, BTreeMap::new());
        }
        let before = match self.old {
            Some(view) => children(view, old, &path)?.into_iter().collect(),
            None => BTreeMap::new(),
        };
        self.push_children(out, &path, &new, before)
    }

    /// Marks what is gone, and notes what is there now for later.
    fn push_children<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        path: &[u8],
        new: &DirNode,
        mut before: BTreeMap<Vec<u8>, Found>,
    ) -> Result<()> {
        let mut pairs = Vec::new();
        for (path, new) in children(self.new, new, path)? {
            let old = before.remove(&path);
            pairs.push(Pair { path, old, new });
        }
        for gone in before.into_keys() {
            let (parent, name) = split(&gone);
            let mark = foreign::whiteout_name(name).ok_or_else(|| {
                let what = "a layer archive can't say that a file of this name is gone";
                TreeError::new(ErrorKind::Refused, what).at(gone.as_slice())
            })?;
            self.mark(out, join(parent, &mark))?;
        }
        pairs.reverse();
        self.todo.append(&mut pairs);
        Ok(())
    }

    fn emit<W: Write>(
        &mut self,
        out: &mut Out<'_, '_, W>,
        path: Vec<u8>,
        found: Found,
    ) -> Result<()> {
        if foreign::is_mark(split(&path).1) {
            let what = "a layer archive can't hold a file whose name begins with .wh., for there it is a \
                        deletion";
            return Err(TreeError::new(ErrorKind::Refused, what).at(path));
        }
        let Out::Archive(writer) = out else {
            if let Found::File(file) = &found
                && file.stat.nlink > 1
            {
                let names = (file.stat.nlink, 0);
                self.linked.entry(inode(file)).or_insert(names).1 += 1;
            }
            return Ok(());
        };
        for folder in std::mem::take(&mut self.above) {
            writer.item(&folder)?;
        }
        match Item::of(path, found, space(self.new))? {
            Some(item) => writer.item(&item),
            None => Ok(()),
        }
    }

    fn mark<W: Write>(&mut self, out: &mut Out<'_, '_, W>, path: Vec<u8>) -> Result<()> {
        let Out::Archive(writer) = out else {
            return Ok(());
        };
        for folder in std::mem::take(&mut self.above) {
            writer.item(&folder)?;
        }
        writer.own_file(&[b"./", path.as_slice()].concat(), 0o600, b"")
    }

    fn folder_differs(&self, old: &DirNode, new: &DirNode, path: &[u8]) -> Result<bool> {
        let plain = |dir: &DirNode| (dir.stat.mode, dir.stat.uid, dir.stat.gid, dir.stat.mtime);
        let what = "can't read the attributes";
        Ok(plain(old) != plain(new)
            || shown(self.old, old.xattrs().context(what, path)?)
                != shown(Some(self.new), new.xattrs().context(what, path)?))
    }

    /// Whether nothing of the file need be written. One that has other names, and lies elsewhere than
    /// before, is written with all of them, so that they are one file again.
    fn same_file(&self, old: &FileNode, new: &FileNode, path: &[u8]) -> Result<bool> {
        if self.linked.contains_key(&inode(new)) {
            return Ok(false);
        }
        if old.loc.same_place(&new.loc) && old.data_loc().same_place(new.data_loc()) {
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
        if shown(self.old, old.loc.xattrs().context(what, path)?)
            != shown(Some(self.new), new.loc.xattrs().context(what, path)?)
        {
            return Ok(false);
        }
        let read = || match new.stat.kind() {
            FileKind::Regular if old.data_loc().same_place(new.data_loc()) => Ok(true),
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

fn space(view: &View) -> Option<XattrSpace> {
    view.layers().first().map(|layer| layer.space())
}

fn shown(view: Option<&View>, on_disk: Xattrs) -> Xattrs {
    let mut shown = match view.and_then(space) {
        Some(space) => user_xattrs(space, on_disk),
        None => on_disk,
    };
    shown.sort_unstable();
    shown
}

/// Whether the path lies below the folder, or is it.
fn lies_in(path: &[u8], folder: &[u8]) -> bool {
    folder.is_empty()
        || path
            .strip_prefix(folder)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

//! Depth-first walks over states and plain directories: a directory before its entries, names sorted by their bytes.
//!
//! Read-only. A walk has one record for each directory between the root and the current one: no recursion, a bounded
//! number of descriptors (those of [`LayerDir`]), and one path, that of the current entry. So time and memory are
//! linear in the number of entries, at any depth.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, LayerDir, Markers, list};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{DirNode, Found, Loc, View};
use rustix::fs::OFlags;

use super::attrs::{self, Xattrs, space_of};
use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::path::{join, split};

/// An entry of a walk.
pub(crate) struct Item<'p> {
    /// The path, without a leading slash; empty for the root.
    pub(crate) path: &'p [u8],
    /// The number of directories above it; 0 for the root.
    pub(crate) depth: usize,
    pub(crate) stat: Stat,
    place: Place,
    /// Set for an entry of a state, where markers are hidden.
    space: Option<XattrSpace>,
}

#[derive(Clone)]
enum Place {
    Dir(Arc<LayerDir>),
    /// The location of the name, and that of the content.
    File(Loc, Loc),
}

impl<'p> Item<'p> {
    /// Creates an entry for an object of a state; `None` if there is none.
    pub(crate) fn of(
        path: &'p [u8],
        found: &Found,
        space: Option<XattrSpace>,
    ) -> Result<Option<Self>> {
        let (place, stat) = match found {
            Found::Absent | Found::Whiteout => return Ok(None),
            Found::File(file) => {
                let data = file.data_loc().clone();
                (Place::File(file.loc.clone(), data), file.stat)
            }
            Found::Dir(dir) => {
                let top = dir.locs.first().cloned();
                let top = top.ok_or_else(|| {
                    TreeError::new(ErrorKind::Damaged, "a directory that lies nowhere").at(path)
                })?;
                (Place::Dir(top), dir.stat)
            }
        };
        Ok(Some(Self {
            path,
            depth: 0,
            stat,
            place,
            space,
        }))
    }

    /// Returns its name; empty for the root.
    pub(crate) fn name(&self) -> &'p [u8] {
        split(self.path).1
    }

    /// Returns its type.
    pub(crate) fn kind(&self) -> FileKind {
        self.stat.kind()
    }

    /// Returns all xattrs that it shows, sorted by name.
    pub(crate) fn xattrs(&self) -> Result<Xattrs> {
        let on_disk = match &self.place {
            Place::Dir(dir) => dir.fd().and_then(|fd| sys::xattr::all((*fd).as_fd())),
            Place::File(loc, _) => loc.xattrs(),
        };
        let on_disk = on_disk.context("can't read the attributes", self.path)?;
        Ok(attrs::shown(self.space, on_disk))
    }

    /// Returns the target of a symbolic link.
    pub(crate) fn target(&self) -> Result<Vec<u8>> {
        match &self.place {
            Place::File(loc, _) => loc
                .readlink()
                .context("can't read the symbolic link", self.path),
            Place::Dir(_) => Err(self.wrong()),
        }
    }

    /// Opens the content of a regular file.
    pub(crate) fn open(&self) -> Result<OwnedFd> {
        match &self.place {
            Place::File(_, data) => open_content(data).context("can't open the file", self.path),
            Place::Dir(_) => Err(self.wrong()),
        }
    }

    /// Returns whether it is a whiteout, in a layer that is read as it is on disk. Whiteouts are hard links to each
    /// other without being names of one file.
    pub(crate) fn is_whiteout(&self) -> Result<bool> {
        let stat = &self.stat;
        if self.space.is_some() {
            return Ok(false);
        }
        if stat.is_whiteout_device() {
            return Ok(true);
        }
        // Other objects need no look at their xattrs.
        if stat.kind() != FileKind::Regular || stat.size > 0 || stat.nlink < 2 {
            return Ok(false);
        }
        let marks = [XattrSpace::Trusted, XattrSpace::User].map(XattrSpace::whiteout);
        let found = self.xattrs()?;
        Ok(found
            .iter()
            .any(|(name, _)| marks.iter().any(|mark| name == mark.as_bytes())))
    }

    fn wrong(&self) -> TreeError {
        TreeError::new(ErrorKind::Io, "a directory has no content").at(self.path)
    }
}

/// Opens a file for reading, without changing its access time if that is permitted.
pub(crate) fn open_content(loc: &Loc) -> cowl_layers::error::Result<OwnedFd> {
    match loc.open(OFlags::RDONLY | OFlags::NOATIME) {
        Err(error) if error.errno() == cowl_layers::error::Errno::PERM => loc.open_read(),
        other => other,
    }
}

/// Values by file, for files with several names.
#[derive(Default)]
pub(crate) struct Links<T>(HashMap<(u64, u64), T>);

impl<T> Links<T> {
    /// Returns the value that was recorded for the first name of this file. For the first name, records `this` and
    /// returns `None`.
    pub(crate) fn first(&mut self, stat: &Stat, this: impl FnOnce() -> T) -> Option<&T> {
        use std::collections::hash_map::Entry;
        if stat.kind() == FileKind::Directory || stat.nlink < 2 {
            return None;
        }
        match self.0.entry((stat.dev, stat.ino)) {
            Entry::Occupied(known) => Some(known.into_mut()),
            Entry::Vacant(new) => {
                new.insert(this());
                None
            }
        }
    }
}

/// A tree that can be walked.
pub(crate) trait Tree {
    /// A directory of the tree.
    type Dir;
    /// The result of a lookup.
    type Node;

    /// Returns the names in a directory, sorted.
    fn names(&self, dir: &Self::Dir) -> cowl_layers::Result<Vec<Name>>;
    /// Looks up one of them.
    fn lookup(&self, dir: &Self::Dir, name: &Name) -> cowl_layers::Result<Self::Node>;
    /// Releases a directory that is not needed any more.
    fn leave(&self, dir: &Self::Dir);
}

/// A step of a walk.
pub(crate) enum Step<T: Tree> {
    /// An entry of the directory that was entered last.
    Entry(T::Node),
    /// The end of the directory that was entered last.
    Leave(T::Dir),
}

struct Level<D> {
    dir: D,
    /// The remaining names, the next one last.
    names: Vec<Name>,
    /// The length of the directory's path.
    path: usize,
}

/// A walk, which descends into those directories that the caller enters.
pub(crate) struct Walk<T: Tree> {
    tree: T,
    levels: Vec<Level<T::Dir>>,
    path: Vec<u8>,
}

impl<T: Tree> Walk<T> {
    /// Creates a walk at this path, in no directory yet.
    pub(crate) fn new(tree: T, path: &[u8]) -> Self {
        Self {
            tree,
            levels: Vec::new(),
            path: path.to_vec(),
        }
    }

    /// Returns the path of the last step.
    pub(crate) fn path(&self) -> &[u8] {
        &self.path
    }

    /// Returns the number of directories that were entered and not left.
    pub(crate) fn depth(&self) -> usize {
        self.levels.len()
    }

    /// Enters the directory of the last step.
    pub(crate) fn enter(&mut self, dir: T::Dir) -> Result<()> {
        let mut names = self
            .tree
            .names(&dir)
            .context("cannot read the directory", &self.path)?;
        names.reverse();
        self.levels.push(Level {
            dir,
            names,
            path: self.path.len(),
        });
        Ok(())
    }

    /// Returns the next entry or the end of a directory; `None` after the end of the first directory.
    pub(crate) fn next(&mut self) -> Result<Option<Step<T>>> {
        let Some(level) = self.levels.last_mut() else {
            return Ok(None);
        };
        self.path.truncate(level.path);
        let Some(name) = level.names.pop() else {
            let left = self.levels.pop();
            return Ok(left.map(|level| {
                self.tree.leave(&level.dir);
                Step::Leave(level.dir)
            }));
        };
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(&name);
        let node = self.tree.lookup(&level.dir, &name);
        Ok(Some(Step::Entry(node.context("can't read", &self.path)?)))
    }
}

/// A state, as it is visible.
impl Tree for &View {
    type Dir = DirNode;
    type Node = Found;

    fn names(&self, dir: &DirNode) -> cowl_layers::Result<Vec<Name>> {
        let listed = self.list(dir)?;
        Ok(listed.into_iter().map(|entry| entry.name).collect())
    }

    fn lookup(&self, dir: &DirNode, name: &Name) -> cowl_layers::Result<Found> {
        View::lookup(self, dir, name)
    }

    fn leave(&self, dir: &DirNode) {
        dir.leave();
    }
}

/// A state with its whiteouts.
pub(crate) struct WithWhiteouts<'v>(pub(crate) &'v View);

impl Tree for WithWhiteouts<'_> {
    type Dir = DirNode;
    type Node = Found;

    fn names(&self, dir: &DirNode) -> cowl_layers::Result<Vec<Name>> {
        let listed = self.0.list_raw(dir)?;
        Ok(listed.into_iter().map(|entry| entry.name).collect())
    }

    fn lookup(&self, dir: &DirNode, name: &Name) -> cowl_layers::Result<Found> {
        self.0.lookup(dir, name)
    }

    fn leave(&self, dir: &DirNode) {
        dir.leave();
    }
}

/// A plain directory, in which markers are ordinary objects.
struct Plain;

impl Tree for Plain {
    type Dir = Arc<LayerDir>;
    type Node = (Place, Stat);

    fn names(&self, dir: &Self::Dir) -> cowl_layers::Result<Vec<Name>> {
        let entries = list(dir, Markers::Ignored)?;
        let mut names: Vec<_> = entries.into_iter().map(|entry| entry.name).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn lookup(&self, dir: &Self::Dir, name: &Name) -> cowl_layers::Result<Self::Node> {
        let stat = sys::stat::stat_at((*dir.fd()?).as_fd(), name)?;
        let place = if stat.kind() == FileKind::Directory {
            Place::Dir(LayerDir::child(dir, name.clone(), stat.ino))
        } else {
            let loc = Loc {
                dir: dir.clone(),
                name: name.clone(),
            };
            Place::File(loc.clone(), loc)
        };
        Ok((place, stat))
    }

    fn leave(&self, dir: &Self::Dir) {
        dir.leave();
    }
}

/// A visitor of the entries of a walk.
pub(crate) trait Visitor {
    /// Visits an entry, a directory before its entries.
    fn item(&mut self, item: &Item<'_>) -> Result<()>;

    /// Visits a directory again, after its entries.
    fn leave(&mut self, _path: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl<F: FnMut(&Item<'_>) -> Result<()>> Visitor for F {
    fn item(&mut self, item: &Item<'_>) -> Result<()> {
        self(item)
    }
}

/// Visits everything in a state.
pub(crate) fn state(view: &View, visitor: &mut dyn Visitor) -> Result<()> {
    let root = view
        .root()
        .context("cannot read the root directory", b".")?;
    below(view, b"", &Found::Dir(root), visitor)
}

/// Visits the object at a path of a state, and everything below it.
pub(crate) fn below(
    view: &View,
    path: &[u8],
    found: &Found,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let mut walk = Walk::new(view, path);
    visit(&mut walk, found, visitor)?;
    while let Some(step) = walk.next()? {
        match step {
            Step::Entry(found) => visit(&mut walk, &found, visitor)?,
            Step::Leave(_) => visitor.leave(walk.path())?,
        }
    }
    Ok(())
}

fn visit(walk: &mut Walk<&View>, found: &Found, visitor: &mut dyn Visitor) -> Result<()> {
    let space = space_of(walk.tree);
    if let Some(item) = Item::of(walk.path(), found, space)? {
        let depth = walk.depth();
        visitor.item(&Item { depth, ..item })?;
    }
    match found {
        Found::Dir(dir) => walk.enter(dir.clone()),
        Found::Absent | Found::Whiteout | Found::File(_) => Ok(()),
    }
}

/// Returns the paths and objects in a directory of a state, sorted.
pub(crate) fn children(view: &View, dir: &DirNode, path: &[u8]) -> Result<Vec<(Vec<u8>, Found)>> {
    let names = view.list(dir).context("cannot read the directory", path)?;
    names
        .into_iter()
        .map(|entry| {
            let inner = join(path, &entry.name);
            let found = view
                .lookup(dir, &entry.name)
                .context("can't read", &inner)?;
            Ok((inner, found))
        })
        .collect()
}

/// Visits everything in a plain directory.
pub(crate) fn plain(root: &Path, visitor: &mut dyn Visitor) -> Result<()> {
    let layer = Layer::open(root, XattrSpace::Trusted).map_err(|error| {
        TreeError::new(ErrorKind::NotFound, "cannot open the directory").because(error)
    })?;
    let top = layer.root_dir();
    let stat = sys::stat::stat_fd(layer.root_fd());
    let stat = stat.context("cannot read the root directory", b".")?;
    let mut walk = Walk::new(Plain, b"");
    visit_plain(&mut walk, (Place::Dir(top), stat), visitor)?;
    while let Some(step) = walk.next()? {
        match step {
            Step::Entry(node) => visit_plain(&mut walk, node, visitor)?,
            Step::Leave(_) => visitor.leave(walk.path())?,
        }
    }
    Ok(())
}

fn visit_plain(
    walk: &mut Walk<Plain>,
    (place, stat): (Place, Stat),
    visitor: &mut dyn Visitor,
) -> Result<()> {
    visitor.item(&Item {
        path: walk.path(),
        depth: walk.depth(),
        stat,
        place: place.clone(),
        space: None,
    })?;
    match place {
        Place::Dir(dir) => walk.enter(dir),
        Place::File(..) => Ok(()),
    }
}

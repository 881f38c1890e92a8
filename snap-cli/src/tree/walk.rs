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

use super::attrs::{self, Xattrs, marker_space};
use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::path::{join, split};
use super::recording;

/// An entry of a walk.
#[derive(Clone)]
pub(crate) struct Item<'p> {
    /// The path, without a leading slash; empty for the root.
    pub(crate) path: &'p [u8],
    /// The number of directories above it; 0 for the root.
    pub(crate) depth: usize,
    pub(crate) stat: Stat,
    location: ObjectLocation,
    /// Set for an entry of a state, where markers are hidden.
    space: Option<XattrSpace>,
    /// The visible xattrs, once they were read.
    xattrs: Option<Xattrs>,
    /// Whether attributes of a record were applied.
    has_record: bool,
}

/// The attributes of the objects that a walk visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ItemAttributes {
    /// Those in the layers, which programs see.
    Stored,
    /// Those that were recorded because they could not be stored.
    Original,
}

/// The location of an object in the layers.
#[derive(Clone)]
enum ObjectLocation {
    /// The topmost directory of a merged one.
    Dir(Arc<LayerDir>),
    /// The location of the name, and that of the content.
    File(Loc, Loc),
}

impl<'p> Item<'p> {
    /// Creates the entry for the object of a state that a lookup found; `None` if it found none.
    pub(crate) fn from_found(
        path: &'p [u8],
        found: &Found,
        space: Option<XattrSpace>,
    ) -> Result<Option<Self>> {
        let (location, stat) = match found {
            Found::Absent | Found::Whiteout => return Ok(None),
            Found::File(file) => {
                let data = file.data_loc().clone();
                (ObjectLocation::File(file.loc.clone(), data), file.stat)
            }
            Found::Dir(dir) => {
                let top = dir.locs.first().cloned();
                let top = top.ok_or_else(|| {
                    TreeError::new(ErrorKind::Damaged, "the directory is in no layer").at(path)
                })?;
                (ObjectLocation::Dir(top), dir.stat)
            }
        };
        Ok(Some(Self {
            path,
            depth: 0,
            stat,
            location,
            space,
            xattrs: None,
            has_record: false,
        }))
    }

    /// Applies the record of the entry's original attributes, if it has one in the namespace `space`.
    pub(crate) fn with_original_attributes(mut self, space: XattrSpace) -> Result<Self> {
        let mut xattrs = self.xattrs_on_disk()?;
        let marker = space.recorded().as_bytes();
        let found = xattrs.iter().position(|(name, _)| name == marker);
        let record = found.map(|at| xattrs.swap_remove(at).1);
        let record = record.and_then(|value| recording::parse(&value, self.path));
        let mut visible = attrs::visible_xattrs(self.space, xattrs);
        if let Some(record) = record {
            let original = record.apply(&self.stat);
            self.stat = original.stat;
            for (name, value) in original.xattrs {
                // In a layer as it is on disk, the name of a user's xattr may be escaped.
                let name = match self.space {
                    Some(_) => name,
                    None => space.to_disk(&name).into_owned(),
                };
                if visible.iter().all(|(other, _)| *other != name) {
                    visible.push((name, value));
                }
            }
            visible.sort_unstable();
            self.has_record = true;
        }
        self.xattrs = Some(visible);
        Ok(self)
    }

    /// Returns the record of the entry's original attributes, if the entry belongs to a state of a plain user.
    pub(crate) fn record(&self) -> Result<Option<Vec<u8>>> {
        let Some(space) = self.space.filter(|space| *space == XattrSpace::User) else {
            return Ok(None);
        };
        let marker = space.recorded().as_bytes();
        let mut xattrs = self.xattrs_on_disk()?.into_iter();
        let value = xattrs.find(|(name, _)| name == marker);
        Ok(value
            .map(|(_, value)| value)
            .filter(|value| recording::parse(value, self.path).is_some()))
    }

    /// Returns whether [`Self::with_original_attributes`] has applied a record.
    pub(crate) fn has_record(&self) -> bool {
        self.has_record
    }

    /// Returns the name; empty for the root.
    pub(crate) fn name(&self) -> &'p [u8] {
        split(self.path).1
    }

    /// Returns the file type.
    pub(crate) fn kind(&self) -> FileKind {
        self.stat.kind()
    }

    /// Returns all visible xattrs, sorted by name.
    pub(crate) fn xattrs(&self) -> Result<Xattrs> {
        match &self.xattrs {
            Some(xattrs) => Ok(xattrs.clone()),
            None => Ok(attrs::visible_xattrs(self.space, self.xattrs_on_disk()?)),
        }
    }

    fn xattrs_on_disk(&self) -> Result<Xattrs> {
        let on_disk = match &self.location {
            ObjectLocation::Dir(dir) => dir.fd().and_then(|fd| sys::xattr::all((*fd).as_fd())),
            ObjectLocation::File(loc, _) => loc.xattrs(),
        };
        on_disk.context("cannot read the xattrs", self.path)
    }

    /// Returns the target of a symbolic link.
    pub(crate) fn target(&self) -> Result<Vec<u8>> {
        match &self.location {
            ObjectLocation::File(loc, _) => loc
                .readlink()
                .context("cannot read the symbolic link", self.path),
            ObjectLocation::Dir(_) => Err(self.not_a_file()),
        }
    }

    /// Opens the content of a regular file.
    pub(crate) fn open(&self) -> Result<OwnedFd> {
        match &self.location {
            ObjectLocation::File(_, data) => {
                open_content(data).context("cannot open the file", self.path)
            }
            ObjectLocation::Dir(_) => Err(self.not_a_file()),
        }
    }

    /// Returns whether the entry is a whiteout in a layer that is read as it is on disk.
    ///
    /// Whiteouts may be hard links to each other, although they are not names of one file.
    pub(crate) fn is_whiteout(&self) -> Result<bool> {
        let stat = &self.stat;
        if self.space.is_some() {
            return Ok(false);
        }
        if stat.is_whiteout_device() {
            return Ok(true);
        }
        // Only empty files with several names can be whiteouts that are marked by an xattr.
        if stat.kind() != FileKind::Regular || stat.size > 0 || stat.nlink < 2 {
            return Ok(false);
        }
        let markers = [XattrSpace::Trusted, XattrSpace::User].map(XattrSpace::whiteout);
        let found = self.xattrs()?;
        Ok(found
            .iter()
            .any(|(name, _)| markers.iter().any(|marker| name == marker.as_bytes())))
    }

    fn not_a_file(&self) -> TreeError {
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

/// A map from files with several names to values.
#[derive(Default)]
pub(crate) struct LinkMap<T>(HashMap<(u64, u64), T>);

impl<T> LinkMap<T> {
    /// Returns the value that was recorded for the first name of this file. For the first name, records `value` and
    /// returns `None`.
    pub(crate) fn first(&mut self, stat: &Stat, value: impl FnOnce() -> T) -> Option<&T> {
        use std::collections::hash_map::Entry;
        if stat.kind() == FileKind::Directory || stat.nlink < 2 {
            return None;
        }
        match self.0.entry((stat.dev, stat.ino)) {
            Entry::Occupied(entry) => Some(entry.into_mut()),
            Entry::Vacant(entry) => {
                entry.insert(value());
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
    type Object;

    /// Returns the names in a directory, sorted.
    fn names(&self, dir: &Self::Dir) -> cowl_layers::Result<Vec<Name>>;
    /// Looks up a name in a directory.
    fn lookup(&self, dir: &Self::Dir, name: &Name) -> cowl_layers::Result<Self::Object>;
    /// Releases the resources of a directory that the walk has left.
    fn leave(&self, dir: &Self::Dir);
}

/// A step of a walk.
pub(crate) enum WalkStep<T: Tree> {
    /// An entry of the directory that was entered last.
    Entry(T::Object),
    /// The end of the directory that was entered last.
    Leave(T::Dir),
}

/// A directory that was entered and not left.
struct WalkLevel<D> {
    dir: D,
    /// The remaining names, the next one last.
    names: Vec<Name>,
    /// The length of the directory's path.
    path_length: usize,
}

/// A walk that descends into those directories that the caller enters.
pub(crate) struct Walk<T: Tree> {
    tree: T,
    levels: Vec<WalkLevel<T::Dir>>,
    path: Vec<u8>,
}

impl<T: Tree> Walk<T> {
    /// Creates a walk at this path. The caller enters the first directory.
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
        self.levels.push(WalkLevel {
            dir,
            names,
            path_length: self.path.len(),
        });
        Ok(())
    }

    /// Returns the next entry or the end of a directory; `None` after the end of the first directory.
    pub(crate) fn next(&mut self) -> Result<Option<WalkStep<T>>> {
        let Some(level) = self.levels.last_mut() else {
            return Ok(None);
        };
        self.path.truncate(level.path_length);
        let Some(name) = level.names.pop() else {
            let left = self.levels.pop();
            return Ok(left.map(|level| {
                self.tree.leave(&level.dir);
                WalkStep::Leave(level.dir)
            }));
        };
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(&name);
        let object = self.tree.lookup(&level.dir, &name);
        let object = object.context("cannot read", &self.path)?;
        Ok(Some(WalkStep::Entry(object)))
    }
}

/// The visible content of a state.
impl Tree for &View {
    type Dir = DirNode;
    type Object = Found;

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

/// The content of a state, including whiteouts.
pub(crate) struct WithWhiteouts<'v>(pub(crate) &'v View);

impl Tree for WithWhiteouts<'_> {
    type Dir = DirNode;
    type Object = Found;

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
struct PlainDir;

impl Tree for PlainDir {
    type Dir = Arc<LayerDir>;
    type Object = (ObjectLocation, Stat);

    fn names(&self, dir: &Self::Dir) -> cowl_layers::Result<Vec<Name>> {
        let entries = list(dir, Markers::Ignored)?;
        let mut names: Vec<_> = entries.into_iter().map(|entry| entry.name).collect();
        names.sort_unstable();
        Ok(names)
    }

    fn lookup(&self, dir: &Self::Dir, name: &Name) -> cowl_layers::Result<Self::Object> {
        let stat = sys::stat::stat_at((*dir.fd()?).as_fd(), name)?;
        let location = if stat.kind() == FileKind::Directory {
            ObjectLocation::Dir(LayerDir::child(dir, name.clone(), stat.ino))
        } else {
            let loc = Loc {
                dir: dir.clone(),
                name: name.clone(),
            };
            ObjectLocation::File(loc.clone(), loc)
        };
        Ok((location, stat))
    }

    fn leave(&self, dir: &Self::Dir) {
        dir.leave();
    }
}

/// A visitor of the entries of a walk.
pub(crate) trait Visitor {
    /// Visits an entry. A directory is visited before its entries.
    fn visit(&mut self, item: &Item<'_>) -> Result<()>;

    /// Visits a directory again, after its entries.
    fn leave(&mut self, _path: &[u8]) -> Result<()> {
        Ok(())
    }
}

impl<F: FnMut(&Item<'_>) -> Result<()>> Visitor for F {
    fn visit(&mut self, item: &Item<'_>) -> Result<()> {
        self(item)
    }
}

/// Visits everything in a state.
pub(crate) fn visit_state(
    view: &View,
    attributes: ItemAttributes,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let root = view
        .root()
        .context("cannot read the root directory", b".")?;
    visit_from(view, b"", &Found::Dir(root), attributes, visitor)
}

/// Visits the object at a path of a state, and everything below it.
pub(crate) fn visit_below(
    view: &View,
    path: &[u8],
    found: &Found,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    visit_from(view, path, found, ItemAttributes::Stored, visitor)
}

fn visit_from(
    view: &View,
    path: &[u8],
    found: &Found,
    attributes: ItemAttributes,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let mut walk = Walk::new(view, path);
    visit_found(&mut walk, found, attributes, visitor)?;
    while let Some(step) = walk.next()? {
        match step {
            WalkStep::Entry(found) => visit_found(&mut walk, &found, attributes, visitor)?,
            WalkStep::Leave(_) => visitor.leave(walk.path())?,
        }
    }
    Ok(())
}

/// Visits an object of a state, and enters it if it is a directory.
fn visit_found(
    walk: &mut Walk<&View>,
    found: &Found,
    attributes: ItemAttributes,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let space = marker_space(walk.tree);
    if let Some(item) = Item::from_found(walk.path(), found, space)? {
        let item = match (attributes, space) {
            (ItemAttributes::Original, Some(space)) => item.with_original_attributes(space)?,
            _ => item,
        };
        let depth = walk.depth();
        visitor.visit(&Item { depth, ..item })?;
    }
    match found {
        Found::Dir(dir) => walk.enter(dir.clone()),
        Found::Absent | Found::Whiteout | Found::File(_) => Ok(()),
    }
}

/// Returns the paths and objects in a directory of a state, sorted.
pub(crate) fn list_children(
    view: &View,
    dir: &DirNode,
    path: &[u8],
) -> Result<Vec<(Vec<u8>, Found)>> {
    let names = view.list(dir).context("cannot read the directory", path)?;
    names
        .into_iter()
        .map(|entry| {
            let inner = join(path, &entry.name);
            let found = view
                .lookup(dir, &entry.name)
                .context("cannot read", &inner)?;
            Ok((inner, found))
        })
        .collect()
}

/// Visits everything in a plain directory.
pub(crate) fn visit_dir(root: &Path, visitor: &mut dyn Visitor) -> Result<()> {
    let layer = Layer::open(root, XattrSpace::Trusted).map_err(|error| {
        TreeError::new(ErrorKind::NotFound, "cannot open the directory").because(error)
    })?;
    let top = layer.root_dir();
    let stat = sys::stat::stat_fd(layer.root_fd());
    let stat = stat.context("cannot read the root directory", b".")?;
    let mut walk = Walk::new(PlainDir, b"");
    visit_plain(&mut walk, (ObjectLocation::Dir(top), stat), visitor)?;
    while let Some(step) = walk.next()? {
        match step {
            WalkStep::Entry(object) => visit_plain(&mut walk, object, visitor)?,
            WalkStep::Leave(_) => visitor.leave(walk.path())?,
        }
    }
    Ok(())
}

/// Visits an object of a plain directory, and enters it if it is a directory.
fn visit_plain(
    walk: &mut Walk<PlainDir>,
    (location, stat): (ObjectLocation, Stat),
    visitor: &mut dyn Visitor,
) -> Result<()> {
    visitor.visit(&Item {
        path: walk.path(),
        depth: walk.depth(),
        stat,
        location: location.clone(),
        space: None,
        xattrs: None,
        has_record: false,
    })?;
    match location {
        ObjectLocation::Dir(dir) => walk.enter(dir),
        ObjectLocation::File(..) => Ok(()),
    }
}

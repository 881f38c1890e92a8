//! Everything in a state, or in a plain directory, one entry after another: a directory before what is in
//! it, names sorted by their bytes. Reads only.
//!
//! A walk keeps one level for each directory between the root and where it is: no recursion, a bounded number
//! of descriptors (those of [`LayerDir`]), and one path, that of the present entry. So a tree takes time and
//! memory in proportion to its entries, however deep it is, as long as nothing keeps the paths.

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

/// One entry.
pub(crate) struct Item<'p> {
    /// Its path, without a leading slash; empty for the root.
    pub(crate) path: &'p [u8],
    /// How many directories it lies below; 0 for the root.
    pub(crate) depth: usize,
    pub(crate) stat: Stat,
    place: Place,
    /// Set where overlay's marks are hidden: the entry is one of a state.
    space: Option<XattrSpace>,
}

#[derive(Clone)]
enum Place {
    Dir(Arc<LayerDir>),
    /// Where the name lies, and where the content does.
    File(Loc, Loc),
}

impl<'p> Item<'p> {
    /// What a state has at a path; `None` where it has nothing.
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

    /// Its name; empty for the root.
    pub(crate) fn name(&self) -> &'p [u8] {
        split(self.path).1
    }

    /// Its type.
    pub(crate) fn kind(&self) -> FileKind {
        self.stat.kind()
    }

    /// All attributes that it shows, sorted by name.
    pub(crate) fn xattrs(&self) -> Result<Xattrs> {
        let on_disk = match &self.place {
            Place::Dir(dir) => dir.fd().and_then(|fd| sys::xattr::all((*fd).as_fd())),
            Place::File(loc, _) => loc.xattrs(),
        };
        let on_disk = on_disk.context("can't read the attributes", self.path)?;
        Ok(attrs::shown(self.space, on_disk))
    }

    /// The target of a symbolic link.
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

    /// Whether it is a whiteout of a layer that is read as it lies. Such are links to one another, and no names
    /// of one file.
    pub(crate) fn is_whiteout(&self) -> Result<bool> {
        let stat = &self.stat;
        if self.space.is_some() {
            return Ok(false);
        }
        if stat.is_whiteout_device() {
            return Ok(true);
        }
        // Most layers have no other empty files with several names.
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

/// Opens for reading, leaving the last-read time alone where that is allowed.
pub(crate) fn open_content(loc: &Loc) -> cowl_layers::error::Result<OwnedFd> {
    match loc.open(OFlags::RDONLY | OFlags::NOATIME) {
        Err(error) if error.errno() == cowl_layers::error::Errno::PERM => loc.open_read(),
        other => other,
    }
}

/// Which names are one file. Only files with several names are remembered.
#[derive(Default)]
pub(crate) struct Links<T>(HashMap<(u64, u64), T>);

impl<T> Links<T> {
    /// What was kept for the first name of this file; else keeps this name's, and says nothing.
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
    /// A directory of it.
    type Dir;
    /// What a name in one means.
    type Node;

    /// The names in a directory, sorted.
    fn names(&self, dir: &Self::Dir) -> cowl_layers::Result<Vec<Name>>;
    /// The meaning of one of them.
    fn lookup(&self, dir: &Self::Dir, name: &Name) -> cowl_layers::Result<Self::Node>;
    /// Called with a directory that will not be needed again.
    fn leave(&self, dir: &Self::Dir);
}

/// What comes next in a walk.
pub(crate) enum Step<T: Tree> {
    /// An entry of the directory that was entered last.
    Entry(T::Node),
    /// All in the directory that was entered last has come.
    Leave(T::Dir),
}

struct Level<D> {
    dir: D,
    /// The next one is taken from the end.
    names: Vec<Name>,
    /// The length of the directory's path.
    path: usize,
}

/// A walk, which goes into those directories that its owner enters.
pub(crate) struct Walk<T: Tree> {
    tree: T,
    levels: Vec<Level<T::Dir>>,
    path: Vec<u8>,
}

impl<T: Tree> Walk<T> {
    /// Begins nowhere, at this path.
    pub(crate) fn new(tree: T, path: &[u8]) -> Self {
        Self {
            tree,
            levels: Vec::new(),
            path: path.to_vec(),
        }
    }

    /// The path of what came last.
    pub(crate) fn path(&self) -> &[u8] {
        &self.path
    }

    /// How many directories were entered and not left.
    pub(crate) fn depth(&self) -> usize {
        self.levels.len()
    }

    /// Goes into a directory, which is what came last.
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

    /// The next entry, or the end of a directory; `None` when the one that was entered first has been left.
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

/// What a state shows.
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

/// The same with the names that are hidden.
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

/// A plain directory. Marks of an overlay are nothing special there.
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

/// What is done with the entries of a walk.
pub(crate) trait Visitor {
    /// Called with each entry, a directory before what is in it.
    fn item(&mut self, item: &Item<'_>) -> Result<()>;

    /// Called with the path of a directory after all that is in it.
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

/// Visits what was found at a path of a state, and everything below it.
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

/// What is in a directory of a state: paths and meanings, sorted.
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

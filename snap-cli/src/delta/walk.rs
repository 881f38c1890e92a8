//! Everything in a state, or in a plain folder, one entry after another: a folder before what is in
//! it, names sorted by their bytes. Reads only; keeps no more open than one folder.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use cowl_fs::format::XattrSpace;
use cowl_fs::layer::{Layer, LayerDir, list};
use cowl_fs::sys;
use cowl_fs::sys::stat::{FileKind, Stat};
use cowl_fs::view::{DirNode, Found, Loc, View, user_xattrs};
use rustix::fs::OFlags;

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::make::{Xattrs, join};

/// One entry.
pub(crate) struct Item {
    /// Its path, without a leading slash; empty for the root.
    pub(crate) path: Vec<u8>,
    pub(crate) stat: Stat,
    place: Place,
    /// Set where overlay's marks are hidden: the entry is one of a state.
    space: Option<XattrSpace>,
}

enum Place {
    Dir(Arc<LayerDir>),
    /// Where the name lies, and where the content does.
    File(Loc, Loc),
}

impl Item {
    /// What a state has at a path; `None` where it has nothing.
    pub(crate) fn of(
        path: Vec<u8>,
        found: Found,
        space: Option<XattrSpace>,
    ) -> Result<Option<Self>> {
        let (place, stat) = match found {
            Found::Absent | Found::Whiteout => return Ok(None),
            Found::File(file) => {
                let data = file.data_loc().clone();
                (Place::File(file.loc, data), file.stat)
            }
            Found::Dir(dir) => {
                let top = dir.locs.first().cloned();
                let top = top.ok_or_else(|| {
                    TreeError::new(ErrorKind::Damaged, "a folder that lies nowhere")
                        .at(path.as_slice())
                })?;
                (Place::Dir(top), dir.stat)
            }
        };
        Ok(Some(Self {
            path,
            stat,
            place,
            space,
        }))
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
        let on_disk = on_disk.context("can't read the attributes", &self.path)?;
        let mut shown = match self.space {
            Some(space) => user_xattrs(space, on_disk),
            None => on_disk,
        };
        shown.sort_unstable();
        Ok(shown)
    }

    /// The target of a symbolic link.
    pub(crate) fn target(&self) -> Result<Vec<u8>> {
        match &self.place {
            Place::File(loc, _) => loc
                .readlink()
                .context("can't read the symbolic link", &self.path),
            Place::Dir(_) => Err(self.wrong()),
        }
    }

    /// Opens the content of a regular file.
    pub(crate) fn open(&self) -> Result<OwnedFd> {
        match &self.place {
            Place::File(_, data) => open_content(data).context("can't open the file", &self.path),
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
        TreeError::new(ErrorKind::Io, "a folder has no content").at(self.path.as_slice())
    }
}

/// Opens for reading, leaving the last-read time alone where that is allowed.
pub(crate) fn open_content(loc: &Loc) -> cowl_fs::error::Result<OwnedFd> {
    match loc.open(OFlags::RDONLY | OFlags::NOATIME) {
        Err(error) if error.errno() == cowl_fs::error::Errno::PERM => loc.open_read(),
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

/// Visits everything in a state.
pub(crate) fn state(view: &View, visit: &mut dyn FnMut(Item) -> Result<()>) -> Result<()> {
    let space = view.layers().first().map(|layer| layer.space());
    let root = view.root().context("can't read the root folder", b".")?;
    let mut todo = vec![(Vec::new(), Found::Dir(root))];
    while let Some((path, found)) = todo.pop() {
        if let Found::Dir(dir) = &found {
            // The next one is taken from the end.
            todo.extend(children(view, dir, &path)?.into_iter().rev());
        }
        if let Some(item) = Item::of(path, found, space)? {
            visit(item)?;
        }
    }
    Ok(())
}

/// What is in a folder of a state: paths and meanings, sorted.
pub(crate) fn children(view: &View, dir: &DirNode, path: &[u8]) -> Result<Vec<(Vec<u8>, Found)>> {
    let names = view.list(dir).context("can't read the folder", path)?;
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

/// Visits everything in a plain folder. Marks of an overlay are nothing special there.
pub(crate) fn plain(root: &Path, visit: &mut dyn FnMut(Item) -> Result<()>) -> Result<()> {
    let layer = Layer::open(root, XattrSpace::Trusted).map_err(|error| {
        TreeError::new(ErrorKind::NotFound, "can't open the folder").because(error)
    })?;
    let top = layer.root_dir();
    let stat = sys::stat::stat_fd(layer.root_fd()).context("can't read the root folder", b".")?;
    let mut todo = vec![(Vec::new(), Place::Dir(top), stat)];
    while let Some((path, place, stat)) = todo.pop() {
        if let Place::Dir(dir) = &place {
            let mut entries = list(dir, false).context("can't read the folder", &path)?;
            entries.sort_unstable_by(|a, b| b.name.cmp(&a.name));
            let fd = dir.fd().context("can't open the folder", &path)?;
            for entry in entries {
                let inner = join(&path, &entry.name);
                let stat = sys::stat::stat_at((*fd).as_fd(), &entry.name);
                let stat = stat.context("can't read", &inner)?;
                let place = if stat.kind() == FileKind::Directory {
                    Place::Dir(LayerDir::child(dir, entry.name, stat.ino))
                } else {
                    let loc = Loc {
                        dir: dir.clone(),
                        name: entry.name,
                    };
                    Place::File(loc.clone(), loc)
                };
                todo.push((inner, place, stat));
            }
        }
        visit(Item {
            path,
            stat,
            place,
            space: None,
        })?;
    }
    Ok(())
}

//! All names of a lower file with several hard links.
//!
//! When they are first needed, the layer that contains the file is scanned once for its paths. Lookups then determine
//! where these paths are visible in the overlay, because directories above them may have been renamed.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::Arc;

use cowl_layers::locks::Mutex;

use super::lookup::Names;
use rustc_hash::FxHashSet;

use crate::inode::{Alias, FileState, Inode};
use cowl_layers::error::Result;
use cowl_layers::layer::{Layer, LayerDir, LayerObject, Markers, list, probe};
use cowl_layers::name::{Name, split};
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::resolve::join;

/// The result of the scan of one layer.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// The paths of the wanted files, by inode number.
    links: HashMap<u64, Vec<Vec<u8>>>,
    /// The paths of directories with a redirect.
    redirects: Vec<Vec<u8>>,
}

impl Scan {
    /// Returns the paths of the file with the inode number `ino` in the layer.
    pub(crate) fn paths(&self, ino: u64) -> impl Iterator<Item = &Vec<u8>> {
        self.links.get(&ino).into_iter().flatten()
    }

    /// Returns one path of each file.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.links.values().filter_map(|paths| paths.first())
    }
}

/// A cache of the layers' scans and of the renamed directories, filled when it is first needed.
#[derive(Debug, Default)]
pub(crate) struct LinkIndex {
    layers: Mutex<HashMap<u64, Arc<Scan>>>,
    /// Directories whose visible path differs from their path in lower layers.
    moved: Mutex<Vec<Arc<Inode>>>,
    /// Whether `moved` contains the directories renamed before this mount. The lock is held during the search for them,
    /// so that no other thread uses an incomplete list.
    moved_found: Mutex<bool>,
}

impl LinkIndex {
    /// Adds a directory that got a redirect.
    pub(crate) fn add_moved(&self, inode: &Arc<Inode>) {
        let mut moved = self.moved.lock();
        if !moved.iter().any(|known| Arc::ptr_eq(known, inode)) {
            moved.push(inode.clone());
        }
    }

    /// Returns the directories whose visible path differs from their path in lower layers, if those from before this
    /// mount are known; for the record of state.
    pub(crate) fn moved_dirs(&self) -> (Vec<Arc<Inode>>, bool) {
        let Self {
            // Only a cache.
            layers: _,
            moved,
            moved_found,
        } = self;
        let found = *moved_found.lock();
        (moved.lock().clone(), found)
    }

    /// Creates the index of a record.
    pub(crate) fn from_record(moved: Vec<Arc<Inode>>, found: bool) -> Self {
        Self {
            layers: Mutex::default(),
            moved: Mutex::new(moved),
            moved_found: Mutex::new(found),
        }
    }

    /// Drops the scans of layers that are not in the stack any more.
    pub(crate) fn forget_layers(&self, ids: &FxHashSet<u64>) {
        self.layers.lock().retain(|id, _| !ids.contains(id));
    }

    /// Removes a directory that was unlinked, in which no names are visible any more.
    pub(crate) fn forget_moved(&self, inode: &Arc<Inode>) {
        self.moved.lock().retain(|known| !Arc::ptr_eq(known, inode));
    }
}

/// The search for the names of a file.
#[derive(Clone, Copy)]
pub(crate) struct Links<'o> {
    pub(crate) names: Names<'o>,
    pub(crate) root: &'o Arc<Inode>,
    pub(crate) index: &'o LinkIndex,
}

impl Links<'_> {
    /// Returns all visible names of a file that is not in the upper.
    pub(crate) fn visible_names(&self, inode: &Arc<Inode>, file: &FileState) -> Result<Vec<Alias>> {
        let stat = match &file.anchor {
            Some(anchor) => sys::stat::stat_fd(&**anchor)?,
            None => file.loc.stat()?,
        };
        self.visible_names_with(inode, file, &stat)
    }

    /// Returns all visible names of a file that is not in the upper and has the attributes `stat` on disk.
    pub(crate) fn visible_names_with(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        stat: &Stat,
    ) -> Result<Vec<Alias>> {
        if stat.nlink == 1 && file.aliases.len() == 1 {
            return Ok(file.aliases.to_vec());
        }
        // A lookup that raced with a removal may have recorded a stale name, which is removed or refers to another file
        // now.
        let mut known = Vec::new();
        for alias in file.aliases.clone() {
            let found = self.names.lookup(&alias.parent, &alias.name)?;
            if found.is_some_and(|found| Arc::ptr_eq(&found, inode)) {
                known.push(alias);
            }
        }
        if stat.nlink <= known.len() as u64 {
            return Ok(known);
        }
        let layer = file.loc.dir.layer().clone();
        // A cached scan lacks a file whose other names were removed while it was in the upper layer.
        let scan = match stat.nlink {
            1 => Arc::new(self.scan_for(&layer, |ino| ino == stat.ino)?),
            _ => self.scan_layer(&layer)?,
        };
        let mut seen: HashSet<_> = known
            .iter()
            .map(|alias| (alias.parent.ino(), alias.name.clone()))
            .collect();
        let mut names = known;
        for path in scan.paths(stat.ino) {
            self.for_each_visible(&layer, path, |parent, last| {
                let shows = self
                    .names
                    .lookup(&parent, &last)?
                    .is_some_and(|found| Arc::ptr_eq(&found, inode));
                if shows && seen.insert((parent.ino(), last.clone())) {
                    names.push(Alias { parent, name: last });
                }
                Ok(())
            })?;
        }
        Ok(names)
    }

    /// Calls `visit` with each candidate for a visible name of the object at `path` in `layer`: a directory of the
    /// overlay and a name in it.
    ///
    /// Another object may have that name: `visit` must check it.
    pub(crate) fn for_each_visible(
        &self,
        layer: &Arc<Layer>,
        path: &[u8],
        mut visit: impl FnMut(Arc<Inode>, Name) -> Result<()>,
    ) -> Result<()> {
        let (parent, last) = split(path);
        let last = Name::new(last)?;
        self.find_moved()?;
        for parent in self.visible_dirs(layer, parent)? {
            visit(parent, last.clone())?;
        }
        Ok(())
    }

    /// Returns the directories of the overlay that the directory `path` of `layer` is merged into.
    fn visible_dirs(&self, layer: &Arc<Layer>, path: &[u8]) -> Result<Vec<Arc<Inode>>> {
        let moved = self.index.moved.lock().clone();
        let mut shown = vec![self.root.clone()];
        let mut dir = layer.root_dir();
        for part in path.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            let Some(there) = probe(&dir, part, Markers::Ignored)? else {
                return Ok(Vec::new());
            };
            let name = Name::new(part)?;
            dir = LayerDir::child(&dir, name.clone(), there.stat.ino);
            let mut next: Vec<Arc<Inode>> = Vec::new();
            let mut candidates = Vec::new();
            for parent in &shown {
                candidates.extend(self.names.lookup(parent, &name)?);
            }
            candidates.extend(moved.iter().cloned());
            for candidate in candidates {
                let Ok(state) = candidate.dir() else { continue };
                let merges = state.locs.iter().any(|loc| loc.is_same_location(&dir));
                if merges && !state.removed && !next.iter().any(|n| Arc::ptr_eq(n, &candidate)) {
                    next.push(candidate);
                }
            }
            shown = next;
        }
        Ok(shown)
    }

    /// Finds the directories that were renamed before this mount, at the first call. Renames during the mount are
    /// recorded as they happen.
    fn find_moved(&self) -> Result<()> {
        let mut found = self.index.moved_found.lock();
        if *found {
            return Ok(());
        }
        // From the top, because renames in upper layers determine the visible path of a directory in a lower one.
        for layer in self.names.cx.stack.view().layers() {
            for path in &self.scan_layer(layer)?.redirects {
                for inode in self.visible_dirs(layer, path)? {
                    self.index.add_moved(&inode);
                }
            }
        }
        *found = true;
        Ok(())
    }

    /// Scans a layer, which may change meanwhile, for files whose inode numbers satisfy `is_wanted`.
    pub(crate) fn scan_for(
        &self,
        layer: &Arc<Layer>,
        is_wanted: impl Fn(u64) -> bool,
    ) -> Result<Scan> {
        scan(layer, |stat| is_wanted(stat.ino))
    }

    /// Returns the scan of a layer, which is cached for a lower layer.
    pub(crate) fn scan_layer(&self, layer: &Arc<Layer>) -> Result<Arc<Scan>> {
        if let Some(scan) = self.index.layers.lock().get(&layer.id()) {
            return Ok(scan.clone());
        }
        let scan = Arc::new(scan(layer, |stat| stat.nlink > 1)?);
        // The upper changes, so only scans of lower layers are cached.
        if !self.names.cx.stack.is_upper(layer) {
            let mut known = self.index.layers.lock();
            known.insert(layer.id(), scan.clone());
        }
        Ok(scan)
    }
}

/// Scans a layer for the names of files that satisfy `is_wanted`. Ignores those that are removed meanwhile.
fn scan(layer: &Arc<Layer>, is_wanted: impl Fn(&Stat) -> bool) -> Result<Scan> {
    let mut scan = Scan::default();
    let mut open = vec![(layer.root_dir(), Vec::new())];
    while let Some((dir, path)) = open.pop() {
        let (fd, entries) = match dir
            .fd()
            .and_then(|fd| Ok((fd, list(&dir, Markers::Ignored)?)))
        {
            Err(error) if error.is_absent() => continue,
            found => found?,
        };
        for entry in entries {
            // Whiteouts are hard links to one shared inode, not names of a file. The whiteout of a container image does
            // not even exist under the name that it hides.
            if entry.whiteout {
                continue;
            }
            let inner = join(&path, &entry.name);
            if entry.kind != FileKind::Directory {
                match sys::stat::stat_at((*fd).as_fd(), &entry.name) {
                    Ok(stat) if is_wanted(&stat) => {
                        scan.links.entry(stat.ino).or_default().push(inner);
                    }
                    Ok(_) => {}
                    Err(error) if error.is_absent() => {}
                    Err(error) => return Err(error),
                }
                continue;
            }
            let Some(found) = probe(&dir, &entry.name, Markers::Read)? else {
                continue;
            };
            if let LayerObject::Dir {
                redirect: Some(_), ..
            } = found.object
            {
                scan.redirects.push(inner.clone());
            }
            open.push((LayerDir::child(&dir, entry.name, found.stat.ino), inner));
        }
    }
    Ok(scan)
}

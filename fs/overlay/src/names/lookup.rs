//! Resolution of names to inodes.

use std::sync::Arc;

use super::absent::LastAbsent;
use super::deep::DeepDirs;
use super::intern::{intern_dir, intern_file};
use super::locate::Locator;
use super::prefetched::Prefetched;
use super::resolve::Resolver;
use crate::inode::{DirState, Inode, InodeTable, OnConflict};
use crate::reach::Context;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::Stat;
use cowl_layers::view::{Found, MergedEntry};

/// The visible link count of a merged directory, whose subdirectories in several layers are not counted. find(1) and
/// fts(3) interpret 1 as an unknown number of subdirectories.
pub(crate) const UNCOUNTED: u64 = 1;

/// The service that looks up names in directories.
#[derive(Clone, Copy)]
pub(crate) struct Names<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) inodes: &'o InodeTable,
    pub(crate) deep: &'o DeepDirs,
    pub(crate) absent: &'o LastAbsent,
    pub(crate) prefetched: &'o Prefetched,
}

/// The result of one attempt of a lookup.
enum Lookup {
    Found(Option<Hit>),
    /// The table has another object under the inode number; see [`OnConflict::Defer`].
    Conflict,
}

/// The result of a lookup that found an object.
pub(crate) struct Hit {
    pub(crate) inode: Arc<Inode>,
    /// The attributes on disk.
    pub(crate) stat: Stat,
    /// Whether the topmost layer contains the name.
    pub(crate) in_top: bool,
}

impl Names<'_> {
    /// Looks up `name` in `parent`; `None` if it does not exist.
    pub(crate) fn lookup(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Arc<Inode>>> {
        Ok(self.lookup_with_stat(parent, name)?.map(|hit| hit.inode))
    }

    /// Looks up `name` in `parent`, and returns the inode with its attributes on disk.
    pub(crate) fn lookup_with_stat(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Hit>> {
        // A copy-up may race with this lookup and move the object before it is inserted into the inode table. The
        // result is then stale, and the lookup is retried. Each retry means that a copy-up has completed, so the loop
        // ends.
        loop {
            let generation = parent.generation();
            match self.attempt(parent, name, OnConflict::Defer)? {
                // Either it is the same object during its copy-up, or another one. They can be distinguished while the
                // names of the directory are locked, because no copy-up completes then.
                Lookup::Conflict => {
                    let _names = parent.names()?.lock();
                    return self.lookup_locked(parent, name);
                }
                Lookup::Found(found) if parent.generation() == generation => return Ok(found),
                Lookup::Found(_) => {}
            }
        }
    }

    /// Looks up `name` in `parent`, whose `names` lock the caller must hold.
    pub(crate) fn lookup_locked(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Hit>> {
        match self.attempt(parent, name, OnConflict::Renumber)? {
            Lookup::Found(found) => Ok(found),
            Lookup::Conflict => Err(Error::Errno(Errno::STALE)),
        }
    }

    fn attempt(&self, parent: &Arc<Inode>, name: &Name, on_conflict: OnConflict) -> Result<Lookup> {
        let Some(locs) = parent.locations()? else {
            return Ok(Lookup::Found(None));
        };
        let is_top = |dir: &Arc<LayerDir>| {
            locs.first()
                .is_some_and(|top| Arc::ptr_eq(top.layer(), dir.layer()))
        };
        let on_conflict = |stat: &Stat| match self.cx.options.live_layers {
            true => OnConflict::Refresh(stat.kind()),
            false => on_conflict,
        };
        let (interned, stat, in_top) = match self.resolver().resolve(&locs, name)? {
            Found::Absent => {
                self.absent.note(&locs, name);
                return Ok(Lookup::Found(None));
            }
            Found::Whiteout => {
                // A foreign whiteout is not at the name that it hides, so a creation must search for it.
                if !locs
                    .first()
                    .is_some_and(|top| top.may_have_foreign_markers())
                {
                    self.absent.note(&locs, name);
                }
                return Ok(Lookup::Found(None));
            }
            Found::Dir(node) => {
                let mut stat = node.stat;
                if node.locs.len() > 1 {
                    stat.nlink = UNCOUNTED;
                }
                let in_top = node.locs.first().is_some_and(is_top);
                let on_conflict = on_conflict(&stat);
                let inode = intern_dir(&self.locator(), (parent, name), node, on_conflict)?;
                (inode, stat, in_top)
            }
            Found::File(node) => {
                let (loc, stat) = (node.loc.clone(), node.stat);
                let in_top = is_top(&loc.dir);
                let on_conflict = on_conflict(&stat);
                let inode = intern_file(&self.locator(), (parent, name), node, on_conflict)?;
                if let Some(inode) = &inode {
                    // The known names of the file may all have been removed; this one becomes its location.
                    inode.restore_location(loc)?;
                }
                (inode, stat, in_top)
            }
        };
        let hit = |inode| {
            Lookup::Found(Some(Hit {
                inode,
                stat,
                in_top,
            }))
        };
        Ok(interned.map_or(Lookup::Conflict, hit))
    }

    /// Resolves a name in the directory with these locations, which are all in lower layers, for a later lookup.
    ///
    /// Returns whether the directory is still in the cache.
    pub(crate) fn prefetch(&self, locs: &Arc<[Arc<LayerDir>]>, name: Name) -> Result<bool> {
        let found = self.resolver().resolve(locs, &name)?;
        Ok(self.prefetched.add_name(locs, name, found))
    }

    fn resolver(&self) -> Resolver<'_> {
        Resolver {
            cx: self.cx,
            deep: self.deep,
            prefetched: self.prefetched,
        }
    }

    /// Returns the search for the objects of a predecessor's inodes.
    pub(crate) fn locator(&self) -> Locator<'_> {
        Locator {
            inodes: self.inodes,
            resolver: self.resolver(),
        }
    }

    /// Returns the visible entries of a directory with these locations.
    pub(crate) fn list_names(&self, locs: &[Arc<LayerDir>]) -> Result<Vec<MergedEntry>> {
        self.resolver().list(locs)
    }

    /// Whether a directory has no visible names.
    pub(crate) fn is_empty(&self, inode: &Inode) -> Result<bool> {
        match inode.locations()? {
            Some(locs) => Ok(self.list_names(&locs)?.is_empty()),
            None => Ok(true),
        }
    }

    /// Whether the lower layers contain an object that would be visible as `name` without the upper layer's entry.
    pub(crate) fn is_visible_below(&self, dir: &DirState, name: &Name) -> Result<bool> {
        let found = self
            .resolver()
            .resolve(self.cx.stack.below_upper(&dir.locs), name)?;
        Ok(matches!(found, Found::Dir(_) | Found::File(_)))
    }
}

//! Hard links of a lower file: all its visible names are brought up together, so that they stay one
//! file, now, after a new mount, and when this upper has become a lower.
//!
//! Which names there are is found by one scan of the layer that holds the file, on the first need;
//! where they show is found by looking, because folders above them may have been moved.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::Op;
use super::copy_up::Copied;
use super::stage::StagedFile;
use crate::inode::{Alias, FileState, Inode};
use cowl_layers::error::Result;
use cowl_layers::format::Redirect;
use cowl_layers::layer::{Layer, LayerDir, Seen, WorkDir, journal, list, probe};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::Loc;
use cowl_layers::view::resolve::join;

/// What a scan of one layer found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Inode number to paths, for files with more than one link.
    pub(super) links: HashMap<u64, Vec<Vec<u8>>>,
    /// Folders with a redirect mark.
    redirects: Vec<Vec<u8>>,
}

/// What is known of hard links and moved folders; filled on the first need.
#[derive(Debug, Default)]
pub(super) struct LinkIndex {
    layers: Mutex<HashMap<u64, Arc<Scan>>>,
    /// Folders that show elsewhere than where lower layers have them.
    moved: Mutex<Vec<Arc<Inode>>>,
    /// Whether those that were moved before this mount are among them. Held while they are looked for,
    /// so that nobody works with half of them.
    moved_found: Mutex<bool>,
}

impl LinkIndex {
    /// Told when a folder gets a redirect mark.
    pub(super) fn note_moved(&self, inode: &Arc<Inode>) {
        let mut moved = self.moved.lock();
        if !moved.iter().any(|known| Arc::ptr_eq(known, inode)) {
            moved.push(inode.clone());
        }
    }

    /// Told when a folder is removed: nothing shows in it any more, and it need not be kept.
    pub(super) fn note_removed(&self, inode: &Arc<Inode>) {
        self.moved.lock().retain(|known| !Arc::ptr_eq(known, inode));
    }
}

impl Op<'_> {
    /// Every name under which a file that is not in the upper shows.
    pub(super) fn visible_names(&self, inode: &Arc<Inode>, file: &FileState) -> Result<Vec<Alias>> {
        let stat = match &file.anchor {
            Some(anchor) => sys::stat::stat_fd(&**anchor)?,
            None => file.loc.stat()?,
        };
        self.visible_names_of(inode, file, &stat)
    }

    /// The same for who has read already what the disk says of it.
    pub(super) fn visible_names_of(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        stat: &Stat,
    ) -> Result<Vec<Alias>> {
        if stat.nlink == 1 && file.aliases.len() == 1 {
            return Ok(file.aliases.to_vec());
        }
        // A lookup beside a removal may have noted a name that is gone, or another file's by now.
        let mut known = Vec::new();
        for alias in file.aliases.clone() {
            let found = self.lookup(&alias.parent, &alias.name)?;
            if found.is_some_and(|found| Arc::ptr_eq(&found, inode)) {
                known.push(alias);
            }
        }
        if stat.nlink <= known.len() as u64 {
            return Ok(known);
        }
        let layer = file.loc.dir.layer().clone();
        let scan = self.scan_of(&layer)?;
        let mut seen: HashSet<_> = known
            .iter()
            .map(|alias| (alias.parent.ino(), alias.name.clone()))
            .collect();
        let mut names = known;
        for path in scan.links.get(&stat.ino).into_iter().flatten() {
            self.each_shown(&layer, path, |parent, last| {
                let shows = self
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

    /// Calls `visit` with every folder of the overlay and the name in it under which the object at `path`
    /// of `layer` shows, unless something else is there.
    pub(super) fn each_shown(
        &self,
        layer: &Arc<Layer>,
        path: &[u8],
        mut visit: impl FnMut(Arc<Inode>, Name) -> Result<()>,
    ) -> Result<()> {
        let (folder, last) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(at) => path.split_at(at),
            None => (&b""[..], path),
        };
        let last = Name::new(last.strip_prefix(b"/").unwrap_or(last))?;
        self.find_moved()?;
        for parent in self.shown_at(layer, folder)? {
            visit(parent, last.clone())?;
        }
        Ok(())
    }

    /// Puts a copied-up file in place under all its names. Only this process sees the steps; a crash
    /// between them is made good by the journal when the layer is mounted again.
    pub(super) fn commit_group(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        made: StagedFile,
        aliases: &[Alias],
    ) -> Result<()> {
        let upper = self.cx.stack.upper()?;
        let redirect = match (made.metacopy, aliases.first()) {
            (true, Some(first)) => {
                // Each name alone would look for the content under itself, so it is named once for all.
                let path = join(&self.path_below(&first.parent)?, &first.name);
                let redirect = Redirect::Path(path.into());
                let fd = made.staged.open_path()?;
                let mark = upper.layer.space().redirect().as_bytes();
                sys::xattr::set(fd.as_fd(), mark, &redirect.to_value())?;
                Some(redirect)
            }
            _ => None,
        };
        let mut places = Vec::new();
        for alias in aliases {
            let (_, parent) = self.dir_up(&alias.parent)?;
            places.push((parent, alias));
        }
        let mut paths = Vec::new();
        for (parent, alias) in &places {
            paths.push(join(&parent.path_in_layer()?, &alias.name));
        }
        let entry = journal::write(&upper.work, made.staged, &paths, self.cx.order()?)?;
        let mut linked = Vec::new();
        // Held until the inode knows its new place: a lookup of a name that is linked already would
        // take it for another file.
        let _names = lock_all(aliases);
        for (parent, alias) in &places {
            if let Err(error) = self.link_one(inode, alias, parent, &entry, &mut linked) {
                self.undo(&linked, entry, &upper.work);
                return Err(error);
            }
        }
        let Some((loc, _)) = linked.into_iter().next() else {
            entry.remove(&upper.work)?;
            return Err(crate::Error::NOT_FOUND);
        };
        // Before anybody sees the copy: its name in the journal is one that nobody may count.
        if let Err(error) = entry.remove(&upper.work) {
            // The copy-up is made: an error here would tell that it is not.
            log::warn!("cannot end a journal entry: {error}; the next mount will");
        }
        let to = Copied {
            loc,
            metacopy: made.metacopy,
            stat: made.stat,
            redirect,
            orphan: None,
        };
        self.switch(inode, file, to)?;
        for alias in aliases {
            alias.parent.next_turn();
        }
        Ok(())
    }

    /// Links the staged file under one of its names, if the name is still the file's.
    fn link_one(
        &self,
        inode: &Arc<Inode>,
        alias: &Alias,
        parent: &Arc<LayerDir>,
        entry: &journal::Entry,
        linked: &mut Vec<(Loc, Arc<Inode>)>,
    ) -> Result<()> {
        // Only the layers know: since the names were gathered this one may have become another file's.
        if !self.shows(alias, inode)? {
            return Ok(());
        }
        let upper = self.cx.stack.upper()?;
        self.keeping_times(&alias.parent, parent, |fd| {
            self.ready_for(inode, fd)?;
            sys::node::link(upper.work.fd(), entry.inode_name(), fd, &alias.name)
        })?;
        let loc = Loc {
            dir: parent.clone(),
            name: alias.name.clone(),
        };
        linked.push((loc, alias.parent.clone()));
        inode.add_alias(alias.clone());
        Ok(())
    }

    /// Takes the names back that a copy-up got before it failed. When that fails too, the journal's
    /// entry stays, and the next mount finishes the copy-up.
    fn undo(&self, linked: &[(Loc, Arc<Inode>)], entry: journal::Entry, work: &WorkDir) {
        let names = linked.iter().try_for_each(|(loc, parent)| {
            self.keeping_times(parent, &loc.dir, |fd| sys::node::unlink(fd, &loc.name))
        });
        if let Err(error) = names.and_then(|()| entry.remove(work)) {
            log::warn!("cannot undo a copy-up of a file with several names: {error}");
        }
    }

    fn shows(&self, alias: &Alias, inode: &Arc<Inode>) -> Result<bool> {
        let found = self.lookup_locked(&alias.parent, &alias.name)?;
        Ok(found.is_some_and(|found| Arc::ptr_eq(&found, inode)))
    }

    /// The folders of the overlay in which the folder `path` of `layer` shows.
    fn shown_at(&self, layer: &Arc<Layer>, path: &[u8]) -> Result<Vec<Arc<Inode>>> {
        let moved = self.overlay.links.moved.lock().clone();
        let mut shown = vec![self.overlay.root.clone()];
        let mut dir = layer.root_dir();
        for part in path.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            let Some(there) = probe(&dir, part, false)? else {
                return Ok(Vec::new());
            };
            let name = Name::new(part)?;
            dir = LayerDir::child(&dir, name.clone(), there.stat.ino);
            let mut next: Vec<Arc<Inode>> = Vec::new();
            let mut candidates = Vec::new();
            for folder in &shown {
                candidates.extend(self.lookup(folder, &name)?);
            }
            candidates.extend(moved.iter().cloned());
            for candidate in candidates {
                let Ok(state) = candidate.dir() else { continue };
                let merges = state.locs.iter().any(|loc| loc.same_place(&dir));
                if merges && !state.removed && !next.iter().any(|n| Arc::ptr_eq(n, &candidate)) {
                    next.push(candidate);
                }
            }
            shown = next;
        }
        Ok(shown)
    }

    /// Finds the folders that a redirect moved, once; from then on renames tell.
    fn find_moved(&self) -> Result<()> {
        let mut found = self.overlay.links.moved_found.lock();
        if *found {
            return Ok(());
        }
        // From the top, because where a lower layer's folder shows depends on the moves above it.
        for layer in self.cx.stack.view().layers() {
            for path in &self.scan_of(layer)?.redirects {
                for inode in self.shown_at(layer, path)? {
                    self.overlay.links.note_moved(&inode);
                }
            }
        }
        *found = true;
        Ok(())
    }

    pub(super) fn scan_of(&self, layer: &Arc<Layer>) -> Result<Arc<Scan>> {
        if let Some(scan) = self.overlay.links.layers.lock().get(&layer.id()) {
            return Ok(scan.clone());
        }
        let scan = Arc::new(scan(layer)?);
        // The upper changes; only what is frozen is kept.
        if !self.cx.stack.is_upper(layer) {
            let mut known = self.overlay.links.layers.lock();
            known.insert(layer.id(), scan.clone());
        }
        Ok(scan)
    }
}

/// The `names` of all folders that hold these names, always taken in the same order.
fn lock_all(aliases: &[Alias]) -> Vec<MutexGuard<'_, ()>> {
    let mut parents: Vec<&Arc<Inode>> = aliases.iter().map(|alias| &alias.parent).collect();
    parents.sort_by_key(|parent| parent.ino());
    parents.dedup_by_key(|parent| parent.ino());
    parents.iter().map(|parent| parent.names.lock()).collect()
}

fn scan(layer: &Arc<Layer>) -> Result<Scan> {
    let mut scan = Scan::default();
    let mut open = vec![(layer.root_dir(), Vec::new())];
    while let Some((dir, path)) = open.pop() {
        let fd = dir.fd()?;
        for entry in list(&dir, false)? {
            let inner = join(&path, &entry.name);
            if entry.kind != FileKind::Directory {
                let stat = sys::stat::stat_at((*fd).as_fd(), &entry.name)?;
                // Whiteouts are links to one another, and no names of anything.
                if stat.nlink > 1 && !stat.is_whiteout_device() {
                    scan.links.entry(stat.ino).or_default().push(inner);
                }
                continue;
            }
            let Some(found) = probe(&dir, &entry.name, true)? else {
                continue;
            };
            if let Seen::Dir {
                redirect: Some(_), ..
            } = found.seen
            {
                scan.redirects.push(inner.clone());
            }
            open.push((LayerDir::child(&dir, entry.name, found.stat.ino), inner));
        }
    }
    Ok(scan)
}

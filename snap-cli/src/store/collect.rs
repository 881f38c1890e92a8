//! Cleaning up: layers that no manifest names, containers whose making was cut off, destroyed ones whose
//! time is over.
//!
//! It takes the store's lock, by itself without waiting: while any command makes or reads something, it does
//! nothing, and the next one tries again. It begins only when there is a sign that something is left
//! over (a note of a maker that is dead, something in the trash, a destroyed container whose time is over),
//! so that in general it costs a few listings of nearly empty folders.
//!
//! A layer that a mount still holds (each mount locks the layers that it reads) stays, whatever the
//! manifests say, until the mount is gone.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use cowl_layers::sys;

use super::deleted::Deleted;
use super::layers::{NOTE, remove_tree};
use super::lock::{Lock, Mode};
use super::manifest::{ContainerId, ContainerManifest, LayerId};
use super::places::{MAPPED, MNT, remove_place};
use super::usage::{Space, head_layers};
use super::{LOCK, Store, disk};
use crate::error::{Error, Kind, Result};

/// What the notes on layers begin with that nothing names, but that some mount held.
const HELD: &str = "held-";

/// What a cleaning did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Layers removed.
    pub layers: usize,
    /// Containers removed.
    pub containers: usize,
}

/// What lies about that nothing needs.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// Destroyed containers whose time is over.
    pub expired: Vec<Deleted>,
    /// Layers that nothing names.
    pub layers: Vec<LayerId>,
    /// Layers that nothing names, but that some mount holds: they stay.
    pub held: Vec<LayerId>,
    /// Containers whose making was cut off.
    pub half_made: Vec<ContainerId>,
    /// Temporary files, and files of snapshots that no container names.
    pub files: Vec<PathBuf>,
    /// Mount points, run folders and caches of containers that are gone.
    pub folders: Vec<PathBuf>,
    /// Locks that nobody needs any more.
    pub locks: Vec<PathBuf>,
    /// What is on its way out already.
    pub trash: Vec<PathBuf>,
    /// Some change waits for its commit.
    pub pending: bool,
}

impl Leftovers {
    /// Whether there is nothing to remove.
    pub fn is_empty(&self) -> bool {
        self.expired.is_empty()
            && self.layers.is_empty()
            && self.half_made.is_empty()
            && self.files.is_empty()
            && self.folders.is_empty()
            && self.locks.is_empty()
            && self.trash.is_empty()
    }
}

/// What the manifests of a store name.
#[derive(Default)]
struct Survey {
    used: HashSet<LayerId>,
    files: Vec<PathBuf>,
    pending: bool,
}

impl Store {
    /// Cleans up if there is a sign of anything left over and nobody is at work.
    pub fn collect(&self) -> Result<Collected> {
        match self.has_signs()? {
            true => self.sweep(),
            false => Ok(Collected::default()),
        }
    }

    /// The same for those who have done their work already: that it could not be is told, and no failure of
    /// theirs.
    pub fn collect_after(&self) {
        if let Err(error) = self.collect() {
            log::warn!("{error}; nothing is collected before that is put in order");
        }
    }

    fn has_signs(&self) -> Result<bool> {
        // Lets go of the notes again at once: the sweep takes them when it is alone.
        if !self.stale_notes()?.is_empty() || !self.trash()?.is_empty() {
            return Ok(true);
        }
        if self.deleted()?.iter().any(Deleted::is_expired) {
            return Ok(true);
        }
        for (_, layer) in self.held_notes()? {
            if !self.is_held(layer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Cleans up if nobody is at work.
    pub fn sweep(&self) -> Result<Collected> {
        let who = &self.session.who;
        let Some(alone) = Lock::try_take(&self.lock_file("store"), Mode::Exclusive, who)? else {
            return Ok(Collected::default());
        };
        match self.leftovers(false) {
            Ok(left) => self.clear(alone, &left),
            Err(error) => {
                drop(alone);
                self.empty_trash_besides(&error);
                Err(error)
            }
        }
    }

    /// Empties the trash where nothing else can be collected: what is in it was moved there when nothing named
    /// it any more, whatever is damaged now.
    pub fn empty_trash_besides(&self, error: &Error) {
        log::debug!("only the trash is emptied: {error}");
        if let Err(error) = self.empty_trash() {
            log::warn!("{error}");
        }
    }

    /// What lies about. `all_deleted`: destroyed containers count as over, whatever their time. Be alone in
    /// the store: what a command is just making looks like something left over.
    pub fn leftovers(&self, all_deleted: bool) -> Result<Leftovers> {
        let mut left = Leftovers {
            trash: self.trash()?,
            ..Leftovers::default()
        };
        let mut kept = Vec::new();
        for deleted in self.deleted()? {
            match all_deleted || deleted.is_expired() {
                true => left.expired.push(deleted),
                false => kept.push(deleted),
            }
        }
        let survey = self.survey(&kept)?;
        left.files = survey.files;
        left.pending = survey.pending;
        for id in self.layer_ids()? {
            if survey.used.contains(&id) {
                match temporaries(&self.layer_dir(id)) {
                    Ok(files) => left.files.extend(files),
                    Err(error) => log::warn!("{error}"),
                }
                continue;
            }
            match self.is_held(id) {
                Ok(true) => left.held.push(id),
                Ok(false) => left.layers.push(id),
                // It stays until that is put in order; the others go.
                Err(error) => log::warn!("{error}"),
            }
        }
        for name in disk::names(&self.root.join("containers"))? {
            if let Some(id) = ContainerId::parse(&name)
                && !disk::is_there(&self.container_file(id))?
            {
                left.half_made.push(id);
            }
        }
        left.files.extend(temporaries(&self.root.join("cache"))?);
        left.folders = self.orphans()?;
        left.locks = self.stale_locks()?;
        Ok(left)
    }

    /// Removes what lies about.
    pub fn clear(&self, alone: Lock, left: &Leftovers) -> Result<Collected> {
        let mut collected = Collected::default();
        // Before their layers: what is listed can be brought back whole.
        for deleted in &left.expired {
            self.to_trash(deleted.dir.clone(), &format!("container-{}", deleted.id))?;
            collected.containers += 1;
        }
        let mut failed = None;
        for id in &left.layers {
            match self.discard(*id) {
                Ok(gone) => collected.layers += usize::from(gone),
                Err(error) => keep_first(&mut failed, error),
            }
        }
        for id in &left.half_made {
            self.to_trash(self.container_dir(*id), &format!("container-{id}"))?;
            collected.containers += 1;
        }
        for file in &left.files {
            disk::remove_if_there(file)?;
        }
        for folder in &left.folders {
            self.remove_orphan(folder);
        }
        let who = &self.session.who;
        for path in &left.locks {
            if let Some(lock) = Lock::try_take(path, Mode::Exclusive, who)? {
                lock.remove()?;
            }
        }
        self.note_held(&left.held)?;
        // What a change that waits for its commit names may turn out to be nobody's: look again then.
        if !left.pending {
            for note in self.stale_notes()? {
                note.remove()?;
            }
        }
        // From here on nothing that counts is touched: others may go to work.
        drop(alone);
        if let Err(error) = self.empty_trash() {
            keep_first(&mut failed, error);
        }
        failed.map_or(Ok(collected), Err)
    }

    /// What layers that are to go take, as far as it is known or can be counted now.
    pub fn space_left(&self, layers: &[LayerId]) -> Space {
        let mut space = Space::default();
        for layer in layers {
            match self.measured(*layer) {
                Ok((_, measured)) => space += measured.into(),
                Err(error) => log::debug!("{error}"),
            }
        }
        space
    }

    /// Moves a layer out of the way unless some mount holds it.
    fn discard(&self, id: LayerId) -> Result<bool> {
        let tree = self.layer_tree(id);
        let at = |error| Error::at("look at the lock of", &tree, error);
        // Held over the move: a mount that comes too late finds no layer.
        let _lock: Option<OwnedFd> = match sys::dir::open_root(&tree) {
            Ok(root) => match sys::dir::lock_exclusive(root.as_fd()).map_err(at)? {
                Some(lock) => Some(lock),
                None => return self.note_held(&[id]).map(|()| false),
            },
            Err(error) if error.is_absent() => None,
            Err(error) => return Err(at(error)),
        };
        self.to_trash(self.layer_dir(id), &format!("layer-{id}"))?;
        Ok(true)
    }

    /// Leaves notes on layers that go once no mount holds them, and removes those that are no more true.
    fn note_held(&self, held: &[LayerId]) -> Result<()> {
        for id in held {
            let path = self.lock_file(&format!("{HELD}{id}"));
            std::fs::write(&path, b"").map_err(|error| Error::at("write", &path, error))?;
        }
        Ok(())
    }

    fn held_notes(&self) -> Result<Vec<(PathBuf, LayerId)>> {
        let dir = self.root.join("locks");
        let names = disk::names(&dir)?;
        let note = |name: &String| {
            let id = name.strip_prefix(HELD)?.strip_suffix(LOCK)?;
            Some((dir.join(name), LayerId::parse(id)?))
        };
        Ok(names.iter().filter_map(note).collect())
    }

    /// Notes of makers that are dead, each locked by us now.
    fn stale_notes(&self) -> Result<Vec<Lock>> {
        let mut stale = Vec::new();
        for name in disk::names(&self.root.join("locks"))? {
            if name.starts_with(NOTE) {
                let path = self.root.join("locks").join(&name);
                stale.extend(Lock::try_take(&path, Mode::Exclusive, &self.session.who)?);
            }
        }
        Ok(stale)
    }

    /// Finds all layers that any manifest names, also those of changes that wait for their commit and of
    /// destroyed containers that may come back, and snapshot files that none names. An unreadable manifest
    /// is an error: what it names must not be taken for unused.
    fn survey(&self, deleted: &[Deleted]) -> Result<Survey> {
        let mut survey = Survey::default();
        for name in disk::names(&self.root.join("containers"))? {
            let Some(id) = ContainerId::parse(&name) else {
                continue;
            };
            let Some(record) = self.container(id)? else {
                if !self.is_half_made(id)? {
                    return Err(disk::missing::<ContainerManifest>(&self.container_file(id)));
                }
                continue;
            };
            if disk::is_there(&self.unfinished_file(id))? {
                survey.files.push(self.unfinished_file(id));
            }
            let mut manifests = vec![record.body];
            if disk::is_there(&self.pending_file(id))? {
                survey.pending = true;
                match self.container_at(&self.pending_file(id)) {
                    Ok(next) => manifests.extend(next.map(|next| next.body)),
                    // A torn one was never relied on; the next command on the container drops it.
                    Err(error) if error.kind == Kind::Damaged => {}
                    Err(error) => return Err(error),
                }
            }
            self.survey_one(&mut survey, &self.container_dir(id), &manifests)?;
        }
        for deleted in deleted {
            let manifest = self.deleted_manifest(deleted)?.body;
            self.survey_one(&mut survey, &deleted.dir, &[manifest])?;
        }
        Ok(survey)
    }

    /// Containers whose manifest is gone: nobody knows what they named.
    pub fn lost_containers(&self) -> Result<Vec<ContainerId>> {
        let mut lost = Vec::new();
        for name in disk::names(&self.root.join("containers"))? {
            if let Some(id) = ContainerId::parse(&name)
                && !disk::is_there(&self.container_file(id))?
                && !self.is_half_made(id)?
            {
                lost.push(id);
            }
        }
        Ok(lost)
    }

    /// Whether a container without a manifest is one whose making was cut off, and not one that lost it.
    fn is_half_made(&self, id: ContainerId) -> Result<bool> {
        if disk::is_there(&self.unfinished_file(id))? {
            return Ok(true);
        }
        // Cut off before the first file was written.
        let inside = disk::names(&self.container_dir(id))?;
        let bare = inside.iter().all(|name| name == "snapshots");
        Ok(bare && disk::names(&self.snapshots_dir(id))?.is_empty())
    }

    fn survey_one(
        &self,
        survey: &mut Survey,
        dir: &Path,
        manifests: &[ContainerManifest],
    ) -> Result<()> {
        let mut named = HashSet::new();
        for manifest in manifests {
            survey.used.extend(head_layers(manifest));
            for snapshot in &manifest.snapshots {
                survey
                    .used
                    .extend(self.snapshot_in(dir, snapshot.id)?.stack);
                named.insert(format!("{}.json", snapshot.id));
            }
        }
        survey.files.extend(temporaries(dir)?);
        let snapshots = dir.join("snapshots");
        for file in disk::names(&snapshots)? {
            if !named.contains(&file) {
                survey.files.push(snapshots.join(file));
            }
        }
        Ok(())
    }

    /// Where a change of a container waits for its commit.
    pub fn pending_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("container.json.next")
    }

    /// Moves a folder out of sight; from here it only goes away.
    pub fn to_trash(&self, path: PathBuf, name: &str) -> Result<()> {
        disk::rename(&path, &self.root.join("trash").join(name))
    }

    /// Mount points, run folders and caches of containers that are gone.
    fn orphans(&self) -> Result<Vec<PathBuf>> {
        let mut orphans = Vec::new();
        let own = [MNT, MAPPED, "cache"].map(|folder| self.root.join(folder));
        let run = self.run_roots().map(Path::to_path_buf);
        for dir in own.into_iter().chain(run) {
            for name in disk::names(&dir)? {
                let own = name.strip_suffix(".json").unwrap_or(&name);
                if let Some(id) = ContainerId::parse(own)
                    && !disk::is_there(&self.container_dir(id))?
                {
                    orphans.push(dir.join(&name));
                }
            }
        }
        Ok(orphans)
    }

    /// What can't be removed just now stays for the next time.
    pub(super) fn remove_orphan(&self, path: &Path) {
        let removed = match self.is_place(path) {
            true => remove_place(path),
            false => remove_tree(path),
        };
        if let Err(error) = removed {
            log::warn!("{error}");
        }
    }

    /// Locks of containers that are gone, claims of names that nobody holds, and notes on layers that are
    /// gone.
    fn stale_locks(&self) -> Result<Vec<PathBuf>> {
        let mut stale = Vec::new();
        for name in disk::names(&self.root.join("locks"))? {
            let path = self.root.join("locks").join(&name);
            let own = name.strip_suffix(LOCK).unwrap_or(&name);
            let container = own.strip_prefix("container-").and_then(ContainerId::parse);
            let layer = own.strip_prefix(HELD).and_then(LayerId::parse);
            let gone = match (container, layer) {
                (Some(id), _) => !disk::is_there(&self.container_dir(id))?,
                (None, Some(id)) => !disk::is_there(&self.layer_dir(id))?,
                (None, None) => {
                    let passing = own.starts_with("name-") || own.starts_with("settling-");
                    passing && !Lock::is_held(&path)?
                }
            };
            if gone {
                stale.push(path);
            }
        }
        Ok(stale)
    }

    fn trash(&self) -> Result<Vec<PathBuf>> {
        let trash = self.root.join("trash");
        let names = disk::names(&trash)?;
        Ok(names.iter().map(|name| trash.join(name)).collect())
    }

    fn empty_trash(&self) -> Result<()> {
        let who = &self.session.who;
        let path = self.lock_file("trash");
        // One is enough.
        let Some(_lock) = Lock::try_take(&path, Mode::Exclusive, who)? else {
            return Ok(());
        };
        let mut failed = None;
        for path in self.trash()? {
            // One that cannot be removed keeps none of the others.
            if let Err(error) = remove_tree(&path) {
                keep_first(&mut failed, error);
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Keeps the first of several errors to be returned; the others are reported at once.
fn keep_first(first: &mut Option<Error>, error: Error) {
    match first {
        None => *first = Some(error),
        Some(_) => log::warn!("{error}"),
    }
}

/// Files that were being written when their writer was killed.
fn temporaries(dir: &Path) -> Result<Vec<PathBuf>> {
    let names = disk::names(dir)?;
    let temporary = names.iter().filter(|name| name.ends_with(disk::TEMPORARY));
    Ok(temporary.map(|name| dir.join(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::super::layers::Making;
    use super::super::manifest::{ContainerManifest, LayerKind};
    use super::super::name::ContainerName;
    use super::super::record::Record;
    use super::super::tests::session;
    use super::*;

    fn container(store: &Store) -> ContainerId {
        let mut making = Making::begin(store).unwrap();
        let base = making.layer(LayerKind::Base, &[], &[]).unwrap();
        let head = making.head(&[base], &store.layer_tree(base)).unwrap();
        let id = making.container().unwrap();
        let name = ContainerName::parse("web").unwrap();
        let manifest = ContainerManifest::new(name, head, &[base]);
        disk::replace(&store.container_file(id), &Record::first(manifest)).unwrap();
        making.done().unwrap();
        id
    }

    #[test]
    fn leftovers_of_a_killed_maker_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let mut making = Making::begin(&store).unwrap();
        let layer = making.layer(LayerKind::Delta, &[], &[]).unwrap();
        std::fs::create_dir_all(store.layer_tree(layer).join("a/b/c")).unwrap();
        let half = making.container().unwrap();
        // While the maker lives, nothing is touched.
        assert_eq!(store.collect().unwrap(), Collected::default());
        assert!(store.layer_dir(layer).try_exists().unwrap());
        making.leave();

        let other = Store::open(store.root(), session()).unwrap();
        let collected = other.collect().unwrap();
        assert_eq!((collected.layers, collected.containers), (1, 1));
        assert!(!store.layer_dir(layer).try_exists().unwrap());
        assert!(!store.container_dir(half).try_exists().unwrap());
        let manifest = store.container(id).unwrap().unwrap().body;
        for kept in manifest.stack {
            assert!(store.layer_tree(kept).try_exists().unwrap());
        }
        assert!(disk::names(&store.root().join("trash")).unwrap().is_empty());
        assert_eq!(other.collect().unwrap(), Collected::default());
    }

    #[test]
    fn nothing_is_collected_while_a_manifest_can_not_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let layers = disk::names(&store.root().join("layers")).unwrap();
        std::fs::write(store.container_file(id), b"{}").unwrap();
        assert_eq!(store.sweep().unwrap_err().kind, Kind::Damaged);
        assert_eq!(disk::names(&store.root().join("layers")).unwrap(), layers);
    }

    #[test]
    fn a_layer_that_a_mount_holds_stays_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let mut making = Making::begin(&store).unwrap();
        let layer = making.layer(LayerKind::Delta, &[], &[]).unwrap();
        making.leave();
        let root = sys::dir::open_root(&store.layer_tree(layer)).unwrap();
        let held = sys::dir::lock_shared(root.as_fd()).unwrap().unwrap();
        assert_eq!(store.collect().unwrap(), Collected::default());
        assert!(store.layer_tree(layer).try_exists().unwrap());
        // It is not looked for again and again.
        assert!(!store.has_signs().unwrap());
        drop(held);
        assert_eq!(store.collect().unwrap().layers, 1);
        assert!(!store.layer_dir(layer).try_exists().unwrap());
        store.sweep().unwrap();
        let locks = disk::names(&store.root().join("locks")).unwrap();
        assert_eq!(locks, ["store.lock", "trash.lock"]);
    }

    #[test]
    fn a_destroyed_container_keeps_its_layers_while_its_time_runs() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = container(&store);
        let layers = store.layer_ids().unwrap();
        store.delete(id, i64::MAX).unwrap();
        store.sweep().unwrap();
        assert_eq!(store.layer_ids().unwrap(), layers);
        assert!(store.containers().unwrap().is_empty());
        let [deleted] = &store.deleted().unwrap()[..] else {
            panic!("one is in the trash");
        };
        store.bring_back(deleted).unwrap();
        assert_eq!(store.containers().unwrap().len(), 1);
        store.delete(id, 0).unwrap();
        let collected = store.collect().unwrap();
        assert_eq!((collected.layers, collected.containers), (2, 1));
        assert!(store.deleted().unwrap().is_empty());
    }
}

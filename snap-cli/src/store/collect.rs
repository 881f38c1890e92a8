//! Cleaning up: layers that no manifest names, containers whose making was cut off, destroyed ones.
//!
//! It takes the store's lock without waiting: while any command makes or reads something, it does
//! nothing, and the next one tries again. It begins only when there is a sign that something is left
//! over (a note of a maker that is dead, or something in the trash), so that in general it costs two
//! listings of nearly empty folders.

use std::collections::HashSet;
use std::path::PathBuf;

use super::layers::{NOTE, remove_tree};
use super::lock::{Lock, Mode};
use super::manifest::{ContainerId, LayerId};
use super::{LOCK, Store, disk};
use crate::error::Result;

/// What a cleaning did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Layers removed.
    pub layers: usize,
    /// Containers removed.
    pub containers: usize,
}

/// What the manifests of a store name.
#[derive(Default)]
struct Survey {
    used: HashSet<LayerId>,
    /// Some change waits for its commit.
    pending: bool,
}

impl Store {
    /// Cleans up if there is a sign of anything left over and nobody is at work.
    pub fn collect(&self) -> Result<Collected> {
        // Let go of the notes again at once: the sweep takes them when it is alone.
        let clean = self.stale_notes()?.is_empty();
        if clean && disk::names(&self.root.join("trash"))?.is_empty() {
            return Ok(Collected::default());
        }
        self.sweep()
    }

    /// Cleans up if nobody is at work.
    pub fn sweep(&self) -> Result<Collected> {
        let who = &self.session.who;
        let path = self.lock_file("store");
        let Some(alone) = Lock::try_take(&path, Mode::Exclusive, who)? else {
            return Ok(Collected::default());
        };
        let mut collected = Collected::default();
        let Survey { used, pending } = self.survey()?;
        for name in disk::names(&self.root.join("layers"))? {
            match LayerId::parse(&name) {
                Some(id) if !used.contains(&id) => {
                    self.to_trash(self.layer_dir(id), &format!("layer-{id}"))?;
                    collected.layers += 1;
                }
                Some(id) => self.remove_temporaries(&self.layer_dir(id))?,
                None => {}
            }
        }
        for name in disk::names(&self.root.join("containers"))? {
            let Some(id) = ContainerId::parse(&name) else {
                continue;
            };
            if !disk::is_there(&self.container_file(id))? {
                self.to_trash(self.container_dir(id), &format!("container-{id}"))?;
                collected.containers += 1;
            }
        }
        self.remove_orphans()?;
        // What a change that waits for its commit names may turn out to be nobody's: look again then.
        if !pending {
            for note in self.stale_notes()? {
                note.remove()?;
            }
        }
        // From here on nothing that counts is touched: others may go to work.
        drop(alone);
        self.empty_trash()?;
        Ok(collected)
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

    /// Finds all layers that any manifest names, also those of changes that wait for their commit, and
    /// removes snapshot files that none names. An unreadable manifest is an error: what it names must
    /// not be taken for unused.
    fn survey(&self) -> Result<Survey> {
        let mut survey = Survey::default();
        for name in disk::names(&self.root.join("containers"))? {
            let Some(id) = ContainerId::parse(&name) else {
                continue;
            };
            let Some(record) = self.container(id)? else {
                continue;
            };
            let mut manifests = vec![record.body];
            if disk::is_there(&self.pending_file(id))? {
                survey.pending = true;
                // A torn one was never relied on; the next command on the container drops it.
                let next = self.container_at(&self.pending_file(id));
                manifests.extend(next.ok().flatten().map(|next| next.body));
            }
            let mut named = HashSet::new();
            for manifest in &manifests {
                survey.used.extend(manifest.stack.iter().copied());
                for snapshot in &manifest.snapshots {
                    survey.used.extend(self.snapshot(id, snapshot.id)?.stack);
                    named.insert(format!("{}.json", snapshot.id));
                }
            }
            self.remove_temporaries(&self.container_dir(id))?;
            let snapshots = self.snapshots_dir(id);
            for file in disk::names(&snapshots)? {
                if !named.contains(&file) {
                    disk::remove_if_there(&snapshots.join(file))?;
                }
            }
        }
        Ok(survey)
    }

    /// Where a change of a container waits for its commit.
    pub fn pending_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("container.json.next")
    }

    /// Moves a folder out of sight; from here it only goes away.
    pub fn to_trash(&self, path: PathBuf, name: &str) -> Result<()> {
        disk::rename(&path, &self.root.join("trash").join(name))
    }

    fn remove_temporaries(&self, dir: &std::path::Path) -> Result<()> {
        for name in disk::names(dir)? {
            if name.ends_with(disk::TEMPORARY) {
                disk::remove_if_there(&dir.join(name))?;
            }
        }
        Ok(())
    }

    /// Mount points, run folders and locks of containers that are gone.
    fn remove_orphans(&self) -> Result<()> {
        for folder in ["mnt", "run"] {
            let dir = self.root.join(folder);
            for name in disk::names(&dir)? {
                let Some(id) = ContainerId::parse(&name) else {
                    continue;
                };
                if disk::is_there(&self.container_dir(id))? {
                    continue;
                }
                let path = dir.join(&name);
                let removed = match folder {
                    // Never anything but an empty folder: something may still be mounted on it.
                    "mnt" => std::fs::remove_dir(&path)
                        .map_err(|e| crate::error::Error::at("remove", &path, e)),
                    _ => remove_tree(&path),
                };
                if let Err(error) = removed {
                    log::warn!("{error}");
                }
            }
        }
        for name in disk::names(&self.root.join("locks"))? {
            let gone = name
                .strip_prefix("container-")
                .and_then(|name| name.strip_suffix(LOCK))
                .and_then(ContainerId::parse)
                .map(|id| disk::is_there(&self.container_dir(id)).map(|there| !there))
                .transpose()?
                .unwrap_or(false);
            if gone {
                let path = self.root.join("locks").join(&name);
                let who = &self.session.who;
                if let Some(lock) = Lock::try_take(&path, Mode::Exclusive, who)? {
                    lock.remove()?;
                }
            }
        }
        Ok(())
    }

    fn empty_trash(&self) -> Result<()> {
        let who = &self.session.who;
        let path = self.lock_file("trash");
        // One is enough.
        let Some(_lock) = Lock::try_take(&path, Mode::Exclusive, who)? else {
            return Ok(());
        };
        let trash = self.root.join("trash");
        for name in disk::names(&trash)? {
            remove_tree(&trash.join(name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::super::layers::Making;
    use super::super::manifest::{ContainerManifest, LayerKind};
    use super::super::name::ContainerName;
    use super::super::record::Record;
    use super::super::tests::session;
    use super::*;
    use crate::error::Kind;

    fn container(store: &Store) -> ContainerId {
        let mut making = Making::begin(store).unwrap();
        let base = making.layer(LayerKind::Base, &[], &[]).unwrap();
        let head = making.head(&[base], &store.layer_tree(base)).unwrap();
        let id = making.container().unwrap();
        let manifest = ContainerManifest {
            name: ContainerName::parse("web").unwrap(),
            head,
            stack: vec![head, base],
            origin: vec![base],
            parent: None,
            snapshots: Vec::new(),
            next_snap: 0,
            next_auto: 0,
            created: super::super::now(),
            settings: Map::new(),
            adopted: None,
            lxc: None,
            moving: None,
            extra: Map::new(),
        };
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
}

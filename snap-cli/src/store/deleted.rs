//! Destroyed containers that may still come back. The folder of each lies in `deleted`, under a name that
//! tells when it was destroyed and how long it is kept; so one rename takes it there, and one brings it
//! back. Its layers stay while it is there.

use std::path::PathBuf;

use super::manifest::{ContainerId, ContainerManifest};
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// A destroyed container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// Its id.
    pub id: ContainerId,
    /// When it was destroyed, in seconds since 1970.
    pub since: i64,
    /// When it goes for good.
    pub until: i64,
    /// Its folder.
    pub dir: PathBuf,
}

impl Deleted {
    /// Whether its time is over.
    pub fn is_expired(&self) -> bool {
        self.until <= jiff::Timestamp::now().as_second()
    }
}

fn parse(name: &str) -> Option<(ContainerId, i64, i64)> {
    let mut parts = name.split('.');
    let parsed = (
        ContainerId::parse(parts.next()?)?,
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
    );
    parts.next().is_none().then_some(parsed)
}

impl Store {
    /// The destroyed containers, the latest last.
    pub fn deleted(&self) -> Result<Vec<Deleted>> {
        let folder = self.root.join("deleted");
        let mut found = Vec::new();
        for name in disk::names(&folder)? {
            if let Some((id, since, until)) = parse(&name) {
                found.push(Deleted {
                    id,
                    since,
                    until,
                    dir: folder.join(&name),
                });
            }
        }
        found.sort_by_key(|deleted| (deleted.since, deleted.id));
        Ok(found)
    }

    /// What the manifest of a destroyed container says.
    pub fn deleted_manifest(&self, deleted: &Deleted) -> Result<Record<ContainerManifest>> {
        let path = deleted.dir.join("container.json");
        if let Some(record) = self.container_at(&path)? {
            return Ok(record);
        }
        match std::fs::symlink_metadata(&deleted.dir) {
            // Brought back, or taken away for good, since it was listed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let id = deleted.id;
                Err(
                    Error::not_found(format!("{id} is not in the trash any more"))
                        .hint("`cowl undelete --list` shows what is"),
                )
            }
            Err(error) => Err(Error::at("look at", &deleted.dir, error)),
            Ok(_) => Err(
                Error::damaged(format!("the file {} is missing", path.shown())).hint(
                    "if nobody wants that container back, `cowl gc --empty-trash` takes it away",
                ),
            ),
        }
    }

    /// Takes a container out of the store, to be kept until this second. Nobody may be using it.
    pub fn delete(&self, id: ContainerId, until: i64) -> Result<()> {
        // A collection that has looked here already, and not yet there, would find it nowhere.
        let _no_collection = self.share()?;
        let folder = self.private_folder("deleted")?;
        let since = jiff::Timestamp::now().as_second();
        disk::rename(
            &self.container_dir(id),
            &folder.join(format!("{id}.{since}.{until}")),
        )
    }

    /// The same for good.
    pub fn discard_container(&self, id: ContainerId) -> Result<()> {
        let _no_collection = self.share()?;
        self.to_trash(self.container_dir(id), &format!("container-{id}"))
    }

    /// Puts it back. The caller has claimed the name that its manifest says.
    pub fn bring_back(&self, deleted: &Deleted) -> Result<()> {
        disk::rename(&deleted.dir, &self.container_dir(deleted.id))
    }

    /// Removes what serves a container that is not there any more: its mount point, run folder and cache.
    pub fn forget_places(&self, id: ContainerId) {
        if let Err(error) = self.remove_places(id) {
            log::warn!("{error}");
        }
        for path in std::iter::once(self.cache_file(id)).chain(self.run_dirs(id)) {
            self.remove_orphan(&path);
        }
    }

    /// The file of what is known of a container's layers.
    pub fn cache_file(&self, id: ContainerId) -> PathBuf {
        self.root.join("cache").join(format!("{id}.json"))
    }

    /// The folder for files that could not be read, for somebody to look at.
    pub fn damaged_folder(&self) -> Result<PathBuf> {
        self.private_folder("damaged")
    }

    /// A folder of the store that older versions did not make.
    pub(super) fn private_folder(&self, name: &str) -> Result<PathBuf> {
        use std::os::unix::fs::DirBuilderExt;
        let folder = self.root.join(name);
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => disk::sync_parent(&folder)?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::at("make the folder", &folder, error)),
        }
        Ok(folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_folders() {
        let id = ContainerId::fresh();
        assert_eq!(parse(&format!("{id}.17.-3")), Some((id, 17, -3)));
        for bad in [
            "",
            "x.1.2",
            &format!("{id}"),
            &format!("{id}.1"),
            &format!("{id}.1.2.3"),
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}

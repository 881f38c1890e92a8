//! Destroyed containers that can still be undeleted.
//!
//! The directory of each is in `deleted`, under a name that contains the times of its destruction and of its expiry. So
//! one rename destroys a container, and one rename undeletes it. Its layers are retained while it is there.

use std::path::PathBuf;

use super::manifest::{ContainerId, ContainerManifest};
use super::record::Record;
use super::{Store, disk, trash};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The directory of destroyed containers.
const DELETED: &str = "deleted";

/// A destroyed container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// The container's id.
    pub id: ContainerId,
    /// The time of its destruction, in seconds since 1970.
    pub since: i64,
    /// The time of its expiry, in seconds since 1970.
    pub until: i64,
    /// Its directory.
    pub dir: PathBuf,
}

impl Deleted {
    /// Returns whether the retention period is over.
    pub fn is_expired(&self) -> bool {
        self.until <= jiff::Timestamp::now().as_second()
    }
}

/// Parses the name of a directory in `deleted`.
fn parse(name: &str) -> Option<(ContainerId, i64, i64)> {
    let mut parts = name.split('.');
    let parsed = (
        ContainerId::parse(parts.next()?)?,
        parts.next()?.parse().ok()?,
        parts.next()?.parse().ok()?,
    );
    parts.next().is_none().then_some(parsed)
}

/// Returns the destroyed containers, the most recently destroyed last.
pub fn list(store: &Store) -> Result<Vec<Deleted>> {
    let parent = store.root().join(DELETED);
    let mut found = Vec::new();
    for name in disk::names(&parent)? {
        if let Some((id, since, until)) = parse(&name) {
            found.push(Deleted {
                id,
                since,
                until,
                dir: parent.join(&name),
            });
        }
    }
    found.sort_by_key(|deleted| (deleted.since, deleted.id));
    Ok(found)
}

/// Reads the manifest of a destroyed container.
pub fn manifest(store: &Store, deleted: &Deleted) -> Result<Record<ContainerManifest>> {
    let path = deleted.dir.join("container.json");
    if let Some(record) = store.container_at(&path)? {
        return Ok(record);
    }
    match std::fs::symlink_metadata(&deleted.dir) {
        // A race: it was undeleted or permanently removed since it was listed.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = deleted.id;
            Err(Error::not_found(format!("{id} is no longer in the trash"))
                .hint("`cowl undelete --list` lists the containers in the trash"))
        }
        Err(error) => Err(Error::at("inspect", &deleted.dir, error)),
        Ok(_) => Err(
            Error::damaged(format!("the file {} is missing", path.shown()))
                .hint("if the container is not needed, remove it: cowl gc --empty-trash"),
        ),
    }
}

/// Moves a container to the destroyed ones, to be retained until the time `until` in seconds since 1970.
///
/// It must not be mounted. The caller must hold its lock.
pub fn delete(store: &Store, id: ContainerId, until: i64) -> Result<()> {
    // Prevents a race with a collection that has listed `deleted` already and `containers` not yet: it would not find
    // the container in either.
    let _no_collection = store.lock_shared()?;
    let parent = store.root().join(DELETED);
    disk::ensure_private_dir(&parent)?;
    let since = jiff::Timestamp::now().as_second();
    disk::rename(
        &store.paths().container_dir(id),
        &parent.join(format!("{id}.{since}.{until}")),
    )
}

/// Removes a container from the store permanently.
pub fn discard(store: &Store, id: ContainerId) -> Result<()> {
    let _no_collection = store.lock_shared()?;
    trash::put(
        store,
        store.paths().container_dir(id),
        &format!("container-{id}"),
    )
}

/// Moves a destroyed container back to the containers. The caller must have claimed the name in its manifest.
pub fn undelete(store: &Store, deleted: &Deleted) -> Result<()> {
    disk::rename(&deleted.dir, &store.paths().container_dir(deleted.id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_names_are_parsed() {
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

//! Destroyed containers that may still come back. The parent of each lies in `deleted`, under a name that
//! tells when it was destroyed and how long it is kept; so one rename takes it there, and one brings it
//! back. Its layers stay while it is there.

use std::path::PathBuf;

use super::manifest::{ContainerId, ContainerManifest};
use super::record::Record;
use super::{Store, disk, trash};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// Their directory.
const DELETED: &str = "deleted";

/// A destroyed container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// Its id.
    pub id: ContainerId,
    /// When it was destroyed, in seconds since 1970.
    pub since: i64,
    /// When it goes for good.
    pub until: i64,
    /// Its parent.
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

/// The destroyed containers, the latest last.
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

/// What the manifest of a destroyed container says.
pub fn manifest(store: &Store, deleted: &Deleted) -> Result<Record<ContainerManifest>> {
    let path = deleted.dir.join("container.json");
    if let Some(record) = store.container_at(&path)? {
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
            Error::damaged(format!("the file {} is missing", path.shown()))
                .hint("if nobody wants that container back, `cowl gc --empty-trash` takes it away"),
        ),
    }
}

/// Takes a container out of the store, to be kept until this second. Nobody may be using it.
pub fn delete(store: &Store, id: ContainerId, until: i64) -> Result<()> {
    // A collection that has looked here already, and not yet there, would find it nowhere.
    let _no_collection = store.lock_shared()?;
    let parent = store.root().join(DELETED);
    disk::ensure_private_dir(&parent)?;
    let since = jiff::Timestamp::now().as_second();
    disk::rename(
        &store.paths().container_dir(id),
        &parent.join(format!("{id}.{since}.{until}")),
    )
}

/// Takes a container out of the store for good.
pub fn discard(store: &Store, id: ContainerId) -> Result<()> {
    let _no_collection = store.lock_shared()?;
    trash::put(
        store,
        store.paths().container_dir(id),
        &format!("container-{id}"),
    )
}

/// Puts it back. The caller has claimed the name that its manifest says.
pub fn undelete(store: &Store, deleted: &Deleted) -> Result<()> {
    disk::rename(&deleted.dir, &store.paths().container_dir(deleted.id))
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

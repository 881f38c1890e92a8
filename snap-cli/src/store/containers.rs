//! Reading the manifests of containers and snapshots.

use std::path::Path;

use super::manifest::{ContainerId, ContainerManifest, LayerId, SnapshotId, SnapshotManifest};
use super::name::{self, ContainerName};
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};

/// A container's id with what its manifest says, or why that can't be read.
pub type Listed = (ContainerId, Result<Record<ContainerManifest>>);

/// A container's id with its name alone, or why that can't be read.
pub type ListedName = (ContainerId, Result<ContainerName>);

impl Store {
    /// The ids of all layers that there are.
    pub fn layer_ids(&self) -> Result<Vec<LayerId>> {
        let names = disk::names(&self.paths().layers())?;
        Ok(names
            .iter()
            .filter_map(|name| LayerId::parse(name))
            .collect())
    }

    /// All containers, by name. One whose manifest can't be read hides none of the others.
    pub fn containers(&self) -> Result<Vec<Listed>> {
        let mut found = Vec::new();
        for name in disk::names(&self.paths().containers())? {
            let Some(id) = ContainerId::parse(&name) else {
                continue;
            };
            match self.container(id) {
                // Half-made: it does not count.
                Ok(None) => {}
                Ok(Some(record)) => found.push((id, Ok(record))),
                Err(error) => found.push((id, Err(error))),
            }
        }
        let key = |entry: &Listed| entry.1.as_ref().ok().map(|r| r.body.name.clone());
        found.sort_by_key(key);
        Ok(found)
    }

    /// One container's manifest; `None` where there is none.
    pub fn container(&self, id: ContainerId) -> Result<Option<Record<ContainerManifest>>> {
        self.container_at(&self.paths().container_file(id))
    }

    /// A container's manifest at a path.
    pub fn container_at(&self, path: &Path) -> Result<Option<Record<ContainerManifest>>> {
        let Some(record) = disk::read_opt::<ContainerManifest>(path)? else {
            return Ok(None);
        };
        match record.body.check() {
            Ok(()) => Ok(Some(record)),
            Err(why) => Err(disk::invalid::<ContainerManifest>(path, why)),
        }
    }

    /// The names of all containers, in no order: far cheaper than [`Store::containers`].
    pub fn names(&self) -> Result<Vec<ListedName>> {
        read_names(self.root())
    }

    /// The container of this name.
    pub fn find(&self, name: &ContainerName) -> Result<(ContainerId, Record<ContainerManifest>)> {
        let id = self.find_id(name)?;
        match self.container(id)? {
            Some(record) => Ok((id, record)),
            None => Err(no_container(name, [])),
        }
    }

    /// The id of the container of this name.
    pub fn find_id(&self, name: &ContainerName) -> Result<ContainerId> {
        let mut known = Vec::new();
        let mut unreadable = None;
        for (id, found) in self.names()? {
            match found {
                Ok(found) if found == *name => return Ok(id),
                Ok(found) => known.push(found),
                Err(error) => unreadable = Some(error),
            }
        }
        match unreadable {
            Some(error) => Err(error),
            None => Err(no_container(name, &known)),
        }
    }

    /// A snapshot's manifest.
    pub fn snapshot(&self, id: ContainerId, snapshot: SnapshotId) -> Result<SnapshotManifest> {
        self.snapshot_in(&self.paths().container_dir(id), snapshot)
    }

    /// The same for a container whose folder lies elsewhere.
    pub fn snapshot_in(&self, dir: &Path, snapshot: SnapshotId) -> Result<SnapshotManifest> {
        let path = dir.join("snapshots").join(format!("{snapshot}.json"));
        let body = disk::read::<SnapshotManifest>(&path)?.body;
        match body.check() {
            Ok(()) => Ok(body),
            Err(why) => Err(disk::invalid::<SnapshotManifest>(&path, why)),
        }
    }
}

/// The names of the containers of the store at `root`.
pub(super) fn read_names(root: &Path) -> Result<Vec<ListedName>> {
    let containers = root.join("containers");
    let mut found = Vec::new();
    for name in disk::names(&containers)? {
        let Some(id) = ContainerId::parse(&name) else {
            continue;
        };
        match read_name(&containers.join(name).join("container.json")) {
            // Half-made: it does not count.
            Ok(None) => {}
            Ok(Some(name)) => found.push((id, Ok(name))),
            Err(error) => found.push((id, Err(error))),
        }
    }
    Ok(found)
}

/// Reads the name alone of the container whose manifest lies at `path`, unchecked: whoever goes on to use
/// the container reads it whole. `None` when there is no such file.
fn read_name(path: &Path) -> Result<Option<ContainerName>> {
    #[derive(serde::Deserialize)]
    struct NameOnly {
        name: ContainerName,
    }
    let bytes = match disk::read_bytes(path) {
        Ok(bytes) => bytes,
        Err(error) if disk::is_absent(&error) => return Ok(None),
        Err(error) => return Err(disk::unreadable(path, error)),
    };
    match serde_json::from_slice::<NameOnly>(&bytes) {
        Ok(found) => Ok(Some(found.name)),
        // What is wrong with it is told as it is when it is read whole.
        Err(_) => Ok(disk::read_opt::<ContainerManifest>(path)?.map(|record| record.body.name)),
    }
}

/// The complaint about a name that no container has, with the one that may have been meant.
pub fn no_container<'a>(
    name: &ContainerName,
    known: impl IntoIterator<Item = &'a ContainerName>,
) -> Error {
    let known = known.into_iter().map(ContainerName::as_str);
    let hint = match name::nearest(name.as_str(), known) {
        Some(near) => format!("did you mean {near}?"),
        None => "`cowl list` shows all containers".to_owned(),
    };
    Error::not_found(format!("there is no container named {name}")).hint(hint)
}

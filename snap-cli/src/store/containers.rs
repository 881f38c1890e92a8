//! Access to the manifests of containers and snapshots.

use std::path::Path;

use super::manifest::{ContainerId, ContainerManifest, LayerId, SnapshotId, SnapshotManifest};
use super::name::{self, ContainerName};
use super::record::Record;
use super::{Store, disk};
use crate::error::{Error, Result};

/// A container's id with its manifest, or the error if the manifest cannot be read.
pub type Listed = (ContainerId, Result<Record<ContainerManifest>>);

/// A container's id with its name, or the error if the manifest cannot be read.
pub type ListedName = (ContainerId, Result<ContainerName>);

impl Store {
    /// Returns the ids of all layers.
    pub fn layer_ids(&self) -> Result<Vec<LayerId>> {
        let names = disk::names(&self.paths().layers())?;
        Ok(names
            .iter()
            .filter_map(|name| LayerId::parse(name))
            .collect())
    }

    /// Returns all containers, sorted by name, including those whose manifest cannot be read.
    pub fn containers(&self) -> Result<Vec<Listed>> {
        let mut found = Vec::new();
        for name in disk::names(&self.paths().containers())? {
            let Some(id) = ContainerId::parse(&name) else {
                continue;
            };
            match self.container(id) {
                // Its creation is not complete.
                Ok(None) => {}
                Ok(Some(record)) => found.push((id, Ok(record))),
                Err(error) => found.push((id, Err(error))),
            }
        }
        let key = |entry: &Listed| entry.1.as_ref().ok().map(|r| r.body.name.clone());
        found.sort_by_key(key);
        Ok(found)
    }

    /// Reads a container's manifest; `None` if it does not exist.
    pub fn container(&self, id: ContainerId) -> Result<Option<Record<ContainerManifest>>> {
        self.container_at(&self.paths().container_file(id))
    }

    /// Reads the container manifest at `path`; `None` if it does not exist.
    pub fn container_at(&self, path: &Path) -> Result<Option<Record<ContainerManifest>>> {
        let Some(record) = disk::read_opt::<ContainerManifest>(path)? else {
            return Ok(None);
        };
        match record.body.check() {
            Ok(()) => Ok(Some(record)),
            Err(why) => Err(disk::invalid::<ContainerManifest>(path, why)),
        }
    }

    /// Returns the names of all containers, unsorted. Much cheaper than [`Store::containers`].
    pub fn names(&self) -> Result<Vec<ListedName>> {
        read_names(self.root())
    }

    /// Returns the name of a container, even if its manifest is otherwise invalid; `None` if it does not exist.
    pub fn name_of(&self, id: ContainerId) -> Result<Option<ContainerName>> {
        read_name(&self.paths().container_file(id))
    }

    /// Returns the id and the manifest of the container `name`.
    pub fn find(&self, name: &ContainerName) -> Result<(ContainerId, Record<ContainerManifest>)> {
        let id = self.find_id(name)?;
        match self.container(id)? {
            Some(record) => Ok((id, record)),
            None => Err(no_container(name, [])),
        }
    }

    /// Returns the id of the container `name`.
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

    /// Reads a snapshot's manifest.
    pub fn snapshot(&self, id: ContainerId, snapshot: SnapshotId) -> Result<SnapshotManifest> {
        self.snapshot_in(&self.paths().container_dir(id), snapshot)
    }

    /// Reads a snapshot's manifest in the container directory `dir`, which may be that of a destroyed container.
    pub fn snapshot_in(&self, dir: &Path, snapshot: SnapshotId) -> Result<SnapshotManifest> {
        let path = dir.join("snapshots").join(format!("{snapshot}.json"));
        let body = disk::read::<SnapshotManifest>(&path)?.body;
        match body.check() {
            Ok(()) => Ok(body),
            Err(why) => Err(disk::invalid::<SnapshotManifest>(&path, why)),
        }
    }
}

/// Returns the names of the containers of the store at `root`.
pub(super) fn read_names(root: &Path) -> Result<Vec<ListedName>> {
    let containers = root.join("containers");
    let mut found = Vec::new();
    for name in disk::names(&containers)? {
        let Some(id) = ContainerId::parse(&name) else {
            continue;
        };
        match read_name(&containers.join(name).join("container.json")) {
            // Its creation is not complete.
            Ok(None) => {}
            Ok(Some(name)) => found.push((id, Ok(name))),
            Err(error) => found.push((id, Err(error))),
        }
    }
    Ok(found)
}

/// Reads only the name from the container manifest at `path`; `None` if the file does not exist.
///
/// Does not verify the checksum: commands that use the container read the complete manifest.
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
        // Read the complete manifest, for the detailed error.
        Err(_) => Ok(disk::read_opt::<ContainerManifest>(path)?.map(|record| record.body.name)),
    }
}

/// Returns the error for an unknown container, with the most similar of the `known` names as a hint.
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

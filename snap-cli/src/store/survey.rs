//! References from manifests to layers and snapshot files, for garbage collection.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::deleted::{self, Deleted};
use super::manifest::{ContainerId, ContainerManifest, LayerId};
use super::usage::head_layers;
use super::{Store, disk};
use crate::error::{Kind, Result};

/// The references from a store's manifests.
#[derive(Default)]
pub(super) struct Survey {
    /// The layers that any manifest references.
    pub(super) used: HashSet<LayerId>,
    /// Temporary files and unreferenced snapshot files.
    pub(super) files: Vec<PathBuf>,
    /// Whether a change has been written and not committed yet.
    pub(super) pending: bool,
}

/// Reads the references from all manifests, including those of pending changes and of the containers in `deleted`.
///
/// Fails if a manifest is unreadable: the layers that it references must not be collected.
pub(super) fn read(store: &Store, deleted: &[Deleted]) -> Result<Survey> {
    let mut survey = Survey::default();
    for name in disk::names(&store.paths().containers())? {
        let Some(id) = ContainerId::parse(&name) else {
            continue;
        };
        let Some(record) = store.container(id)? else {
            if !is_unfinished(store, id)? {
                return Err(disk::missing::<ContainerManifest>(
                    &store.paths().container_file(id),
                ));
            }
            continue;
        };
        if disk::exists(&store.paths().unfinished_file(id))? {
            survey.files.push(store.paths().unfinished_file(id));
        }
        let mut manifests = vec![record.body];
        if disk::exists(&store.paths().pending_file(id))? {
            survey.pending = true;
            match store.container_at(&store.paths().pending_file(id)) {
                Ok(next) => manifests.extend(next.map(|next| next.body)),
                // A partial write: nothing relies on it yet, and the next command on the container removes it.
                Err(error) if error.kind == Kind::Damaged => {}
                Err(error) => return Err(error),
            }
        }
        add_container(
            store,
            &mut survey,
            &store.paths().container_dir(id),
            &manifests,
        )?;
    }
    for deleted in deleted {
        let manifest = deleted::manifest(store, deleted)?.body;
        add_container(store, &mut survey, &deleted.dir, &[manifest])?;
    }
    Ok(survey)
}

/// Adds the references from the manifests of a container in `dir`.
fn add_container(
    store: &Store,
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
                .extend(store.snapshot_in(dir, snapshot.id)?.stack);
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

/// Returns the containers that lost their manifest, so that the layers that they referenced are unknown.
pub fn containers_without_manifest(store: &Store) -> Result<Vec<ContainerId>> {
    let mut lost = Vec::new();
    for name in disk::names(&store.paths().containers())? {
        if let Some(id) = ContainerId::parse(&name)
            && !disk::exists(&store.paths().container_file(id))?
            && !is_unfinished(store, id)?
        {
            lost.push(id);
        }
    }
    Ok(lost)
}

/// Returns whether the creation of a container without a manifest was interrupted. Otherwise the manifest was lost.
fn is_unfinished(store: &Store, id: ContainerId) -> Result<bool> {
    if disk::exists(&store.paths().unfinished_file(id))? {
        return Ok(true);
    }
    // It may have been interrupted before it created that file.
    let names = disk::names(&store.paths().container_dir(id))?;
    let is_empty = names.iter().all(|name| name == "snapshots");
    Ok(is_empty && disk::names(&store.paths().snapshots_dir(id))?.is_empty())
}

/// Returns the temporary files in a directory, which killed commands left.
pub(super) fn temporaries(dir: &Path) -> Result<Vec<PathBuf>> {
    let names = disk::names(dir)?;
    let temporary = names.iter().filter(|name| name.ends_with(disk::TEMPORARY));
    Ok(temporary.map(|name| dir.join(name)).collect())
}

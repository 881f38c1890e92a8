//! What the manifests of a store name.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::deleted::{self, Deleted};
use super::manifest::{ContainerId, ContainerManifest, LayerId};
use super::usage::head_layers;
use super::{Store, disk};
use crate::error::{Kind, Result};

/// What the manifests of a store name.
#[derive(Default)]
pub(super) struct Survey {
    /// The layers that any manifest names.
    pub(super) used: HashSet<LayerId>,
    /// Files that nothing names.
    pub(super) files: Vec<PathBuf>,
    /// Some change waits for its commit.
    pub(super) pending: bool,
}

/// Finds all layers that any manifest names, also those of changes that wait for their commit and of
/// destroyed containers that may come back, and snapshot files that none names. An unreadable manifest
/// is an error: what it names must not be taken for unused.
pub(super) fn read(store: &Store, deleted: &[Deleted]) -> Result<Survey> {
    let mut survey = Survey::default();
    for name in disk::names(&store.paths().containers())? {
        let Some(id) = ContainerId::parse(&name) else {
            continue;
        };
        let Some(record) = store.container(id)? else {
            if !is_half_made(store, id)? {
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
                // A torn one was never relied on; the next command on the container drops it.
                Err(error) if error.kind == Kind::Damaged => {}
                Err(error) => return Err(error),
            }
        }
        survey_one(
            store,
            &mut survey,
            &store.paths().container_dir(id),
            &manifests,
        )?;
    }
    for deleted in deleted {
        let manifest = deleted::manifest(store, deleted)?.body;
        survey_one(store, &mut survey, &deleted.dir, &[manifest])?;
    }
    Ok(survey)
}

fn survey_one(
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

/// Containers whose manifest is gone: nobody knows what they named.
pub fn containers_without_manifest(store: &Store) -> Result<Vec<ContainerId>> {
    let mut lost = Vec::new();
    for name in disk::names(&store.paths().containers())? {
        if let Some(id) = ContainerId::parse(&name)
            && !disk::exists(&store.paths().container_file(id))?
            && !is_half_made(store, id)?
        {
            lost.push(id);
        }
    }
    Ok(lost)
}

/// Whether a container without a manifest is one whose making was cut off, and not one that lost it.
fn is_half_made(store: &Store, id: ContainerId) -> Result<bool> {
    if disk::exists(&store.paths().unfinished_file(id))? {
        return Ok(true);
    }
    // Cut off before the first file was written.
    let inside = disk::names(&store.paths().container_dir(id))?;
    let bare = inside.iter().all(|name| name == "snapshots");
    Ok(bare && disk::names(&store.paths().snapshots_dir(id))?.is_empty())
}

/// Files that were being written when their writer was killed.
pub(super) fn temporaries(dir: &Path) -> Result<Vec<PathBuf>> {
    let names = disk::names(dir)?;
    let temporary = names.iter().filter(|name| name.ends_with(disk::TEMPORARY));
    Ok(temporary.map(|name| dir.join(name)).collect())
}

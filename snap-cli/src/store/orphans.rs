//! Orphans: mount points, run-time directories and caches of containers that do not exist any more.

use std::path::{Path, PathBuf};

use super::disk::remove_tree;
use super::manifest::ContainerId;
use super::mount_points;
use super::paths::{MAPPED, MNT};
use super::{Store, disk};
use crate::error::Result;

/// Returns the paths of all orphans.
pub(super) fn list(store: &Store) -> Result<Vec<PathBuf>> {
    let mut orphans = Vec::new();
    let own = [MNT, MAPPED, "cache"].map(|dir| store.root().join(dir));
    let run = store.run().roots().map(Path::to_path_buf);
    for dir in own.into_iter().chain(run) {
        for name in disk::names(&dir)? {
            let own = name.strip_suffix(".json").unwrap_or(&name);
            if let Some(id) = ContainerId::parse(own)
                && !disk::exists(&store.paths().container_dir(id))?
            {
                orphans.push(dir.join(&name));
            }
        }
    }
    Ok(orphans)
}

/// Removes an orphan. A failure is logged, and the next collection tries again.
pub(super) fn remove(store: &Store, path: &Path) {
    let removed = match mount_points::is_mount_point(store.paths(), path) {
        true => mount_points::remove_dir(path),
        false => remove_tree(path),
    };
    if let Err(error) = removed {
        log::warn!("{error}");
    }
}

/// Removes the mount points, run-time directories and cache of a container that does not exist any more.
pub fn remove_for(store: &Store, id: ContainerId) {
    if let Err(error) = mount_points::remove(store.paths(), id) {
        log::warn!("{error}");
    }
    for path in std::iter::once(store.paths().cache_file(id)).chain(store.run().dirs(id)) {
        remove(store, &path);
    }
}

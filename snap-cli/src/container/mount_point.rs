//! Paths at which a container or a snapshot can be mounted.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::shell::quoted;
use cowl_layers::shown::Show as _;

/// Resolves the symbolic links in the path of a mount point.
pub(super) fn canonical(mount_point: &Path) -> Result<PathBuf> {
    let resolved = mount_point.canonicalize();
    resolved.map_err(|error| Error::at("mount at", mount_point, error))
}

/// Checks that a container can be mounted at `at`, and returns the canonical path.
///
/// The directory must be empty, and must not hide part of the store.
pub(super) fn check_mount_point(at: &Path, store: &Path) -> Result<PathBuf> {
    let refused = |why: &str| {
        Err(Error::failed(format!(
            "cannot mount at {}: {why}",
            at.shown()
        )))
    };
    let mount_point = match at.canonicalize() {
        Ok(mount_point) => mount_point,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(
                Error::failed(format!("the mount point {} does not exist", at.shown()))
                    .hint(format!("create it first: mkdir -p {}", quoted(at))),
            );
        }
        Err(error) => return Err(Error::at("mount at", at, error)),
    };
    if !mount_point.is_dir() {
        return refused("it is not a directory");
    }
    let store = store
        .canonicalize()
        .map_err(|e| Error::at("use the store", store, e))?;
    if store.starts_with(&mount_point)
        || ["layers", "containers"]
            .iter()
            .any(|f| mount_point.starts_with(store.join(f)))
    {
        return refused("the mount would hide part of the store");
    }
    check_empty(&mount_point)?;
    Ok(mount_point)
}

/// Returns an error if a mount point is not empty.
pub(super) fn check_empty(mount_point: &Path) -> Result<()> {
    let at = |error| Error::at("list the mount point", mount_point, error);
    match std::fs::read_dir(mount_point).map_err(at)?.next() {
        None => Ok(()),
        Some(entry) => {
            let name = entry.map_err(at)?.file_name();
            Err(Error::failed(format!(
                "the mount point {} is not empty: it holds {}",
                mount_point.shown(),
                name.shown()
            ))
            .hint("specify an empty directory: the mount would hide its content"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsuitable_mount_points_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let layers = store.join("layers/x");
        let full = dir.path().join("full");
        std::fs::create_dir_all(&layers).unwrap();
        std::fs::create_dir(&full).unwrap();
        std::fs::write(full.join("file\n"), b"").unwrap();
        for (mount_point, word) in [
            (dir.path().join("absent"), "does not exist"),
            (full.join("file\n"), "not a directory"),
            (full.clone(), "not empty"),
            (layers, "hide"),
            (dir.path().to_path_buf(), "hide"),
        ] {
            let error = check_mount_point(&mount_point, &store).unwrap_err();
            assert!(error.what.contains(word), "{error}");
        }
        let good = dir.path().join("good");
        std::fs::create_dir(&good).unwrap();
        check_mount_point(&good, &store).unwrap();
    }
}

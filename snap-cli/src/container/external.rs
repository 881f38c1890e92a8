//! Files of a container outside the store: the directory that its root filesystem was adopted from, and LXC's config.
//!
//! Before such a file changes, a marker file is created in the store's directory `moving`, so that other commands find
//! an interrupted change without reading every manifest. `crate::recover` completes such a change or rolls it back.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::config;
use crate::lxc::own_files;
use crate::shell::quoted;
use crate::store::bytes::Blob;
use crate::store::disk::remove_tree;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::ContainerName;
use crate::store::outside::{Adopted, Lxc, Moving};
use crate::store::{Store, disk};

/// The directory of markers in a store.
pub(crate) const MARKERS: &str = "moving";

/// The name of the file that replaces the content of an adopted root filesystem.
pub const README: &str = "MOVED-TO-COWL.txt";

/// Returns the path of a container's marker.
pub(crate) fn marker_path(store: &Store, id: ContainerId) -> PathBuf {
    store.root().join(MARKERS).join(id.to_string())
}

/// Writes and syncs the marker of a change. The change may begin after this returns.
///
/// `rest` lists the files to remove if the container does not exist any more.
pub(crate) fn write_marker(store: &Store, id: ContainerId, rest: &Leftover) -> Result<()> {
    let path = marker_path(store, id);
    disk::ensure_dir(&store.root().join(MARKERS))?;
    let bytes = serde_json::to_vec(rest).map_err(|e| Error::at("write", &path, e))?;
    disk::replace_bytes(&path, &bytes)
}

/// Writes the marker of a config that is about to be written, and returns the manifest's entry for it.
pub(crate) fn begin_writing(store: &Store, id: ContainerId, config: Blob) -> Result<Moving> {
    write_marker(store, id, &Leftover::default())?;
    Ok(Moving::Writing {
        config,
        hostname: None,
    })
}

/// Removes the marker of a completed change.
pub(crate) fn remove_marker(store: &Store, id: ContainerId) -> Result<()> {
    disk::remove_if_exists(&marker_path(store, id))
}

/// The files of a container outside the store that are removed once it is destroyed. Stored in its marker.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Leftover {
    #[serde(default)]
    adopted: Option<Adopted>,
    #[serde(default)]
    lxc: Option<Lxc>,
}

impl Leftover {
    /// Returns the files of the container with this manifest.
    pub(crate) fn from_manifest(manifest: &ContainerManifest) -> Self {
        Self {
            adopted: manifest.adopted.clone(),
            lxc: manifest.lxc.clone(),
        }
    }

    /// Returns whether there are no such files.
    pub(crate) fn is_none(&self) -> bool {
        self.adopted.is_none() && self.lxc.is_none()
    }

    /// Removes the files after the container was removed, and the marker.
    ///
    /// Removes the note in the directory of an adopted root filesystem, and LXC's config; both directories only if
    /// they are empty then.
    pub(crate) fn remove(&self, store: &Store, id: ContainerId) -> Result<()> {
        if self.is_none() {
            return Ok(());
        }
        if let Some(adopted) = &self.adopted {
            remove_readme(&adopted.rootfs)?;
            remove_if_empty(&adopted.rootfs)?;
        }
        if let Some(link) = &self.lxc {
            let exists = disk::exists(&link.config())?;
            if !exists || config::has_own_lines(&files::read(&link.config())?, &id.to_string()) {
                disk::remove_if_exists(&link.config())?;
                own_files::remove_unchanged(&link.files, &link.dir())?;
                remove_if_empty(&link.dir())?;
            }
        }
        remove_marker(store, id)
    }
}

/// Removes the directory of a copy that LXC made and that has no root filesystem of its own.
///
/// Includes the files of an overlay copy. LXC would remove them itself if cowl's lines in the config did not prevent
/// it.
pub(crate) fn remove_copy(config: &Path) -> Result<()> {
    let dir = config.parent().unwrap_or(config);
    remove_if_empty(&dir.join("rootfs"))?;
    remove_tree(&dir.join("overlay"))?;
    for name in ["config", "lxc_rdepends"] {
        disk::remove_if_exists(&dir.join(name))?;
    }
    remove_if_empty(dir)
}

/// Returns the quoted path of an object that cowl did not create where a root filesystem was.
pub(crate) fn find_foreign(dir: &Path) -> Result<Option<String>> {
    match std::fs::symlink_metadata(dir) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Ok(Some(quoted(dir))),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::at("inspect", dir, error)),
    }
    let at = |error| Error::at("list", dir, error);
    for entry in std::fs::read_dir(dir).map_err(at)? {
        let name = entry.map_err(at)?.file_name();
        if name != README {
            return Ok(Some(quoted(dir.join(name))));
        }
    }
    Ok(None)
}

/// Writes the note that replaces an adopted root filesystem.
pub(crate) fn write_readme(dir: &Path, name: &ContainerName) -> Result<()> {
    let text = format!(
        "The files of this container are in cowl's store, as the container {name}.\n\
         To access them:      cowl mount {name}\n\
         To move them back:   cowl release {name}\n\
         Files in this directory are not part of the container.\n"
    );
    disk::ensure_dir(dir)?;
    files::replace_name(&dir.join(README), text.as_bytes(), 0o644)?;
    disk::sync_parent(dir)
}

/// Removes the note that [`write_readme`] wrote.
pub(crate) fn remove_readme(dir: &Path) -> Result<()> {
    match std::fs::remove_file(dir.join(README)) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(())
        }
        Err(error) => Err(Error::at("remove", &dir.join(README), error)),
    }
}

/// Removes a directory if it exists and is empty.
fn remove_if_empty(dir: &Path) -> Result<()> {
    match std::fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(Error::at("remove", dir, error)),
    }
}

//! What a container has outside the store: the directory that says where its root file system went, and LXC's
//! config. A change of these begins with a sign, a file in the store's directory `moving`, so that other commands
//! need not read every manifest to find an interrupted change. `crate::recover` completes such a change or rolls
//! it back.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::config;
use crate::shell::quoted;
use crate::store::bytes::Blob;
use crate::store::disk::remove_tree;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::ContainerName;
use crate::store::outside::{Adopted, Lxc, Moving};
use crate::store::{Store, disk};

/// The directory of signs.
pub(crate) const SIGNS: &str = "moving";

/// The file that stands where a root file system was, and what it says.
pub const README: &str = "MOVED-TO-COWL.txt";

/// Returns the path of a container's sign.
pub(crate) fn sign(store: &Store, id: ContainerId) -> PathBuf {
    store.root().join(SIGNS).join(id.to_string())
}

/// Leaves the sign of a change, durable before the change begins. `rest`: what is to be removed if the container is
/// gone.
pub(crate) fn mark(store: &Store, id: ContainerId, rest: &Leftover) -> Result<()> {
    let path = sign(store, id);
    disk::ensure_dir(&store.root().join(SIGNS))?;
    let bytes = serde_json::to_vec(rest).map_err(|e| Error::at("write", &path, e))?;
    disk::replace_bytes(&path, &bytes)
}

/// Leaves the sign of a config that is about to be written, and returns the manifest's entry for it.
pub(crate) fn begin_writing(store: &Store, id: ContainerId, config: Blob) -> Result<Moving> {
    mark(store, id, &Leftover::default())?;
    Ok(Moving::Writing {
        config,
        hostname: None,
    })
}

/// Removes the sign of a change that is complete.
pub(crate) fn unmark(store: &Store, id: ContainerId) -> Result<()> {
    disk::remove_if_there(&sign(store, id))
}

/// The files of a container outside the store that are removed once it is destroyed. Stored in its sign.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Leftover {
    #[serde(default)]
    adopted: Option<Adopted>,
    #[serde(default)]
    lxc: Option<Lxc>,
}

impl Leftover {
    /// The files of the container with this manifest.
    pub(crate) fn of(manifest: &ContainerManifest) -> Self {
        Self {
            adopted: manifest.adopted.clone(),
            lxc: manifest.lxc.clone(),
        }
    }

    /// Whether there are none.
    pub(crate) fn is_none(&self) -> bool {
        self.adopted.is_none() && self.lxc.is_none()
    }

    /// Removes them once the container is gone: the directory that only says where the files went, and LXC's
    /// config; LXC's directory if nothing else is in it. Files that others put there stay.
    pub(crate) fn remove(&self, store: &Store, id: ContainerId) -> Result<()> {
        if self.is_none() {
            return Ok(());
        }
        if let Some(adopted) = &self.adopted {
            remove_readme(&adopted.rootfs)?;
            remove_if_empty(&adopted.rootfs)?;
        }
        if let Some(link) = &self.lxc {
            let there = disk::is_there(&link.config())?;
            if !there || config::has_own_lines(&files::read(&link.config())?, &id.to_string()) {
                disk::remove_if_there(&link.config())?;
                remove_if_empty(&link.dir())?;
            }
        }
        unmark(store, id)
    }
}

/// Removes the directory of a copy that LXC made and that has no root file system of its own, with what an overlay
/// copy wrote. LXC would do so itself if cowl's lines in the config did not keep it from that.
pub(crate) fn remove_copy(config: &Path) -> Result<()> {
    let dir = config.parent().unwrap_or(config);
    remove_if_empty(&dir.join("rootfs"))?;
    remove_tree(&dir.join("overlay"))?;
    for name in ["config", "lxc_rdepends"] {
        disk::remove_if_there(&dir.join(name))?;
    }
    remove_if_empty(dir)
}

/// Returns the name, for messages, of a file other than cowl's own where a root file system was.
pub(crate) fn foreign(folder: &Path) -> Result<Option<String>> {
    match std::fs::symlink_metadata(folder) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Ok(Some(quoted(folder))),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::at("look at", folder, error)),
    }
    let at = |error| Error::at("list", folder, error);
    for entry in std::fs::read_dir(folder).map_err(at)? {
        let name = entry.map_err(at)?.file_name();
        if name != README {
            return Ok(Some(quoted(folder.join(name))));
        }
    }
    Ok(None)
}

/// Writes the file that says where a root file system went.
pub(crate) fn write_readme(folder: &Path, name: &ContainerName) -> Result<()> {
    let text = format!(
        "The files of this container are kept by cowl, as the container {name}.\n\
         To look at them:     cowl mount {name}\n\
         To get them back:    cowl release {name}\n\
         What is put in this folder is no part of the container.\n"
    );
    disk::ensure_dir(folder)?;
    files::replace_name(&folder.join(README), text.as_bytes(), 0o644)?;
    disk::sync_parent(folder)
}

/// Removes that file.
pub(crate) fn remove_readme(folder: &Path) -> Result<()> {
    match std::fs::remove_file(folder.join(README)) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(())
        }
        Err(error) => Err(Error::at("remove", &folder.join(README), error)),
    }
}

fn remove_if_empty(folder: &Path) -> Result<()> {
    match std::fs::remove_dir(folder) {
        Ok(()) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(Error::at("remove", folder, error)),
    }
}

//! The paths in a store. Pure: this module does not access files.

use std::path::{Path, PathBuf};

use super::manifest::{ContainerId, LayerId, SnapshotId};

/// The directory of mount points that only the store's owner can reach.
pub(super) const MNT: &str = "mnt";
/// The directory of mount points that a mapped root can reach as well.
pub(super) const MAPPED: &str = "mapped";
/// The name of the mount point in a directory of `mapped`.
pub(super) const ROOTFS: &str = "rootfs";
/// The extension of lock files.
pub const LOCK: &str = ".lock";

/// The paths of a store (see the layout in [`super`]).
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Creates the paths of the store at `root`.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
        }
    }

    /// Returns the store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the path of the directory of all layers.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Returns the path of a layer's directory.
    pub fn layer_dir(&self, id: LayerId) -> PathBuf {
        self.layers().join(id.to_string())
    }

    /// Returns the path of a layer's tree.
    pub fn layer_tree(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("tree")
    }

    /// Returns the path of a head's work directory.
    pub fn layer_work(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("work")
    }

    /// Returns the path of the blob that a layer was unpacked from, if it was retained.
    pub fn layer_blob(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("blob")
    }

    /// Returns the path of the record of the blobs that a layer was packed to.
    pub fn layer_packed(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("packed.json")
    }

    /// Returns the path of a layer's manifest.
    pub fn layer_file(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("layer.json")
    }

    /// Returns the path of the directory of all containers.
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// Returns the path of a container's directory.
    pub fn container_dir(&self, id: ContainerId) -> PathBuf {
        self.containers().join(id.to_string())
    }

    /// Returns the path of a container's manifest.
    pub fn container_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("container.json")
    }

    /// Returns the path of the next manifest of a container, until its commit.
    pub fn pending_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("container.json.next")
    }

    /// Returns the path of the file in a container's directory until its first manifest is written.
    pub fn unfinished_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("unfinished")
    }

    /// Returns the path of the directory of a container's snapshot files.
    pub fn snapshots_dir(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("snapshots")
    }

    /// Returns the path of a snapshot's file.
    pub fn snapshot_file(&self, id: ContainerId, snapshot: SnapshotId) -> PathBuf {
        self.snapshots_dir(id).join(format!("{snapshot}.json"))
    }

    /// Returns the path of the directory of all locks.
    pub fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    /// Returns the path of the file of the lock `name`.
    pub fn lock_file(&self, name: &str) -> PathBuf {
        self.locks().join(format!("{name}{LOCK}"))
    }

    /// Returns the path of the directory of objects that are being removed.
    pub fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Returns the path of the directory of blobs that are being downloaded, and of images that are being uploaded.
    pub fn transfers(&self) -> PathBuf {
        self.root.join("transfers")
    }

    /// Returns the path of the directory of caches.
    pub fn caches(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Returns the path of the cache of the sizes of a container's layers.
    pub fn cache_file(&self, id: ContainerId) -> PathBuf {
        self.caches().join(format!("{id}.json"))
    }

    /// Returns the path of the directory for files that could not be read and were replaced.
    pub fn damaged(&self) -> PathBuf {
        self.root.join("damaged")
    }

    /// Returns the path of the default mount point of a container.
    pub fn mount_dir(&self, id: ContainerId) -> PathBuf {
        self.root.join(MNT).join(id.to_string())
    }

    /// Returns the path of the directory of the mount point of a container with an id map.
    pub(super) fn mapped_parent(&self, id: ContainerId) -> PathBuf {
        self.root.join(MAPPED).join(id.to_string())
    }

    /// Returns the path of the socket through which LXC passes the mount of a container of a plain user to the daemon.
    pub fn mapped_socket(&self, id: ContainerId) -> PathBuf {
        self.mapped_parent(id).join("socket")
    }

    /// Returns the path of the mount point of a container with an id map, for LXC.
    pub fn mapped_dir(&self, id: ContainerId) -> PathBuf {
        self.mapped_parent(id).join(ROOTFS)
    }
}

//! The paths of what is in a store. Pure: nothing here reads or writes a file.

use std::path::{Path, PathBuf};

use super::manifest::{ContainerId, LayerId, SnapshotId};

/// Mount points that only the store's owner can reach.
pub(super) const MNT: &str = "mnt";
/// Mount points that a mapped root can reach as well.
pub(super) const MAPPED: &str = "mapped";
/// The mount point in a directory of `mapped`.
pub(super) const ROOTFS: &str = "rootfs";
/// The extension of lock files.
pub const LOCK: &str = ".lock";

/// The paths of a store (see the layout in [`super`]).
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The paths of the store at `root`.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
        }
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of all layers.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// A layer's directory.
    pub fn layer_dir(&self, id: LayerId) -> PathBuf {
        self.layers().join(id.to_string())
    }

    /// A layer's tree.
    pub fn layer_tree(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("tree")
    }

    /// A head's work directory.
    pub fn layer_work(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("work")
    }

    /// A layer's manifest.
    pub fn layer_file(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("layer.json")
    }

    /// The directory of all containers.
    pub fn containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// A container's directory.
    pub fn container_dir(&self, id: ContainerId) -> PathBuf {
        self.containers().join(id.to_string())
    }

    /// A container's manifest.
    pub fn container_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("container.json")
    }

    /// The next manifest of a container, until its commit.
    pub fn pending_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("container.json.next")
    }

    /// The file in a container's directory until its first manifest is there.
    pub fn unfinished_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("unfinished")
    }

    /// The directory of a container's snapshot files.
    pub fn snapshots_dir(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("snapshots")
    }

    /// A snapshot's file.
    pub fn snapshot_file(&self, id: ContainerId, snapshot: SnapshotId) -> PathBuf {
        self.snapshots_dir(id).join(format!("{snapshot}.json"))
    }

    /// The directory of all locks.
    pub fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    /// The file of the lock `name`.
    pub fn lock_file(&self, name: &str) -> PathBuf {
        self.locks().join(format!("{name}{LOCK}"))
    }

    /// The directory of what is about to be removed.
    pub fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// The directory of caches.
    pub fn caches(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// The cache of the sizes of a container's layers.
    pub fn cache_file(&self, id: ContainerId) -> PathBuf {
        self.caches().join(format!("{id}.json"))
    }

    /// The directory for files that could not be read and were replaced.
    pub fn damaged(&self) -> PathBuf {
        self.root.join("damaged")
    }

    /// The default mount point of a container.
    pub fn mount_dir(&self, id: ContainerId) -> PathBuf {
        self.root.join(MNT).join(id.to_string())
    }

    /// The directory of the mount point of a container with an id map.
    pub(super) fn mapped_parent(&self, id: ContainerId) -> PathBuf {
        self.root.join(MAPPED).join(id.to_string())
    }

    /// The mount point of a container with an id map, for LXC.
    pub fn mapped_dir(&self, id: ContainerId) -> PathBuf {
        self.mapped_parent(id).join(ROOTFS)
    }
}

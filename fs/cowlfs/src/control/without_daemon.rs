//! Mounts of kernel overlayfs: the commands of `cowl` unmount them, in the same way as a daemon unmounts itself.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ControlError;
use super::client::into_error;
use super::detach::detach_without_daemon;
use super::own_mount::{OwnMount, OwnMountRecord};
use crate::choices::Mounter;
use cowl_layers::sys::users::Device;

/// A mount of kernel overlayfs, as another process recognizes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KernelMount(OwnMountRecord);

impl KernelMount {
    /// Records the properties of the topmost mount of `device` at `path`, in the mount namespace of this thread.
    pub fn record(path: PathBuf, device: Device) -> Self {
        Self(OwnMount::record(path, device, Mounter::Daemon).to_record())
    }

    /// Unmounts it, unless a process uses it in any mount namespace. Detaches unused copies in other namespaces.
    ///
    /// The file system may end a little later, when the kernel has dropped its last reference.
    pub fn detach(&self) -> Result<(), ControlError> {
        detach_without_daemon(&self.0.clone().into_mount(Mounter::Daemon)).map_err(into_error)
    }
}

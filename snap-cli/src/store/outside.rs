//! What a container's manifest says of things outside the store: the folder that it was taken over from,
//! the LXC container that runs it, and a change under way that needs more than one file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::bytes::{self, Blob};

/// A root file system that was taken over where it stood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// The folder that it was. What is there now only says where it went.
    #[serde(with = "bytes::path")]
    pub rootfs: PathBuf,
    /// The folder's inode number, by which a cut-off move tells whether it was done.
    pub inode: u64,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The LXC container that a container is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lxc {
    /// The folder of LXC's containers.
    #[serde(with = "bytes::path")]
    pub lxcpath: PathBuf,
    /// LXC's name for it.
    pub name: String,
    /// Its config as it was before cowl changed it; `None` where cowl made it (of a clone).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<Blob>,
    /// Its config as cowl wrote it the last time, or as it was when the container was destroyed: what brings it
    /// back.
    pub written: Blob,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Lxc {
    /// The folder of the LXC container.
    pub fn dir(&self) -> PathBuf {
        self.lxcpath.join(&self.name)
    }

    /// Its config.
    pub fn config(&self) -> PathBuf {
        self.dir().join("config")
    }
}

/// A change under way that needs more than the manifest: whoever opens the container next finishes it, or
/// takes it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum Moving {
    /// The root file system moves into the base layer, then LXC's config changes. Taken back as long as the
    /// root file system is where it was.
    Adopting,
    /// The only layer moves back to where the root file system was, LXC's config changes back, and the
    /// container leaves the store. Always finished.
    Releasing,
    /// LXC's config is to be this, its folder is to be there. Always finished.
    Writing {
        /// The config.
        config: Blob,
        /// The host name to be written into the root file system first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hostname: Option<String>,
    },
}

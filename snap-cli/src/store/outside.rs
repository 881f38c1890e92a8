//! The parts of a container's manifest that refer to files outside the store: the directory that it was adopted from,
//! the LXC container that runs it, and a pending change of these.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::bytes::{self, Blob};

/// An adopted root filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// The directory that it was moved from, which now contains only a note.
    #[serde(with = "bytes::path")]
    pub rootfs: PathBuf,
    /// The inode number of its root, which shows after an interruption whether the move has happened.
    pub inode: u64,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The LXC container that runs a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lxc {
    /// The directory of LXC's containers (lxcpath).
    #[serde(with = "bytes::path")]
    pub lxcpath: PathBuf,
    /// The name of the LXC container.
    pub name: String,
    /// The config before cowl changed it; `None` if cowl created it for a clone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<Blob>,
    /// The config that cowl last wrote, or the config when the container was destroyed. `undelete` restores it.
    pub written: Blob,
    /// The files in its directory that cowl created with it. `undelete` restores them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<OwnFile>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A file in the directory of an LXC container, outside of its root filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnFile {
    /// The path relative to the directory.
    #[serde(with = "bytes::path")]
    pub path: PathBuf,
    /// Its kind.
    pub kind: OwnFileKind,
    /// The mode.
    pub mode: u32,
    /// The content.
    pub content: Blob,
}

/// The kind of a file in the directory of an LXC container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OwnFileKind {
    /// A config or a table of mounts, in which a copy has paths of its own.
    Text,
    /// A program, or a file that it reads.
    Program,
}

impl Lxc {
    /// Returns the directory of the LXC container.
    pub fn dir(&self) -> PathBuf {
        self.lxcpath.join(&self.name)
    }

    /// Returns the path of its config.
    pub fn config(&self) -> PathBuf {
        self.dir().join("config")
    }
}

/// A pending change of files outside the store.
///
/// After an interruption, the next command on the container completes it or rolls it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum Moving {
    /// The root filesystem moves into the base layer, then LXC's config changes.
    ///
    /// Rolled back if the root filesystem has not been moved yet, otherwise completed.
    Adopting,
    /// The only layer moves back to the adopted directory, LXC's config is restored, and the container is removed from
    /// the store. Always completed.
    Releasing,
    /// LXC's config is written, and its directory created. Always completed.
    Writing {
        /// The new config.
        config: Blob,
        /// The host name to write into the root filesystem first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hostname: Option<String>,
    },
}

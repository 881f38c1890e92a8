//! The identity of an object on disk.

use serde::{Deserialize, Serialize};

use cowl_layers::sys::stat::Stat;

/// The device and inode number of an object on disk, at the location that provides its attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The device number.
    pub dev: u64,
    /// The inode number on that device.
    pub ino: u64,
}

impl Identity {
    /// Returns the identity of the object with these attributes.
    pub fn from_stat(stat: &Stat) -> Self {
        Self {
            dev: stat.dev,
            ino: stat.ino,
        }
    }
}

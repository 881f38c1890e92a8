//! The identity of objects on disk.

use cowl_layers::sys::stat::Stat;

/// An object on disk: device and inode number at the location that gives its attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device.
    pub dev: u64,
    /// Inode number there.
    pub ino: u64,
}

impl Identity {
    /// Returns the object that was found with these attributes.
    pub fn from_stat(stat: &Stat) -> Self {
        Self {
            dev: stat.dev,
            ino: stat.ino,
        }
    }
}

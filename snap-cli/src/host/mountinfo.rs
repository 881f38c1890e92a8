//! The mounts of this process's mount namespace.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

pub use cowl_layers::sys::mountinfo::{Mount, below, topmost};

use crate::error::{Error, Result};

/// Reads and parses `/proc/self/mountinfo`.
pub fn read() -> Result<Vec<Mount>> {
    let path = Path::new("/proc/self/mountinfo");
    std::fs::read(path)
        .map(|text| cowl_layers::sys::mountinfo::parse(&text))
        .map_err(|error| Error::at("read", path, error))
}

/// Finds the mount that contains `path`.
pub fn find_containing(path: &Path) -> Result<Mount> {
    let at = |error: std::io::Error| Error::at("inspect", path, error);
    let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).map_err(|e| at(e.into()))?;
    let found = read()?
        .into_iter()
        .find(|mount| mount.id == stat.stx_mnt_id);
    found.ok_or_else(|| {
        at(std::io::Error::other(
            "the mount is not listed in /proc/self/mountinfo",
        ))
    })
}

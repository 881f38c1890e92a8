//! The machine outside: what is mounted, who uses it, LXC's containers. It knows nothing of stores and of
//! containers in them.

pub mod cgroup;
pub mod files;
pub mod hooks;
pub mod inside;
pub mod lxc;
pub mod lxc_snaps;
pub mod mountinfo;
pub mod process;
pub mod reach;
pub mod users;

use std::path::Path;

use crate::error::{Error, Result};

/// The id of this boot: process ids and mounts of another one mean nothing.
pub fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    std::fs::read_to_string(path)
        .map(|id| id.trim().to_owned())
        .map_err(|error| Error::at("read", path, error))
}

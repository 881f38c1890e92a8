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

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Error, Result};

/// The id of this boot: process ids and mounts of another one mean nothing.
pub fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    std::fs::read_to_string(path)
        .map(|id| id.trim().to_owned())
        .map_err(|error| Error::at("read", path, error))
}

/// The number of the disk below `path`: each that is attached to the machine in one boot gets another, also
/// when it was there before. `None` where the file system has several disks or none.
pub fn disk_sequence(path: &Path) -> Option<u64> {
    let dev = std::fs::metadata(path).ok()?.dev();
    let device = format!(
        "/sys/dev/block/{}:{}",
        rustix::fs::major(dev),
        rustix::fs::minor(dev)
    );
    // A partition has that of its disk.
    let read = |name: &str| std::fs::read_to_string(Path::new(&device).join(name)).ok();
    let text = read("diskseq").or_else(|| read("../diskseq"))?;
    text.trim().parse().ok()
}

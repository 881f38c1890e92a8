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

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::error::{Error, Result};

/// The id of this boot: process ids and mounts of another one mean nothing.
pub fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    std::fs::read_to_string(path)
        .map(|id| id.trim().to_owned())
        .map_err(|error| Error::at("read", path, error))
}

/// Returns the number of the disk below `path`: each that is attached to the machine in one boot gets another,
/// also when it was there before. Of several disks it is that of the one that was named when the file system was
/// mounted. `None` where there is none.
pub fn disk_sequence(path: &Path) -> Option<u64> {
    let dev = std::fs::metadata(path).ok()?.dev();
    sequence_of(dev).or_else(|| {
        // btrfs has a device number that is no disk's.
        let source = mountinfo::holding(path).ok()?.source;
        let source = Path::new(OsStr::from_bytes(&source));
        let disk = std::fs::metadata(source).ok()?;
        let is_disk = source.is_absolute() && disk.file_type().is_block_device();
        is_disk.then(|| sequence_of(disk.rdev()))?
    })
}

fn sequence_of(dev: u64) -> Option<u64> {
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

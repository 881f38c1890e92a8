//! The machine outside: what is mounted and which processes use it. It knows nothing of stores and of
//! containers in them.

pub mod cgroup;
pub mod files;
pub mod hooks;
pub mod inside;
pub mod mountinfo;
pub mod process;
pub mod reach;
pub mod users;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

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
    let disk = disk_of(path)?;
    // A partition has that of its disk.
    let read = |name: &str| std::fs::read_to_string(disk.join(name)).ok();
    let text = read("diskseq").or_else(|| read("../diskseq"))?;
    text.trim().parse().ok()
}

/// Returns a number of the mounted file system that holds `path`: when it is unmounted everywhere and mounted
/// again, it has another one. `None` where its kind shows none.
///
/// It is the inode number of the directory that sysfs has for the file system: sysfs numbers what it makes one
/// after the other.
pub fn filesystem_sequence(path: &Path) -> Option<u64> {
    let disk = std::fs::canonicalize(disk_of(path)?).ok()?;
    let name = disk.file_name()?;
    let number = |dir: PathBuf| std::fs::metadata(dir).ok().map(|meta| meta.ino());
    let kinds = ["ext4", "xfs", "f2fs"].iter();
    let mut plain = kinds.map(|kind| Path::new("/sys/fs").join(kind).join(name));
    let found = plain.find_map(number);
    found.or_else(|| {
        let mut all = std::fs::read_dir("/sys/fs/btrfs").ok()?.flatten();
        let has_disk = |dir: &PathBuf| dir.join("devices").join(name).symlink_metadata().is_ok();
        all.find_map(|entry| Some(entry.path()).filter(has_disk))
            .and_then(number)
    })
}

/// Returns the directory that sysfs has for the disk below `path`.
fn disk_of(path: &Path) -> Option<PathBuf> {
    let disk = |dev: u64| {
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        let disk = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        disk.is_dir().then_some(disk)
    };
    disk(std::fs::metadata(path).ok()?.dev()).or_else(|| {
        // btrfs has a device number that is no disk's.
        let source = mountinfo::holding(path).ok()?.source;
        let source = Path::new(OsStr::from_bytes(&source));
        let meta = std::fs::metadata(source).ok()?;
        let is_disk = source.is_absolute() && meta.file_type().is_block_device();
        disk(meta.rdev()).filter(|_| is_disk)
    })
}

//! In which order a file system brings to the disk what it was given, and how to make sure that a file's
//! content is there no later than its next name. The reasons are in docs/decisions/0012.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use super::copy::Copied;
use super::write_back::write_back;
use crate::error::Result;

/// ext2, ext3 and ext4.
pub(super) const EXT4: u64 = 0xef53;
pub(super) const XFS: u64 = 0x5846_5342;
pub(super) const BTRFS: u64 = 0x9123_683e;

const MOUNTS: &str = "/proc/self/mountinfo";

/// What is known of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One journal takes all changes of names and of where content lies, in their order, and every
    /// commit flushes the disk: content that was handed to the disk and recorded before a rename is there
    /// when the rename is.
    Journal,
    /// A name may be on the disk long before what it names, also where that holds attributes alone.
    NamesFirst,
    /// Nothing: what is to be there first must be synced first.
    Unknown,
    /// Nothing is asked for: a power cut may cost what was not written.
    Careless,
}

impl Order {
    /// What is known of the file system that holds `dir`.
    pub fn of(dir: BorrowedFd<'_>) -> Self {
        match known(dir) {
            Ok(order) => order,
            Err(error) => {
                log::debug!("every copy-up is synced, for the file system is not known: {error}");
                Self::Unknown
            }
        }
    }

    /// To be called before `file`, whose content was copied as `copied` says, gets its name: when the name
    /// is on the disk, so is the content.
    pub fn content_first(self, file: impl AsFd, copied: Copied) -> Result<()> {
        match (self, copied) {
            (Self::Careless, _) => Ok(()),
            // What it shares is on the disk, and that it does went through the journal.
            (Self::Journal, Copied::Shared) => Ok(()),
            (Self::Journal, Copied::Written) => write_back(file.as_fd()),
            (Self::NamesFirst | Self::Unknown, _) => {
                super::copy::sync(file, super::copy::SyncScope::All)
            }
        }
    }

    /// The same for a file without content of its own.
    pub fn attributes_first(self, file: impl AsFd) -> Result<()> {
        match self {
            Self::NamesFirst => super::copy::sync(file, super::copy::SyncScope::All),
            Self::Journal | Self::Unknown | Self::Careless => Ok(()),
        }
    }

    /// To be called between two changes of names, the first of them in `dir`: when the second is on the
    /// disk, so is the first.
    pub fn name_first(self, dir: BorrowedFd<'_>) -> Result<()> {
        match self {
            Self::Careless | Self::Journal => Ok(()),
            Self::NamesFirst | Self::Unknown => super::dir::sync_dir(dir),
        }
    }
}

/// The type of the file system that holds `dir`, and its options where they are known.
pub(super) fn kind_and_options(dir: BorrowedFd<'_>) -> std::io::Result<(u64, Option<String>)> {
    let kind = kind(dir)?;
    if kind != EXT4 {
        return Ok((kind, None));
    }
    let table = std::fs::read_to_string(MOUNTS)?;
    let options = options(&table, &device(dir)?).map(str::to_owned);
    Ok((kind, options))
}

fn kind(dir: BorrowedFd<'_>) -> std::io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstatfs(dir)?.f_type).unwrap_or_default())
}

fn device(dir: BorrowedFd<'_>) -> std::io::Result<String> {
    let device = rustix::fs::fstat(dir)?.st_dev;
    Ok(format!("{}:{}", major(device), minor(device)))
}

fn known(dir: BorrowedFd<'_>) -> std::io::Result<Order> {
    let kind = kind(dir)?;
    if kind == BTRFS {
        return Ok(Order::NamesFirst);
    }
    if kind != EXT4 && kind != XFS {
        return Ok(Order::Unknown);
    }
    let device = device(dir)?;
    let table = std::fs::read_to_string(MOUNTS)?;
    let Some(options) = options(&table, &device) else {
        return Ok(Order::Unknown);
    };
    let usual = if kind == XFS {
        is_usual_xfs(options)
    } else {
        is_usual_ext4(options) && has_own_journal(&device)?
    };
    Ok(if usual {
        Order::Journal
    } else {
        Order::Unknown
    })
}

/// The options of the file system on `device`, in a table as /proc/self/mountinfo is one.
fn options<'t>(table: &'t str, device: &str) -> Option<&'t str> {
    table
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(device))?
        .split_once(" - ")?
        .1
        .split(' ')
        .nth(2)
}

/// Not `data=writeback` nor `data=journal`, which go other ways, nor a commit that overtakes others' flush.
fn is_usual_ext4(options: &str) -> bool {
    options.split(',').all(|option| {
        option == "data=ordered"
            || ![
                "data=",
                "journal_async_commit",
                "nodelalloc",
                "dioread_lock",
            ]
            .iter()
            .any(|other| option.starts_with(other))
    })
}

/// Log and content on one device.
fn is_usual_xfs(options: &str) -> bool {
    !options
        .split(',')
        .any(|option| option.starts_with("logdev=") || option.starts_with("rtdev="))
}

/// Whether an ext4 has a journal, and on its own device: jbd2 keeps a folder for each, named by the device
/// and, when it is a file on it, by the file's number. (An ext4 without one commits nothing in order.)
fn has_own_journal(device: &str) -> std::io::Result<bool> {
    let link = std::fs::read_link(Path::new("/sys/dev/block").join(device))?;
    let Some(name) = link.file_name().and_then(|name| name.to_str()) else {
        return Ok(false);
    };
    let place = PathBuf::from(format!("/proc/fs/jbd2/{name}-8"));
    place.try_exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n\
        30 22 7:1 / /mnt/a\\040b rw - ext4 /dev/loop1 rw,data=writeback\n\
        31 22 7:2 / /x rw master:1 - xfs /dev/loop2 rw,attr2,logdev=/dev/sdb\n";

    #[test]
    fn options_are_those_of_the_device() {
        assert_eq!(options(TABLE, "254:0"), Some("rw,discard"));
        assert_eq!(options(TABLE, "7:1"), Some("rw,data=writeback"));
        assert_eq!(options(TABLE, "7:2"), Some("rw,attr2,logdev=/dev/sdb"));
        assert_eq!(options(TABLE, "7:3"), None);
    }

    #[test]
    fn what_goes_other_ways_is_not_usual() {
        assert!(is_usual_ext4("rw,discard,stripe=16"));
        assert!(is_usual_ext4("rw,data=ordered"));
        for other in [
            "rw,data=writeback",
            "data=journal",
            "rw,nodelalloc",
            "rw,dioread_lock",
            "rw,journal_async_commit,data=writeback",
        ] {
            assert!(!is_usual_ext4(other), "{other}");
        }
        assert!(is_usual_xfs("rw,attr2,inode64"));
        assert!(!is_usual_xfs("rw,logdev=/dev/sdb"));
    }

    #[test]
    fn a_file_system_in_memory_is_not_known() {
        let dir = rustix::fs::open("/dev/shm", rustix::fs::OFlags::PATH, 0.into()).unwrap();
        assert_eq!(Order::of(dir.as_fd()), Order::Unknown);
    }
}

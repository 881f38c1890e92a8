//! The held flock(2) locks, from /proc/locks. Parsing is separate from reading.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::users::Device;
use crate::error::{Errno, Result};

/// A held lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flock {
    /// The process that took the lock.
    pub pid: u32,
    /// The file system, as in mountinfo. For some, the number that stat(2) returns is another one.
    pub device: Device,
    /// The inode number.
    pub ino: u64,
    /// Whether it is exclusive.
    pub is_exclusive: bool,
}

/// Parses the table. Processes that wait for a lock, locks of other types and malformed lines are skipped.
pub fn parse(text: &str) -> Vec<Flock> {
    text.lines().filter_map(line).collect()
}

fn line(line: &str) -> Option<Flock> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    if fields.next()? != "FLOCK" {
        return None;
    }
    let is_exclusive = fields.nth(1)? == "WRITE";
    let pid = fields.next()?.parse().ok()?;
    let mut numbers = fields.next()?.split(':');
    let mut hexadecimal = || u32::from_str_radix(numbers.next()?, 16).ok();
    let device = Device::from((hexadecimal()?, hexadecimal()?));
    let ino = numbers.next()?.parse().ok()?;
    Some(Flock {
        pid,
        device,
        ino,
        is_exclusive,
    })
}

/// Reads the locks of all processes that are visible in the pid namespace.
pub fn read() -> Result<Vec<Flock>> {
    std::fs::read_to_string("/proc/locks")
        .map(|text| parse(&text))
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO).into())
}

/// Returns the processes that have a descriptor of an open file that holds a lock on the inode.
///
/// The table of locks names only the process that took the lock, which may have ended. This reads all descriptors of all
/// processes, as far as it is permitted.
pub fn holders(ino: u64) -> Vec<u32> {
    find_holders(|lock, _| lock.ino == ino)
}

/// Returns the processes that have a descriptor of an open file that holds an exclusive lock on this file.
///
/// Unlike [`holders`], it compares the device too, so it returns no process that has locked another file with the same
/// inode number.
pub fn exclusive_holders(file: &Metadata) -> Vec<u32> {
    let is_same = |descriptor: &Path| {
        std::fs::metadata(descriptor)
            .is_ok_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
    };
    find_holders(|lock, descriptor| {
        lock.is_exclusive && lock.ino == file.ino() && is_same(descriptor)
    })
}

/// Returns the processes with a lock for which `is_wanted` returns true. Its second argument is the path of the open file
/// in /proc.
fn find_holders(is_wanted: impl Fn(&Flock, &Path) -> bool) -> Vec<u32> {
    let mut pids = super::users::pids().unwrap_or_default();
    pids.retain(|pid| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fdinfo"));
        descriptors.into_iter().flatten().flatten().any(|entry| {
            // The descriptor may have been closed, or the process may have ended.
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let locks = text.lines().filter_map(|line| line.strip_prefix("lock:"));
            let open = Path::new("/proc")
                .join(format!("{pid}/fd"))
                .join(entry.file_name());
            locks
                .filter_map(self::line)
                .any(|lock| is_wanted(&lock, &open))
        })
    });
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_proc_locks() {
        let text = "\
1: FLOCK  ADVISORY  READ 4711 08:01:131 0 EOF
2: POSIX  ADVISORY  WRITE 12 08:01:7 0 EOF
3: FLOCK  ADVISORY  WRITE 4712 00:2a:99 0 EOF
3: -> FLOCK  ADVISORY  WRITE 4713 00:2a:99 0 EOF
4: FLOCK  ADVISORY
";
        let found = parse(text);
        let expected = [(4711, (8, 1), 131, false), (4712, (0, 42), 99, true)].map(
            |(pid, device, ino, is_exclusive)| Flock {
                pid,
                device: device.into(),
                ino,
                is_exclusive,
            },
        );
        assert_eq!(found, expected);
    }

    #[test]
    fn own_lock_is_found() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared).unwrap();
        let device = Device::from_fd(&file).unwrap();
        let ours = Flock {
            pid: std::process::id(),
            device,
            ino: file.metadata().unwrap().ino(),
            is_exclusive: false,
        };
        assert!(read().unwrap().contains(&ours));
        assert_eq!(holders(ours.ino), [ours.pid]);
        assert!(exclusive_holders(&file.metadata().unwrap()).is_empty());
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert_eq!(exclusive_holders(&file.metadata().unwrap()), [ours.pid]);
    }
}

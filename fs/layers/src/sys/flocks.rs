//! The held flock(2) locks, from /proc/locks. Parsing is separate from reading.

use crate::error::{Errno, Result};

/// A held lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flock {
    /// The process that took the lock.
    pub pid: u32,
    /// The inode number. The device is omitted, because for some file systems it differs from that of stat(2).
    pub ino: u64,
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
    let pid = fields.nth(2)?.parse().ok()?;
    let ino = fields.next()?.rsplit(':').next()?.parse().ok()?;
    Some(Flock { pid, ino })
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
    let mut pids = super::users::pids().unwrap_or_default();
    pids.retain(|pid| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fdinfo"));
        descriptors.into_iter().flatten().flatten().any(|entry| {
            // The descriptor may have been closed, or the process may have ended.
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let locks = text.lines().filter_map(|line| line.strip_prefix("lock:"));
            locks.filter_map(self::line).any(|lock| lock.ino == ino)
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
        let expected = [(4711, 131), (4712, 99)].map(|(pid, ino)| Flock { pid, ino });
        assert_eq!(found, expected);
    }

    #[test]
    fn own_lock_is_found() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared).unwrap();
        let ours = Flock {
            pid: std::process::id(),
            ino: file.metadata().unwrap().ino(),
        };
        assert!(read().unwrap().contains(&ours));
        assert_eq!(holders(ours.ino), [ours.pid]);
    }
}

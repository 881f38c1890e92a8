//! Finds the processes that use a file system: open files, working and root directories, executables and mappings.
//!
//! They are found by device number, not by path, which includes processes in other mount namespaces and in a chroot.
#![allow(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Errno, Result};
use crate::shown::Show as _;

/// A way in which a process uses a file system.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// Its working directory is on it.
    Cwd,
    /// Its root directory is on it.
    Root,
    /// It runs an executable on it.
    Exe,
    /// It has mapped a file.
    Map,
    /// It has a file open; true: for writing.
    Open(bool),
    /// Its mount namespace contains a copy of the mount.
    Namespace,
}

impl Hold {
    /// Returns the word for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cwd => "working directory",
            Self::Root => "root directory",
            Self::Exe => "program",
            Self::Map => "mapped file",
            Self::Open(false) => "open file",
            Self::Open(true) => "file open for writing",
            Self::Namespace => "mount namespace",
        }
    }
}

/// A process that uses a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The process id.
    pub pid: u32,
    /// The command name.
    pub command: String,
    /// Its uses of the file system, without duplicates.
    pub holds: Vec<Hold>,
}

impl User {
    /// Returns a process that only has a copy of the mount in its mount namespace; `None` if it has ended.
    pub fn from_namespace(pid: u32) -> Option<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        fs::read_link(proc.join("ns/mnt")).ok()?;
        Some(Self {
            pid,
            command: command(&proc),
            holds: vec![Hold::Namespace],
        })
    }

    /// Whether it only has a copy of the mount, and does not use it.
    pub fn has_only_a_copy(&self) -> bool {
        self.holds
            .iter()
            .all(|hold| matches!(hold, Hold::Namespace))
    }

    /// Formats it for messages: "pid 12 (bash: working directory, open file)".
    pub fn describe(&self) -> String {
        let holds: Vec<_> = self.holds.iter().map(Hold::name).collect();
        format!("pid {} ({}: {})", self.pid, self.command, holds.join(", "))
    }
}

/// The device number of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

impl Device {
    /// Returns the device of the file system that `path` is on, without sending it a request.
    pub fn from_path(path: &Path) -> Result<Self> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE)?;
        Ok(Self {
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
        })
    }

    /// Returns the device of the file system behind a descriptor, without sending it a request.
    pub fn from_fd(fd: impl std::os::fd::AsFd) -> Result<Self> {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH;
        let stat = rustix::fs::statx(fd, "", flags, StatxFlags::TYPE)?;
        Ok(Self {
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
        })
    }
}

impl From<(u32, u32)> for Device {
    fn from((major, minor): (u32, u32)) -> Self {
        Self { major, minor }
    }
}

/// Lists all processes except `except` that use the file system `dev`.
///
/// Processes that end in the meantime, or that this one may not inspect, are omitted.
pub fn list(dev: Device, except: &[u32]) -> Result<Vec<User>> {
    let mut users = Vec::new();
    for pid in pids()? {
        if except.contains(&pid) {
            continue;
        }
        let holds = holds(pid, dev);
        if !holds.is_empty() {
            users.push(User {
                pid,
                command: command(&PathBuf::from(format!("/proc/{pid}"))),
                holds,
            });
        }
    }
    Ok(users)
}

/// Lists the ids of all processes.
pub fn pids() -> Result<Vec<u32>> {
    numbers(Path::new("/proc"))
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO).into())
}

/// Lists the ids of a process's threads; empty if the process has ended.
pub fn threads(pid: u32) -> Vec<u32> {
    numbers(&PathBuf::from(format!("/proc/{pid}/task"))).unwrap_or_default()
}

fn numbers(dir: &Path) -> std::io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Returns the command name of the process whose /proc directory is `proc`.
pub fn command(proc: &Path) -> String {
    match fs::read(proc.join("comm")) {
        Ok(name) => name.trim_ascii().shown().to_string(),
        Err(_) => "?".to_owned(),
    }
}

/// Whether the target of a /proc link is on `dev`.
///
/// Sends no request to the file system, which may hang.
fn lies_on(link: &Path, dev: Device) -> bool {
    Device::from_path(link).is_ok_and(|found| found == dev)
}

/// Lists the uses of the file system `dev` by a process.
///
/// All threads are inspected: a thread may have directories and descriptors of its own, and the main thread may have
/// ended before the others.
fn holds(pid: u32, dev: Device) -> Vec<Hold> {
    let mut holds = Vec::new();
    let (mut with_files, mut with_memory) = (None, false);
    for thread in threads(pid) {
        let task = PathBuf::from(format!("/proc/{pid}/task/{thread}"));
        for (link, hold) in [("cwd", Hold::Cwd), ("root", Hold::Root)] {
            if lies_on(&task.join(link), dev) {
                holds.push(hold);
            }
        }
        if with_files.is_none_or(|other| !share_files(other, thread))
            && let Ok(open) = fs::read_dir(task.join("fd"))
        {
            with_files = Some(thread);
            open_files(&task, open, dev, &mut holds);
        }
        if !with_memory && let Ok(maps) = fs::read(task.join("maps")) {
            with_memory = !maps.is_empty();
            if lies_on(&task.join("exe"), dev) {
                holds.push(Hold::Exe);
            }
            if maps_device(&maps, dev) {
                holds.push(Hold::Map);
            }
        }
    }
    holds.sort_unstable();
    holds.dedup();
    holds
}

/// Returns a link in /proc to an object on `dev` that the process uses.
pub fn link_to(pid: u32, dev: Device) -> Option<PathBuf> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let tasks = threads(pid).into_iter().flat_map(|thread| {
        let task = proc.join("task").join(thread.to_string());
        ["cwd", "root", "exe"].map(|link| task.join(link))
    });
    let entries = |name: &str| {
        fs::read_dir(proc.join(name))
            .into_iter()
            .flatten()
            .flatten()
    };
    let open = entries("fd").chain(entries("map_files"));
    tasks
        .chain(open.map(|entry| entry.path()))
        .find(|link| lies_on(link, dev))
}

fn open_files(task: &Path, open: fs::ReadDir, dev: Device, holds: &mut Vec<Hold>) {
    for fd in open.flatten() {
        if lies_on(&fd.path(), dev) {
            let info = task.join("fdinfo").join(fd.file_name());
            let writes = fs::read(info).is_ok_and(|text| opened_for_writing(&text));
            holds.push(Hold::Open(writes));
        }
    }
}

/// Whether a thread has the file with the inode number `ino` of the file system `dev` open for writing.
///
/// Returns `None` if its descriptors are not visible. Sends no request to the file system.
pub fn writes_to(thread: u32, dev: Device, ino: u64) -> Option<bool> {
    let task = PathBuf::from(format!("/proc/{thread}"));
    let mut writes = false;
    for fd in fs::read_dir(task.join("fd")).ok()? {
        let fd = fd.ok()?;
        // A descriptor that another thread has closed meanwhile is not the one of a request in progress.
        let Ok(info) = fs::read(task.join("fdinfo").join(fd.file_name())) else {
            continue;
        };
        let number = inode_number(&info)?;
        writes |= number == ino && opened_for_writing(&info) && lies_on(&fd.path(), dev);
    }
    Some(writes)
}

/// Returns the inode number in /proc/PID/fdinfo/FD; `None` before Linux 5.14.
fn inode_number(info: &[u8]) -> Option<u64> {
    let mut lines = info.split(|&b| b == b'\n');
    let number = lines.find_map(|line| line.strip_prefix(b"ino:"))?;
    std::str::from_utf8(number.trim_ascii()).ok()?.parse().ok()
}

/// Whether two threads share a table of descriptors. `false` if the kernel does not support the comparison.
fn share_files(one: u32, other: u32) -> bool {
    const FILES: libc::c_int = 2; // KCMP_FILES
    // SAFETY: kcmp(2) takes numbers only, and writes nothing.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, FILES, 0_usize, 0_usize) == 0 }
}

/// Whether /proc/PID/fdinfo/FD shows an access mode that allows writing.
fn opened_for_writing(info: &[u8]) -> bool {
    info.split(|&b| b == b'\n')
        .find_map(|line| line.strip_prefix(b"flags:"))
        .and_then(|flags| std::str::from_utf8(flags.trim_ascii()).ok())
        .and_then(|flags| u32::from_str_radix(flags, 8).ok())
        .is_some_and(|flags| matches!(flags & 0o3, 1 | 2))
}

/// Whether /proc/PID/maps lists a file on `dev`.
fn maps_device(maps: &[u8], dev: Device) -> bool {
    let wanted = format!("{:02x}:{:02x}", dev.major, dev.minor);
    maps.split(|&b| b == b'\n')
        .filter_map(|line| line.split(|&b| b == b' ').nth(3))
        .any(|field| field == wanted.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_parsed() {
        assert!(opened_for_writing(
            b"pos:\t0\nflags:\t0100002\nmnt_id:\t29\n"
        ));
        assert!(opened_for_writing(b"flags:\t0101\n"));
        assert!(!opened_for_writing(b"pos:\t0\nflags:\t0100000\n"));
        assert!(!opened_for_writing(b""));
        let maps = b"7f00-7f01 r-xp 00000000 fe:03 1234   /usr/lib/x\n\
                     7f02-7f03 rw-p 00000000 00:00 0 \n";
        let dev = |major, minor| Device { major, minor };
        assert!(maps_device(maps, dev(0xfe, 3)));
        assert!(!maps_device(maps, dev(0xfe, 4)));
    }

    #[test]
    fn a_file_that_is_open_for_writing_is_found() {
        use std::os::unix::fs::MetadataExt;
        assert_eq!(inode_number(b"pos:\t0\nino:\t77\n"), Some(77));
        assert_eq!(inode_number(b"pos:\t0\n"), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = fs::File::open(file.path()).unwrap();
        let dev = Device::from_fd(&reader).unwrap();
        let ino = reader.metadata().unwrap().ino();
        let thread = rustix::thread::gettid()
            .as_raw_nonzero()
            .get()
            .cast_unsigned();
        assert_eq!(writes_to(thread, dev, ino), Some(true));
        let path = file.into_temp_path();
        assert_eq!(writes_to(thread, dev, ino), Some(false), "open for reading");
        drop(path);
        assert_eq!(writes_to(u32::MAX, dev, ino), None);
    }

    #[test]
    fn this_process_is_found_by_its_open_file() {
        let file = tempfile::tempfile().unwrap();
        let dev = Device::from_fd(&file).unwrap();
        let me = std::process::id();
        let users = list(dev, &[]).unwrap();
        let found = users.iter().find(|user| user.pid == me).unwrap();
        assert!(found.holds.contains(&Hold::Open(true)), "{found:?}");
        assert!(!list(dev, &[me]).unwrap().iter().any(|user| user.pid == me));
    }

    #[test]
    fn thread_with_its_own_working_directory_is_found() {
        // No other test works in /proc.
        let proc = Device::from_path(Path::new("/proc")).unwrap();
        let me = std::process::id();
        let found = || list(proc, &[]).unwrap().into_iter().find(|u| u.pid == me);
        let works_in_proc = || found().is_some_and(|user| user.holds.contains(&Hold::Cwd));
        assert!(!works_in_proc());
        let ready = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
                std::env::set_current_dir("/proc").unwrap();
                ready.wait();
                ready.wait();
            });
            ready.wait();
            assert!(works_in_proc());
            ready.wait();
        });
    }
}

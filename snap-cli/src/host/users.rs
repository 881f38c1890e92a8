//! Who uses a mounted file system: open files, working and root directories, programs and mappings.
//!
//! Processes are told by device number, not by path, so that those in other mount namespaces and in a
//! chroot are seen as well.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

use super::mountinfo;
use crate::error::{Error, Result};

/// How a process holds on to a file system.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// Its working directory lies there.
    Cwd,
    /// Its root directory lies there.
    Root,
    /// It runs a program from there.
    Exe,
    /// It has mapped a file.
    Map,
    /// It has a file open; true: for writing.
    Open(bool),
    /// Its mount namespace holds a copy of the mount.
    Namespace,
}

impl Hold {
    /// A word for messages.
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
    /// Its id.
    pub pid: u32,
    /// Its command's name.
    pub command: String,
    /// What it holds, each once.
    pub holds: Vec<Hold>,
}

impl User {
    /// A process that only has a copy of the mount in its mount namespace; `None` when it is gone.
    pub fn of_namespace(pid: u32) -> Option<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        fs::read_link(proc.join("ns/mnt")).ok()?;
        Some(Self {
            pid,
            command: command(&proc),
            holds: vec![Hold::Namespace],
        })
    }

    /// Whether it uses nothing of the mount that it has a copy of.
    pub fn has_only_a_copy(&self) -> bool {
        self.holds
            .iter()
            .all(|hold| matches!(hold, Hold::Namespace))
    }

    /// "pid 12 (bash: working directory, open file)"
    pub fn describe(&self) -> String {
        let holds: Vec<_> = self.holds.iter().map(Hold::name).collect();
        format!("pid {} ({}: {})", self.pid, self.command, holds.join(", "))
    }
}

/// A file system's device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl From<(u32, u32)> for Device {
    fn from((major, minor): (u32, u32)) -> Self {
        Self { major, minor }
    }
}

/// All processes but `except` that use the file system `dev`. Processes that end meanwhile, or that we may
/// not look into, are left out.
pub fn of(dev: Device, except: &[u32]) -> Result<Vec<User>> {
    let mut users = Vec::new();
    for pid in pids()? {
        if except.contains(&pid) {
            continue;
        }
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let holds = holds(&proc, dev);
        if !holds.is_empty() {
            users.push(User {
                pid,
                command: command(&proc),
                holds,
            });
        }
    }
    Ok(users)
}

pub(super) fn pids() -> Result<Vec<u32>> {
    let root = Path::new("/proc");
    let at = |error| Error::at("list", root, error);
    let mut pids = Vec::new();
    for entry in fs::read_dir(root).map_err(at)? {
        let name = entry.map_err(at)?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    pids.sort_unstable();
    Ok(pids)
}

pub(super) fn command(proc: &Path) -> String {
    match fs::read(proc.join("comm")) {
        Ok(name) => name.trim_ascii().escape_ascii().to_string(),
        Err(_) => "?".to_owned(),
    }
}

/// Whether what a /proc link stands for lies on `dev`. Asks the kernel only, never the file system itself,
/// which may be the one that hangs.
fn lies_on(link: &Path, dev: Device) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(CWD, link, flags, StatxFlags::TYPE).is_ok_and(|stat| {
        (Device {
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
        }) == dev
    })
}

fn holds(proc: &Path, dev: Device) -> Vec<Hold> {
    let mut holds = Vec::new();
    for (link, hold) in [("cwd", Hold::Cwd), ("root", Hold::Root), ("exe", Hold::Exe)] {
        if lies_on(&proc.join(link), dev) {
            holds.push(hold);
        }
    }
    for fd in fs::read_dir(proc.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        if lies_on(&fd.path(), dev) {
            let info = proc.join("fdinfo").join(fd.file_name());
            let writes = fs::read(info).is_ok_and(|text| opened_for_writing(&text));
            holds.push(Hold::Open(writes));
        }
    }
    if fs::read(proc.join("maps")).is_ok_and(|maps| maps_device(&maps, dev)) {
        holds.push(Hold::Map);
    }
    holds.sort_unstable();
    holds.dedup();
    holds
}

/// Whether a line of /proc/PID/fdinfo/FD tells an access mode that writes.
fn opened_for_writing(info: &[u8]) -> bool {
    info.split(|&b| b == b'\n')
        .find_map(|line| line.strip_prefix(b"flags:"))
        .and_then(|flags| std::str::from_utf8(flags.trim_ascii()).ok())
        .and_then(|flags| u32::from_str_radix(flags, 8).ok())
        .is_some_and(|flags| matches!(flags & 0o3, 1 | 2))
}

/// Whether /proc/PID/maps names a file on `dev`.
fn maps_device(maps: &[u8], dev: Device) -> bool {
    let wanted = format!("{:02x}:{:02x}", dev.major, dev.minor);
    maps.split(|&b| b == b'\n')
        .filter_map(|line| line.split(|&b| b == b' ').nth(3))
        .any(|field| field == wanted.as_bytes())
}

/// Lists users for a message, a few of many.
pub fn describe(users: &[User]) -> String {
    const SHOWN: usize = 8;
    let mut all: Vec<_> = users.iter().take(SHOWN).map(User::describe).collect();
    if users.len() > SHOWN {
        all.push(format!("and {} more", users.len() - SHOWN));
    }
    all.join(", ")
}

/// The device number of the mount at `at`, as the table of mounts tells it.
pub fn device_at(at: &Path) -> Result<Option<Device>> {
    let mounts = mountinfo::read()?;
    Ok(mountinfo::topmost(&mounts, at).map(|mount| mount.dev.into()))
}

/// A word of a command to type: quoted when a shell would not take it as it is.
pub fn quoted(word: impl AsRef<std::ffi::OsStr>) -> String {
    let bytes = word.as_ref().as_bytes();
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+=:@%,".contains(b);
    if !bytes.is_empty() && bytes.iter().all(plain) {
        bytes.escape_ascii().to_string()
    } else {
        // The form in which bash and zsh take any byte.
        format!("$'{}'", bytes.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_proc() {
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
    fn this_process_is_found_by_its_open_file() {
        let file = tempfile::tempfile().unwrap();
        let stat = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE).unwrap();
        let dev = Device {
            major: stat.stx_dev_major,
            minor: stat.stx_dev_minor,
        };
        let me = std::process::id();
        let users = of(dev, &[]).unwrap();
        let found = users.iter().find(|user| user.pid == me).unwrap();
        assert!(found.holds.contains(&Hold::Open(true)), "{found:?}");
        assert!(!of(dev, &[me]).unwrap().iter().any(|user| user.pid == me));
    }

    #[test]
    fn commands_to_type() {
        assert_eq!(quoted(Path::new("/a/b-c")), "/a/b-c");
        assert_eq!(quoted(Path::new("/a b")), "$'/a b'");
        assert_eq!(quoted(Path::new("/it's\n")), "$'/it\\'s\\n'");
    }
}

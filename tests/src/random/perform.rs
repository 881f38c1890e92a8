//! Doing one operation on one tree, and what came of it in a form that two trees can be compared
//! by: results and error numbers, without what must differ (inode numbers, times of now, sizes and
//! link counts of folders).

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    Access, AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::{Errno, Result};

use super::operation::{Op, SLOTS};
use crate::tree::NOW;

/// What came of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It failed.
    Failed(Errno),
    /// It succeeded with nothing to tell.
    Done,
    /// A number of bytes.
    Count(usize),
    /// Bytes read.
    Bytes(Vec<u8>),
    /// Names with their types, sorted.
    Names(Vec<(Vec<u8>, String)>),
    /// Attributes: mode with type, links, owner, group, size, device, mtime.
    Attributes([i128; 8]),
    /// Extended attributes with their values, sorted.
    Xattrs(Vec<(Vec<u8>, Vec<u8>)>),
}

/// One of the two trees, with the descriptors held in it.
#[derive(Debug)]
pub struct Side {
    root: OwnedFd,
    slots: [Option<OwnedFd>; SLOTS],
}

const NO_TERMINAL: OFlags = OFlags::CLOEXEC
    .union(OFlags::NOCTTY)
    .union(OFlags::NONBLOCK);
const MOST: usize = 1 << 20;

impl Side {
    /// The tree at `root`.
    #[must_use]
    pub fn new(root: &Path) -> Side {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, root, flags, Mode::empty())
            .unwrap_or_else(|error| panic!("cannot open {}: {error}", root.display()));
        Side {
            root,
            slots: Default::default(),
        }
    }

    /// Does `op`, as user and group `id` (with no other group and no privilege) unless that is 0.
    pub fn perform(&mut self, op: &Op, id: u32) -> Outcome {
        let id = if *op == Op::DropCaches { 0 } else { id };
        become_user(id);
        let outcome = self.attempt(op);
        become_user(0);
        outcome.unwrap_or_else(Outcome::Failed)
    }

    fn attempt(&mut self, op: &Op) -> Result<Outcome> {
        match self.by_descriptor(op) {
            Some(outcome) => outcome,
            None => match self.by_name(op) {
                Some(outcome) => outcome,
                None => self.looking(op),
            },
        }
    }

    fn fd(&self, slot: usize) -> Result<&OwnedFd> {
        self.slots[slot].as_ref().ok_or(Errno::BADF)
    }

    /// Follows a symbolic link or not, for calls that only take paths.
    fn path(&self, path: &[u8]) -> Vec<u8> {
        let mut full = format!("/proc/self/fd/{}/", self.root.as_raw_fd()).into_bytes();
        full.extend_from_slice(path);
        full
    }

    fn by_descriptor(&mut self, op: &Op) -> Option<Result<Outcome>> {
        let done = |result: Result<()>| result.map(|()| Outcome::Done);
        Some(match op {
            Op::Hold { slot, path, flags } => {
                self.slots[*slot] = None;
                let opened =
                    rustix::fs::openat(&self.root, path, *flags | NO_TERMINAL, Mode::empty());
                opened.map(|fd| {
                    self.slots[*slot] = Some(fd);
                    Outcome::Done
                })
            }
            Op::Close { slot } => {
                self.slots[*slot] = None;
                Ok(Outcome::Done)
            }
            Op::FdRead { slot, offset, len } => self.fd(*slot).and_then(|fd| {
                let mut buffer = vec![0; *len];
                let mut total = 0;
                while total < *len {
                    match rustix::io::pread(fd, &mut buffer[total..], offset + total as u64)? {
                        0 => break,
                        read => total += read,
                    }
                }
                buffer.truncate(total);
                Ok(Outcome::Bytes(buffer))
            }),
            Op::FdWrite { slot, offset, data } => self
                .fd(*slot)
                .and_then(|fd| rustix::io::pwrite(fd, &pattern(*data), *offset))
                .map(Outcome::Count),
            Op::FdAppend { slot, data } => self
                .fd(*slot)
                .and_then(|fd| {
                    rustix::fs::seek(fd, rustix::fs::SeekFrom::End(0))?;
                    rustix::io::write(fd, &pattern(*data))
                })
                .map(Outcome::Count),
            Op::FdTruncate { slot, len } => done(
                self.fd(*slot)
                    .and_then(|fd| rustix::fs::ftruncate(fd, *len)),
            ),
            Op::FdStat { slot } => self.fd(*slot).and_then(rustix::fs::fstat).map(attributes),
            Op::FdChmod { slot, mode } => done(
                self.fd(*slot)
                    .and_then(|fd| rustix::fs::fchmod(fd, Mode::from_raw_mode(*mode))),
            ),
            Op::FdSetxattr { slot, name, value } => done(
                self.fd(*slot)
                    .and_then(|fd| rustix::fs::fsetxattr(fd, *name, value, XattrFlags::empty())),
            ),
            Op::FdXattrs { slot } => self.fd(*slot).and_then(|fd| {
                xattrs(
                    |buffer| rustix::fs::flistxattr(fd, buffer),
                    |name, buffer| rustix::fs::fgetxattr(fd, name, buffer),
                )
            }),
            Op::FdAllocate {
                slot,
                mode,
                offset,
                len,
            } => done(
                self.fd(*slot)
                    .and_then(|fd| rustix::fs::fallocate(fd, *mode, *offset, *len)),
            ),
            Op::FdSync { slot } => done(self.fd(*slot).and_then(rustix::fs::fsync)),
            Op::FdList { slot } => self.fd(*slot).and_then(list),
            Op::FdUtimens { slot, seconds } => done(
                self.fd(*slot)
                    .and_then(|fd| rustix::fs::futimens(fd, &times(*seconds))),
            ),
            Op::FdCopy {
                from,
                to,
                from_offset,
                to_offset,
                len,
            } => self.copy((*from, *from_offset), (*to, *to_offset), *len),
            _ => return None,
        })
    }

    fn copy(&self, from: (usize, u64), to: (usize, u64), len: usize) -> Result<Outcome> {
        let (mut read_at, mut write_at) = (from.1, to.1);
        let (source, target) = (self.fd(from.0)?, self.fd(to.0)?);
        let mut total = 0;
        // A short copy is allowed anywhere, so only the sum can be compared.
        while total < len {
            let wanted = len - total;
            match rustix::fs::copy_file_range(
                source,
                Some(&mut read_at),
                target,
                Some(&mut write_at),
                wanted,
            ) {
                Ok(0) => break,
                Ok(copied) => total += copied,
                Err(error) if total == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(Outcome::Count(total))
    }

    fn by_name(&mut self, op: &Op) -> Option<Result<Outcome>> {
        let root = &self.root;
        let done = match op {
            Op::Create {
                path,
                flags,
                mode,
                data,
            } => {
                let mode = Mode::from_raw_mode(*mode);
                return Some(
                    rustix::fs::openat(root, path, *flags | NO_TERMINAL, mode).and_then(|fd| {
                        if flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
                            return rustix::io::write(&fd, &pattern(*data)).map(Outcome::Count);
                        }
                        Ok(Outcome::Done)
                    }),
                );
            }
            Op::Mkdir { path, mode } => rustix::fs::mkdirat(root, path, Mode::from_raw_mode(*mode)),
            Op::Rmdir { path } => rustix::fs::unlinkat(root, path, AtFlags::REMOVEDIR),
            Op::Unlink { path } => rustix::fs::unlinkat(root, path, AtFlags::empty()),
            Op::Rename { from, to, flags } => {
                rustix::fs::renameat_with(root, from, root, to, *flags)
            }
            Op::Link { from, to } => rustix::fs::linkat(root, from, root, to, AtFlags::empty()),
            Op::Symlink { target, path } => rustix::fs::symlinkat(target, root, path),
            Op::Mkfifo { path, mode } => {
                let mode = Mode::from_raw_mode(*mode);
                rustix::fs::mknodat(root, path, FileType::Fifo, mode, 0)
            }
            Op::Mknod { path, mode, minor } => {
                let device = rustix::fs::makedev(1, *minor);
                let mode = Mode::from_raw_mode(*mode);
                rustix::fs::mknodat(root, path, FileType::CharacterDevice, mode, device)
            }
            Op::Chmod { path, mode } => {
                rustix::fs::chmodat(root, path, Mode::from_raw_mode(*mode), AtFlags::empty())
            }
            Op::Chown {
                path,
                uid,
                gid,
                follow,
            } => rustix::fs::chownat(
                root,
                path,
                uid.map(Uid::from_raw),
                gid.map(Gid::from_raw),
                at_flags(*follow),
            ),
            Op::Utimens {
                path,
                seconds,
                follow,
            } => rustix::fs::utimensat(root, path, &times(*seconds), at_flags(*follow)),
            Op::Setxattr {
                path,
                name,
                value,
                flags,
            } => {
                let flags = XattrFlags::from_bits_retain(*flags);
                rustix::fs::lsetxattr(self.path(path), *name, value, flags)
            }
            Op::Removexattr { path, name } => rustix::fs::lremovexattr(self.path(path), *name),
            Op::Truncate { path, len } => {
                rustix::fs::openat(root, path, OFlags::WRONLY | NO_TERMINAL, Mode::empty())
                    .and_then(|fd| rustix::fs::ftruncate(fd, *len))
            }
            Op::DropCaches => {
                // A cache that stays makes the run less sharp, not wrong.
                if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "2") {
                    eprintln!("cannot drop caches: {error}");
                }
                Ok(())
            }
            _ => return None,
        };
        Some(done.map(|()| Outcome::Done))
    }

    fn looking(&self, op: &Op) -> Result<Outcome> {
        let root = &self.root;
        match op {
            Op::Read { path } => {
                let fd =
                    rustix::fs::openat(root, path, OFlags::RDONLY | NO_TERMINAL, Mode::empty())?;
                // A terminal, /dev/full and the like never end.
                let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
                if matches!(kind, FileType::CharacterDevice | FileType::Fifo) {
                    return Ok(Outcome::Done);
                }
                let mut bytes = vec![0; MOST];
                let mut total = 0;
                while total < MOST {
                    match rustix::io::read(&fd, &mut bytes[total..])? {
                        0 => break,
                        read => total += read,
                    }
                }
                bytes.truncate(total);
                Ok(Outcome::Bytes(bytes))
            }
            Op::Readlink { path } => rustix::fs::readlinkat(root, path, Vec::new())
                .map(|target| Outcome::Bytes(target.into_bytes())),
            Op::Stat { path, follow } => {
                rustix::fs::statat(root, path, at_flags(*follow)).map(attributes)
            }
            Op::Access { path, mode } => {
                let access = Access::from_bits_retain(*mode);
                rustix::fs::accessat(root, path, access, AtFlags::EACCESS).map(|()| Outcome::Done)
            }
            Op::List { path } => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | NO_TERMINAL;
                list(&rustix::fs::openat(root, path, flags, Mode::empty())?)
            }
            Op::Getxattr { path, name } => {
                let mut value = vec![0; 64 << 10];
                let length = rustix::fs::lgetxattr(self.path(path), *name, &mut value[..])?;
                value.truncate(length);
                Ok(Outcome::Bytes(value))
            }
            Op::Xattrs { path } => {
                let path = self.path(path);
                xattrs(
                    |buffer| rustix::fs::llistxattr(&path, buffer),
                    |name, buffer| rustix::fs::lgetxattr(&path, name, buffer),
                )
            }
            other => panic!("nobody performs {other:?}"),
        }
    }
}

/// Changes this thread's effective user and group; real and saved ones stay root's.
fn become_user(id: u32) {
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    let result = if id == 0 {
        set_thread_res_uid(None, uid, None)
            .and_then(|()| set_thread_res_gid(None, gid, None))
            .and_then(|()| set_thread_groups(&[]))
    } else {
        set_thread_groups(&[])
            .and_then(|()| set_thread_res_gid(None, gid, None))
            .and_then(|()| set_thread_res_uid(None, uid, None))
    };
    result.unwrap_or_else(|error| panic!("cannot become user {id}: {error}"));
}

fn at_flags(follow: bool) -> AtFlags {
    if follow {
        AtFlags::empty()
    } else {
        AtFlags::SYMLINK_NOFOLLOW
    }
}

fn times(seconds: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 123_456_789,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// `len` bytes that are the same for the same seed and hold no long run of zeros.
fn pattern((seed, len): (u64, usize)) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        bytes.extend_from_slice(&(state >> 8).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn attributes(stat: Stat) -> Outcome {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_dir = kind == FileType::Directory;
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    // What passes through a fifo moves the times of the kernel's own inode; FUSE is not told.
    let now = stat.st_mtime >= NOW || kind == FileType::Fifo;
    Outcome::Attributes([
        i128::from(stat.st_mode),
        if is_dir { 0 } else { i128::from(stat.st_nlink) },
        i128::from(stat.st_uid),
        i128::from(stat.st_gid),
        if is_dir { 0 } else { i128::from(stat.st_size) },
        if is_device {
            i128::from(stat.st_rdev)
        } else {
            0
        },
        if now { 0 } else { i128::from(stat.st_mtime) },
        if now {
            0
        } else {
            i128::from(stat.st_mtime_nsec)
        },
    ])
}

fn list(fd: &OwnedFd) -> Result<Outcome> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        names.push((
            entry.file_name().to_bytes().to_vec(),
            format!("{:?}", entry.file_type()),
        ));
    }
    names.sort();
    Ok(Outcome::Names(names))
}

fn xattrs(
    list: impl FnOnce(&mut [u8]) -> Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> Result<usize>,
) -> Result<Outcome> {
    let mut names = vec![0; 64 << 10];
    let length = list(&mut names)?;
    let mut all = Vec::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 64 << 10];
        let length = get(name, &mut value)?;
        value.truncate(length);
        all.push((name.to_vec(), value));
    }
    all.sort();
    Ok(Outcome::Xattrs(all))
}

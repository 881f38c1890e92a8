//! Performs one operation on one tree. The outcome is comparable between two trees: results and error numbers, without
//! values that may differ (inode numbers, current times, sizes and link counts of directories).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    Advice, AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps,
    UTIME_NOW, Uid, XattrFlags,
};
use rustix::io::{Errno, Result};

use super::looking::{attributes, list, xattrs};
use super::mapping::Mapping;
use super::operation::{Caller, MAPS, Op, SLOTS};

/// Outcome of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Failure.
    Failed(Errno),
    /// Success without a result.
    Done,
    /// Number of bytes.
    Count(usize),
    /// Bytes read.
    Bytes(Vec<u8>),
    /// Names with their types, sorted.
    Names(Vec<(Vec<u8>, String)>),
    /// Attributes: mode with type, links, owner, group, size, device, mtime.
    Attributes([i128; 8]),
    /// Extended attributes with their values, sorted.
    Xattrs(Vec<(Vec<u8>, Vec<u8>)>),
    /// Violations of POSIX, on any file system.
    Wrong(Vec<String>),
}

/// Identity of the file of a descriptor or a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Inode number.
    pub ino: u64,
    /// Birth time, if the file system reports it.
    pub born: (i64, u32),
}

/// One of the two trees, with the descriptors and mappings that are held in it.
#[derive(Debug)]
pub struct Side {
    pub(super) root: OwnedFd,
    slots: [Option<OwnedFd>; SLOTS],
    maps: [Option<Mapping>; MAPS],
}

pub(super) const NO_TERMINAL: OFlags = OFlags::CLOEXEC
    .union(OFlags::NOCTTY)
    .union(OFlags::NONBLOCK);
pub(super) const MOST: usize = 1 << 20;

impl Side {
    /// Opens the tree at `root`.
    #[must_use]
    pub fn new(root: &Path) -> Side {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, root, flags, Mode::empty())
            .unwrap_or_else(|error| panic!("cannot open {}: {error}", root.display()));
        Side {
            root,
            slots: Default::default(),
            maps: Default::default(),
        }
    }

    /// Performs `op` with the credentials of `caller`.
    pub fn perform(&mut self, op: &Op, caller: Caller) -> Outcome {
        let caller = if *op == Op::DropCaches {
            Caller::ROOT
        } else {
            caller
        };
        // These operations set or report times.
        if let Op::Utimens { .. } | Op::FdUtimens { .. } | Op::Stat { .. } | Op::FdStat { .. } = op
        {
            self.sync_mappings();
        }
        become_user(caller);
        let outcome = self.attempt(op);
        become_user(Caller::ROOT);
        outcome.unwrap_or_else(Outcome::Failed)
    }

    /// Writes all dirty pages of mappings. FUSE learns of a store through a mapping at writeback, and takes that time
    /// as mtime (docs/semantics.md), so writeback must precede every operation that sets or reports times.
    pub fn sync_mappings(&self) {
        for map in self.maps.iter().flatten() {
            map.sync().expect("syncing a mapping");
        }
    }

    /// Returns the identity of every held file: slots, then mappings.
    #[must_use]
    pub fn held(&self) -> Vec<Option<Held>> {
        let slots = self.slots.iter().map(|fd| fd.as_ref().map(held));
        let maps = self
            .maps
            .iter()
            .map(|map| map.as_ref().map(|m| held(m.file())));
        slots.chain(maps).collect()
    }

    pub(super) fn attempt(&mut self, op: &Op) -> Result<Outcome> {
        let outcome = match self.by_descriptor(op) {
            Some(outcome) => return outcome,
            None => self.by_mapping(op),
        };
        match outcome {
            Some(outcome) => outcome,
            None => match self.by_name(op) {
                Some(outcome) => outcome,
                None => self.looking(op),
            },
        }
    }

    fn map(&self, map: usize) -> Result<&Mapping> {
        self.maps[map].as_ref().ok_or(Errno::BADF)
    }

    fn by_mapping(&mut self, op: &Op) -> Option<Result<Outcome>> {
        Some(match op {
            Op::Map { slot, map, write } => {
                self.maps[*map] = None;
                self.fd(*slot)
                    .and_then(|fd| Mapping::new(fd, *write))
                    .map(|mapping| {
                        self.maps[*map] = Some(mapping);
                        Outcome::Done
                    })
            }
            Op::Unmap { map } => {
                self.maps[*map] = None;
                Ok(Outcome::Done)
            }
            Op::MapRead { map, offset, len } => self
                .map(*map)
                .and_then(|map| map.read(*offset, *len))
                .map(Outcome::Bytes),
            Op::MapWrite { map, offset, data } => self
                .map(*map)
                .and_then(|map| map.write(*offset, &pattern(*data)))
                .map(Outcome::Count),
            Op::MapSync { map } => self
                .map(*map)
                .and_then(Mapping::sync)
                .map(|()| Outcome::Done),
            Op::ListWhile { path, inner } => self.list_while(path, inner),
            _ => return None,
        })
    }

    pub(super) fn fd(&self, slot: usize) -> Result<&OwnedFd> {
        self.slots[slot].as_ref().ok_or(Errno::BADF)
    }

    /// Returns an absolute path, for system calls that do not take a directory descriptor.
    pub(super) fn path(&self, path: &[u8]) -> Vec<u8> {
        let mut full = format!("/proc/self/fd/{}/", self.root.as_raw_fd()).into_bytes();
        full.extend_from_slice(path);
        full
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
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
                    .and_then(|fd| rustix::fs::futimens(fd, &times(Some(*seconds)))),
            ),
            Op::FdDropPages { slot } => done(self.fd(*slot).and_then(|fd| {
                // fadvise does not drop dirty pages.
                rustix::fs::fdatasync(fd)?;
                rustix::fs::fadvise(fd, 0, None, Advice::DontNeed)
            })),
            Op::FdSeek { slot, offset, hole } => self
                .fd(*slot)
                .and_then(|fd| {
                    // The meaning of directory offsets depends on the file system.
                    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
                    if kind != FileType::RegularFile {
                        return Err(Errno::INVAL);
                    }
                    let from = if *hole {
                        SeekFrom::Hole(*offset)
                    } else {
                        SeekFrom::Data(*offset)
                    };
                    rustix::fs::seek(fd, from)
                })
                .map(|offset| Outcome::Count(usize::try_from(offset).unwrap_or_default())),
            Op::FdChown { slot, uid, gid } => done(self.fd(*slot).and_then(|fd| {
                rustix::fs::fchown(fd, uid.map(Uid::from_raw), gid.map(Gid::from_raw))
            })),
            Op::FdRemovexattr { slot, name } => done(
                self.fd(*slot)
                    .and_then(|fd| rustix::fs::fremovexattr(fd, *name)),
            ),
            Op::FdReopen { slot, to, flags } => {
                let opened = self.fd(*slot).and_then(|fd| {
                    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                    rustix::fs::open(path, *flags | NO_TERMINAL, Mode::empty())
                });
                opened.map(|fd| {
                    self.slots[*to] = Some(fd);
                    Outcome::Done
                })
            }
            Op::FdLink { slot, path } => done(self.fd(*slot).and_then(|fd| {
                let from = format!("/proc/self/fd/{}", fd.as_raw_fd());
                rustix::fs::linkat(CWD, from, &self.root, path, AtFlags::SYMLINK_FOLLOW)
            })),
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
        // A short copy is always permitted, so only the total can be compared.
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

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
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
            Op::RemoveTree { path } => remove_tree(root.as_fd(), path),
            Op::Unlink { path } => rustix::fs::unlinkat(root, path, AtFlags::empty()),
            Op::Rename { from, to, flags } => {
                let mut flags = *flags;
                // If the target exists, ext4 updates the directory's times although a rename with these flags fails.
                if rustix::fs::statat(root, to, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                    flags -= RenameFlags::WHITEOUT;
                }
                match rustix::fs::renameat_with(root, from, root, to, flags) {
                    // POSIX permits both errors for a directory that is not empty. XFS returns this one.
                    Err(Errno::EXIST) if !flags.contains(RenameFlags::NOREPLACE) => {
                        Err(Errno::NOTEMPTY)
                    }
                    done => done,
                }
            }
            Op::Link { from, to } => rustix::fs::linkat(root, from, root, to, AtFlags::empty()),
            Op::Symlink { target, path } => rustix::fs::symlinkat(target, root, path),
            Op::Mkfifo { path, mode } => {
                let mode = Mode::from_raw_mode(*mode);
                rustix::fs::mknodat(root, path, FileType::Fifo, mode, 0)
            }
            Op::Mknod { path, mode, device } => {
                let device = rustix::fs::makedev(device.0, device.1);
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
            Op::Cut { path, len } => {
                let path = self.path(path);
                let path = std::ffi::OsStr::from_bytes(&path);
                let len = i64::try_from(*len).unwrap_or_default();
                nix::unistd::truncate(path, len)
                    .map_err(|errno| Errno::from_raw_os_error(errno as i32))
            }
            Op::DropCaches => {
                // If this fails, the run covers less but remains correct.
                if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "2") {
                    eprintln!("cannot drop caches: {error}");
                }
                Ok(())
            }
            _ => return None,
        };
        Some(done.map(|()| Outcome::Done))
    }
}

/// Removes a tree, in the same order on every file system, and stops at the first error.
fn remove_tree(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        // POSIX permits EPERM for a directory.
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | NO_TERMINAL;
    let directory = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    let Outcome::Names(names) = list(&directory)? else {
        return Err(Errno::NOTDIR);
    };
    for (name, _) in names {
        if name != b"." && name != b".." {
            remove_tree(directory.as_fd(), &name)?;
        }
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}

/// Changes the effective user, groups and umask of this thread. The real and saved ids remain those of root.
fn become_user(caller: Caller) {
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    let (uid, gid) = (Uid::from_raw(caller.id), Gid::from_raw(caller.id));
    let groups: Vec<Gid> = caller.groups.iter().map(|id| Gid::from_raw(*id)).collect();
    rustix::process::umask(Mode::from_raw_mode(caller.umask));
    let result = if caller.id == 0 {
        set_thread_res_uid(None, uid, None)
            .and_then(|()| set_thread_res_gid(None, gid, None))
            .and_then(|()| set_thread_groups(&groups))
    } else {
        set_thread_groups(&groups)
            .and_then(|()| set_thread_res_gid(None, gid, None))
            .and_then(|()| set_thread_res_uid(None, uid, None))
    };
    result.unwrap_or_else(|error| panic!("cannot become user {}: {error}", caller.id));
}

fn held(fd: impl AsFd) -> Held {
    use rustix::fs::{StatxFlags, statx};
    let flags = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let found = statx(fd, "", AtFlags::EMPTY_PATH, flags).expect("statx of a descriptor");
    Held {
        ino: found.stx_ino,
        born: (found.stx_btime.tv_sec, found.stx_btime.tv_nsec),
    }
}

pub(super) fn at_flags(follow: bool) -> AtFlags {
    if follow {
        AtFlags::empty()
    } else {
        AtFlags::SYMLINK_NOFOLLOW
    }
}

/// Returns timestamps with the given seconds, or the current time.
fn times(seconds: Option<i64>) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds.unwrap_or_default(),
        tv_nsec: match seconds {
            Some(_) => 123_456_789,
            None => UTIME_NOW,
        },
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Returns `len` bytes that depend only on the seed and contain no long run of zeros.
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

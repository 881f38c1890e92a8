//! Operations that read a tree. Their outcomes are comparable between two trees.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{Access, AtFlags, Dir, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Result;

use super::operation::Op;
use super::perform::{MOST, NO_TERMINAL, Outcome, Side, at_flags};
use crate::tree::{NOW, is_acl_alias};

impl Side {
    pub(super) fn looking(&self, op: &Op) -> Result<Outcome> {
        let root = &self.root;
        match op {
            Op::Read { path } => {
                let fd =
                    rustix::fs::openat(root, path, OFlags::RDONLY | NO_TERMINAL, Mode::empty())?;
                // Reads of terminals, /dev/full and similar devices do not end.
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
            other => panic!("unhandled operation {other:?}"),
        }
    }

    /// Reads half of a directory, performs `inner`, and reads the rest. A name that refers to the same object before
    /// and after must be listed exactly once. No name may be listed twice, or listed without existing before or after.
    pub(super) fn list_while(&mut self, path: &[u8], inner: &Op) -> Result<Outcome> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | NO_TERMINAL;
        let open = |side: &Side| rustix::fs::openat(&side.root, path, flags, Mode::empty());
        let dir = open(self)?;
        let numbers = |fd: &OwnedFd| -> Result<BTreeMap<Vec<u8>, u64>> {
            Dir::read_from(fd)?
                .map(|entry| entry.map(|e| (e.file_name().to_bytes().to_vec(), e.ino())))
                .collect()
        };
        // A separate descriptor, because the listing below must start at the beginning.
        let before = numbers(&open(self)?)?;
        // A small buffer, which forces several getdents calls. It holds one entry with a name of maximum length.
        let mut buffer = [MaybeUninit::<u8>::uninit(); 320];
        let mut listing = RawDir::new(&dir, &mut buffer);
        let mut listed: Vec<Vec<u8>> = Vec::new();
        let mut outcome = None;
        loop {
            if listed.len() >= before.len() / 2 && outcome.is_none() {
                outcome = Some(self.attempt(inner).unwrap_or_else(Outcome::Failed));
            }
            match listing.next() {
                Some(entry) => listed.push(entry?.file_name().to_bytes().to_vec()),
                None => break,
            }
        }
        let outcome = match outcome {
            Some(outcome) => outcome,
            None => self.attempt(inner).unwrap_or_else(Outcome::Failed),
        };
        let after = numbers(&reopen(&dir)?)?;
        let distinct: BTreeSet<&Vec<u8>> = listed.iter().collect();
        let mut wrong = Vec::new();
        if distinct.len() != listed.len() {
            wrong.push("a name is listed twice".to_owned());
        }
        for (name, number) in &before {
            if after.get(name) == Some(number) && !distinct.contains(name) {
                wrong.push(format!("{} is missing", name.escape_ascii()));
            }
        }
        for name in distinct {
            if !before.contains_key(name) && !after.contains_key(name) {
                wrong.push(format!(
                    "{} is listed but never existed",
                    name.escape_ascii()
                ));
            }
        }
        Ok(if wrong.is_empty() {
            outcome
        } else {
            Outcome::Wrong(wrong)
        })
    }
}

/// Reopens the directory by descriptor, at its current path, to list it from the beginning.
fn reopen(dir: &OwnedFd) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | NO_TERMINAL;
    rustix::fs::openat(dir, ".", flags, Mode::empty())
}

pub(super) fn attributes(stat: Stat) -> Outcome {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_dir = kind == FileType::Directory;
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    // I/O on a fifo updates the times of the kernel's own inode, without a FUSE request.
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

pub(super) fn list(fd: &OwnedFd) -> Result<Outcome> {
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

pub(super) fn xattrs(
    list: impl FnOnce(&mut [u8]) -> Result<usize>,
    get: impl Fn(&[u8], &mut [u8]) -> Result<usize>,
) -> Result<Outcome> {
    let mut names = vec![0; 64 << 10];
    let length = list(&mut names)?;
    let mut all = Vec::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && !is_acl_alias(name))
    {
        let mut value = vec![0; 64 << 10];
        let length = get(name, &mut value)?;
        value.truncate(length);
        all.push((name.to_vec(), value));
    }
    all.sort();
    Ok(Outcome::Xattrs(all))
}

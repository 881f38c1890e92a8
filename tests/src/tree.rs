//! Reads trees and compares them: all stat fields, content, xattrs and hard links.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, readlinkat, statat};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

/// Times after this one count as the current time, which two trees that are created one after the other do not share.
pub const NOW: i64 = 1_700_000_000;

/// Xattrs by name.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// The object at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Type of the object.
    pub kind: FileType,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Link count; 0 for directories.
    pub nlink: u64,
    /// Size; 0 for directories.
    pub size: u64,
    /// Device number, for devices.
    pub rdev: u64,
    /// Modification time.
    pub mtime: (i64, u32),
    /// Inode number.
    pub ino: u64,
    /// Inode number in the directory listing.
    pub listed_ino: u64,
    /// Birth time, if the file system reports it; never compared.
    pub born: (i64, u32),
    /// Target, for symlinks.
    pub target: Option<Vec<u8>>,
    /// SHA-256 of the content, for files.
    pub content: Option<[u8; 32]>,
    /// All xattrs.
    pub xattrs: Xattrs,
}

/// A tree: the object at each path relative to the root; the path of the root is empty.
pub type Tree = BTreeMap<Vec<u8>, Entry>;

/// Reads the tree at `root`, without crossing mount points.
pub fn read(root: &Path) -> Result<Tree> {
    let fd = openat(
        CWD,
        root,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let device = rustix::fs::fstat(&fd)?.st_dev;
    let mut tree = Tree::new();
    let mut entry = entry(fd.as_fd(), b".")?;
    entry.listed_ino = entry.ino;
    tree.insert(Vec::new(), entry);
    walk(&fd, b"", device, &mut tree)?;
    Ok(tree)
}

fn walk(dir: &OwnedFd, path: &[u8], device: u64, tree: &mut Tree) -> Result<()> {
    for listed in Dir::read_from(dir)? {
        let listed = listed?;
        let name = listed.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let mut full = path.to_vec();
        if !full.is_empty() {
            full.push(b'/');
        }
        full.extend_from_slice(name);
        let context = |error: std::io::Error| {
            std::io::Error::new(error.kind(), format!("{}: {error}", full.escape_ascii()))
        };
        let mut found = entry(dir.as_fd(), name).map_err(context)?;
        found.listed_ino = listed.ino();
        let is_dir = found.kind == FileType::Directory;
        if tree.insert(full.clone(), found).is_some() {
            return Err(std::io::Error::other(format!(
                "{} is listed twice",
                full.escape_ascii()
            )));
        }
        if is_dir {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = openat(dir, name, flags, Mode::empty()).map_err(|e| context(e.into()))?;
            if rustix::fs::fstat(&below)?.st_dev == device {
                walk(&below, &full, device, tree)?;
            }
        }
    }
    Ok(())
}

fn entry(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Entry> {
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
    let is_dir = kind == FileType::Directory;
    Ok(Entry {
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        nlink: if is_dir { 0 } else { stat.st_nlink },
        size: if is_dir {
            0
        } else {
            u64::try_from(stat.st_size).unwrap_or(u64::MAX)
        },
        rdev: if is_device { stat.st_rdev } else { 0 },
        mtime: (
            stat.st_mtime,
            u32::try_from(stat.st_mtime_nsec).unwrap_or(u32::MAX),
        ),
        ino: stat.st_ino,
        listed_ino: 0,
        born: born(dir, name)?,
        target: match kind {
            FileType::Symlink => Some(readlinkat(dir, name, Vec::new())?.into_bytes()),
            _ => None,
        },
        content: match kind {
            FileType::RegularFile => Some(hash(dir, name)?),
            _ => None,
        },
        xattrs: xattrs(dir, name)?,
    })
}

fn born(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(i64, u32)> {
    let (flags, mask) = (AtFlags::SYMLINK_NOFOLLOW, rustix::fs::StatxFlags::BTIME);
    let time = rustix::fs::statx(dir, name, flags, mask)?.stx_btime;
    Ok((time.tv_sec, time.tv_nsec))
}

fn hash(dir: BorrowedFd<'_>, name: &[u8]) -> Result<[u8; 32]> {
    let mut file = File::from(openat(
        dir,
        name,
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().into()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

/// Returns the xattrs of `name` in `dir`. Does not follow symlinks.
pub fn xattrs(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Xattrs> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let path = path.as_slice();
    let mut list = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(Xattrs::new()),
        Err(error) => return Err(error.into()),
    };
    let mut all = Xattrs::new();
    for attribute in list[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && !is_acl_alias(name))
    {
        let mut value = vec![0; 64 << 10];
        match rustix::fs::lgetxattr(path, attribute, &mut value[..]) {
            Ok(length) => value.truncate(length),
            // The kernel does not return invalid capabilities.
            Err(Errno::INVAL) if attribute == b"security.capability" => value = b"invalid".to_vec(),
            Err(error) => return Err(error.into()),
        }
        all.insert(attribute.to_vec(), value);
    }
    Ok(all)
}

/// Returns whether XFS lists an ACL under this name as well. A mount does not.
#[must_use]
pub fn is_acl_alias(name: &[u8]) -> bool {
    name.starts_with(b"trusted.SGI_ACL_")
}

/// The paths in a tree, without its root.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// All paths.
    pub all: Vec<Vec<u8>>,
    /// The paths of directories.
    pub dirs: Vec<Vec<u8>>,
}

/// Returns the paths below `root`, without reading the objects.
pub fn paths(root: &Path) -> Result<Paths> {
    let mut paths = Paths::default();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let path = entry.path();
            let below = path.strip_prefix(root).map_err(std::io::Error::other)?;
            let below = below.as_os_str().as_bytes().to_vec();
            paths.all.push(below.clone());
            if entry.file_type()?.is_dir() {
                paths.dirs.push(below);
                open.push(path);
            }
        }
    }
    paths.all.sort();
    paths.dirs.sort();
    Ok(paths)
}

/// Opens every object below `root` without reading it, so that the kernel forgets none of them until the returned
/// descriptors are closed.
pub fn open_all(root: &Path) -> Result<Vec<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |below: &Vec<u8>| {
        let path = root.join(OsStr::from_bytes(below));
        rustix::fs::open(path, flags, Mode::empty()).map_err(std::io::Error::from)
    };
    paths(root)?.all.iter().map(open).collect()
}

/// Fields that a comparison includes.
#[derive(Debug, Clone, Copy)]
pub struct Compare {
    /// Link counts of files.
    pub nlink: bool,
    /// Hard links: paths that refer to one file in one tree must do so in the other.
    pub groups: bool,
    /// Exact modification times, including current ones.
    pub exact_times: bool,
    /// Inode numbers, for one file system at two times.
    pub numbers: bool,
}

impl Compare {
    /// Two trees on two file systems with the same history.
    pub const HISTORY: Compare = Compare {
        nlink: true,
        groups: true,
        exact_times: false,
        numbers: false,
    };
    /// One tree that is read twice.
    pub const SAME: Compare = Compare {
        nlink: true,
        groups: true,
        exact_times: true,
        numbers: false,
    };
    /// A tree and a copy by a program that reports the link counts of the layer, not of the merge.
    pub const READER: Compare = Compare {
        nlink: false,
        groups: true,
        exact_times: true,
        numbers: false,
    };
    /// One file system, before and after an operation.
    pub const IDENTICAL: Compare = Compare {
        nlink: true,
        groups: true,
        exact_times: true,
        numbers: true,
    };
}

/// Returns the differences of `b` from `a`, one per line; empty if they are equal.
#[must_use]
pub fn differences(a: &Tree, b: &Tree, compare: Compare) -> Vec<String> {
    let mut lines = Vec::new();
    let show = |path: &[u8]| format!("/{}", path.escape_ascii());
    for path in a.keys().filter(|path| !b.contains_key(*path)) {
        lines.push(format!("{}: only in the first", show(path)));
    }
    for path in b.keys().filter(|path| !a.contains_key(*path)) {
        lines.push(format!("{}: only in the second", show(path)));
    }
    for (path, left) in a {
        let Some(right) = b.get(path) else { continue };
        let (left, right) = (normalized(left, compare), normalized(right, compare));
        if left != right {
            lines.push(format!(
                "{}: {}",
                show(path),
                describe_differences(&left, &right)
            ));
        }
    }
    if compare.groups {
        let (left, right) = (groups(a), groups(b));
        for (path, first) in &left {
            if let Some(other) = right.get(path)
                && other != first
            {
                lines.push(format!(
                    "{}: one file with {} in the first, with {} in the second",
                    show(path),
                    show(first),
                    show(other)
                ));
            }
        }
    }
    lines
}

fn normalized(entry: &Entry, compare: Compare) -> Entry {
    let mut entry = entry.clone();
    entry.listed_ino = 0;
    entry.born = (0, 0);
    if !compare.nlink {
        entry.nlink = 0;
    }
    if !compare.numbers {
        entry.ino = 0;
    }
    if !compare.exact_times && entry.mtime.0 >= NOW {
        entry.mtime = (NOW, 0);
    }
    // I/O on a fifo updates the times of the kernel's own inode only, without a FUSE request (the kernel's FUSE sets
    // S_NOCMTIME on all types other than regular files).
    if entry.kind == FileType::Fifo && !compare.exact_times {
        entry.mtime = (NOW, 0);
    }
    entry
}

fn describe_differences(a: &Entry, b: &Entry) -> String {
    let mut parts = Vec::new();
    let mut field = |name: &str, left: String, right: String| {
        if left != right {
            parts.push(format!("{name} {left} != {right}"));
        }
    };
    field("type", format!("{:?}", a.kind), format!("{:?}", b.kind));
    field("mode", format!("{:o}", a.mode), format!("{:o}", b.mode));
    field(
        "owner",
        format!("{}:{}", a.uid, a.gid),
        format!("{}:{}", b.uid, b.gid),
    );
    field("links", a.nlink.to_string(), b.nlink.to_string());
    field("size", a.size.to_string(), b.size.to_string());
    field("device", format!("{:x}", a.rdev), format!("{:x}", b.rdev));
    field("mtime", format!("{:?}", a.mtime), format!("{:?}", b.mtime));
    field("inode", a.ino.to_string(), b.ino.to_string());
    let text = |bytes: &Option<Vec<u8>>| bytes.as_ref().map(|b| b.escape_ascii().to_string());
    field(
        "target",
        format!("{:?}", text(&a.target)),
        format!("{:?}", text(&b.target)),
    );
    let digest = |bytes: &Option<[u8; 32]>| bytes.map(|b| hex(&b[..6]));
    field(
        "content",
        format!("{:?}", digest(&a.content)),
        format!("{:?}", digest(&b.content)),
    );
    field("xattrs", show_xattrs(&a.xattrs), show_xattrs(&b.xattrs));
    parts.join(", ")
}

fn show_xattrs(all: &Xattrs) -> String {
    let show = |(name, value): (&Vec<u8>, &Vec<u8>)| {
        format!("{}={}", name.escape_ascii(), value.escape_ascii())
    };
    format!("{{{}}}", all.iter().map(show).collect::<Vec<_>>().join(" "))
}

/// Returns, for each path, the first path with the same inode.
fn groups(tree: &Tree) -> BTreeMap<&[u8], &[u8]> {
    let mut by_ino: BTreeMap<u64, Vec<&[u8]>> = BTreeMap::new();
    for (path, entry) in tree {
        by_ino.entry(entry.ino).or_default().push(path);
    }
    let mut groups = BTreeMap::new();
    for paths in by_ino.values() {
        for path in paths {
            groups.insert(*path, paths[0]);
        }
    }
    groups
}

/// Returns the paths whose inode number in the directory listing differs from that of stat.
#[must_use]
pub fn wrong_listed_numbers(tree: &Tree) -> Vec<String> {
    tree.iter()
        .filter(|(_, entry)| entry.listed_ino != entry.ino)
        .map(|(path, entry)| {
            format!(
                "/{}: listed {}, stat {}",
                path.escape_ascii(),
                entry.listed_ino,
                entry.ino
            )
        })
        .collect()
}

/// Reads the tree at `dir`, and panics with at most twenty differences unless it is equal to `expected`.
#[track_caller]
pub fn assert_tree(label: &str, dir: &Path, expected: &Tree) {
    assert_same(label, &read(dir).unwrap(), expected, Compare::SAME);
}

/// Panics with at most twenty differences unless the trees are equal.
#[track_caller]
pub fn assert_same(label: &str, a: &Tree, b: &Tree, compare: Compare) {
    let lines = differences(a, b, compare);
    assert!(
        lines.is_empty(),
        "{label}: {} differences\n{}",
        lines.len(),
        lines
            .iter()
            .take(20)
            .map(|line| format!("  {line}\n"))
            .collect::<String>()
    );
}

/// Formats bytes as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_detected() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = dir.path();
        std::fs::write(root.join("a"), "one").unwrap();
        std::fs::hard_link(root.join("a"), root.join("b")).unwrap();
        std::fs::write(root.join("c"), "two").unwrap();
        let before = read(root).unwrap();
        assert_eq!(
            differences(&before, &before, Compare::IDENTICAL),
            Vec::<String>::new()
        );
        assert_eq!(wrong_listed_numbers(&before), Vec::<String>::new());
        std::fs::write(root.join("c"), "owt").unwrap();
        std::fs::remove_file(root.join("b")).unwrap();
        std::fs::write(root.join("b"), "one").unwrap();
        std::fs::write(root.join("d"), "").unwrap();
        let lines = differences(&before, &read(root).unwrap(), Compare::HISTORY).join("\n");
        for expected in [
            "/a: links 2 != 1",
            "/c: content",
            "/d: only in the second",
            "/b: one file",
        ] {
            assert!(lines.contains(expected), "{expected} not in\n{lines}");
        }
    }
}

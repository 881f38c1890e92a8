//! Operations on one or a few files, in steps, and the states that are permitted after a cut.

use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, Timespec, Timestamps, XattrFlags};

use crate::random::rng::Rng;

/// Number of directories that contain the files.
pub const DIRS: usize = 7;
/// Modification time of the lower files, in seconds.
const LONG_AGO: u64 = 1_000_000_000;
const XATTR: &str = "user.cut";

/// An operation on a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Appends bytes to a lower file.
    Append,
    /// Opens a lower file with O_TRUNC and writes new content.
    Rewrite,
    /// Overwrites one byte in the middle of a lower file.
    Poke,
    /// Overwrites one byte in the middle of a lower file of 16 MiB.
    PokeBig,
    /// Changes mode, owner and an xattr of a lower file, then appends bytes.
    Metadata,
    /// Renames a lower file.
    Rename,
    /// Renames a lower file over another.
    RenameOver,
    /// Appends to a lower file, then renames it over another.
    AppendRename,
    /// Removes a lower file.
    Unlink,
    /// Writes a new file, syncs it, and renames it over the lower file, as dpkg does.
    Replace,
    /// Appends to one of three hard links of a lower file.
    Group,
    /// Creates a hard link to a lower file.
    Link,
    /// Renames a lower directory that contains a file.
    RenameDir,
    /// Empties and removes a lower directory, and creates it again.
    RemoveDir,
    /// Creates a new file.
    New,
    /// Changes the owner of a lower symlink.
    Lchown,
}

/// All kinds. Those that an incorrect copy-up would lose occur more often.
pub const KINDS: &[Kind] = &[
    Kind::Append,
    Kind::Append,
    Kind::Append,
    Kind::Append,
    Kind::Poke,
    Kind::Poke,
    Kind::Poke,
    Kind::Rewrite,
    Kind::Metadata,
    Kind::Metadata,
    Kind::Rename,
    Kind::RenameOver,
    Kind::AppendRename,
    Kind::AppendRename,
    Kind::Unlink,
    Kind::Replace,
    Kind::Group,
    Kind::Link,
    Kind::RenameDir,
    Kind::RemoveDir,
    Kind::New,
    Kind::Lchown,
];

/// Result of a check, with a description of the problem.
pub type Verdict = Result<(), String>;

/// One or a few related files, with an operation on them.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The operation.
    pub kind: Kind,
    /// Number that determines the names and the content.
    pub id: usize,
    /// Whether the program syncs its changes.
    pub synced: bool,
    /// Whether both names may exist after a rename that was not synced: on btrfs, the fsync of another file may write
    /// the new name, and the whiteout follows with the next commit.
    pub both_names: bool,
    /// Whether a chown that was not synced may set the owner without clearing setuid and setgid: ext4 journals the owner
    /// first, and then the mode, so that a commit between them contains only the owner.
    pub owner_first: bool,
}

impl Subject {
    /// Returns the main path of the subject.
    fn path(&self, root: &Path) -> PathBuf {
        self.named(root, "f")
    }

    /// Returns the name of the subject's directory, and the number in the names of its files.
    #[must_use]
    pub fn place(&self) -> (String, String) {
        (format!("d{}", self.id % DIRS), self.id.to_string())
    }

    /// Returns another path in the same directory.
    fn named(&self, root: &Path, prefix: &str) -> PathBuf {
        root.join(format!("d{}/{prefix}{}", self.id % DIRS, self.id))
    }

    fn other_directory(&self, root: &Path) -> PathBuf {
        let directory = (self.id + 1) % DIRS;
        root.join(format!("d{directory}/third{}", self.id))
    }

    fn bytes(&self, salt: u64, length: usize) -> Vec<u8> {
        // No byte is zero, so that blocks that were never written are detected. The period is not a divisor of the
        // block size, so that misplaced blocks are detected.
        const PATTERN: usize = 4093;
        let mut rng = Rng::new((self.id as u64) << 8 | salt);
        let mut out = Vec::with_capacity(length + PATTERN);
        while out.len() < length.min(PATTERN) {
            out.extend(rng.number().to_le_bytes().map(|byte| byte | 1));
        }
        out.truncate(length.min(PATTERN));
        while out.len() < length {
            out.extend_from_within(..PATTERN);
        }
        out.truncate(length);
        out
    }

    /// Returns the content of the lower file.
    fn original(&self) -> Vec<u8> {
        let mut rng = Rng::new(self.id as u64);
        let length = match self.kind {
            Kind::PokeBig => 16 << 20,
            _ if rng.chance(40) => 1 + rng.below(4000),
            _ if rng.chance(70) => rng.below(60_000) + 4000,
            _ => rng.below(1_500_000) + 60_000,
        };
        self.bytes(1, usize::try_from(length).unwrap_or_default())
    }

    fn tail(&self) -> Vec<u8> {
        self.bytes(2, 1 + self.id * 37 % 9000)
    }

    fn other(&self) -> Vec<u8> {
        self.bytes(3, 1 + self.id * 91 % 50_000)
    }

    /// Creates the subject's files in the lower layer.
    pub fn plant(&self, lower: &Path) {
        let main = self.path(lower);
        match self.kind {
            Kind::New => return,
            Kind::RenameDir | Kind::RemoveDir => {
                std::fs::create_dir(&main).unwrap();
                plain(&main.join("in"), &self.original());
                return;
            }
            Kind::Lchown => return std::os::unix::fs::symlink("to", &main).unwrap(),
            _ => plain(&main, &self.original()),
        }
        match self.kind {
            Kind::RenameOver | Kind::AppendRename => {
                plain(&self.named(lower, "over"), &self.other());
            }
            Kind::Group => {
                std::fs::hard_link(&main, self.named(lower, "second")).unwrap();
                std::fs::hard_link(&main, self.other_directory(lower)).unwrap();
            }
            _ => {}
        }
    }

    /// Returns the number of steps.
    #[must_use]
    pub fn steps(&self) -> usize {
        match self.kind {
            Kind::Metadata => 4,
            Kind::AppendRename => 2,
            Kind::RemoveDir => 3,
            _ => 1,
        }
    }

    /// Performs step number `step`, counted from 1. Returns whether the change was synced.
    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    pub fn take(&self, root: &Path, step: usize) -> bool {
        let path = self.path(root);
        match (self.kind, step) {
            (Kind::Append | Kind::Group | Kind::AppendRename, 1) | (Kind::Metadata, 4) => {
                let mut file = OpenOptions::new().append(true).open(&path).unwrap();
                file.write_all(&self.tail()).unwrap();
                self.sync_content(&file)
            }
            (Kind::Rewrite, _) => {
                let mut file = File::create(&path).unwrap();
                file.write_all(&self.other()).unwrap();
                self.sync_content(&file)
            }
            (Kind::Poke | Kind::PokeBig, _) => {
                let file = OpenOptions::new().write(true).open(&path).unwrap();
                let middle = self.original().len() as u64 / 2;
                file.write_all_at(b"!", middle).unwrap();
                self.sync_content(&file)
            }
            (Kind::Metadata, 1) => {
                std::fs::set_permissions(&path, Permissions::from_mode(0o6711)).unwrap();
                false
            }
            (Kind::Metadata, 2) => {
                std::os::unix::fs::lchown(&path, Some(1234), Some(2345)).unwrap();
                false
            }
            (Kind::Metadata, _) => {
                rustix::fs::setxattr(&path, XATTR, b"value", XattrFlags::empty()).unwrap();
                self.sync(&File::open(&path).unwrap())
            }
            (Kind::Rename, _) => {
                let to = self.named(root, "to");
                std::fs::rename(&path, &to).unwrap();
                self.sync(&File::open(&to).unwrap()) && self.sync_directory(root)
            }
            (Kind::RenameOver | Kind::AppendRename, _) => {
                std::fs::rename(&path, self.named(root, "over")).unwrap();
                self.synced && self.sync_directory(root)
            }
            (Kind::Unlink, _) => {
                std::fs::remove_file(&path).unwrap();
                self.synced && self.sync_directory(root)
            }
            (Kind::Replace, _) => {
                let new = self.named(root, "dpkg-new");
                let mut file = File::create_new(&new).unwrap();
                file.write_all(&self.other()).unwrap();
                file.sync_all().unwrap();
                std::fs::rename(&new, &path).unwrap();
                self.synced && self.sync_directory(root)
            }
            (Kind::Link, _) => {
                std::fs::hard_link(&path, self.named(root, "to")).unwrap();
                self.synced && self.sync_directory(root)
            }
            (Kind::RenameDir, _) => {
                std::fs::rename(&path, self.named(root, "to")).unwrap();
                self.synced && self.sync_directory(root)
            }
            (Kind::RemoveDir, 1) => {
                std::fs::remove_file(path.join("in")).unwrap();
                false
            }
            (Kind::RemoveDir, 2) => {
                std::fs::remove_dir(&path).unwrap();
                self.synced && self.sync_directory(root)
            }
            (Kind::RemoveDir, _) => {
                std::fs::create_dir(&path).unwrap();
                self.synced && self.sync_directory(root)
            }
            (Kind::New, _) => {
                let mut file = File::create_new(&path).unwrap();
                file.write_all(&self.other()).unwrap();
                self.sync(&file) && self.sync_directory(root)
            }
            (Kind::Lchown, _) => {
                std::os::unix::fs::lchown(&path, Some(77), Some(78)).unwrap();
                false
            }
            (Kind::Append | Kind::Group, _) => unreachable!("one step only"),
        }
    }

    /// Syncs with either fdatasync or fsync; both guarantee that the content is durable.
    fn sync_content(&self, file: &File) -> bool {
        if self.synced && self.id.is_multiple_of(2) {
            file.sync_data().unwrap();
            return true;
        }
        self.sync(file)
    }

    fn sync(&self, file: &File) -> bool {
        if self.synced {
            file.sync_all().unwrap();
        }
        self.synced
    }

    fn sync_directory(&self, root: &Path) -> bool {
        let directory = root.join(format!("d{}", self.id % DIRS));
        File::open(directory).unwrap().sync_all().unwrap();
        true
    }

    /// Verifies that `root` has the state after `step` steps. Unless `exact`, data that was not synced may be missing,
    /// as on a plain file system.
    pub fn shows(&self, root: &Path, step: usize, exact: bool) -> Verdict {
        let path = self.path(root);
        let original = self.original();
        let whole = |path: &Path| content(path, &original, b"", true);
        let grown = |path: &Path| content(path, &original, &self.tail(), exact);
        match (self.kind, step) {
            (Kind::New, 0) => expect_absent(&path),
            (Kind::New, _) => content(&path, b"", &self.other(), exact),
            (Kind::Metadata, 0..=3) => {
                whole(&path).and_then(|()| self.attributes(&path, step, exact))
            }
            (Kind::Metadata, _) => grown(&path).and_then(|()| self.attributes(&path, step, exact)),
            (Kind::RenameOver | Kind::AppendRename, 0) => whole(&path)
                .and_then(|()| content(&self.named(root, "over"), &self.other(), b"", true))
                .and_then(|()| expect_unmodified(&path)),
            (Kind::RenameOver, _) => self
                .moved(root, exact)
                .and_then(|()| whole(&self.named(root, "over"))),
            (Kind::AppendRename, 1) => grown(&path)
                .and_then(|()| content(&self.named(root, "over"), &self.other(), b"", true)),
            (Kind::AppendRename, _) => self
                .moved(root, exact)
                .and_then(|()| grown(&self.named(root, "over"))),
            (Kind::Lchown, _) => {
                let found = path.symlink_metadata().map_err(|e| e.to_string())?.uid();
                expect_equal("owner", found, if step == 0 { 0 } else { 77 })
            }
            (Kind::RenameDir | Kind::RemoveDir, 0) => whole(&path.join("in")),
            (Kind::RenameDir, _) => {
                let moved = self.named(root, "to").join("in");
                self.moved(root, exact).and_then(|()| whole(&moved))
            }
            (Kind::RemoveDir, 1 | 3) => expect_absent(&path.join("in")).and_then(|()| {
                let found = path.symlink_metadata().map_err(|e| e.to_string())?;
                expect_equal("is a directory", found.is_dir(), true)
            }),
            (Kind::RemoveDir, _) => expect_absent(&path),
            (Kind::Group, _) => self.group(root, step, exact),
            (Kind::Link, _) => whole(&path).and_then(|()| {
                let other = self.named(root, "to");
                if step == 0 {
                    return expect_absent(&other);
                }
                expect_equal("inode number", inode(&path)?, inode(&other)?)
            }),
            (Kind::Append, 1) => grown(&path),
            (Kind::Rewrite | Kind::Replace, 1) => {
                let exact = exact || self.kind == Kind::Replace;
                content(&path, b"", &self.other(), exact)
            }
            (Kind::Poke | Kind::PokeBig, 1) => {
                let mut new = original.clone();
                let middle = new.len() / 2;
                new[middle] = b'!';
                match content(&path, &new, b"", true) {
                    // The byte may not have been written yet.
                    Err(_) if !exact => whole(&path),
                    other => other,
                }
            }
            (Kind::Rename, 1) => {
                let to = self.named(root, "to");
                self.moved(root, exact)
                    .and_then(|()| whole(&to).and_then(|()| expect_unmodified(&to)))
            }
            (Kind::Unlink, 1) => expect_absent(&path),
            _ => whole(&path).and_then(|()| expect_unmodified(&path)),
        }
    }

    /// Verifies that the old name does not exist, unless `both_names` permits it.
    fn moved(&self, root: &Path, exact: bool) -> Verdict {
        let path = self.path(root);
        match expect_absent(&path) {
            Err(_) if self.both_names && !exact && path.is_file() => {
                content(&path, &self.original(), b"", true)
            }
            Err(_) if self.both_names && !exact => {
                content(&path.join("in"), &self.original(), b"", true)
            }
            other => other,
        }
    }

    /// Verifies that all names refer to one file.
    fn group(&self, root: &Path, step: usize, exact: bool) -> Verdict {
        let (path, second) = (self.path(root), self.named(root, "second"));
        let third = self.other_directory(root);
        let tail = if step == 0 { Vec::new() } else { self.tail() };
        content(&path, &self.original(), &tail, exact)?;
        expect_equal(
            "inode number of the second name",
            inode(&second)?,
            inode(&path)?,
        )?;
        expect_equal(
            "inode number of the third name",
            inode(&third)?,
            inode(&path)?,
        )
    }

    fn attributes(&self, path: &Path, step: usize, exact: bool) -> Verdict {
        let found = path.symlink_metadata().map_err(|e| e.to_string())?;
        // chown clears the setuid and setgid bits, as a write does.
        let mode = match step {
            0 => 0o640,
            1 => 0o6711,
            _ => 0o0711,
        };
        let found_mode = found.mode() & 0o7777;
        let is_between = step == 2 && self.owner_first && !exact && found_mode == 0o6711;
        if !is_between {
            expect_equal("mode", found_mode, mode)?;
        }
        let owner = if step >= 2 { (1234, 2345) } else { (0, 0) };
        expect_equal("owner", (found.uid(), found.gid()), owner)?;
        let mut value = [0; 16];
        let xattr = match rustix::fs::getxattr(path, XATTR, &mut value) {
            Ok(length) => value[..length].to_vec(),
            Err(rustix::io::Errno::NODATA) => Vec::new(),
            Err(error) => return Err(format!("xattr: {error}")),
        };
        let expected: &[u8] = if step >= 3 { b"value" } else { b"" };
        expect_equal("xattr", xattr.as_slice(), expected)?;
        if step < 4 {
            expect_unmodified(path)
        } else {
            Ok(())
        }
    }
}

/// Creates a lower file.
fn plain(path: &Path, data: &[u8]) {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(path)
        .unwrap();
    file.write_all(data).unwrap();
    drop(file);
    std::fs::set_permissions(path, Permissions::from_mode(0o640)).unwrap();
    let time = Timespec {
        tv_sec: i64::try_from(LONG_AGO).unwrap(),
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
}

/// Verifies that the modification time is that of the lower file.
fn expect_unmodified(path: &Path) -> Verdict {
    let found = path.symlink_metadata().and_then(|found| found.modified());
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(LONG_AGO);
    expect_equal("time", found.map_err(|e| e.to_string())?, long_ago)
}

fn expect_equal<T: PartialEq + std::fmt::Debug>(label: &str, found: T, expected: T) -> Verdict {
    if found == expected {
        return Ok(());
    }
    Err(format!("{label}: found {found:?}, expected {expected:?}"))
}

fn inode(path: &Path) -> Result<u64, String> {
    path.symlink_metadata()
        .map(|found| found.ino())
        .map_err(|error| format!("{}: {error}", path.display()))
}

fn expect_absent(path: &Path) -> Verdict {
    match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("{}: {error}", path.display())),
        Ok(_) => Err(format!("{} exists", path.display())),
    }
}

/// Verifies the content of a file: `whole` must be complete; unless `exact`, parts of `tail` may be missing or zero.
fn content(path: &Path, whole: &[u8], tail: &[u8], exact: bool) -> Verdict {
    let fail = |text: String| Err(format!("{}: {text}", path.display()));
    let found = match std::fs::read(path) {
        Ok(found) => found,
        Err(error) => return fail(error.to_string()),
    };
    let (least, most) = (whole.len(), whole.len() + tail.len());
    if found.len() < least || found.len() > most || (exact && found.len() != most) {
        return fail(format!("{} bytes, expected {least} to {most}", found.len()));
    }
    let (start, rest) = found.split_at(least);
    if start != whole {
        let offset = start.iter().zip(whole).position(|(a, b)| a != b);
        let zeros = start.iter().filter(|byte| **byte == 0).count();
        return fail(format!(
            "mismatch at byte {offset:?} of {least}, {zeros} bytes are zero"
        ));
    }
    let fits = |(found, written): (&u8, &u8)| found == written || (!exact && *found == 0);
    if !rest.iter().zip(tail).all(fits) {
        return fail("the appended data differs".to_owned());
    }
    Ok(())
}

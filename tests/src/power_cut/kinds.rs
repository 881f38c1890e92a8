//! What is done to one file or a few, step by step, and what may be found of it.

use std::fs::{File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, Timespec, Timestamps, XattrFlags};

use crate::random::rng::Rng;

/// How many folders the files lie in.
pub const FOLDERS: usize = 7;
/// When the lower files were changed last.
const LONG_AGO: u64 = 1_000_000_000;
const XATTR: &str = "user.cut";

/// What happens to a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes are appended to a lower file.
    Append,
    /// A lower file is cut to nothing as it is opened, and written anew.
    Rewrite,
    /// One byte in the middle of a lower file is written.
    Poke,
    /// The same in a file of many MiB.
    PokeBig,
    /// chmod, chown, an attribute; then bytes are appended.
    Metadata,
    /// A lower file is renamed.
    Rename,
    /// A lower file is renamed over another.
    RenameOver,
    /// A lower file is written to, then renamed over another.
    AppendRename,
    /// A lower file is removed.
    Unlink,
    /// Written beside it, synced, renamed over it; as dpkg does.
    Replace,
    /// One of three names of a lower file is appended to.
    Group,
    /// A lower file gets one more name.
    Link,
    /// A lower folder with a file is renamed.
    RenameDir,
    /// A lower folder is emptied and removed, and made anew.
    RemoveDir,
    /// A new file.
    New,
    /// The owner of a lower symbolic link.
    Lchown,
}

/// All of them, those more often that a careless copy-up would lose.
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

/// What is found wrong.
pub type Verdict = Result<(), String>;

/// A file, or a few that belong together, and what happens to it.
#[derive(Debug, Clone)]
pub struct Subject {
    /// What happens.
    pub kind: Kind,
    /// Its number, which names it and makes its content.
    pub id: usize,
    /// Whether the program asks for its change to be on the disk.
    pub synced: bool,
    /// Whether a rename that was not synced may show both names: btrfs writes the new name with any sync
    /// of another file, and the whiteout with the next commit.
    pub both_names: bool,
}

impl Subject {
    /// The subject's main name.
    fn path(&self, root: &Path) -> PathBuf {
        self.named(root, "f")
    }

    /// Another name of it.
    fn named(&self, root: &Path, what: &str) -> PathBuf {
        root.join(format!("d{}/{what}{}", self.id % FOLDERS, self.id))
    }

    fn other_folder(&self, root: &Path) -> PathBuf {
        let folder = (self.id + 1) % FOLDERS;
        root.join(format!("d{folder}/third{}", self.id))
    }

    fn bytes(&self, salt: u64, length: usize) -> Vec<u8> {
        // No byte is zero: one that is was never written. The pattern fits no block, so that a block in
        // another's place is seen.
        const PATTERN: usize = 4093;
        let mut luck = Rng::new((self.id as u64) << 8 | salt);
        let mut out = Vec::with_capacity(length + PATTERN);
        while out.len() < length.min(PATTERN) {
            out.extend(luck.number().to_le_bytes().map(|byte| byte | 1));
        }
        out.truncate(length.min(PATTERN));
        while out.len() < length {
            out.extend_from_within(..PATTERN);
        }
        out.truncate(length);
        out
    }

    /// What the lower file holds.
    fn original(&self) -> Vec<u8> {
        let mut luck = Rng::new(self.id as u64);
        let length = match self.kind {
            Kind::PokeBig => 16 << 20,
            _ if luck.chance(40) => 1 + luck.below(4000),
            _ if luck.chance(70) => luck.below(60_000) + 4000,
            _ => luck.below(1_500_000) + 60_000,
        };
        self.bytes(1, usize::try_from(length).unwrap_or_default())
    }

    fn tail(&self) -> Vec<u8> {
        self.bytes(2, 1 + self.id * 37 % 9000)
    }

    fn other(&self) -> Vec<u8> {
        self.bytes(3, 1 + self.id * 91 % 50_000)
    }

    /// Makes what the lower layer has of it.
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
                std::fs::hard_link(&main, self.other_folder(lower)).unwrap();
            }
            _ => {}
        }
    }

    /// How many steps there are.
    #[must_use]
    pub fn steps(&self) -> usize {
        match self.kind {
            Kind::Metadata => 4,
            Kind::AppendRename => 2,
            Kind::RemoveDir => 3,
            _ => 1,
        }
    }

    /// Takes the `step`-th step, from 1; true when what it did was synced.
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
                self.sync(&File::open(&to).unwrap()) && self.sync_folder(root)
            }
            (Kind::RenameOver | Kind::AppendRename, _) => {
                std::fs::rename(&path, self.named(root, "over")).unwrap();
                self.synced && self.sync_folder(root)
            }
            (Kind::Unlink, _) => {
                std::fs::remove_file(&path).unwrap();
                self.synced && self.sync_folder(root)
            }
            (Kind::Replace, _) => {
                let new = self.named(root, "dpkg-new");
                let mut file = File::create_new(&new).unwrap();
                file.write_all(&self.other()).unwrap();
                file.sync_all().unwrap();
                std::fs::rename(&new, &path).unwrap();
                self.synced && self.sync_folder(root)
            }
            (Kind::Link, _) => {
                std::fs::hard_link(&path, self.named(root, "to")).unwrap();
                self.synced && self.sync_folder(root)
            }
            (Kind::RenameDir, _) => {
                std::fs::rename(&path, self.named(root, "to")).unwrap();
                self.synced && self.sync_folder(root)
            }
            (Kind::RemoveDir, 1) => {
                std::fs::remove_file(path.join("in")).unwrap();
                false
            }
            (Kind::RemoveDir, 2) => {
                std::fs::remove_dir(&path).unwrap();
                self.synced && self.sync_folder(root)
            }
            (Kind::RemoveDir, _) => {
                std::fs::create_dir(&path).unwrap();
                self.synced && self.sync_folder(root)
            }
            (Kind::New, _) => {
                let mut file = File::create_new(&path).unwrap();
                file.write_all(&self.other()).unwrap();
                self.sync(&file) && self.sync_folder(root)
            }
            (Kind::Lchown, _) => {
                std::os::unix::fs::lchown(&path, Some(77), Some(78)).unwrap();
                false
            }
            (Kind::Append | Kind::Group, _) => unreachable!("one step only"),
        }
    }

    /// One way or the other: what fdatasync(2) promises of the content is no less.
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

    fn sync_folder(&self, root: &Path) -> bool {
        let folder = root.join(format!("d{}", self.id % FOLDERS));
        File::open(folder).unwrap().sync_all().unwrap();
        true
    }

    /// Whether `root` shows the state after `step` steps; `exact` when it is on the disk, else what a
    /// plain file system may lose of what was written may be missing.
    pub fn shows(&self, root: &Path, step: usize, exact: bool) -> Verdict {
        let path = self.path(root);
        let original = self.original();
        let whole = |path: &Path| content(path, &original, b"", true);
        let grown = |path: &Path| content(path, &original, &self.tail(), exact);
        match (self.kind, step) {
            (Kind::New, 0) => gone(&path),
            (Kind::New, _) => content(&path, b"", &self.other(), exact),
            (Kind::Metadata, 0..=3) => whole(&path).and_then(|()| self.attributes(&path, step)),
            (Kind::Metadata, _) => grown(&path).and_then(|()| self.attributes(&path, step)),
            (Kind::RenameOver | Kind::AppendRename, 0) => whole(&path)
                .and_then(|()| content(&self.named(root, "over"), &self.other(), b"", true))
                .and_then(|()| old(&path)),
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
                same("owner", found, if step == 0 { 0 } else { 77 })
            }
            (Kind::RenameDir | Kind::RemoveDir, 0) => whole(&path.join("in")),
            (Kind::RenameDir, _) => {
                let moved = self.named(root, "to").join("in");
                self.moved(root, exact).and_then(|()| whole(&moved))
            }
            (Kind::RemoveDir, 1 | 3) => gone(&path.join("in")).and_then(|()| {
                let found = path.symlink_metadata().map_err(|e| e.to_string())?;
                same("is a folder", found.is_dir(), true)
            }),
            (Kind::RemoveDir, _) => gone(&path),
            (Kind::Group, _) => self.group(root, step, exact),
            (Kind::Link, _) => whole(&path).and_then(|()| {
                let other = self.named(root, "to");
                if step == 0 {
                    return gone(&other);
                }
                same("number", inode(&path)?, inode(&other)?)
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
                    // The byte was not written yet.
                    Err(_) if !exact => whole(&path),
                    other => other,
                }
            }
            (Kind::Rename, 1) => {
                let to = self.named(root, "to");
                self.moved(root, exact)
                    .and_then(|()| whole(&to).and_then(|()| old(&to)))
            }
            (Kind::Unlink, 1) => gone(&path),
            _ => whole(&path).and_then(|()| old(&path)),
        }
    }

    /// The old name is free.
    fn moved(&self, root: &Path, exact: bool) -> Verdict {
        let path = self.path(root);
        match gone(&path) {
            Err(_) if self.both_names && !exact && path.is_file() => {
                content(&path, &self.original(), b"", true)
            }
            Err(_) if self.both_names && !exact => {
                content(&path.join("in"), &self.original(), b"", true)
            }
            other => other,
        }
    }

    /// All names of one file are that file.
    fn group(&self, root: &Path, step: usize, exact: bool) -> Verdict {
        let (path, second) = (self.path(root), self.named(root, "second"));
        let third = self.other_folder(root);
        let tail = if step == 0 { Vec::new() } else { self.tail() };
        content(&path, &self.original(), &tail, exact)?;
        same("number of the second name", inode(&second)?, inode(&path)?)?;
        same("number of the third name", inode(&third)?, inode(&path)?)
    }

    fn attributes(&self, path: &Path, step: usize) -> Verdict {
        let found = path.symlink_metadata().map_err(|e| e.to_string())?;
        // A change of the owner takes the setuid and setgid bits, as writing does.
        let mode = match step {
            0 => 0o640,
            1 => 0o6711,
            _ => 0o0711,
        };
        same("mode", found.mode() & 0o7777, mode)?;
        let owner = if step >= 2 { (1234, 2345) } else { (0, 0) };
        same("owner", (found.uid(), found.gid()), owner)?;
        let mut value = [0; 16];
        let xattr = match rustix::fs::getxattr(path, XATTR, &mut value) {
            Ok(length) => value[..length].to_vec(),
            Err(rustix::io::Errno::NODATA) => Vec::new(),
            Err(error) => return Err(format!("its attribute: {error}")),
        };
        let expected: &[u8] = if step >= 3 { b"value" } else { b"" };
        same("attribute", xattr.as_slice(), expected)?;
        if step < 4 { old(path) } else { Ok(()) }
    }
}

/// A lower file.
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

/// The file was not written to.
fn old(path: &Path) -> Verdict {
    let found = path.symlink_metadata().and_then(|found| found.modified());
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(LONG_AGO);
    same("time", found.map_err(|e| e.to_string())?, long_ago)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Verdict {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: found {found:?}, not {expected:?}"))
}

fn inode(path: &Path) -> Result<u64, String> {
    path.symlink_metadata()
        .map(|found| found.ino())
        .map_err(|error| format!("{}: {error}", path.display()))
}

fn gone(path: &Path) -> Verdict {
    match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("{}: {error}", path.display())),
        Ok(_) => Err(format!("{} is there", path.display())),
    }
}

/// `whole` is there whatever happened; of `tail` a part may be missing or zero, unless `exact`.
fn content(path: &Path, whole: &[u8], tail: &[u8], exact: bool) -> Verdict {
    let say = |text: String| Err(format!("{}: {text}", path.display()));
    let found = match std::fs::read(path) {
        Ok(found) => found,
        Err(error) => return say(error.to_string()),
    };
    let (least, most) = (whole.len(), whole.len() + tail.len());
    if found.len() < least || found.len() > most || (exact && found.len() != most) {
        return say(format!("{} bytes, not {least} to {most}", found.len()));
    }
    let (start, rest) = found.split_at(least);
    if start != whole {
        let at = start.iter().zip(whole).position(|(a, b)| a != b);
        let zeros = start.iter().filter(|byte| **byte == 0).count();
        return say(format!(
            "wrong from byte {at:?} of {least}, {zeros} are zero"
        ));
    }
    let fits = |(found, written): (&u8, &u8)| found == written || (!exact && *found == 0);
    if !rest.iter().zip(tail).all(fits) {
        return say("what was written is something else".to_owned());
    }
    Ok(())
}

//! Removes a tree with a bounded number of descriptors, in linear time and without recursion.
//!
//! The tree is untrusted: it has any depth, any width and any mode bits. Symbolic links are not followed, and mounts
//! inside the tree are not entered, because their content is not part of it.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, RawDir, ResolveFlags, SeekFrom};

use super::node::{rmdir, unlink};
use super::{attr, dir, stat};
use crate::error::{Errno, Error, Result};

/// The number of directories of the current path that stay open.
///
/// Those above are reopened through `..` when they are needed; if one is not the same inode, removal stops.
const OPEN: usize = 8;

/// The object that could not be removed, and the error.
#[derive(Clone, Debug)]
pub struct RemovalError {
    /// The path below the root of the tree, shortened in the middle if it is long; empty for the root.
    pub path: Vec<u8>,
    /// The cause.
    pub error: Error,
}

/// Removes `name` in `parent` with everything below it. An absent name is not an error.
///
/// Stops at the first object that cannot be removed. For an unprivileged caller, directories whose mode denies access
/// are made accessible first, as their owner may.
pub fn tree(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), RemovalError> {
    let at_root = |error| RemovalError {
        path: Vec::new(),
        error,
    };
    match unlink(parent, name) {
        Ok(()) => return Ok(()),
        Err(error) if error.is_absent() => return Ok(()),
        Err(error) if matches!(error.errno(), Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(at_root(error)),
    }
    let first = Level::open(parent, name).map_err(at_root)?;
    let mut removal = Removal {
        parent,
        levels: vec![first],
        buffer: vec![MaybeUninit::uninit(); 32 << 10],
        stuck: None,
    };
    while !removal.levels.is_empty() {
        if let Err(error) = removal.step() {
            let path = removal.path();
            return Err(RemovalError { path, error });
        }
    }
    Ok(())
}

/// A directory that is being emptied.
struct Level {
    name: Box<[u8]>,
    id: (u64, u64),
    fd: Option<OwnedFd>,
    /// Directories that were read but not entered yet. Dropped with the descriptor, and read again.
    todo: Vec<Box<[u8]>>,
    /// An entry was removed since the last rewind.
    progress: bool,
    /// Its owner was given access.
    opened_up: bool,
}

impl Level {
    fn open(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Self> {
        let (fd, opened_up) = match open_below(parent, name, OFlags::RDONLY) {
            Err(Error::Errno(Errno::ACCESS)) => {
                let path = open_below(parent, name, OFlags::PATH)?;
                attr::chmod(path.as_fd(), 0o700)?;
                (open_below(parent, name, OFlags::RDONLY)?, true)
            }
            other => (other?, false),
        };
        let stat = stat::stat_fd(&fd)?;
        Ok(Self {
            name: name.into(),
            id: (stat.dev, stat.ino),
            fd: Some(fd),
            todo: Vec::new(),
            progress: false,
            opened_up,
        })
    }
}

struct Removal<'a> {
    parent: BorrowedFd<'a>,
    levels: Vec<Level>,
    buffer: Vec<MaybeUninit<u8>>,
    /// The name in the deepest level that could not be removed.
    stuck: Option<Box<[u8]>>,
}

impl Removal<'_> {
    /// Enters the next directory of the deepest level, reads more of its entries, or removes it.
    fn step(&mut self) -> Result<()> {
        let Some(level) = self.levels.last_mut() else {
            return Ok(());
        };
        if let Some(next) = level.todo.pop() {
            return self.enter(next);
        }
        match read_on(level, &mut self.buffer, &mut self.stuck)? {
            true => Ok(()),
            false => self.leave(),
        }
    }

    fn enter(&mut self, name: Box<[u8]>) -> Result<()> {
        match Level::open(fd_of(&self.levels, self.parent)?, &name) {
            Ok(inner) => self.levels.push(inner),
            Err(error) if error.is_absent() => return Ok(()),
            Err(error) => {
                self.stuck = Some(name);
                return Err(error);
            }
        }
        if let Some(far) = self.levels.len().checked_sub(OPEN + 1)
            && let Some(far) = self.levels.get_mut(far)
        {
            far.fd = None;
            far.todo = Vec::new();
        }
        Ok(())
    }

    /// Removes the deepest level after all its entries were read.
    ///
    /// It is empty, unless entries moved during their removal.
    fn leave(&mut self) -> Result<()> {
        let Some((level, above)) = self.levels.split_last_mut() else {
            return Ok(());
        };
        let Some(fd) = &level.fd else {
            return Err(Error::Errno(Errno::STALE));
        };
        if let Some(up) = above.last_mut()
            && up.fd.is_none()
        {
            let found = open_above(fd.as_fd())?;
            let stat = stat::stat_fd(&found)?;
            if (stat.dev, stat.ino) != up.id {
                return Err(Error::Errno(Errno::STALE));
            }
            up.fd = Some(found);
        }
        let mut removed = rmdir(fd_of(above, self.parent)?, &level.name);
        if removed == Err(Error::Errno(Errno::ACCESS))
            && let Some(up) = above.last_mut()
            && open_up(up)?
        {
            removed = rmdir(fd_of(above, self.parent)?, &level.name);
        }
        match removed {
            Err(Error::Errno(Errno::NOTEMPTY | Errno::EXIST)) if level.progress => {
                rustix::fs::seek(fd, SeekFrom::Start(0))?;
                level.progress = false;
                return Ok(());
            }
            Err(error) if !error.is_absent() => return Err(error),
            Ok(()) | Err(_) => {}
        }
        if let Some(up) = above.last_mut() {
            up.progress = true;
        }
        self.levels.pop();
        Ok(())
    }

    /// Returns the path of the deepest level, below the root of the tree.
    fn path(&self) -> Vec<u8> {
        const SHOWN: usize = 8;
        let levels = self.levels.iter().skip(1).map(|level| &*level.name);
        let names: Vec<&[u8]> = levels.chain(self.stuck.as_deref()).collect();
        match names.len().checked_sub(2 * SHOWN) {
            None | Some(0) => names.join(&b'/'),
            Some(_) => {
                let head = names.get(..SHOWN).unwrap_or_default();
                let tail = names.get(names.len() - SHOWN..).unwrap_or_default();
                [&head.join(&b'/')[..], b"/.../", &tail.join(&b'/')].concat()
            }
        }
    }
}

/// Returns the descriptor of the deepest of these levels; without levels, that of the tree's parent directory.
fn fd_of<'a>(levels: &'a [Level], parent: BorrowedFd<'a>) -> Result<BorrowedFd<'a>> {
    match levels.last().map(|level| &level.fd) {
        None => Ok(parent),
        Some(Some(fd)) => Ok(fd.as_fd()),
        // The deepest level is always open.
        Some(None) => Err(Error::Errno(Errno::STALE)),
    }
}

/// Gives the owner of a directory access to it; false if that was done before.
fn open_up(level: &mut Level) -> Result<bool> {
    let Some(fd) = level.fd.as_ref().filter(|_| !level.opened_up) else {
        return Ok(false);
    };
    attr::chmod(fd.as_fd(), 0o700)?;
    level.opened_up = true;
    Ok(true)
}

/// Reads one buffer of names and unlinks those that are not directories; false at the end of the directory.
///
/// A name that cannot be removed is stored in `stuck`.
fn read_on(
    level: &mut Level,
    buffer: &mut [MaybeUninit<u8>],
    stuck: &mut Option<Box<[u8]>>,
) -> Result<bool> {
    let Some(fd) = &level.fd else {
        return Err(Error::Errno(Errno::STALE));
    };
    let mut names: Vec<(Box<[u8]>, bool)> = Vec::new();
    {
        let mut raw = RawDir::new(fd, buffer);
        while let Some(entry) = raw.next() {
            let entry = match entry {
                // An open directory that was removed is empty.
                Err(Errno::NOENT) => break,
                other => other?,
            };
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                let is_dir = entry.file_type() == rustix::fs::FileType::Directory;
                names.push((name.into(), is_dir));
            }
            if raw.is_buffer_empty() {
                break;
            }
        }
    }
    if names.is_empty() {
        return Ok(false);
    }
    for (name, is_dir) in names {
        if is_dir {
            level.todo.push(name);
            continue;
        }
        match remove_file(level, &name) {
            Ok(true) => level.progress = true,
            Ok(false) => level.todo.push(name),
            Err(error) => {
                *stuck = Some(name);
                return Err(error);
            }
        }
    }
    Ok(true)
}

/// Unlinks a name; false if it is a directory.
fn remove_file(level: &mut Level, name: &[u8]) -> Result<bool> {
    let call = |level: &Level| match &level.fd {
        Some(fd) => unlink(fd.as_fd(), name),
        None => Err(Error::Errno(Errno::STALE)),
    };
    let removed = match call(level) {
        Err(Error::Errno(Errno::ACCESS)) if open_up(level)? => call(level),
        other => other,
    };
    match removed {
        Ok(()) => Ok(true),
        Err(error) if error.is_absent() => Ok(true),
        Err(Error::Errno(Errno::ISDIR)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Opens a directory on the same mount.
fn open_below(parent: BorrowedFd<'_>, name: &[u8], how: OFlags) -> Result<OwnedFd> {
    let flags = how | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    match rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve) {
        Err(Errno::NOSYS) => {
            let fd = match how == OFlags::PATH {
                true => dir::open_dir(parent, name)?,
                false => dir::open_dir_to_read(parent, name)?,
            };
            match stat::stat_fd(&fd)?.dev == stat::stat_fd(parent)?.dev {
                true => Ok(fd),
                false => Err(Error::Errno(Errno::XDEV)),
            }
        }
        other => Ok(other?),
    }
}

/// Opens the parent directory for reading.
fn open_above(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    dir::open_dir_to_read(fd, b"..")
}

/// Like [`tree`], with the error alone.
pub fn remove_tree(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    tree(dir, name).map_err(|stopped| stopped.error)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use super::*;

    fn remove(top: &Path, name: &str) -> Result<(), RemovalError> {
        let parent = dir::open_root(top).unwrap();
        tree(parent.as_fd(), name.as_bytes())
    }

    /// A chain of directories, deeper than a path may be long, with a file and a short branch in each.
    fn chain(top: &Path, levels: usize) {
        let mut at = dir::open_root(top).unwrap();
        for _ in 0..levels {
            super::super::node::mkdir(at.as_fd(), b"d", 0o755).unwrap();
            super::super::node::mkdir(at.as_fd(), b"e", 0o755).unwrap();
            super::super::node::symlink(at.as_fd(), b"f", b"/").unwrap();
            at = dir::open_dir(at.as_fd(), b"d").unwrap();
        }
    }

    #[test]
    fn descriptors_do_not_grow_with_depth_or_width() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("t")).unwrap();
        chain(&top.path().join("t"), 3000);
        for number in 0..3000 {
            fs::create_dir(top.path().join(format!("t/wide{number}"))).unwrap();
            fs::write(top.path().join(format!("t/file{number}")), b"").unwrap();
        }
        remove(top.path(), "t").unwrap();
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 0);
        remove(top.path(), "t").unwrap();
    }

    #[test]
    fn modes_and_symlinks_do_not_prevent_removal() {
        let top = tempfile::tempdir().unwrap();
        let at = |path: &str| top.path().join(path);
        fs::create_dir_all(at("t/a/b/c")).unwrap();
        fs::create_dir(at("beside")).unwrap();
        fs::write(at("beside/file"), b"kept").unwrap();
        std::os::unix::fs::symlink(at("beside"), at("t/a/link")).unwrap();
        for (path, mode) in [("t/a/b", 0), ("t/a", 0o555), ("t", 0o300)] {
            fs::set_permissions(at(path), fs::Permissions::from_mode(mode)).unwrap();
        }
        remove(top.path(), "t").unwrap();
        assert_eq!(fs::read(at("beside/file")).unwrap(), b"kept");
        assert!(!at("t").try_exists().unwrap());
    }

    #[test]
    fn long_path_is_shortened_in_the_middle() {
        let level = |number: usize| Level {
            name: number.to_string().into_bytes().into(),
            id: (0, 0),
            fd: None,
            todo: Vec::new(),
            progress: false,
            opened_up: false,
        };
        let mut removal = Removal {
            parent: rustix::fs::CWD,
            levels: (0..40).map(level).collect(),
            buffer: Vec::new(),
            stuck: Some(b"file"[..].into()),
        };
        let path_of = |removal: &Removal<'_>| String::from_utf8(removal.path()).unwrap();
        let long = "1/2/3/4/5/6/7/8/.../33/34/35/36/37/38/39/file";
        assert_eq!(path_of(&removal), long);
        removal.levels.truncate(3);
        assert_eq!(path_of(&removal), "1/2/file");
    }
}

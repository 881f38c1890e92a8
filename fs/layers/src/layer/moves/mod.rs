//! Files that move from a frozen layer to the new upper layer, and leave a copy in the frozen one (docs/decisions/0043).
//!
//! The directory `moves` in the work directory of the upper layer contains the copies, and a list of the moves. Until
//! the list exists, nothing has moved. From then on the moves are either completed or undone, also by a later mount.
//! Each file has its name in one of the two layers at every moment.

mod paths;
mod placeholders;
mod recovery;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::upper_dirs::remove_acls;
use super::{Layer, Upper, private};
use crate::error::{Errno, Error, Result};
use crate::name::{Name, split};
use crate::sys;
use crate::sys::attr::SetTime;
use crate::sys::copy::Copied;
use crate::sys::node::RenameMode;
use crate::sys::order::Order;
use crate::sys::private::Through;
use crate::sys::stat::Time;

use paths::{is_absent, is_file, open_below, parent, unlink_if_exists};
pub use recovery::{abandon, complete, refuse_pending};

/// The directory in the work directory that the user specified.
pub const DIR: &[u8] = b"moves";
/// The list in [`DIR`].
const LIST: &[u8] = b"list";
/// The list once all files are in the new layer.
const LINKED: &[u8] = b"linked";
/// The list once the files are to be removed from the new layer.
const UNDONE: &[u8] = b"undone";
/// The list before it is complete.
const NEW_LIST: &[u8] = b"list.new";
/// The start of the names of placeholders.
const TEMPORARY: &str = ".cowl-";
/// The version of the list.
const VERSION: u32 = 2;

/// The files that move, and the directories in which their names are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveList {
    /// The directories, which exist in both layers.
    pub dirs: Vec<ChangedDir>,
    /// The files.
    pub files: Vec<MovedFile>,
}

/// A directory in which names change, and the times that it retains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedDir {
    /// The path relative to the root of both layers; empty for the root.
    pub path: Vec<u8>,
    /// The access time.
    pub atime: Time,
    /// The modification time.
    pub mtime: Time,
}

/// A file that moves under all of its names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedFile {
    /// The name of its copy in the directory of the moves.
    pub copy: Vec<u8>,
    /// The inode number.
    pub ino: u64,
    /// The paths relative to the root of both layers.
    pub names: Vec<Vec<u8>>,
}

/// The root directory of a layer, on a known file system.
///
/// The id of a layer on XFS depends on the device number, which a reboot can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RootDir {
    ino: u64,
    born: Time,
}

impl RootDir {
    fn of(layer: &Layer) -> Result<Self> {
        Ok(Self {
            ino: sys::stat::stat_fd(layer.root_fd())?.ino,
            born: sys::stat::birth_time(layer.root_fd())?.unwrap_or_default(),
        })
    }
}

/// The content of the list.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// The frozen layer.
    layer: RootDir,
    /// The start of the names of placeholders. It is random, because no program may have chosen it before.
    temporary: Vec<u8>,
    /// Whether the names in the frozen layer are durable before files get names in the new one. Lists of earlier daemons
    /// do not have it.
    #[serde(default)]
    names_synced: bool,
    moves: MoveList,
}

/// The directories between which files move, all reached through one mount.
#[derive(Debug)]
pub struct Moves {
    from: OwnedFd,
    to: OwnedFd,
    /// The work directory that the user specified.
    outer: OwnedFd,
    /// The directory [`DIR`] in it.
    dir: OwnedFd,
    layer: RootDir,
    temporary: Name,
    order: Order,
}

impl Moves {
    /// Creates the directory for the copies of files that move from `from` to `upper`.
    pub fn begin(from: &Layer, upper: &Upper, order: Order) -> Result<Self> {
        let [from_root, to, outer] = reach(from, upper)?;
        sys::remove::remove_tree(outer.as_fd(), DIR)?;
        sys::node::mkdir(outer.as_fd(), DIR, 0o700)?;
        let dir = sys::dir::open_dir(outer.as_fd(), DIR)?;
        remove_acls(dir.as_fd())?;
        Ok(Self {
            from: from_root,
            to,
            outer,
            dir,
            layer: RootDir::of(from)?,
            temporary: Name::new(format!("{TEMPORARY}{:032x}", sys::random::number()?))?,
            order,
        })
    }

    /// Creates the file for a copy, without content.
    pub fn create_copy(&self, name: &[u8]) -> Result<OwnedFd> {
        sys::node::create(self.dir.as_fd(), name, 0o600, OFlags::RDWR)
    }

    /// Creates the file for a copy, without content and without a name.
    ///
    /// The lock of a named file could block every process that reads or removes the directory.
    pub fn create_nameless(&self) -> Result<OwnedFd> {
        sys::node::create_nameless(self.dir.as_fd(), 0o600)
    }

    /// Gives a copy its name.
    pub fn name_copy(&self, copy: &OwnedFd, name: &[u8]) -> Result<()> {
        sys::node::link_fd(copy.as_fd(), self.dir.as_fd(), name)
    }

    /// Opens the file of a copy.
    pub fn open_copy(&self, name: &[u8]) -> Result<OwnedFd> {
        sys::content::open(self.dir.as_fd(), name, OFlags::RDWR)
    }

    /// Creates what [`Self::reserve`] and [`Self::fill`] link and rename. Returns whether it was complete before the
    /// deadline. Called before [`Self::commit_list`]: from then on, no name is added to the directory.
    pub fn prepare(&self, list: &MoveList, deadline: Instant) -> Result<bool> {
        if !placeholders::create_source(self.dir.as_fd())? {
            return Ok(true);
        }
        for (index, file, _) in names(list) {
            if Instant::now() > deadline {
                return Ok(false);
            }
            placeholders::create_second_name(self.dir.as_fd(), &file.copy, index)?;
        }
        Ok(true)
    }

    /// Writes the list. From here on, another process completes the moves if this one ends.
    ///
    /// The copies must be complete, and the directories of the names must exist in both layers.
    ///
    /// The later names of the list exist before it does, without content, and are only replaced: so no rename of the
    /// list needs space, even on a full disk.
    pub fn commit_list(&self, list: &MoveList) -> Result<()> {
        let stored = Stored {
            version: VERSION,
            layer: self.layer,
            temporary: self.temporary.to_vec(),
            names_synced: true,
            moves: list.clone(),
        };
        let bytes = serde_json::to_vec(&stored).map_err(|_| Error::Errno(Errno::INVAL))?;
        let dir = self.dir.as_fd();
        let file = sys::node::create(dir, NEW_LIST, 0o600, OFlags::WRONLY)?;
        sys::copy::write_all(&file, &bytes, 0)?;
        self.order.content_first(&file, Copied::Written)?;
        // In this order: `cancel` replaces the first by the second if both exist.
        for name in [UNDONE, LINKED] {
            sys::node::create(dir, name, 0o600, OFlags::WRONLY)?;
        }
        sys::node::rename(dir, NEW_LIST, dir, LIST, RenameMode::NoReplace)?;
        self.order.name_first(dir)?;
        self.order.name_first(self.outer.as_fd())
    }

    /// Creates the placeholders, so that a full disk prevents the move before it begins, and not [`Self::fill`]. Returns
    /// whether all exist before the deadline. Called after [`Self::commit_list`].
    pub fn reserve(&self, list: &MoveList, deadline: Instant) -> Result<bool> {
        self.check_projects(list)?;
        if is_absent(&self.dir, placeholders::SOURCE)? {
            return Ok(true);
        }
        let dirs: HashMap<_, _> = list.dirs.iter().map(|dir| (&*dir.path, dir)).collect();
        for (index, _, path) in names(list) {
            if Instant::now() > deadline {
                return Ok(false);
            }
            let Some((from, _)) = parent(&self.from, path)? else {
                return Err(Error::Errno(Errno::STALE));
            };
            let name = placeholders::name(&self.temporary, index)?;
            placeholders::create(self.dir.as_fd(), (from.as_fd(), &name))?;
            // Directly after the change, because this process could be killed.
            if let Some(dir) = dirs.get(split(path).0) {
                dir.restore_times(&from)?;
            }
        }
        Ok(true)
    }

    /// Fails if the copies cannot be renamed to the frozen layer, because its directories belong to another project.
    fn check_projects(&self, list: &MoveList) -> Result<()> {
        let Some(first) = list.files.first() else {
            return Ok(());
        };
        let copy = sys::project::of(self.open_copy(&first.copy)?.as_fd())?;
        for dir in &list.dirs {
            if let Some(fd) = open_below(&self.from, &dir.path)?
                && let Some(project) = sys::project::of(sys::dir::reopen_dir(fd.as_fd())?.as_fd())?
                && project.is_inherited
                && copy.is_none_or(|copy| copy.id != project.id)
            {
                log::warn!(
                    "a frozen directory belongs to another project (quota) than the new layer"
                );
                return Err(Error::Errno(Errno::XDEV));
            }
        }
        Ok(())
    }

    /// Removes the placeholders that exist, and restores the times of their directories in the frozen layer to those in
    /// the list. Called while no request is answered; [`Self::unlink`] makes the change durable.
    pub fn release(&self, list: &MoveList) -> Result<()> {
        release(&self.from, &self.temporary, list, Times::OfList).map(drop)
    }

    /// Whether the directories of all names exist in the new layer.
    fn has_new_dirs(&self, list: &MoveList) -> Result<bool> {
        for dir in &list.dirs {
            if open_below(&self.to, &dir.path)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Links the files into the new layer, unless that was done before.
    ///
    /// Before that, their names in the frozen layer become durable, so that a power cut after [`Self::cancel`] removes
    /// none that a program has not removed.
    pub fn link(&self, list: &MoveList) -> Result<()> {
        sync_dirs(&self.from, list, self.order)?;
        for (_, file, path) in names(list) {
            let (Some((to, last)), Some((from, _))) =
                (parent(&self.to, path)?, parent(&self.from, path)?)
            else {
                // The directory was removed in the meantime: the name is not visible.
                continue;
            };
            match sys::stat::stat_at(to.as_fd(), &last) {
                Err(error) if error.is_absent() => {}
                Ok(_) => continue,
                Err(error) => return Err(error),
            }
            if is_file(&from, &last, file)? {
                sys::node::link(from.as_fd(), &last, to.as_fd(), &last)?;
            } else if is_absent(&from, &last)?
                && let Some((other, name)) = self.surviving_name(file)?
            {
                // After a power cut, the name may not be durable, unlike another one of the file.
                sys::node::link(other.as_fd(), &name, to.as_fd(), &last)?;
            }
        }
        for dir in &list.dirs {
            if let Some(fd) = open_below(&self.to, &dir.path)? {
                dir.restore_times(&fd)?;
                self.order.name_first(fd.as_fd())?;
            }
        }
        Ok(())
    }

    /// Returns the directory and the last component of a name that the file has in one of the layers.
    fn surviving_name(&self, file: &MovedFile) -> Result<Option<(OwnedFd, Name)>> {
        for path in &file.names {
            for root in [&self.from, &self.to] {
                if let Some((dir, last)) = parent(root, path)?
                    && is_file(&dir, &last, file)?
                {
                    return Ok(Some((dir, last)));
                }
            }
        }
        Ok(None)
    }

    /// Returns the list with empty names instead of those that exist in neither layer. Called after [`Self::link`] if a
    /// power cut may have removed names: they were not durable, and a copy must not get them.
    fn without_lost_names(&self, list: &MoveList) -> Result<MoveList> {
        let mut left = list.clone();
        for file in &mut left.files {
            for path in &mut file.names {
                let mut exists = false;
                for root in [&self.from, &self.to] {
                    if let Some((dir, last)) = parent(root, path)? {
                        exists |= !is_absent(&dir, &last)?;
                    }
                }
                if !exists {
                    path.clear();
                }
            }
        }
        Ok(left)
    }

    /// Records that all files are in the new layer. From here on a file may lose its names there, by a request of a
    /// program, and the moves can no longer be undone.
    pub fn commit_links(&self) -> Result<()> {
        self.rename_list(LIST, LINKED)
    }

    /// Records that the files are not in the new layer, although some have names there until [`Self::unlink`].
    pub fn cancel(&self) -> Result<()> {
        for list in [LIST, LINKED] {
            match self.rename_list(list, UNDONE) {
                // It was not written.
                Err(error) if error.is_absent() => {}
                done => return done,
            }
        }
        Ok(())
    }

    fn rename_list(&self, from: &[u8], to: &[u8]) -> Result<()> {
        let dir = self.dir.as_fd();
        // It replaces an empty file.
        self.order.before_replacing(dir)?;
        sys::node::rename(dir, from, dir, to, RenameMode::Replace)?;
        self.order.name_first(dir)
    }

    /// Replaces the placeholders by the copies, unless that was done before. Called after [`Self::commit_links`], and
    /// before any request is answered.
    ///
    /// A rename between directories holds the lock of all such renames of the file system, so it must not wait for a
    /// program. Here it does not: no program has opened a copy before. No name is added to a directory, which could need
    /// space.
    pub fn fill(&self, list: &MoveList) -> Result<()> {
        for (index, file, path) in names(list) {
            let Some((from, last)) = parent(&self.from, path)? else {
                continue;
            };
            if is_file(&from, &last, file)? {
                let name = placeholders::name(&self.temporary, index)?;
                placeholders::fill(self.dir.as_fd(), &file.copy, (from.as_fd(), &name), index)?;
            }
        }
        Ok(())
    }

    /// Replaces the files in the frozen layer by their copies, unless that was done before. Called after
    /// [`Self::fill`].
    ///
    /// By then, the names in the new layer may be removed or refer to other files.
    ///
    /// A rename waits for the locks of the replaced file and of the copy, which a program may hold. So it is one within a
    /// directory: the kernel holds the lock of this directory meanwhile, but not that of all renames between directories.
    pub fn exchange(&self, list: &MoveList) -> Result<()> {
        for (index, file, path) in names(list) {
            let Some((from, last)) = parent(&self.from, path)? else {
                continue;
            };
            let from = from.as_fd();
            let name = placeholders::name(&self.temporary, index)?;
            match sys::stat::stat_at(from, &last) {
                Ok(stat) if stat.ino == file.ino => {
                    sys::node::rename(from, &name, from, &last, RenameMode::Replace)?;
                }
                Ok(_) => unlink_if_exists(from, &name)?,
                // After a power cut, the name may not be durable, unlike the list.
                Err(error) if error.is_absent() => {
                    unlink_if_exists(from, &name)?;
                    sys::node::link(self.dir.as_fd(), &file.copy, from, &last)?;
                }
                Err(error) => return Err(error),
            }
        }
        for dir in &list.dirs {
            if let Some(fd) = open_below(&self.from, &dir.path)? {
                dir.restore_times(&fd)?;
                // The list must not be removed before the names are durable.
                self.order.name_first(fd.as_fd())?;
            }
        }
        Ok(())
    }

    /// Removes the files from the new layer after [`Self::cancel`], and then the list.
    ///
    /// A file that no longer has a name in the frozen layer does not get it back: a program has removed the name.
    pub fn unlink(&self, list: &MoveList) -> Result<()> {
        self.unlink_with(list, Missing::Removed)
    }

    fn unlink_with(&self, list: &MoveList, missing: Missing) -> Result<()> {
        release(&self.from, &self.temporary, list, Times::Current)?;
        // Also if they were removed before. The list must not be removed earlier.
        sync_dirs(&self.from, list, self.order)?;
        for (_, file, path) in names(list) {
            let Some((to, last)) = parent(&self.to, path)? else {
                continue;
            };
            if is_file(&to, &last, file)? {
                if missing == Missing::Lost {
                    self.return_name((&to, &last), path)?;
                }
                sys::node::unlink(to.as_fd(), &last)?;
                self.order.name_first(to.as_fd())?;
            }
        }
        for dir in &list.dirs {
            if let Some(fd) = open_below(&self.to, &dir.path)? {
                dir.restore_times(&fd)?;
            }
        }
        self.finish()
    }

    /// Gives a file its name in the frozen layer again, if it lacks it: after a power cut, the name there may not be
    /// durable, unlike the one in the new layer.
    fn return_name(&self, (to, last): (&OwnedFd, &Name), path: &[u8]) -> Result<()> {
        if let Some((from, _)) = parent(&self.from, path)?
            && is_absent(&from, last)?
        {
            sys::node::link(to.as_fd(), last, from.as_fd(), last)?;
            self.order.name_first(from.as_fd())?;
        }
        Ok(())
    }

    /// Removes the list, and then the copies.
    pub fn finish(&self) -> Result<()> {
        for list in [LIST, LINKED, UNDONE] {
            unlink_if_exists(self.dir.as_fd(), list)?;
        }
        sys::remove::remove_tree(self.outer.as_fd(), DIR)
    }
}

impl ChangedDir {
    fn restore_times(&self, dir: &OwnedFd) -> Result<()> {
        let (atime, mtime) = (SetTime::At(self.atime), SetTime::At(self.mtime));
        sys::attr::utimens(dir.as_fd(), atime, mtime)
    }
}

/// Opens the roots of both layers and the work directory through one mount, because neither a link nor a rename is
/// possible between two.
fn reach(from: &Layer, upper: &Upper) -> Result<[OwnedFd; 3]> {
    let paths = [from.path(), upper.layer.path(), upper.work_path.as_path()];
    let known = [
        from.root_fd(),
        upper.layer.root_fd(),
        upper.locks.outer.as_fd(),
    ];
    let mut plain = Vec::new();
    for (path, known) in paths.iter().zip(known) {
        let dir = sys::dir::open_root(path)?;
        let (found, known) = (sys::stat::stat_fd(&dir)?, sys::stat::stat_fd(known)?);
        if (found.dev, found.ino) != (known.dev, known.ino) {
            return Err(Error::Errno(Errno::STALE));
        }
        plain.push(dir);
    }
    let plain = plain.try_into().map_err(|_| Error::Errno(Errno::INVAL))?;
    Ok(private::for_writing(plain, paths, Through::WRITING).0)
}

/// Returns the number of each name, its file, and the name. Names that are empty are omitted.
fn names(list: &MoveList) -> impl Iterator<Item = (usize, &MovedFile, &Vec<u8>)> {
    let files = list.files.iter();
    let all = files.flat_map(|file| file.names.iter().map(move |name| (file, name)));
    all.enumerate()
        .map(|(index, (file, name))| (index, file, name))
        .filter(|(_, _, name)| !name.is_empty())
}

/// The reason why a file lacks a name in the frozen layer while its move is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    /// A program has removed the name after [`Moves::cancel`].
    Removed,
    /// No request was answered, and a power cut has removed the name.
    Lost,
}

/// The times that directories have after placeholders were removed.
#[derive(Clone, Copy, Debug)]
enum Times {
    /// Those in the list: no program has changed the directories since.
    OfList,
    /// Those that they have directly before.
    Current,
}

/// Removes the placeholders that exist in a layer, and restores the times of their directories. Returns whether there
/// were any.
fn release(root: &OwnedFd, temporary: &Name, list: &MoveList, times: Times) -> Result<bool> {
    let mut changed = HashSet::new();
    for (index, _, path) in names(list) {
        let Some((dir, _)) = parent(root, path)? else {
            continue;
        };
        let before = sys::stat::stat_fd(&dir)?;
        match sys::node::unlink(dir.as_fd(), &placeholders::name(temporary, index)?) {
            Ok(()) => {}
            Err(error) if error.is_absent() => continue,
            Err(error) => return Err(error),
        }
        changed.insert(split(path).0);
        if let Times::Current = times {
            let (atime, mtime) = (SetTime::At(before.atime), SetTime::At(before.mtime));
            sys::attr::utimens(dir.as_fd(), atime, mtime)?;
        }
    }
    for dir in &list.dirs {
        if let Times::OfList = times
            && changed.contains(dir.path.as_slice())
            && let Some(fd) = open_below(root, &dir.path)?
        {
            dir.restore_times(&fd)?;
        }
    }
    Ok(!changed.is_empty())
}

/// Ensures that changes of names in the directories of the list are durable before later changes.
fn sync_dirs(root: &OwnedFd, list: &MoveList, order: Order) -> Result<()> {
    for dir in &list.dirs {
        if let Some(fd) = open_below(root, &dir.path)? {
            order.name_first(fd.as_fd())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

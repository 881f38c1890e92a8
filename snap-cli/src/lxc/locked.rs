//! Exclusive access to the snapshots of an LXC container, to restore and remove them.
//!
//! An interrupted command or a full disk loses nothing: a directory is prepared in a staging directory, and one rename
//! commits it. The lock of the container's directory is held; the next command cleans up after an interrupted one.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowl_layers::shown::Show as _;

use super::command::LxcContainer;
use super::layout::Dependant;
use super::snapshots::{self, GOING, LxcSnapshot};
use super::staging::{self, lock_dir};
use crate::error::{Error, Result};
use crate::store::disk;
use crate::store::disk::remove_tree;
use crate::store::name::nearest;

/// The snapshots of an LXC container, locked: no other command restores or removes any of them while this value exists.
#[derive(Debug)]
pub struct LockedSnapshots {
    pub(super) container: LxcContainer,
    folder: PathBuf,
    pub(super) patience: Duration,
    _lock: OwnedFd,
}

/// Returns the error for an LXC container that does not exist.
pub fn no_container(container: &LxcContainer) -> Error {
    Error::not_found(format!(
        "there is no LXC container named {} in {}",
        container.name,
        container.lxcpath.shown()
    ))
    .hint(format!(
        "lxc-ls -P {} shows those that there are",
        container.lxcpath.shown()
    ))
}

/// Returns the snapshot of exactly this name.
pub fn find<'t>(
    container: &LxcContainer,
    trees: &'t [LxcSnapshot],
    name: &OsStr,
) -> Result<&'t LxcSnapshot> {
    trees.iter().find(|tree| tree.name == name).ok_or_else(|| {
        let known = trees.iter().filter_map(|tree| tree.name.to_str());
        let hint = match name.to_str().and_then(|name| nearest(name, known)) {
            Some(near) => format!("did you mean {near}?"),
            None => format!(
                "lxc-snapshot {} -L shows its snapshots",
                container.options()
            ),
        };
        let shown = name.as_encoded_bytes().escape_ascii();
        let what = format!("{} has no snapshot named \"{shown}\"", container.name);
        Error::not_found(what).hint(hint)
    })
}

/// Refuses a snapshot whose creation was interrupted.
pub fn refuse_unfinished(tree: &LxcSnapshot) -> Result<()> {
    if tree.taken.is_some() {
        return Ok(());
    }
    let name = tree.name.as_encoded_bytes().escape_ascii();
    Err(Error::failed(format!(
        "{name} is not whole: whoever made it was cut off, or is still at work"
    ))
    .hint(format!("nothing was changed; -d {name} removes it")))
}

impl LockedSnapshots {
    /// Waits for the lock, and cleans up after interrupted commands.
    pub fn open(container: LxcContainer, patience: Duration) -> Result<Self> {
        if !disk::exists(&container.dir())? {
            return Err(no_container(&container));
        }
        let lock = lock_dir(&container.dir(), patience)?;
        // It may have been removed while this waited for the lock.
        if !disk::exists(&container.config())? {
            return Err(no_container(&container));
        }
        let folder = snapshots::folder(&container)?;
        let (here, out) = snapshots::going(&folder)?;
        for dir in out {
            remove_tree(&dir)?;
        }
        for dir in here {
            take_away(&dir)?;
        }
        let place = Self {
            container,
            folder,
            patience,
            _lock: lock,
        };
        staging::remove_staging(&place.container, patience)?;
        Ok(place)
    }

    /// Returns the container.
    pub fn container(&self) -> &LxcContainer {
        &self.container
    }

    /// Returns the snapshots, by number.
    pub fn trees(&self) -> Result<Vec<LxcSnapshot>> {
        snapshots::list(&self.folder)
    }

    /// Returns the snapshot of exactly this name.
    pub fn tree(&self, name: &OsStr) -> Result<LxcSnapshot> {
        find(&self.container, &self.trees()?, name).cloned()
    }

    /// Removes snapshots: all of them, or none if one of them cannot be removed.
    pub fn remove(&self, trees: &[LxcSnapshot]) -> Result<()> {
        for tree in trees {
            refuse_base(
                &tree.dir,
                &tree.name.as_encoded_bytes().escape_ascii().to_string(),
            )?;
        }
        for tree in trees {
            // This commits the removal: a directory without a config is not a snapshot.
            disk::rename(&tree.dir.join("config"), &tree.dir.join(GOING))?;
            take_away(&tree.dir)?;
        }
        // As LXC does, if it is empty.
        match std::fs::remove_dir(&self.folder) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) => Err(Error::at("remove", &self.folder, error)),
        }
    }
}

/// Removes the directory of a snapshot whose removal was committed.
fn take_away(dir: &Path) -> Result<()> {
    snapshots::forget_dependant(dir)?;
    let Some(out) = snapshots::way_out(dir) else {
        return Err(Error::failed(format!("{} names no folder", dir.shown())));
    };
    // Renamed first, so that an interrupted removal is recognized by the name.
    disk::rename(dir, &out)?;
    remove_tree(&out)
}

/// Refuses to change files that other containers depend on.
pub fn refuse_base(dir: &Path, name: &str) -> Result<()> {
    let found = snapshots::dependants(dir)?;
    let Some(first) = found.first() else {
        return Ok(());
    };
    let who = match first {
        Dependant::Container(path, name) => path.join(name).shown().to_string(),
        Dependant::Count(count) => format!("{count} containers"),
    };
    let more = match found.len() {
        0 | 1 => String::new(),
        many => format!(" and {} more", many - 1),
    };
    Err(Error::busy(format!(
        "{name} stays as it is: {who}{more}, made by lxc-copy -s, stands on its files"
    ))
    .hint("restore to a new name with -N NEW, or destroy what stands on it first"))
}

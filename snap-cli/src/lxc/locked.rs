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
use super::snapshots::{self, LxcSnapshot, REMOVED_CONFIG};
use super::staging::{self, lock_dir};
use crate::error::{Error, Result};
use crate::store::disk;
use crate::store::disk::remove_tree;
use crate::store::name::nearest;

/// The snapshots of an LXC container, locked: no other command restores or removes any of them while this value exists.
#[derive(Debug)]
pub struct LockedSnapshots {
    pub(super) container: LxcContainer,
    dir: PathBuf,
    pub(super) patience: Duration,
    _lock: OwnedFd,
}

/// Returns the error for an LXC container that does not exist.
pub fn no_container(container: &LxcContainer) -> Error {
    Error::not_found(format!(
        "LXC container {} does not exist in {}",
        container.name,
        container.lxcpath.shown()
    ))
    .hint(format!(
        "list the containers: lxc-ls -P {}",
        container.lxcpath.shown()
    ))
}

/// Returns the snapshot of exactly this name.
pub fn find_snapshot<'t>(
    container: &LxcContainer,
    snapshots: &'t [LxcSnapshot],
    name: &OsStr,
) -> Result<&'t LxcSnapshot> {
    let found = snapshots.iter().find(|snapshot| snapshot.name == name);
    found.ok_or_else(|| {
        let names = snapshots
            .iter()
            .filter_map(|snapshot| snapshot.name.to_str());
        let hint = match name.to_str().and_then(|name| nearest(name, names)) {
            Some(near) => format!("did you mean {near}?"),
            None => format!(
                "list its snapshots: lxc-snapshot {} -L",
                container.options()
            ),
        };
        let message = format!(
            "{} has no snapshot named \"{}\"",
            container.name,
            name.shown()
        );
        Error::not_found(message).hint(hint)
    })
}

/// Fails if the creation of a snapshot was interrupted.
pub fn refuse_unfinished(snapshot: &LxcSnapshot) -> Result<()> {
    if snapshot.taken.is_some() {
        return Ok(());
    }
    let name = snapshot.name.shown();
    Err(Error::failed(format!(
        "{name} is incomplete: its creation was interrupted, or still runs"
    ))
    .hint(format!("wait, or remove it with -d {name}")))
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
        let dir = snapshots::snapshots_dir(&container)?;
        let (unrenamed, renamed) = snapshots::interrupted_removals(&dir)?;
        for dir in renamed {
            remove_tree(&dir)?;
        }
        for dir in unrenamed {
            complete_removal(&dir)?;
        }
        let locked = Self {
            container,
            dir,
            patience,
            _lock: lock,
        };
        staging::remove_staging(&locked.container, patience)?;
        Ok(locked)
    }

    /// Returns the container.
    pub fn container(&self) -> &LxcContainer {
        &self.container
    }

    /// Returns the snapshots, by number.
    pub fn list(&self) -> Result<Vec<LxcSnapshot>> {
        snapshots::list(&self.dir)
    }

    /// Returns the snapshot of exactly this name.
    pub fn find(&self, name: &OsStr) -> Result<LxcSnapshot> {
        find_snapshot(&self.container, &self.list()?, name).cloned()
    }

    /// Removes snapshots: all of them, or none if one of them cannot be removed.
    pub fn remove(&self, snapshots: &[LxcSnapshot]) -> Result<()> {
        for snapshot in snapshots {
            refuse_base(&snapshot.dir, &snapshot.name.shown().to_string())?;
        }
        for snapshot in snapshots {
            // This commits the removal: a directory without a config is not a snapshot.
            disk::rename(
                &snapshot.dir.join("config"),
                &snapshot.dir.join(REMOVED_CONFIG),
            )?;
            complete_removal(&snapshot.dir)?;
        }
        // LXC also removes the directory of all snapshots when it is empty.
        match std::fs::remove_dir(&self.dir) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) => Err(Error::at("remove", &self.dir, error)),
        }
    }
}

/// Removes the directory of a snapshot whose removal was committed.
fn complete_removal(dir: &Path) -> Result<()> {
    snapshots::forget_dependant(dir)?;
    let Some(out) = snapshots::removal_path(dir) else {
        return Err(Error::failed(format!(
            "cannot remove {}: it is not a directory",
            dir.shown()
        )));
    };
    // The directory is renamed first, so that an interrupted removal is recognized by the name.
    disk::rename(dir, &out)?;
    remove_tree(&out)
}

/// Fails if other containers depend on the files in `dir`.
pub fn refuse_base(dir: &Path, name: &str) -> Result<()> {
    let found = snapshots::dependants(dir)?;
    let Some(first) = found.first() else {
        return Ok(());
    };
    let user = match first {
        Dependant::Container(path, name) => path.join(name).shown().to_string(),
        Dependant::Count(count) => format!("{count} containers"),
    };
    let more = match found.len() {
        0 | 1 => String::new(),
        many => format!(" and {} more", many - 1),
    };
    Err(Error::busy(format!(
        "cannot change {name}: {user}{more}, created by lxc-copy -s, depends on its files"
    ))
    .hint("restore to a new name with -N NEW, or destroy the containers that depend on it first"))
}

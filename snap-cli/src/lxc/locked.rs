//! Snapshots that LXC's own tools made, of containers in a folder of their own: going back to them and
//! removing them, so that a command that is killed at any call, or a full disk, takes nothing away.
//!
//! One folder is made beside another, and one rename is what counts. Who does this holds the lock of the
//! container's folder; what a killed one left is cleaned up by the next.

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

/// An LXC container with its snapshots, alone: nobody else restores or removes here while this lives.
#[derive(Debug)]
pub struct LockedSnapshots {
    pub(super) container: LxcContainer,
    folder: PathBuf,
    pub(super) patience: Duration,
    _lock: OwnedFd,
}

/// The complaint about an LXC container that is not there.
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

/// The snapshot of exactly this name.
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

/// A snapshot whose making was cut off is none to go back to.
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
    /// Waits until nobody else is at work here, and cleans up.
    pub fn open(container: LxcContainer, patience: Duration) -> Result<Self> {
        if !disk::is_there(&container.dir())? {
            return Err(no_container(&container));
        }
        let lock = lock_dir(&container.dir(), patience)?;
        // It may have gone while we waited.
        if !disk::is_there(&container.config())? {
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

    /// The container.
    pub fn container(&self) -> &LxcContainer {
        &self.container
    }

    /// Its snapshots, by number.
    pub fn trees(&self) -> Result<Vec<LxcSnapshot>> {
        snapshots::list(&self.folder)
    }

    /// The snapshot of exactly this name.
    pub fn tree(&self, name: &OsStr) -> Result<LxcSnapshot> {
        find(&self.container, &self.trees()?, name).cloned()
    }

    /// Removes snapshots: all, or none where one can't go.
    pub fn remove(&self, trees: &[LxcSnapshot]) -> Result<()> {
        for tree in trees {
            refuse_base(
                &tree.dir,
                &tree.name.as_encoded_bytes().escape_ascii().to_string(),
            )?;
        }
        for tree in trees {
            // From here on it is no snapshot, whatever happens to the rest of it.
            disk::rename(&tree.dir.join("config"), &tree.dir.join(GOING))?;
            take_away(&tree.dir)?;
        }
        // As LXC does; it stays while anything is in it.
        match std::fs::remove_dir(&self.folder) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) => Err(Error::at("remove", &self.folder, error)),
        }
    }
}

/// Removes a snapshot's folder, which counts no more.
fn take_away(dir: &Path) -> Result<()> {
    snapshots::forget_dependant(dir)?;
    let Some(out) = snapshots::way_out(dir) else {
        return Err(Error::failed(format!("{} names no folder", dir.shown())));
    };
    // Under a name that tells what is left of it.
    disk::rename(dir, &out)?;
    remove_tree(&out)
}

/// Refuses to touch what other containers stand on.
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

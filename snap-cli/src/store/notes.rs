//! Notes in the directory of locks, by which a collection finds leftovers: notes of commands that create objects, and
//! notes on unreferenced layers that a mount holds.

use std::path::PathBuf;

use super::lock::{Lock, Mode};
use super::manifest::LayerId;
use super::paths::LOCK;
use super::{Store, disk};
use crate::error::{Error, Result};

/// The prefix of the note of a command that creates objects.
pub(super) const CREATION_NOTE: &str = "making-";

/// The prefix of the note on an unreferenced layer that a mount holds.
pub(super) const HELD: &str = "held-";

/// Writes notes on layers that a collection removes once no mount holds them.
pub(super) fn write_held(store: &Store, held: &[LayerId]) -> Result<()> {
    for id in held {
        let path = store.paths().lock_file(&format!("{HELD}{id}"));
        std::fs::write(&path, b"").map_err(|error| Error::at("write", &path, error))?;
    }
    Ok(())
}

/// Returns the notes on held layers.
pub(super) fn list_held(store: &Store) -> Result<Vec<(PathBuf, LayerId)>> {
    let dir = store.paths().locks();
    let names = disk::names(&dir)?;
    let note = |name: &String| {
        let id = name.strip_prefix(HELD)?.strip_suffix(LOCK)?;
        Some((dir.join(name), LayerId::parse(id)?))
    };
    Ok(names.iter().filter_map(note).collect())
}

/// Locks and returns the notes of commands that were killed while they created objects.
pub(super) fn lock_stale(store: &Store) -> Result<Vec<Lock>> {
    let mut stale = Vec::new();
    for name in disk::names(&store.paths().locks())? {
        if name.starts_with(CREATION_NOTE) {
            let path = store.paths().locks().join(&name);
            stale.extend(Lock::try_take(
                &path,
                Mode::Exclusive,
                &store.session().command,
            )?);
        }
    }
    Ok(stale)
}

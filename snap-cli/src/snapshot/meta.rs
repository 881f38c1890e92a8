//! Edits the name, comment, tags and protection of existing snapshots.
//!
//! All of these are in the container's manifest, so each change is one commit and reads no layer.

use std::collections::BTreeMap;

use super::take::check_free;
use crate::container::{Container, Swap};
use crate::error::Result;
use crate::store::manifest::SnapshotRef;
use crate::store::name::SnapshotName;

/// Whether a snapshot is protected from removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// `cowl rm`, `cowl prune` and `cowl destroy` fail.
    On,
    /// Removal is possible.
    Off,
}

/// Edits the manifest entry of one snapshot.
///
/// Commits nothing if the edit changes nothing.
fn edit_entry(
    container: &mut Container<'_>,
    name: &SnapshotName,
    edit: impl FnOnce(&mut SnapshotRef),
) -> Result<()> {
    let (current, _) = container.snapshot(name)?;
    let mut next = container.manifest().clone();
    if let Some(snapshot) = next.snapshots.iter_mut().find(|s| s.id == current.id) {
        edit(snapshot);
        if *snapshot == current {
            return Ok(());
        }
    }
    container.commit(next, None, |_| Ok(Swap::Done))
}

/// Sets the comment; an empty text removes it.
pub fn set_comment(container: &mut Container<'_>, name: &SnapshotName, text: &str) -> Result<()> {
    edit_entry(container, name, |snapshot| {
        text.clone_into(&mut snapshot.comment)
    })
}

/// Adds tags, replacing those with the same key, and removes the tags with a key in `remove`.
pub fn edit_tags(
    container: &mut Container<'_>,
    name: &SnapshotName,
    add: &BTreeMap<String, String>,
    remove: &[String],
) -> Result<()> {
    edit_entry(container, name, |snapshot| {
        for key in remove {
            snapshot.tags.remove(key);
        }
        snapshot.tags.extend(add.clone());
    })
}

/// Sets whether a snapshot is protected from removal.
pub fn set_protection(
    container: &mut Container<'_>,
    name: &SnapshotName,
    protection: Protection,
) -> Result<()> {
    let (current, _) = container.snapshot(name)?;
    let mut next = container.manifest().clone();
    if let Some(snapshot) = next.snapshots.iter_mut().find(|s| s.id == current.id) {
        snapshot.protected = protection == Protection::On;
    }
    // If the snapshot was received, its sender does not change the protection any more.
    if let Some(record) = next
        .received
        .iter_mut()
        .find(|known| known.id == current.id)
    {
        record.own_protection = true;
    }
    match next == *container.manifest() {
        true => Ok(()),
        false => container.commit(next, None, |_| Ok(Swap::Done)),
    }
}

/// Renames a snapshot.
///
/// The old name becomes free, unless automatic numbering assigned it.
pub fn rename(
    container: &mut Container<'_>,
    name: &SnapshotName,
    new: &SnapshotName,
) -> Result<()> {
    container.snapshot(name)?;
    if name == new {
        return Ok(());
    }
    check_free(container, new)?;
    edit_entry(container, name, |snapshot| snapshot.name = new.clone())
}

//! What people say about a snapshot, any time after it was taken: its name, remark, tags, protection. All of
//! it stands in the container's manifest, so each change is one commit, and no layer is looked at.

use std::collections::BTreeMap;

use super::take::check_free;
use crate::container::{Container, Swap};
use crate::error::Result;
use crate::store::manifest::SnapshotRef;
use crate::store::name::SnapshotName;

/// Changes what the manifest says of one snapshot; nothing is written when nothing changes.
fn change(
    container: &mut Container<'_>,
    name: &SnapshotName,
    how: impl FnOnce(&mut SnapshotRef),
) -> Result<()> {
    let (known, _) = container.snapshot(name)?;
    let mut next = container.manifest().clone();
    if let Some(snapshot) = next.snapshots.iter_mut().find(|s| s.id == known.id) {
        how(snapshot);
        if *snapshot == known {
            return Ok(());
        }
    }
    container.commit(next, None, |_| Ok(Swap::Done))
}

/// Sets the remark; an empty one takes it away.
pub fn comment(container: &mut Container<'_>, name: &SnapshotName, text: &str) -> Result<()> {
    change(container, name, |snapshot| {
        text.clone_into(&mut snapshot.comment)
    })
}

/// Adds tags (one of the same key is replaced), and removes those of the keys in `without`.
pub fn tag(
    container: &mut Container<'_>,
    name: &SnapshotName,
    with: &BTreeMap<String, String>,
    without: &[String],
) -> Result<()> {
    change(container, name, |snapshot| {
        for key in without {
            snapshot.tags.remove(key);
        }
        snapshot.tags.extend(with.clone());
    })
}

/// Protects a snapshot from removal, or no longer.
pub fn protect(container: &mut Container<'_>, name: &SnapshotName, on: bool) -> Result<()> {
    change(container, name, |snapshot| snapshot.protected = on)
}

/// Gives a snapshot another name. Its old one is free again, unless the counter gave it.
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
    change(container, name, |snapshot| snapshot.name = new.clone())
}

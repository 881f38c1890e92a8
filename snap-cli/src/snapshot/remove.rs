//! Removes snapshots.
//!
//! One commit takes all of them off the container's list. Garbage collection removes their layers unless
//! another manifest references them.

use std::collections::{HashMap, HashSet};

use super::readers;
use crate::container::Container;
use crate::container::{Swap, find_snapshot_ref};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::creation::Creation;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, SnapshotId, SnapshotRef};
use crate::store::name::{SnapshotChoice, SnapshotName};
use crate::store::sizes::Sizes;
use crate::store::usage::{References, Space};

/// A snapshot that is not removed despite the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The snapshot.
    pub name: SnapshotName,
    /// The reason.
    pub reason: String,
    /// The hint for the user.
    pub hint: String,
    /// Whether the reason is its protection; otherwise it is in use.
    pub protected: bool,
}

impl Refused {
    /// Converts the refusal to an error.
    pub fn to_error(&self) -> Error {
        let message = format!("cannot remove {}: {}", self.name, self.reason);
        let error = match self.protected {
            true => Error::failed(message),
            false => Error::busy(message),
        };
        error.hint(self.hint.clone())
    }
}

/// The snapshots that a removal would remove, and the space that it would free.
#[derive(Clone, Debug, Default)]
pub struct Removal {
    /// The snapshots to remove, oldest first.
    pub going: Vec<SnapshotRef>,
    /// The snapshots that are not removed.
    pub refused: Vec<Refused>,
    /// The space that the removal frees.
    pub frees: Space,
}

/// Returns the chosen snapshots, each once, in the order of the list.
///
/// A range includes all snapshots between its ends in the list.
pub fn select_snapshots<'m>(
    manifest: &'m ContainerManifest,
    choice: &[SnapshotChoice],
) -> Result<Vec<&'m SnapshotRef>> {
    let position = |name: &SnapshotName| -> Result<usize> {
        let found = find_snapshot_ref(manifest, name)?;
        let at = manifest.snapshots.iter().position(|s| s.id == found.id);
        Ok(at.unwrap_or_default())
    };
    let mut selected = HashSet::new();
    for one in choice {
        let (first, last) = match one {
            SnapshotChoice::One(name) => (position(name)?, position(name)?),
            SnapshotChoice::Through(first, last) => (position(first)?, position(last)?),
        };
        if first > last {
            return Err(Error::usage("the range is reversed")
                .hint("write A..B, where A is the older snapshot and B the newer"));
        }
        selected.extend(first..=last);
    }
    let all = manifest.snapshots.iter().enumerate();
    Ok(all
        .filter_map(|(at, snapshot)| selected.contains(&at).then_some(snapshot))
        .collect())
}

/// The treatment of protected snapshots by a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protected {
    /// Refuse to remove them.
    Refuse,
    /// Remove them as well.
    Remove,
}

/// Returns what removing these snapshots would do, without changing anything.
pub fn plan(
    container: &Container<'_>,
    ids: &[SnapshotId],
    protected: Protected,
) -> Result<Removal> {
    let store = container.store();
    // The lock prevents the collection of the layers that are inspected here.
    let _reading = store.lock_shared()?;
    let mut removal = Removal::default();
    let mut stacks = Vec::new();
    for snapshot in &container.manifest().snapshots {
        if !ids.contains(&snapshot.id) {
            continue;
        }
        let stack = store.snapshot(container.id(), snapshot.id)?.stack;
        match check_removable(container, snapshot, &stack, protected)? {
            Some(refused) => removal.refused.push(refused),
            None => {
                removal.going.push(snapshot.clone());
                stacks.push(stack);
            }
        }
    }
    match measure_freed(container.store(), container.id(), &stacks) {
        Ok(frees) => removal.frees = frees,
        // A damaged manifest of another container does not prevent the removal, but it prevents any collection.
        Err(error) => log::warn!("{error}; no space is freed until that is repaired"),
    }
    Ok(removal)
}

/// Returns the space that is freed when these states of a container are removed.
///
/// The caller must hold a shared lock of the store.
pub fn measure_freed(store: &Store, id: ContainerId, stacks: &[Vec<LayerId>]) -> Result<Space> {
    let only = References::from_store(store)?.layers_only_in(stacks.iter().map(Vec::as_slice));
    let mut sizes = Sizes::read(store, id);
    let mut space = Space::default();
    for layer in only {
        space += sizes.measured(layer)?.1.into();
    }
    sizes.save();
    Ok(space)
}

/// Returns the reason not to remove a snapshot, if there is one.
fn check_removable(
    container: &Container<'_>,
    snapshot: &SnapshotRef,
    stack: &[LayerId],
    protected: Protected,
) -> Result<Option<Refused>> {
    let address = format!("{}@{}", container.name(), snapshot.name);
    if snapshot.protected && protected == Protected::Refuse {
        return Ok(Some(Refused {
            name: snapshot.name.clone(),
            reason: "it is protected".to_owned(),
            hint: format!("remove the protection first: cowl protect {address} --off"),
            protected: true,
        }));
    }
    let readers = readers::find_readers(container.store(), stack)?;
    if readers.is_empty() {
        return Ok(None);
    }
    let pids: Vec<_> = readers
        .iter()
        .map(|pid| match pid {
            0 => "a process in another PID namespace".to_owned(),
            pid => format!("pid {pid}"),
        })
        .collect();
    Ok(Some(Refused {
        name: snapshot.name.clone(),
        reason: format!("it is mounted for reading ({})", pids.join(", ")),
        hint: format!("unmount it first: cowl umount {address}"),
        protected: false,
    }))
}

/// Removes snapshots from the container's list, and collects layers that are no longer referenced.
pub fn remove(container: &mut Container<'_>, going: &[SnapshotRef]) -> Result<()> {
    if going.is_empty() {
        return Ok(());
    }
    let ids: HashSet<_> = going.iter().map(|snapshot| snapshot.id).collect();
    let mut creation = Creation::begin(container.store())?;
    creation.request_sweep();
    let next = manifest_without(container.manifest(), &ids);
    container.commit(next, Some(creation), |_| Ok(Swap::Done))
}

/// Returns the manifest without these snapshots.
///
/// Their children become children of the nearest remaining ancestor.
fn manifest_without(
    manifest: &ContainerManifest,
    going: &HashSet<SnapshotId>,
) -> ContainerManifest {
    let parents: HashMap<_, _> = manifest
        .snapshots
        .iter()
        .filter_map(|snapshot| Some((snapshot.id, snapshot.parent?)))
        .collect();
    let remaining = |mut parent: Option<SnapshotId>| {
        // The number of steps is limited, because the parents in a damaged file may form a cycle.
        for _ in 0..=manifest.snapshots.len() {
            match parent {
                Some(id) if going.contains(&id) => parent = parents.get(&id).copied(),
                other => return other,
            }
        }
        None
    };
    let mut next = manifest.clone();
    next.parent = remaining(next.parent);
    next.snapshots
        .retain(|snapshot| !going.contains(&snapshot.id));
    for snapshot in &mut next.snapshots {
        snapshot.parent = remaining(snapshot.parent);
    }
    next
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Map;

    use super::*;
    use crate::error::Kind;
    use crate::store::manifest::SnapshotKind;
    use crate::store::name::ContainerName;

    /// Returns a container with the snapshots snap0, snap1, ..., each the parent of the next.
    fn container(snapshots: u64) -> ContainerManifest {
        let head = LayerId::fresh();
        let name = ContainerName::parse("web").unwrap();
        let mut manifest = ContainerManifest {
            next_snap: snapshots,
            ..ContainerManifest::new(name, head, &[])
        };
        for number in 0..snapshots {
            let id = SnapshotId::fresh();
            manifest.snapshots.push(SnapshotRef {
                id,
                name: SnapshotName::counted(number),
                kind: SnapshotKind::Manual,
                created: String::new(),
                parent: manifest.parent.replace(id),
                layer: LayerId::fresh(),
                comment: String::new(),
                tags: BTreeMap::new(),
                protected: false,
                settling: None,
                extra: Map::new(),
            });
        }
        manifest
    }

    fn names(manifest: &ContainerManifest, words: &[&str]) -> Result<Vec<String>> {
        let choice: Result<Vec<_>> = words.iter().map(SnapshotChoice::parse).collect();
        let found = select_snapshots(manifest, &choice?)?;
        Ok(found.iter().map(|s| s.name.to_string()).collect())
    }

    #[test]
    fn ranges_and_names_select_snapshots() {
        let manifest = container(12);
        let select = |words: &[&str]| names(&manifest, words).unwrap().join(" ");
        assert_eq!(select(&["snap1"]), "snap1");
        assert_eq!(select(&["snap3", "snap1", "snap3"]), "snap1 snap3");
        assert_eq!(select(&["snap9..snap11"]), "snap9 snap10 snap11");
        assert_eq!(
            select(&["snap2..snap4", "snap3..snap5"]),
            "snap2 snap3 snap4 snap5"
        );
        assert_eq!(select(&["snap2..snap2"]), "snap2");
        let kind = |words: &[&str]| names(&manifest, words).unwrap_err().kind;
        assert_eq!(kind(&["snap"]), Kind::NotFound);
        assert_eq!(kind(&["snap1", "snap12"]), Kind::NotFound);
        assert_eq!(kind(&["snap4..snap2"]), Kind::Usage);
        assert_eq!(kind(&["snap2..snap12"]), Kind::NotFound);
    }

    #[test]
    fn children_get_the_parent_of_removed_snapshots() {
        let manifest = container(5);
        let ids: Vec<_> = manifest.snapshots.iter().map(|s| s.id).collect();
        let parents = |going: &[usize]| -> Vec<Option<usize>> {
            let going = going.iter().map(|at| ids[*at]).collect();
            let next = manifest_without(&manifest, &going);
            let heads = std::iter::once(next.parent);
            let parents = next.snapshots.iter().map(|s| s.parent).chain(heads);
            let at = |id| ids.iter().position(|known| *known == id);
            parents.map(|parent| parent.and_then(at)).collect()
        };
        assert_eq!(
            parents(&[]),
            [None, Some(0), Some(1), Some(2), Some(3), Some(4)]
        );
        assert_eq!(parents(&[1, 2]), [None, Some(0), Some(3), Some(4)]);
        assert_eq!(parents(&[0]), [None, Some(1), Some(2), Some(3), Some(4)]);
        assert_eq!(parents(&[3, 4]), [None, Some(0), Some(1), Some(2)]);
        assert_eq!(parents(&[0, 1, 2, 3, 4]), [None]);
    }

    #[test]
    fn a_cycle_of_parents_terminates() {
        let mut manifest = container(2);
        let ids: Vec<_> = manifest.snapshots.iter().map(|s| s.id).collect();
        manifest.snapshots[0].parent = Some(ids[1]);
        let next = manifest_without(&manifest, &ids.iter().copied().collect());
        assert_eq!(next.parent, None);
    }
}

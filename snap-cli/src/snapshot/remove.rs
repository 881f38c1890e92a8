//! Removing snapshots. One commit takes all of them off the container's list; their layers go by
//! collection, as far as nothing else names them.

use std::collections::{HashMap, HashSet};

use super::readers;
use crate::container::Container;
use crate::container::{Swap, find_snapshot_ref};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::making::Making;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, SnapshotId, SnapshotRef};
use crate::store::name::{SnapshotChoice, SnapshotName};
use crate::store::sizes::Sizes;
use crate::store::usage::{References, Space};

/// A snapshot that stays although somebody asked for its removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The snapshot.
    pub name: SnapshotName,
    /// Why.
    pub why: String,
    /// What to do about it.
    pub hint: String,
    /// It is protected; else it is in use.
    pub protected: bool,
}

impl Refused {
    /// As an error.
    pub fn error(&self) -> Error {
        let what = format!("{} is not removed: {}", self.name, self.why);
        let error = match self.protected {
            true => Error::failed(what),
            false => Error::busy(what),
        };
        error.hint(self.hint.clone())
    }
}

/// What a removal would do.
#[derive(Clone, Debug, Default)]
pub struct Removal {
    /// The snapshots that go, oldest first.
    pub going: Vec<SnapshotRef>,
    /// Those that stay.
    pub refused: Vec<Refused>,
    /// What is free afterwards.
    pub frees: Space,
}

/// The snapshots that were chosen, each once, in the order of the list. A range goes by the place in the
/// list.
pub fn chosen<'m>(
    manifest: &'m ContainerManifest,
    choice: &[SnapshotChoice],
) -> Result<Vec<&'m SnapshotRef>> {
    let place = |name: &SnapshotName| -> Result<usize> {
        let found = find_snapshot_ref(manifest, name)?;
        let at = manifest.snapshots.iter().position(|s| s.id == found.id);
        Ok(at.unwrap_or_default())
    };
    let mut meant = HashSet::new();
    for one in choice {
        let (first, last) = match one {
            SnapshotChoice::One(name) => (place(name)?, place(name)?),
            SnapshotChoice::Through(first, last) => (place(first)?, place(last)?),
        };
        if first > last {
            return Err(Error::usage("the range is the wrong way round")
                .hint("A..B: A is the older snapshot, B the newer"));
        }
        meant.extend(first..=last);
    }
    let all = manifest.snapshots.iter().enumerate();
    Ok(all
        .filter_map(|(at, snapshot)| meant.contains(&at).then_some(snapshot))
        .collect())
}

/// What becomes of protected snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protected {
    /// They are refused.
    Refuse,
    /// They are removed as well.
    Remove,
}

/// What removing these snapshots would do.
pub fn plan(
    container: &Container<'_>,
    ids: &[SnapshotId],
    protected: Protected,
) -> Result<Removal> {
    let store = container.store();
    // What is looked at here is not collected meanwhile.
    let _reading = store.lock_shared()?;
    let mut removal = Removal::default();
    let mut stacks = Vec::new();
    for snapshot in &container.manifest().snapshots {
        if !ids.contains(&snapshot.id) {
            continue;
        }
        let stack = store.snapshot(container.id(), snapshot.id)?.stack;
        match refused(container, snapshot, &stack, protected)? {
            Some(refused) => removal.refused.push(refused),
            None => {
                removal.going.push(snapshot.clone());
                stacks.push(stack);
            }
        }
    }
    match frees(container.store(), container.id(), &stacks) {
        Ok(frees) => removal.frees = frees,
        // Another container's damage is no reason to keep these; but nothing is collected either.
        Err(error) => log::warn!("{error}; nothing is freed before that is repaired"),
    }
    Ok(removal)
}

/// What is free once these states of a container are gone. Hold a shared lock of the store.
pub fn frees(store: &Store, id: ContainerId, stacks: &[Vec<LayerId>]) -> Result<Space> {
    let only = References::from_store(store)?.layers_only_in(stacks.iter().map(Vec::as_slice));
    let mut sizes = Sizes::read(store, id);
    let mut space = Space::default();
    for layer in only {
        space += sizes.measured(layer)?.1.into();
    }
    sizes.save();
    Ok(space)
}

fn refused(
    container: &Container<'_>,
    snapshot: &SnapshotRef,
    stack: &[LayerId],
    protected: Protected,
) -> Result<Option<Refused>> {
    let address = format!("{}@{}", container.name(), snapshot.name);
    if snapshot.protected && protected == Protected::Refuse {
        return Ok(Some(Refused {
            name: snapshot.name.clone(),
            why: "it is protected".to_owned(),
            hint: format!("if you mean it, first type: cowl protect {address} --off"),
            protected: true,
        }));
    }
    let readers = readers::of(container.store(), stack)?;
    if readers.is_empty() {
        return Ok(None);
    }
    let pids: Vec<_> = readers
        .iter()
        .map(|pid| match pid {
            0 => "a process that can't be seen from here".to_owned(),
            pid => format!("pid {pid}"),
        })
        .collect();
    Ok(Some(Refused {
        name: snapshot.name.clone(),
        why: format!("it is mounted to be read ({})", pids.join(", ")),
        hint: format!("unmount it first: cowl umount {address}"),
        protected: false,
    }))
}

/// Takes snapshots off the container's list, and collects what nothing names any more.
pub fn remove(container: &mut Container<'_>, going: &[SnapshotRef]) -> Result<()> {
    if going.is_empty() {
        return Ok(());
    }
    let ids: HashSet<_> = going.iter().map(|snapshot| snapshot.id).collect();
    let mut making = Making::begin(container.store())?;
    making.request_sweep();
    let next = without(container.manifest(), &ids);
    container.commit(next, Some(making), |_| Ok(Swap::Done))
}

/// The manifest without these snapshots: what was made from one of them counts as made from its parent.
fn without(manifest: &ContainerManifest, going: &HashSet<SnapshotId>) -> ContainerManifest {
    let parents: HashMap<_, _> = manifest
        .snapshots
        .iter()
        .filter_map(|snapshot| Some((snapshot.id, snapshot.parent?)))
        .collect();
    let staying = |mut parent: Option<SnapshotId>| {
        // As many steps as there are snapshots, and not in a circle, whatever the file says.
        for _ in 0..=manifest.snapshots.len() {
            match parent {
                Some(id) if going.contains(&id) => parent = parents.get(&id).copied(),
                other => return other,
            }
        }
        None
    };
    let mut next = manifest.clone();
    next.parent = staying(next.parent);
    next.snapshots
        .retain(|snapshot| !going.contains(&snapshot.id));
    for snapshot in &mut next.snapshots {
        snapshot.parent = staying(snapshot.parent);
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

    /// A container with the snapshots snap0, snap1, ... in a row.
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
        let found = chosen(manifest, &choice?)?;
        Ok(found.iter().map(|s| s.name.to_string()).collect())
    }

    #[test]
    fn what_was_chosen() {
        let manifest = container(12);
        let of = |words: &[&str]| names(&manifest, words).unwrap().join(" ");
        assert_eq!(of(&["snap1"]), "snap1");
        assert_eq!(of(&["snap3", "snap1", "snap3"]), "snap1 snap3");
        assert_eq!(of(&["snap9..snap11"]), "snap9 snap10 snap11");
        assert_eq!(
            of(&["snap2..snap4", "snap3..snap5"]),
            "snap2 snap3 snap4 snap5"
        );
        assert_eq!(of(&["snap2..snap2"]), "snap2");
        let kind = |words: &[&str]| names(&manifest, words).unwrap_err().kind;
        assert_eq!(kind(&["snap"]), Kind::NotFound);
        assert_eq!(kind(&["snap1", "snap12"]), Kind::NotFound);
        assert_eq!(kind(&["snap4..snap2"]), Kind::Usage);
        assert_eq!(kind(&["snap2..snap12"]), Kind::NotFound);
    }

    #[test]
    fn children_get_the_parent_of_what_goes() {
        let manifest = container(5);
        let ids: Vec<_> = manifest.snapshots.iter().map(|s| s.id).collect();
        let parents = |going: &[usize]| -> Vec<Option<usize>> {
            let going = going.iter().map(|at| ids[*at]).collect();
            let next = without(&manifest, &going);
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
    fn a_circle_of_parents_ends() {
        let mut manifest = container(2);
        let ids: Vec<_> = manifest.snapshots.iter().map(|s| s.id).collect();
        manifest.snapshots[0].parent = Some(ids[1]);
        let next = without(&manifest, &ids.iter().copied().collect());
        assert_eq!(next.parent, None);
    }
}

//! The removal of containerd's snapshots by a command, after containerd was uninstalled.

use std::collections::{HashMap, HashSet};

use super::read::{self, LoadedSnapshot};
use super::running;
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::lock::Lock;
use crate::store::name::ContainerName;

/// Returns the lock that excludes `cowl-snapshotter`. Fails with `Busy` if it or containerd runs.
pub fn lock_without_containerd(store: &Store) -> Result<Lock> {
    let lock = store.try_lock_containerd()?.ok_or_else(|| {
        Error::busy("cowl-snapshotter uses the store, and containerd would still know what is removed")
            .hint(
                "remove containers and images with a client of containerd; if it is uninstalled: systemctl disable --now \
                 cowl-snapshotter.socket cowl-snapshotter.service",
            )
    })?;
    running::refuse_containerd()?;
    Ok(lock)
}

/// The choice of snapshots to remove.
#[derive(Clone, Copy, Debug)]
pub enum Abandoned<'n> {
    /// All of them.
    All,
    /// Those of these containers.
    Named(&'n [ContainerName]),
}

/// Returns the selected snapshots, each before its parent.
///
/// Fails if one has children that are not selected, or if a container is not a snapshot of containerd.
pub fn select_abandoned(store: &Store, choice: Abandoned<'_>) -> Result<Vec<LoadedSnapshot>> {
    let loaded = read::load(store)?;
    let (names, is_complete) = match choice {
        Abandoned::All => (None, !loaded.incomplete),
        Abandoned::Named(names) => {
            let is_read =
                |name: &ContainerName| loaded.snapshots.iter().any(|one| one.name == *name);
            (Some(names), !loaded.incomplete || names.iter().all(is_read))
        }
    };
    if !is_complete {
        return Err(Error::damaged(
            "the manifest of a container that may belong to containerd cannot be read",
        )
        .hint("repair the store first: cowl check --repair"));
    }
    select(loaded.snapshots, names)
}

fn select(
    all: Vec<LoadedSnapshot>,
    names: Option<&[ContainerName]>,
) -> Result<Vec<LoadedSnapshot>> {
    if let Some(name) = names.unwrap_or_default().iter().find(|name| {
        let is_same = |one: &LoadedSnapshot| one.name == **name;
        !all.iter().any(is_same)
    }) {
        return Err(
            Error::usage(format!("{name} does not belong to containerd"))
                .hint(format!("to remove it: cowl destroy {name}")),
        );
    }
    let is_selected = |one: &LoadedSnapshot| names.is_none_or(|names| names.contains(&one.name));
    let (selected, others): (Vec<_>, Vec<_>) = all.into_iter().partition(is_selected);
    let parents: HashSet<_> = others
        .iter()
        .filter_map(|one| one.record.parent.as_deref())
        .collect();
    if let Some(parent) = selected
        .iter()
        .find(|one| parents.contains(one.record.key.as_str()))
    {
        let is_child =
            |one: &&LoadedSnapshot| one.record.parent.as_ref() == Some(&parent.record.key);
        let child = others.iter().find(is_child);
        return Err(Error::failed(format!(
            "cannot remove {}: other snapshots are based on it, for example {}",
            parent.name,
            child.map(|child| child.name.as_str()).unwrap_or_default()
        ))
        .hint("remove them as well, or all snapshots: cowl destroy --containerd --all"));
    }
    Ok(sort_children_first(selected))
}

/// Sorts snapshots so that each is before its parent.
fn sort_children_first(all: Vec<LoadedSnapshot>) -> Vec<LoadedSnapshot> {
    let depths: Vec<usize> = {
        let parents: HashMap<_, _> = all
            .iter()
            .map(|one| (one.record.key.as_str(), one.record.parent.as_deref()))
            .collect();
        let depth = |one: &LoadedSnapshot| {
            let mut key = one.record.parent.as_deref();
            // The manifests of a damaged store may form a circle.
            let above = std::iter::from_fn(|| {
                let now = key?;
                key = parents.get(now).copied().flatten();
                Some(())
            });
            above.take(all.len()).count()
        };
        all.iter().map(depth).collect()
    };
    let mut sorted: Vec<_> = depths.into_iter().zip(all).collect();
    sorted.sort_by_key(|(depth, _)| std::cmp::Reverse(*depth));
    sorted.into_iter().map(|(_, one)| one).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Map;

    use super::*;
    use crate::store::containerd::{ContainerdKind, ContainerdRecord};
    use crate::store::manifest::ContainerId;

    fn snapshot(key: &str, parent: Option<&str>) -> LoadedSnapshot {
        LoadedSnapshot {
            id: ContainerId::fresh(),
            name: ContainerName::parse(format!("ctr.{key}")).unwrap(),
            record: ContainerdRecord {
                key: key.to_owned(),
                kind: ContainerdKind::Active,
                parent: parent.map(str::to_owned),
                labels: BTreeMap::new(),
                created: String::new(),
                updated: String::new(),
                committed_from: None,
                labels_before: None,
                snapshots_before: 0,
                undone: 0,
                frozen: false,
                extra: Map::new(),
            },
        }
    }

    fn tree() -> Vec<LoadedSnapshot> {
        vec![
            snapshot("base", None),
            snapshot("middle", Some("base")),
            snapshot("web", Some("middle")),
            snapshot("db", Some("base")),
            snapshot("round", Some("about")),
            snapshot("about", Some("round")),
            snapshot("lost", Some("unknown")),
        ]
    }

    #[test]
    fn children_are_removed_before_their_parents() {
        let sorted = select(tree(), None).unwrap();
        assert_eq!(sorted.len(), tree().len());
        let at = |key: &str| sorted.iter().position(|one| one.record.key == key).unwrap();
        assert!(at("web") < at("middle") && at("middle") < at("base") && at("db") < at("base"));
    }

    #[test]
    fn parents_of_others_and_other_containers_are_not_selected() {
        let select = |names: &[&str]| {
            let names = names.iter().map(|name| ContainerName::parse(name).unwrap());
            let names: Vec<_> = names.collect();
            let found = select(tree(), Some(&names));
            found.map(|all| {
                all.into_iter()
                    .map(|one| one.record.key)
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(
            select(&["ctr.middle", "ctr.web"]).unwrap(),
            ["web", "middle"]
        );
        let error = select(&["ctr.middle"]).unwrap_err();
        assert!(error.what.contains("ctr.web"), "{error}");
        let error = select(&["web"]).unwrap_err();
        assert!(error.what.contains("does not belong"), "{error}");
    }
}

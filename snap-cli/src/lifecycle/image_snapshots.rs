//! The snapshots of a container that is created from an image, or updated from one.

use std::collections::{BTreeMap, HashSet};

use serde_json::Map;

use crate::archive::image_source::Image;
use crate::error::{Error, Result};
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, Settling, SnapshotId, SnapshotKind, SnapshotManifest,
    SnapshotRef,
};
use crate::store::name::SnapshotName;
use crate::store::record::Record;
use crate::store::{Store, disk, span};

/// The maximum number of characters of a comment that is a step of an image: it can be a script.
const COMMENT: usize = 200;

/// The layers of an image that get a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerSnapshots {
    /// Each layer.
    Each,
    /// The layers that were snapshots when cowl wrote the image.
    Recorded,
}

/// The names of a container's snapshots, and its counters.
#[derive(Debug)]
pub(super) struct Names {
    taken: HashSet<SnapshotName>,
    next_snap: u64,
    next_auto: u64,
}

impl Names {
    /// Returns the names in a manifest.
    pub(super) fn of(manifest: &ContainerManifest) -> Self {
        Self {
            taken: manifest.snapshots.iter().map(|s| s.name.clone()).collect(),
            next_snap: manifest.next_snap,
            next_auto: manifest.next_auto,
        }
    }

    /// Returns the counters after the new names.
    pub(super) fn counters(&self) -> (u64, u64) {
        (self.next_snap, self.next_auto)
    }

    /// Returns the name for an automatic snapshot.
    fn automatic(&mut self) -> SnapshotName {
        loop {
            let name = SnapshotName::automatic(self.next_auto);
            self.next_auto = self.next_auto.saturating_add(1);
            if self.taken.insert(name.clone()) {
                return name;
            }
        }
    }

    /// Returns the name for a snapshot that another container names `wanted`, or the next number if this container has
    /// a snapshot of this name, or had one.
    fn assign(&mut self, wanted: &str) -> SnapshotName {
        let parsed = SnapshotName::parse(wanted).ok();
        let number = |prefix| parsed.as_ref().and_then(|name| name.number(prefix));
        let (snap, auto) = (number("snap"), number("auto"));
        let usable = parsed.filter(|name| match (snap, auto) {
            (Some(number), _) => number >= self.next_snap,
            (_, Some(number)) => number >= self.next_auto,
            // Other forms of a number are reserved.
            (None, None) => !name.is_reserved(),
        });
        let name = usable.filter(|name| !self.taken.contains(name));
        let name = match name {
            Some(name) => {
                self.next_snap = snap.map_or(self.next_snap, |number| number + 1);
                self.next_auto = auto.map_or(self.next_auto, |number| number + 1);
                name
            }
            None => {
                let name = SnapshotName::counted(self.next_snap);
                self.next_snap = self.next_snap.saturating_add(1);
                name
            }
        };
        self.taken.insert(name.clone());
        name
    }
}

/// A snapshot that is to be created.
#[derive(Clone, Debug)]
pub(super) struct PlannedSnapshot {
    /// The index of its topmost layer, among the layers that were planned.
    pub(super) layer: usize,
    name: SnapshotName,
    kind: SnapshotKind,
    created: String,
    comment: String,
    tags: BTreeMap<String, String>,
}

/// Plans the snapshots of the layers of an image, from the layer `first`.
pub(super) fn plan(
    (image, first): (&Image, usize),
    snapshots: LayerSnapshots,
    names: &mut Names,
) -> Vec<PlannedSnapshot> {
    let mut planned = Vec::new();
    let layers = image.layers.iter().zip(image.steps());
    for (at, (layer, step)) in layers.enumerate().skip(first) {
        match (&layer.snapshot, snapshots) {
            (Some(note), _) => planned.push(PlannedSnapshot {
                layer: at - first,
                name: names.assign(&note.name),
                // An image must not determine what `cowl prune` removes: the snapshots of another kind share
                // its limits.
                kind: SnapshotKind::Manual,
                created: span::claimed(Some(&note.created)),
                comment: note.comment.clone(),
                tags: note.tags.clone(),
            }),
            (None, LayerSnapshots::Each) => {
                let text = step.and_then(|s| s.created_by.as_ref().or(s.comment.as_ref()));
                planned.push(PlannedSnapshot {
                    layer: at - first,
                    name: names.assign(&format!("layer{}", at + 1)),
                    kind: SnapshotKind::Manual,
                    created: span::claimed(step.and_then(|step| step.created.as_deref())),
                    comment: text.map_or_else(String::new, |text| shortened(text)),
                    tags: BTreeMap::new(),
                });
            }
            (None, LayerSnapshots::Recorded) => {}
        }
    }
    planned
}

/// Returns the stack of each state, topmost first, after layers were put on the stack `below`, from the bottom.
pub(super) fn stacks(below: &[LayerId], layers: &[LayerId]) -> Vec<Vec<LayerId>> {
    let mut stack = below.to_vec();
    let mut found = Vec::new();
    for layer in layers {
        stack.insert(0, *layer);
        found.push(stack.clone());
    }
    found
}

impl PlannedSnapshot {
    /// Plans a snapshot for the last layer of an image, which is not one that cowl wrote.
    pub(super) fn of_image(layer: usize, image: &Image, names: &mut Names) -> Self {
        Self {
            layer,
            name: names.assign(""),
            kind: SnapshotKind::Manual,
            created: span::claimed(image.created.as_deref()),
            comment: image.name.as_deref().map_or_else(String::new, shortened),
            tags: BTreeMap::new(),
        }
    }

    /// Plans an automatic snapshot of the state that an update replaces.
    pub(super) fn before_update(names: &mut Names) -> Self {
        Self {
            layer: 0,
            name: names.automatic(),
            kind: SnapshotKind::Auto,
            created: crate::store::now(),
            comment: "before an update".to_owned(),
            tags: BTreeMap::new(),
        }
    }

    /// Returns the name.
    pub(super) fn name(&self) -> &SnapshotName {
        &self.name
    }

    /// Writes and syncs the snapshot's file, and returns the entry for the container's manifest. Its parent is that of
    /// the manifest.
    pub(super) fn write(
        &self,
        (store, container): (&Store, ContainerId),
        manifest: &ContainerManifest,
        stack: &[LayerId],
        settling: Option<Settling>,
    ) -> Result<SnapshotRef> {
        let id = SnapshotId::fresh();
        let Some(layer) = stack.first() else {
            return Err(Error::damaged("a state has no layer"));
        };
        let path = store.paths().snapshot_file(container, id);
        let body = SnapshotManifest {
            stack: stack.to_vec(),
            settings: manifest.settings.clone(),
            config: None,
            extra: Map::new(),
        };
        disk::write_new(&path, &Record::first(body))?;
        disk::sync_file(&path)?;
        Ok(SnapshotRef {
            id,
            name: self.name.clone(),
            kind: self.kind,
            created: self.created.clone(),
            parent: manifest.parent,
            layer: *layer,
            comment: self.comment.clone(),
            tags: self.tags.clone(),
            protected: false,
            settling,
            extra: Map::new(),
        })
    }
}

fn shortened(text: &str) -> String {
    let one_line: Vec<_> = text.split_whitespace().collect();
    let one_line = one_line.join(" ");
    match one_line.char_indices().nth(COMMENT) {
        Some((end, _)) => format!("{}...", one_line.get(..end).unwrap_or_default()),
        None => one_line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kept_if_they_are_free() {
        let mut names = Names {
            taken: HashSet::from([SnapshotName::parse("before").unwrap()]),
            next_snap: 2,
            next_auto: 0,
        };
        for (wanted, expected) in [
            // This number was used.
            ("snap1", "snap2"),
            ("snap7", "snap7"),
            ("snap7", "snap8"),
            ("snap3", "snap9"),
            ("auto4", "auto4"),
            ("auto4", "snap10"),
            ("before", "snap11"),
            ("after", "after"),
            ("after", "snap12"),
            ("snap007", "snap13"),
            ("snap99999999999999999999", "snap14"),
            ("snap18446744073709551615", "snap15"),
            ("../x", "snap16"),
            ("", "snap17"),
            ("a\u{1b}", "snap18"),
        ] {
            assert_eq!(names.assign(wanted).as_str(), expected, "{wanted}");
        }
        assert_eq!(names.counters(), (19, 5));
    }
}

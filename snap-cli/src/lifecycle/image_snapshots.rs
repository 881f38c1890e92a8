//! The snapshots of a container that is created from an image, or updated from one.

use std::collections::BTreeMap;

use serde_json::Map;

use super::foreign::{self, Names};
use crate::archive::image_source::Image;
use crate::error::{Error, Result};
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, Settling, SnapshotId, SnapshotKind, SnapshotManifest,
    SnapshotRef,
};
use crate::store::name::SnapshotName;
use crate::store::record::Record;
use crate::store::{Store, disk};

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
                kind: SnapshotKind::Manual,
                created: note.created.clone(),
                comment: note.comment.clone(),
                tags: note.tags.clone(),
            }),
            (None, LayerSnapshots::Each) => {
                let text = step.and_then(|s| s.created_by.as_ref().or(s.comment.as_ref()));
                planned.push(PlannedSnapshot {
                    layer: at - first,
                    name: names.assign(&format!("layer{}", at + 1)),
                    kind: SnapshotKind::Manual,
                    created: time(step.and_then(|step| step.created.as_ref())),
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
            created: time(image.created.as_ref()),
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

    /// Writes and syncs the snapshot's file, and returns the entry for the container's manifest, with limited claims. Its
    /// parent is that of the manifest.
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
            received_config: None,
            extra: Map::new(),
        };
        disk::write_new(&path, &Record::first(body))?;
        disk::sync_file(&path)?;
        let mut snapshot = SnapshotRef {
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
        };
        if self.kind != SnapshotKind::Auto {
            foreign::limit_claims(&mut snapshot);
        }
        Ok(snapshot)
    }
}

/// Returns the text of a time; an empty one, which is replaced by the current time, if the image has none.
fn time(text: Option<&String>) -> String {
    text.cloned().unwrap_or_default()
}

fn shortened(text: &str) -> String {
    let one_line: Vec<_> = text.split_whitespace().collect();
    let one_line = one_line.join(" ");
    match one_line.char_indices().nth(COMMENT) {
        Some((end, _)) => format!("{}...", one_line.get(..end).unwrap_or_default()),
        None => one_line,
    }
}

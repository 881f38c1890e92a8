//! The layers and the history of the image that a state is exported as.

use serde_json::Map;

use super::{ResolvedState, describe_loss};
use crate::archive::image_source::{Digest, HistoryEntry, Platform, SnapshotNote};
use crate::archive::oci::{ImageDescription, ImageStep, KeptBlob};
use crate::container::durability::epoch;
use crate::error::Result;
use crate::store::manifest::{LayerId, LayerManifest, SnapshotRef};
use crate::store::{Store, disk};

/// The image of a state.
#[derive(Debug)]
pub struct ImagePlan {
    /// Its layers, from the bottom, with the stack of each state.
    pub steps: Vec<ImageStep<Vec<LayerId>>>,
    /// Everything else.
    pub description: ImageDescription,
}

impl ResolvedState {
    /// Plans the image of this state: the layers of the image that its container was created from, the rest of the
    /// container's origin, and a layer for each snapshot since.
    ///
    /// The plan depends only on the state, so that each export results in the same image.
    pub fn image_plan(&self, store: &Store) -> Result<ImagePlan> {
        let own = image_layers(store, &self.stack)?;
        let mut steps = Vec::new();
        for (at, layer) in own.iter().enumerate() {
            let below = self.stack.len().saturating_sub(at + 1);
            let stack = self.stack.get(below..).unwrap_or_default();
            let id = stack.first();
            let path = id.map(|id| store.paths().layer_blob(*id));
            let image = layer.image.as_ref();
            let kept = image.and_then(|image| Some((image, image.blob.as_ref()?)));
            let kept = kept.zip(path).map(|((image, blob), path)| KeptBlob {
                path,
                diff_id: image.diff_id.clone(),
                digest: blob.digest.clone(),
                size: blob.size,
                media_type: blob.media_type.clone(),
            });
            let usable = image.filter(|image| !image.incomplete);
            steps.push(ImageStep {
                state: stack.to_vec(),
                kept,
                unpacked_from: usable.map(|image| image.diff_id.clone()),
                snapshot: None,
            });
        }
        let mut history = self.image_history(&own);
        let epoch = epoch(store)?;
        let image_stack =
            |stack: &[LayerId]| stack.len() <= own.len() && self.stack.ends_with(stack);
        for (snapshot, stack) in self.ancestry(store)? {
            let note = snapshot.as_ref().map(note_of);
            if image_stack(&stack) {
                // A snapshot that came with the image.
                if let Some(step) = steps.get_mut(stack.len().saturating_sub(1)) {
                    step.snapshot = note;
                }
                continue;
            }
            let address = |name| format!("{}@{name}", self.manifest.name);
            let lost = snapshot
                .as_ref()
                .and_then(|s| describe_loss(&address(&s.name), s.settling.as_ref(), &epoch));
            let created = match &snapshot {
                Some(snapshot) => snapshot.created.clone(),
                None => created_of(store, stack.first())?,
            };
            let comment = lost.or(snapshot.map(|s| s.comment));
            history.push(HistoryEntry {
                created: Some(created),
                created_by: Some("cowl".to_owned()),
                comment: comment.filter(|comment| !comment.is_empty()),
                ..HistoryEntry::default()
            });
            steps.push(ImageStep {
                state: stack,
                kept: None,
                unpacked_from: None,
                snapshot: note,
            });
        }
        let image = self.manifest.image.as_deref();
        let is_unchanged = steps.len() == own.len();
        let last = history.iter().rev().find_map(|entry| entry.created.clone());
        let snapshot = self.snapshot.as_ref();
        let tag = snapshot
            .map_or("latest", |(snapshot, _)| snapshot.name.as_str())
            .to_owned();
        // Names of images are in lower case.
        let name = self.manifest.name.as_str().to_ascii_lowercase();
        let description = ImageDescription {
            name: format!("localhost/{name}:{tag}"),
            tag,
            platform: image.map_or_else(Platform::of_machine, |image| image.platform.clone()),
            created: match is_unchanged {
                true => image.and_then(|image| image.created.clone()).or(last),
                false => last,
            },
            author: image.and_then(|image| image.author.clone()),
            config: image.map_or_else(Map::new, |image| image.config.clone()),
            history,
        };
        Ok(ImagePlan { steps, description })
    }

    /// Returns the history of the image's layers in the state: the original one if it describes all of them.
    fn image_history(&self, layers: &[LayerManifest]) -> Vec<HistoryEntry> {
        if let Some(image) = &self.manifest.image {
            let has_layer = |entry: &HistoryEntry| !entry.empty_layer;
            let described = image
                .history
                .iter()
                .filter(|entry| has_layer(entry))
                .count();
            if !layers.is_empty() && described == layers.len() {
                return image.history.clone();
            }
            // The state is an earlier one of the same image.
            if !layers.is_empty() && described > layers.len() {
                let mut left = layers.len();
                let own = image.history.iter().take_while(|entry| {
                    let is_own = left > 0;
                    left -= usize::from(is_own && has_layer(entry));
                    is_own
                });
                return own.cloned().collect();
            }
        }
        let entry = |layer: &LayerManifest| HistoryEntry {
            created: Some(layer.created.clone()),
            created_by: Some("cowl".to_owned()),
            ..HistoryEntry::default()
        };
        layers.iter().map(entry).collect()
    }
}

/// Returns the properties of a snapshot that travel with an image.
fn note_of(snapshot: &SnapshotRef) -> SnapshotNote {
    SnapshotNote {
        name: snapshot.name.to_string(),
        created: snapshot.created.clone(),
        comment: snapshot.comment.clone(),
        tags: snapshot.tags.clone(),
    }
}

/// Returns the time of the creation of a layer. For a state without a snapshot, it depends only on the state.
fn created_of(store: &Store, layer: Option<&LayerId>) -> Result<String> {
    match layer {
        Some(layer) => {
            let path = store.paths().layer_file(*layer);
            Ok(disk::read::<LayerManifest>(&path)?.body.created)
        }
        None => Ok(crate::store::now()),
    }
}

/// Returns the layers at the bottom of a stack that are those of an image, from the bottom.
fn image_layers(store: &Store, stack: &[LayerId]) -> Result<Vec<LayerManifest>> {
    let mut found = Vec::new();
    let mut below: Option<Digest> = None;
    for id in stack.iter().rev() {
        let layer = disk::read::<LayerManifest>(&store.paths().layer_file(*id))?.body;
        let Some(image) = &layer.image else {
            break;
        };
        if image.diff_id.chain(below.as_ref()) != image.chain_id {
            break;
        }
        below = Some(image.chain_id.clone());
        found.push(layer);
    }
    Ok(found)
}

//! The manifest of an archive of a whole container.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::lxc::config::IdMap;
use crate::lxc::own_files;
use crate::store::bytes::Blob;
use crate::store::manifest::{
    ContainerManifest, LayerId, LayerIdentity, LayerManifest, MarkerSpace, SnapshotId,
    SnapshotManifest,
};
use crate::store::outside::OwnFile;
use crate::store::record::{Body, Record, RecordError};

/// The manifest of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WholeManifest {
    /// The xattr namespace of the markers in its layers.
    pub(super) marks: MarkerSpace,
    /// The container's manifest. The archive does not contain the head, which was empty.
    pub(super) container: ContainerManifest,
    /// The manifests of the snapshots.
    pub(super) states: BTreeMap<SnapshotId, SnapshotManifest>,
    /// The layers that the archive refers to, but does not contain, in the order of their lists of numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) base: Vec<BaseEntry>,
    /// The layers, in the order of the archive.
    pub(super) layers: Vec<LayerEntry>,
    /// The approximate number of bytes in the layers, for a progress bar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bytes: Option<u64>,
    /// Whether snapshots that the receiver has removed are omitted. The stack is then not that of the container's current
    /// state, so that no container can be created from the archive.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) omits_removed: bool,
    /// The config of the exported LXC container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) config: Option<Blob>,
    /// The files in its directory to which the config refers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) files: Vec<OwnFile>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub(super) extra: Map<String, Value>,
}

/// An archive of `cowl export`, which older versions can import.
impl Body for WholeManifest {
    const TYPE_NAME: &'static str = "archive";
}

/// The manifest of a container that is sent. Its layers have digests, and some may not be in the archive.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct SentManifest(pub(super) WholeManifest);

impl Body for SentManifest {
    const TYPE_NAME: &'static str = "archive";
    const FORMAT: u64 = 2;
}

/// A layer that the receiver has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BaseEntry {
    /// Its id in the original store.
    pub(super) id: LayerId,
    /// Its identity, by which the receiver finds it.
    pub(super) identity: LayerIdentity,
}

/// A layer of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerEntry {
    /// Its id in the original store.
    pub(super) id: LayerId,
    /// The id that it has across stores, if that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) known_as: Option<LayerId>,
    /// Its manifest.
    pub(super) layer: LayerManifest,
}

impl WholeManifest {
    /// Reads a manifest in this or an older format, and checks it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let refused = |error: RecordError| {
            let newer = matches!(error, RecordError::Newer { .. });
            let refused = Error::failed("cannot use the archive").because(error);
            refused.hint(match newer {
                true => "a newer version of cowl created it: install that version",
                false => "it is damaged: copy or create it again",
            })
        };
        let SentManifest(mut manifest) =
            Record::<SentManifest>::decode(bytes).map_err(refused)?.body;
        // The stacks in the archive are complete without it, and the store would rewrite its own snapshots to the layer.
        manifest.container.merged = None;
        match manifest.check() {
            Ok(()) => Ok(manifest),
            Err(reason) => Err(refused(RecordError::Shape(reason))),
        }
    }

    /// Returns the id map of the container's files. An older version has exported only the config that contains it.
    pub(super) fn id_map(&self) -> Vec<String> {
        match (&self.config, self.container.id_map.as_slice()) {
            (Some(Blob(text)), []) => IdMap::of(text).values().collect(),
            (_, known) => known.to_vec(),
        }
    }

    /// Checks the invariants that types do not express.
    ///
    /// The error is the text of a message.
    pub(super) fn check(&self) -> Result<(), String> {
        let container = &self.container;
        container.check()?;
        if container.below_head().is_empty() {
            return Err("its container has no layers".to_owned());
        }
        let mut listed = HashSet::new();
        let base = self.base.iter().map(|entry| entry.id);
        let mut ids = self.layers.iter().map(|entry| entry.id).chain(base);
        if !ids.all(|id| listed.insert(id)) {
            return Err("it lists a layer twice".to_owned());
        }
        if listed.contains(&container.head) {
            return Err("it contains a layer for the head".to_owned());
        }
        let mut used: HashSet<LayerId> = container.below_head().iter().copied().collect();
        let (mut ids, mut names) = (HashSet::new(), HashSet::new());
        for snapshot in &container.snapshots {
            if !ids.insert(snapshot.id) || !names.insert(&snapshot.name) {
                return Err(format!("it lists the snapshot {} twice", snapshot.name));
            }
            let Some(state) = self.states.get(&snapshot.id) else {
                return Err(format!(
                    "the manifest of the snapshot {} is missing",
                    snapshot.name
                ));
            };
            state.check()?;
            if state.stack.first() != Some(&snapshot.layer) {
                return Err(format!(
                    "the top layer of the snapshot {} is inconsistent",
                    snapshot.name
                ));
            }
            used.extend(&state.stack);
        }
        if !self.files.iter().all(|file| own_files::is_own(&file.path)) {
            return Err("a file of the config is not in the container's directory".to_owned());
        }
        if self.states.len() != ids.len() {
            return Err("it has a manifest of an unlisted snapshot".to_owned());
        }
        if used != listed {
            return Err("its layers are not those of its stacks".to_owned());
        }
        Ok(())
    }
}

/// Maps layer ids to the new ones.
///
/// A layer that is not in the archive keeps its id, which refers to nothing.
pub(super) fn map_ids(ids: &[LayerId], new: &HashMap<LayerId, LayerId>) -> Vec<LayerId> {
    ids.iter().map(|id| *new.get(id).unwrap_or(id)).collect()
}

//! The types of the store's manifests: store, container, snapshot, layer. [`super::disk`] reads and writes them.
//!
//! Each type preserves fields that a newer version added.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::bytes::Blob;
use super::containerd::ContainerdRecord;
use super::image_record::{ImageLayerRecord, ImageRecord};
use super::name::{ContainerName, SnapshotName};
use super::outside::{Adopted, Lxc, Moving};
use super::record::Body;
pub use super::settling::{Durability, Settling};
use crate::tree::PortableDigest;

macro_rules! id_type {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $type(Uuid);

        impl $type {
            /// Returns a new random id.
            pub fn fresh() -> Self {
                Self(Uuid::new_v4())
            }

            /// Parses an id from the name of a file or directory.
            pub fn parse(name: &str) -> Option<Self> {
                let id = Uuid::try_parse(name).ok()?;
                // Accept only the spelling that `Display` writes.
                (id.hyphenated().to_string() == name).then_some(Self(id))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
    };
}

id_type!(
    /// The id of a layer.
    LayerId
);
id_type!(
    /// The id of a container, which does not change when it is renamed.
    ContainerId
);
id_type!(
    /// The id of a snapshot, which does not change when it is renamed.
    SnapshotId
);

/// The manifest of a store: `store.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreManifest {
    /// The store's id.
    pub uuid: Uuid,
    /// The namespace of its layers' marker xattrs: "trusted" or "user".
    pub marks: MarkerSpace,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for StoreManifest {
    const TYPE_NAME: &'static str = "store";
}

/// The namespace of the marker xattrs in a store's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MarkerSpace {
    /// `trusted.overlay.*`
    Trusted,
    /// `user.overlay.*`
    User,
}

/// The manifest of a container: `container.json`. Renaming this file into place commits a change of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerManifest {
    /// The container's name, unique in the store.
    pub name: ContainerName,
    /// The top layer, which is written to: the first of `stack`.
    pub head: LayerId,
    /// All layers, topmost first.
    pub stack: Vec<LayerId>,
    /// The layers that it was created from, without a head.
    pub origin: Vec<LayerId>,
    /// The latest snapshot that was taken of the head or that it was restored to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// The snapshot of the state before the last restore: `restore --undo` restores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<SnapshotId>,
    /// The snapshots, oldest first. A snapshot file that is not listed here is a leftover.
    pub snapshots: Vec<SnapshotRef>,
    /// The number of the next `snap<N>`.
    pub next_snap: u64,
    /// The number of the next `auto<N>`.
    pub next_auto: u64,
    /// The time of its creation (RFC 3339, UTC).
    pub created: String,
    /// Settings of the user.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// The directory that it was adopted from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted: Option<Adopted>,
    /// The image that it was created from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Box<ImageRecord>>,
    /// The LXC container that uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lxc: Option<Lxc>,
    /// The id map of its LXC container when it was last known, as values of `lxc.idmap`: its files have these ids.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub id_map: Vec<String>,
    /// A pending change of files outside the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<Moving>,
    /// The phase of an ephemeral container, which is destroyed when its mount ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<Ephemeral>,
    /// The mark of the state below the head, if that was not durable yet at the clone or restore that used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settling: Option<Settling>,
    /// A committed merge of layers that the files of the snapshots do not reflect yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged: Option<Merged>,
    /// The snapshots that other stores have sent, also those that were removed since, in the order of their arrival.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub received: Vec<ReceivedSnapshot>,
    /// The snapshot of containerd that it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub containerd: Option<Box<ContainerdRecord>>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The phase of an ephemeral container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ephemeral {
    /// It has not been mounted yet.
    Waiting,
    /// It has been mounted, or is about to be.
    Mounted,
}

impl Body for ContainerManifest {
    const TYPE_NAME: &'static str = "container";
    /// Format 2 added `containerd`.
    const FORMAT: u64 = 2;

    fn format(&self) -> u64 {
        // A version that does not know the field would write to frozen layers.
        match self.containerd {
            Some(_) => 2,
            None => 1,
        }
    }
}

impl ContainerManifest {
    /// Creates the manifest of a new container with the head `head` over the layers `below`.
    pub fn new(name: ContainerName, head: LayerId, below: &[LayerId]) -> Self {
        let mut stack = vec![head];
        stack.extend_from_slice(below);
        Self {
            name,
            head,
            stack,
            origin: below.to_vec(),
            parent: None,
            undo: None,
            snapshots: Vec::new(),
            next_snap: 0,
            next_auto: 0,
            created: super::span::now(),
            settings: Map::new(),
            adopted: None,
            image: None,
            lxc: None,
            id_map: Vec::new(),
            moving: None,
            ephemeral: None,
            settling: None,
            merged: None,
            received: Vec::new(),
            containerd: None,
            extra: Map::new(),
        }
    }

    /// Returns the layers below the head.
    pub fn below_head(&self) -> &[LayerId] {
        self.stack.split_first().map_or(&[], |(_, below)| below)
    }

    /// Returns the layer that a mount writes to; `None` if all layers are frozen.
    pub fn written_head(&self) -> Option<LayerId> {
        let is_frozen = self
            .containerd
            .as_deref()
            .is_some_and(|record| record.frozen);
        (!is_frozen).then_some(self.head)
    }

    /// Returns the layers that nothing writes to, topmost first.
    pub fn frozen_stack(&self) -> &[LayerId] {
        match self.written_head() {
            Some(_) => self.below_head(),
            None => &self.stack,
        }
    }

    /// Returns the snapshot `name`.
    pub fn snapshot(&self, name: &SnapshotName) -> Option<&SnapshotRef> {
        self.snapshots.iter().find(|known| known.name == *name)
    }

    /// Returns the next name `snap<N>` that is free, and the counter after it.
    pub fn free_counted(&self) -> (SnapshotName, u64) {
        self.first_free(self.next_snap, &SnapshotName::counted)
    }

    /// Returns the next name `auto<N>` that is free, and the counter after it.
    pub fn free_automatic(&self) -> (SnapshotName, u64) {
        self.first_free(self.next_auto, &SnapshotName::automatic)
    }

    /// A counter can be wrong in the manifest of another host, and two snapshots with one name could not be removed.
    fn first_free(&self, from: u64, named: &dyn Fn(u64) -> SnapshotName) -> (SnapshotName, u64) {
        let used: HashSet<_> = self.snapshots.iter().map(|known| &known.name).collect();
        let mut numbers = (from..=u64::MAX).chain(0..from);
        let free = numbers.find(|number| !used.contains(&named(*number)));
        let number = free.unwrap_or(from);
        (named(number), number.saturating_add(1))
    }

    /// Clears the fields that refer to this host, for an exported or copied container.
    pub fn clear_machine_fields(&mut self) {
        self.adopted = None;
        self.lxc = None;
        self.moving = None;
        self.ephemeral = None;
        self.received.clear();
        self.containerd = None;
    }

    /// Checks the invariants of the fields. The error describes the violation.
    pub fn check(&self) -> Result<(), String> {
        if self.stack.first() != Some(&self.head) {
            return Err("its head is not the first layer of its stack".to_owned());
        }
        check_unique(&self.stack)
    }
}

/// Returns an error if the stack contains a layer twice.
fn check_unique(stack: &[LayerId]) -> Result<(), String> {
    let mut sorted = stack.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(_) => Err("its stack names a layer twice".to_owned()),
        None => Ok(()),
    }
}

/// A merge of several layers into one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merged {
    /// The merged layers, topmost first.
    pub run: Vec<LayerId>,
    /// The layer that replaces them.
    pub layer: LayerId,
}

/// A snapshot's entry in its container's manifest: the fields that lists show or that can change.
///
/// The layers of its state are in the snapshot's own file, which only a flatten changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRef {
    /// The snapshot's id, which names its file.
    pub id: SnapshotId,
    /// The snapshot's name, unique in the container.
    pub name: SnapshotName,
    /// The reason for the snapshot.
    pub kind: SnapshotKind,
    /// The time at which it was taken (RFC 3339, UTC).
    pub created: String,
    /// The snapshot that its state is based on: the container's `parent` when it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// The topmost layer of its state: the changes since its parent.
    pub layer: LayerId,
    /// The user's comment.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// The user's tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Whether it cannot be removed until the user removes the protection.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// The mark of a snapshot that is not known to be durable; `None` if it is durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settling: Option<Settling>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A snapshot that another store has sent, with the properties that were sent last.
///
/// A property that has this value is that of the sender; another value was set in this store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceivedSnapshot {
    /// The snapshot's id, which is the same in all stores.
    pub id: SnapshotId,
    /// The comment.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// The tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Whether it was protected.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// Whether the protection was set or removed in this store: the sender does not change it any more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_protection: bool,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The manifest of a snapshot: `snapshots/<uuid>.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotManifest {
    /// The layers of the state, topmost first. All are frozen.
    pub stack: Vec<LayerId>,
    /// The container's settings when the snapshot was taken.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// The LXC config when the snapshot was taken, for an LXC container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Blob>,
    /// The LXC config that another host sent with the snapshot. It can name programs that LXC runs as root, so only a user
    /// who confirms it can restore it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_config: Option<Blob>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for SnapshotManifest {
    const TYPE_NAME: &'static str = "snapshot";
}

impl SnapshotManifest {
    /// Sets the config apart, because another host has sent it.
    pub fn quarantine_config(&mut self) {
        self.received_config = self.config.take().or(self.received_config.take());
    }

    /// Checks the invariants of the fields. The error describes the violation.
    pub fn check(&self) -> Result<(), String> {
        if self.stack.is_empty() {
            return Err("its stack is empty".to_owned());
        }
        check_unique(&self.stack)
    }
}

/// The reason for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// A user's request.
    Manual,
    /// A timer or a hook.
    Scheduled,
    /// A command that would otherwise have discarded the state.
    Auto,
}

impl SnapshotKind {
    /// Returns the word that lists print.
    pub fn name(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Scheduled => "scheduled",
            Self::Auto => "auto",
        }
    }
}

/// The manifest of a layer: `layers/<uuid>/layer.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerManifest {
    /// The kind of the layer.
    pub kind: LayerKind,
    /// The layers below it when it was created, topmost first. Its redirects refer to paths in them.
    pub over: Vec<LayerId>,
    /// The merged layers that it replaces (for a flattened layer).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stands_for: Vec<LayerId>,
    /// The time of its creation (RFC 3339, UTC).
    pub created: String,
    /// The layer's size, measured once after it was frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// A digest of its tree without file contents, for `cowl check`. Computed together with `measured`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub looks: Option<String>,
    /// A digest of its tree with file contents, computed when it was filled or first checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The layer of an image that it was unpacked from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageLayerRecord>,
    /// Its identity across stores, once it was sent or received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<LayerIdentity>,
    /// Whether its content is not known to be durable. Set from a head's creation until the first sync after it was
    /// frozen; the three fields above are absent then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsynced: bool,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for LayerManifest {
    const TYPE_NAME: &'static str = "layer";
}

impl LayerManifest {
    /// Returns the manifest without what was recorded about the layer in this store: for an archive, these would be claims.
    #[must_use]
    pub fn without_records(self) -> Self {
        Self {
            created: self.created,
            extra: self.extra,
            ..Self::new(self.kind, &self.over, &self.stands_for)
        }
    }

    /// Creates the manifest of a new layer.
    pub fn new(kind: LayerKind, over: &[LayerId], stands_for: &[LayerId]) -> Self {
        Self {
            kind,
            over: over.to_vec(),
            stands_for: stands_for.to_vec(),
            created: super::span::now(),
            measured: None,
            looks: None,
            digest: None,
            image: None,
            identity: None,
            unsynced: false,
            extra: Map::new(),
        }
    }
}

/// The identity of a layer across stores.
///
/// Two layers are the same if both fields are equal. The id alone would be a claim of the sender. The digest alone does
/// not suffice, because two layers of a stack can have the same content.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerIdentity {
    /// The id of the layer in the store that it was created in.
    pub id: LayerId,
    /// The digest of its tree.
    pub digest: PortableDigest,
}

/// The kind of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// An imported root filesystem.
    Base,
    /// Changes over other layers.
    Delta,
    /// Several merged deltas.
    Flattened,
}

/// The size of a frozen layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// The allocated size in bytes. Each inode counts once.
    pub bytes: u64,
    /// The number of names.
    pub files: u64,
    /// The number of inodes, including the root directory.
    #[serde(default)]
    pub inodes: u64,
}

#[cfg(test)]
mod tests {
    use super::super::record::Record;
    use super::*;

    fn container() -> ContainerManifest {
        let (head, base) = (LayerId::fresh(), LayerId::fresh());
        let name = ContainerName::parse("web").unwrap();
        ContainerManifest::new(name, head, &[base])
    }

    #[test]
    fn a_container_manifest_round_trips() {
        let record = Record::first(container());
        record.body.check().unwrap();
        let bytes = record.encode().unwrap();
        assert_eq!(Record::<ContainerManifest>::decode(&bytes).unwrap(), record);
    }

    #[test]
    fn invalid_stacks_are_refused() {
        let mut other_head = container();
        other_head.head = LayerId::fresh();
        assert!(other_head.check().is_err());
        let mut twice = container();
        twice.stack.push(twice.head);
        assert!(twice.check().is_err());
        let mut none = container();
        none.stack.clear();
        assert!(none.check().is_err());
    }

    #[test]
    fn a_bad_name_in_a_manifest_is_refused() {
        let mut value = serde_json::to_value(container()).unwrap();
        value["name"] = "../x".into();
        assert!(serde_json::from_value::<ContainerManifest>(value).is_err());
    }

    #[test]
    fn ids_have_one_spelling() {
        let id = LayerId::fresh().to_string();
        assert!(LayerId::parse(&id).is_some());
        assert!(LayerId::parse(&id.to_uppercase()).is_none() || id == id.to_uppercase());
        assert!(LayerId::parse(&id.replace('-', "")).is_none());
        assert!(LayerId::parse("x").is_none());
    }
}

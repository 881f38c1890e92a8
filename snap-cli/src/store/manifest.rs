//! What the store's files say: the store, containers, snapshots, layers. Only types; reading and writing
//! them is [`super::disk`]'s.
//!
//! Fields that this version does not know are kept wherever a newer one may add some.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::bytes::Blob;
use super::name::{ContainerName, SnapshotName};
use super::outside::{Adopted, Lxc, Moving};
use super::record::Body;

macro_rules! id_type {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $type(Uuid);

        impl $type {
            /// A new one, never given before.
            pub fn fresh() -> Self {
                Self(Uuid::new_v4())
            }

            /// The id that a folder's or file's name spells; `None` when it spells none.
            pub fn parse(name: &str) -> Option<Self> {
                let id = Uuid::try_parse(name).ok()?;
                // One spelling only: the one that we write.
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
    /// A layer.
    LayerId
);
id_type!(
    /// A container, whatever its name.
    ContainerId
);
id_type!(
    /// A snapshot, whatever its name.
    SnapshotId
);

/// `store.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreManifest {
    /// The store's own id.
    pub uuid: Uuid,
    /// Where the marks of its layers lie: "trusted" or "user".
    pub marks: MarkerSpace,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for StoreManifest {
    const WHAT: &'static str = "store";
}

/// Which extended attributes carry the marks of a store's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MarkerSpace {
    /// `trusted.overlay.*`
    Trusted,
    /// `user.overlay.*`
    User,
}

/// `container.json`: the one file whose rename commits a change of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerManifest {
    /// Its name, unique in the store.
    pub name: ContainerName,
    /// The layer that is written: the first of `stack`.
    pub head: LayerId,
    /// All layers, topmost first.
    pub stack: Vec<LayerId>,
    /// The layers that it began with, without a head.
    pub origin: Vec<LayerId>,
    /// The snapshot that the head was last taken from or restored to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// What it was before it was last put back to something: the state that `restore --undo` gives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<SnapshotId>,
    /// The snapshots that count, oldest first. A snapshot file that is not named here does not.
    pub snapshots: Vec<SnapshotRef>,
    /// The number of the next `snap<N>`.
    pub next_snap: u64,
    /// The number of the next `auto<N>`.
    pub next_auto: u64,
    /// When it was made (RFC 3339, UTC).
    pub created: String,
    /// Options that people set.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// Where it was taken over from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted: Option<Adopted>,
    /// The LXC container that it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lxc: Option<Lxc>,
    /// A change under way that needs more than this file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<Moving>,
    /// It is there for one mount, and goes when that ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<Ephemeral>,
    /// The state below its head was not durable yet when the container came to stand on it (a clone, a
    /// restore).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settling: Option<Settling>,
    /// Layers were merged, and the files of the snapshots that held them are still to say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged: Option<Merged>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// How far a container is that is there for one mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ephemeral {
    /// It was not mounted yet.
    Waiting,
    /// Its mount began.
    Mounted,
}

impl Body for ContainerManifest {
    const WHAT: &'static str = "container";
}

impl ContainerManifest {
    /// One that begins now, with a new head over `below`.
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
            lxc: None,
            moving: None,
            ephemeral: None,
            settling: None,
            merged: None,
            extra: Map::new(),
        }
    }

    /// What lies below the head.
    pub fn below_head(&self) -> &[LayerId] {
        self.stack.split_first().map_or(&[], |(_, below)| below)
    }

    /// The snapshot of this name.
    pub fn snapshot(&self, name: &SnapshotName) -> Option<&SnapshotRef> {
        self.snapshots.iter().find(|known| known.name == *name)
    }

    /// Drops all that is of this machine, for a container that goes to another, or is made anew.
    pub fn clear_machine_fields(&mut self) {
        self.adopted = None;
        self.lxc = None;
        self.moving = None;
        self.ephemeral = None;
    }

    /// What must hold besides the fields' types; the text says what does not.
    pub fn check(&self) -> Result<(), String> {
        if self.stack.first() != Some(&self.head) {
            return Err("its head is not the first layer of its stack".to_owned());
        }
        no_layer_twice(&self.stack)
    }
}

fn no_layer_twice(stack: &[LayerId]) -> Result<(), String> {
    let mut sorted = stack.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(_) => Err("its stack names a layer twice".to_owned()),
        None => Ok(()),
    }
}

/// Layers that became one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merged {
    /// The layers, topmost first.
    pub run: Vec<LayerId>,
    /// What stands for them.
    pub layer: LayerId,
}

/// A snapshot as its container names it: all that is listed, and all that may change. What the state is
/// made of stands in the snapshot's own file, which never changes but by a flatten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRef {
    /// Its id, which names its file.
    pub id: SnapshotId,
    /// Its name, unique in the container.
    pub name: SnapshotName,
    /// Who made it.
    pub kind: SnapshotKind,
    /// When it was taken (RFC 3339, UTC).
    pub created: String,
    /// The snapshot that the state was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// The topmost layer of its state: what was written since its parent.
    pub layer: LayerId,
    /// What somebody said about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// What somebody sorts it by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// It is not to be removed before somebody says otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// It is not known to be durable; absent: it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settling: Option<Settling>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// `snapshots/<uuid>.json`: what one state of a container is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotManifest {
    /// The layers of the state, topmost first; all of them frozen.
    pub stack: Vec<LayerId>,
    /// The container's settings at that time.
    #[serde(default)]
    pub settings: Map<String, Value>,
    /// The text of the container's own configuration (LXC's) at that time, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Blob>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for SnapshotManifest {
    const WHAT: &'static str = "snapshot";
}

impl SnapshotManifest {
    /// What must hold besides the fields' types; the text says what does not.
    pub fn check(&self) -> Result<(), String> {
        if self.stack.is_empty() {
            return Err("its stack is empty".to_owned());
        }
        no_layer_twice(&self.stack)
    }
}

/// Says of a state that it was acknowledged before its data was known to be durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settling {
    /// The epoch in which it was acknowledged (see `container::durability`). In any other, data that was in
    /// memory only is lost.
    pub epoch: String,
    /// Why a sync failed. What was not written then is not written by a later sync either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// The address of the state that this one was made from, where it is not a container's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Settling {
    /// A state that is acknowledged in the epoch `epoch`.
    pub fn since(epoch: String) -> Self {
        Self {
            epoch,
            failed: None,
            source: None,
            extra: Map::new(),
        }
    }

    /// Whether a sync can still make it durable, in the epoch `epoch`.
    pub fn is_pending(&self, epoch: &str) -> bool {
        self.is_in_epoch(epoch) && self.failed.is_none()
    }

    /// Whether it was acknowledged in the epoch `epoch`: in the same boot, on the same disk and in the same mounted
    /// file system, where both say which.
    pub fn is_in_epoch(&self, epoch: &str) -> bool {
        let mut parts = self.epoch.split('/').zip(epoch.split('/'));
        let same_boot = parts.next().is_some_and(|(own, other)| own == other);
        let mut known = parts.filter(|(own, other)| !own.is_empty() && !other.is_empty());
        same_boot && known.all(|(own, other)| own == other)
    }
}

/// How much of a state a power cut can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing.
    Durable,
    /// What the kernel has not written yet.
    Settling,
    /// What the kernel had not written when the machine went down is lost.
    Incomplete,
}

impl Durability {
    /// The durability of what `settling` is said of, in the epoch `epoch`.
    pub fn from_settling(settling: Option<&Settling>, epoch: &str) -> Self {
        match settling {
            None => Self::Durable,
            Some(settling) if settling.is_in_epoch(epoch) => Self::Settling,
            Some(_) => Self::Incomplete,
        }
    }

    /// The word that lists print.
    pub fn name(self) -> &'static str {
        match self {
            Self::Durable => "durable",
            Self::Settling => "settling",
            Self::Incomplete => "incomplete",
        }
    }
}

/// Who made a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// Somebody who asked for it.
    Manual,
    /// A timer or a hook.
    Scheduled,
    /// A command that would have thrown something away.
    Auto,
}

impl SnapshotKind {
    /// The word that lists print.
    pub fn name(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Scheduled => "scheduled",
            Self::Auto => "auto",
        }
    }
}

/// `layers/<uuid>/layer.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerManifest {
    /// How it came to be.
    pub kind: LayerKind,
    /// What it was made over, topmost first: its redirects name what lies there.
    pub over: Vec<LayerId>,
    /// The layers that it stands for (flattened ones).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stands_for: Vec<LayerId>,
    /// When it was made (RFC 3339, UTC).
    pub created: String,
    /// Counted once, after it was frozen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// What its tree looked like then, contents left out: `cowl check` compares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub looks: Option<String>,
    /// A digest of its tree with all contents, taken when it was filled or first checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Its content is not known to be durable: nothing is recorded above. True from a head's creation until
    /// a sync after it was frozen.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsynced: bool,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for LayerManifest {
    const WHAT: &'static str = "layer";
}

impl LayerManifest {
    /// A layer of which nothing was measured yet.
    pub fn new(kind: LayerKind, over: &[LayerId], stands_for: &[LayerId]) -> Self {
        Self {
            kind,
            over: over.to_vec(),
            stands_for: stands_for.to_vec(),
            created: super::span::now(),
            measured: None,
            looks: None,
            digest: None,
            unsynced: false,
            extra: Map::new(),
        }
    }
}

/// How a layer came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerKind {
    /// An imported root file system.
    Base,
    /// What was written over other layers.
    Delta,
    /// Several deltas made one.
    Flattened,
}

/// What a frozen layer takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes on the disk, each inode once.
    pub bytes: u64,
    /// Names in it.
    pub files: u64,
    /// Inodes in it, its own folder counted.
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
    fn a_container_comes_back() {
        let record = Record::first(container());
        record.body.check().unwrap();
        let bytes = record.encode().unwrap();
        assert_eq!(Record::<ContainerManifest>::decode(&bytes).unwrap(), record);
    }

    #[test]
    fn epochs() {
        for (own, now, same) in [
            ("boot", "boot", true),
            ("boot", "other", false),
            ("boot/7", "boot/7", true),
            // The disk was pulled, or its device made anew.
            ("boot/7", "boot/8", false),
            ("boot/7", "other/7", false),
            // Where sysfs is not there, the boot decides.
            ("boot/7/1", "boot/7/1", true),
            ("boot/7/1", "boot/7/2", false),
            ("boot//1", "boot/7/2", false),
            ("boot//1", "boot/7/1", true),
            // Versions before did not note the mounted file system.
            ("boot/7", "boot/7/1", true),
            ("boot/7", "boot//1", true),
            ("boot/7", "boot", true),
            ("boot", "boot/7", true),
            ("other", "boot/7", false),
            ("", "boot/7", false),
        ] {
            let mark = Settling::since(own.to_owned());
            assert_eq!(mark.is_in_epoch(now), same, "{own} {now}");
            assert_eq!(mark.is_pending(now), same, "{own} {now}");
        }
    }

    #[test]
    fn stacks_that_can_not_be() {
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

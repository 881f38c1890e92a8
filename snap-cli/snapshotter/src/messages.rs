//! The messages of containerd's snapshots service, `containerd.services.snapshots.v1`.
//!
//! Messages with the same fields and numbers share a type, because only these are encoded.

use std::collections::HashMap;

use prost_types::{FieldMask, Timestamp};

/// A request to create an active snapshot or a view.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct PrepareRequest {
    /// The name under which containerd knows this snapshotter; not used.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The key of the new snapshot.
    #[prost(string, tag = "2")]
    pub key: String,
    /// The key of the committed snapshot below it; empty for none.
    #[prost(string, tag = "3")]
    pub parent: String,
    /// The labels of the new snapshot.
    #[prost(map = "string, string", tag = "4")]
    pub labels: HashMap<String, String>,
}

/// A request that concerns a single snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct KeyRequest {
    /// The name under which containerd knows this snapshotter; not used.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The key of the snapshot.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// A request to commit an active snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CommitRequest {
    /// The name under which containerd knows this snapshotter; not used.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The key of the committed snapshot.
    #[prost(string, tag = "2")]
    pub name: String,
    /// The key of the active snapshot, which is unused afterwards.
    #[prost(string, tag = "3")]
    pub key: String,
    /// The labels of the committed snapshot.
    #[prost(map = "string, string", tag = "4")]
    pub labels: HashMap<String, String>,
}

/// A request to change properties of a snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct UpdateRequest {
    /// The name under which containerd knows this snapshotter; not used.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The key of the snapshot, with the new values.
    #[prost(message, optional, tag = "2")]
    pub info: Option<SnapshotInfo>,
    /// The fields to change; all that can be changed if absent or empty.
    #[prost(message, optional, tag = "3")]
    pub update_mask: Option<FieldMask>,
}

/// A request for a list of snapshots.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ListRequest {
    /// The name under which containerd knows this snapshotter; not used.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Filters; a snapshot is listed if any of them matches, or if there are none.
    #[prost(string, repeated, tag = "2")]
    pub filters: Vec<String>,
}

/// A request to free the space of removed snapshots.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CleanupRequest {
    /// The name under which containerd knows this snapshotter; not used.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
}

/// A reply without content.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Empty {}

/// The mounts that show a snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct MountList {
    /// The mounts, in the order in which they are made.
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<Mount>,
}

/// A mount.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Mount {
    /// The type of the file system.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// The source.
    #[prost(string, tag = "2")]
    pub source: String,
    /// The path in the container; empty for its root.
    #[prost(string, tag = "3")]
    pub target: String,
    /// The options.
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// The kind of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum SnapshotKind {
    /// Not set.
    Unknown = 0,
    /// A read-only view of a committed snapshot.
    View = 1,
    /// A snapshot that can be written to.
    Active = 2,
    /// An immutable snapshot.
    Committed = 3,
}

/// The properties of a snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SnapshotInfo {
    /// The key.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The key of the parent; empty for none.
    #[prost(string, tag = "2")]
    pub parent: String,
    /// The kind.
    #[prost(enumeration = "SnapshotKind", tag = "3")]
    pub kind: i32,
    /// The time of its creation or commit.
    #[prost(message, optional, tag = "4")]
    pub created_at: Option<Timestamp>,
    /// The time of its last update.
    #[prost(message, optional, tag = "5")]
    pub updated_at: Option<Timestamp>,
    /// The labels.
    #[prost(map = "string, string", tag = "6")]
    pub labels: HashMap<String, String>,
}

/// The properties of the requested snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct InfoReply {
    /// The properties.
    #[prost(message, optional, tag = "1")]
    pub info: Option<SnapshotInfo>,
}

/// A part of a list of snapshots.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct InfoList {
    /// The snapshots.
    #[prost(message, repeated, tag = "1")]
    pub info: Vec<SnapshotInfo>,
}

/// The disk space that a snapshot uses in addition to its parent.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct UsageReply {
    /// The size in bytes.
    #[prost(int64, tag = "1")]
    pub size: i64,
    /// The number of inodes.
    #[prost(int64, tag = "2")]
    pub inodes: i64,
}

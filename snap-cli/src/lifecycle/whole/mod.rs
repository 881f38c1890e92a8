//! Exports a whole container to one archive, imports it, and sends it to another store.
//!
//! The archive has the layers of the current state and of all snapshots, each once, and the manifests. The
//! imported container has the same content and the same list of snapshots. Only the ids of the container and of
//! its layers are new, because ids are never reused. `archive::bundle` defines the format of the archive; this
//! module defines its manifest.
//!
//! A container that is sent (docs/decisions/0048) has the same form, but may refer to layers that the receiver has. The
//! receiver can add the snapshots to a container that it has.

mod arrival;
mod claims;
mod frames;
mod import;
mod manifest;
mod merge;
pub mod negotiation;
mod outgoing;
mod receive;
pub mod ssh;

pub use claims::ReceiveTarget;
pub use import::{Incoming, SentConfigs, describe, import};
pub use merge::{AddedSnapshot, ChangedSnapshot};
pub use outgoing::{ChosenStates, KnownToReceiver, Outgoing, Selection, needs_snapshot};
pub use receive::{ReceiveOptions, Received, RemovedSnapshots, receive, removed_snapshots};

//! The options of a mount.

use serde::{Deserialize, Serialize};

use crate::idmap::IdMap;

/// The options of a mount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OverlayOptions {
    /// Whether a change of attributes copies up only the metadata.
    pub metacopy: bool,
    /// Whether durability is disabled: fsync has no effect, and a power cut may lose data, also of copied-up files.
    pub volatile: bool,
    /// Whether POSIX ACLs are hidden and cannot be set.
    pub no_acl: bool,
    /// Whether the visible link count of every file is 1.
    pub static_nlink: bool,
    /// Whether another process may change the layers, which the overlay then only reads. Each lookup resolves the name
    /// again.
    pub live_layers: bool,
    /// The map of user ids.
    pub uids: IdMap,
    /// The map of group ids.
    pub gids: IdMap,
}

//! The options of a mount.

use crate::idmap::IdMap;

/// Options of a whole mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverlayOptions {
    /// A change of attributes alone copies no data.
    pub metacopy: bool,
    /// A power cut may lose data that was not synced, copied-up files included; fsync does nothing.
    pub volatile: bool,
    /// POSIX ACLs are neither shown nor accepted.
    pub no_acl: bool,
    /// Every file shows one link.
    pub static_nlink: bool,
    /// User ids.
    pub uids: IdMap,
    /// Group ids.
    pub gids: IdMap,
}

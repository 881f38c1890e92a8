//! The two forms of digests over trees (docs/decisions/0022).

use sha2::{Digest as _, Sha256};

use super::walk::Item;

/// The identification of an entry in a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// The whole path. Digests of this form are only verified, never created, because the time for them is proportional
    /// to the number of entries times the length of their paths.
    Paths,
    /// The depth and the name, which is equivalent in a walk.
    Names,
}

impl Form {
    /// The prefix of digests of the form [`Form::Names`].
    const NAMES: &str = "2:";

    /// Returns the form of a digest.
    pub(super) fn of_digest(sum: &str) -> Self {
        match sum.starts_with(Self::NAMES) {
            true => Self::Names,
            false => Self::Paths,
        }
    }

    /// Returns the prefix of digests of this form.
    pub(super) fn digest_prefix(self) -> &'static str {
        match self {
            Self::Paths => "",
            Self::Names => Self::NAMES,
        }
    }

    /// Returns the bytes that are hashed first, which separate the kinds of digests.
    pub(super) fn hash_prefix(self, kind: &str) -> String {
        match self {
            Self::Paths => format!("cowl {kind} 1"),
            Self::Names => format!("cowl {kind} 2"),
        }
    }

    /// Adds the identification of an entry to a hash.
    pub(super) fn add_name(self, item: &Item<'_>, hasher: &mut Sha256) {
        let name = match self {
            Self::Paths => item.path,
            Self::Names => {
                hasher.update((item.depth as u64).to_le_bytes());
                item.name()
            }
        };
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
    }
}

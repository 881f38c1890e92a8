//! The two forms of digests over trees (docs/decisions/0022).

use sha2::{Digest as _, Sha256};

use super::walk::Item;

/// How a digest identifies an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// By its whole path. Digests of this form are only compared with, never written: they take time in proportion to the
    /// number of entries times the length of their paths.
    Paths,
    /// By its depth and its name, which is equivalent in a walk.
    Names,
}

impl Form {
    /// The prefix of a digest's digits.
    const NAMES: &str = "2:";

    /// Returns the form of a digest.
    pub(super) fn of(sum: &str) -> Self {
        match sum.starts_with(Self::NAMES) {
            true => Self::Names,
            false => Self::Paths,
        }
    }

    pub(super) fn mark(self) -> &'static str {
        match self {
            Self::Paths => "",
            Self::Names => Self::NAMES,
        }
    }

    pub(super) fn prefix(self, what: &str) -> String {
        match self {
            Self::Paths => format!("cowl {what} 1"),
            Self::Names => format!("cowl {what} 2"),
        }
    }

    pub(super) fn add_name(self, item: &Item<'_>, sum: &mut Sha256) {
        let name = match self {
            Self::Paths => item.path,
            Self::Names => {
                sum.update((item.depth as u64).to_le_bytes());
                item.name()
            }
        };
        sum.update((name.len() as u64).to_le_bytes());
        sum.update(name);
    }
}

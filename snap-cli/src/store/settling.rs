//! The durability of states that were acknowledged before their data was synced.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The mark of a state that was acknowledged before its data was known to be durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settling {
    /// The epoch in which the state was acknowledged (see `container::durability`). In any later epoch, unsynced data
    /// is lost.
    pub epoch: String,
    /// The error of a failed sync. A later sync does not write the lost data again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// The address of the state that this one was created from, if that belongs to another container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Settling {
    /// Returns the mark of a state that is acknowledged in the epoch `epoch`.
    pub fn since(epoch: String) -> Self {
        Self {
            epoch,
            failed: None,
            source: None,
            extra: Map::new(),
        }
    }

    /// Returns whether a sync in the epoch `epoch` can still make the state durable.
    pub fn is_pending(&self, epoch: &str) -> bool {
        self.is_in_epoch(epoch) && self.failed.is_none()
    }

    /// Returns whether the state was acknowledged in the epoch `epoch`.
    ///
    /// The boot ids must be equal, and so must the numbers of the disk and of the mounted file system if both epochs
    /// contain them.
    pub fn is_in_epoch(&self, epoch: &str) -> bool {
        let mut parts = self.epoch.split('/').zip(epoch.split('/'));
        let same_boot = parts.next().is_some_and(|(own, other)| own == other);
        let mut known = parts.filter(|(own, other)| !own.is_empty() && !other.is_empty());
        same_boot && known.all(|(own, other)| own == other)
    }
}

/// The durability of a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A power cut loses no data.
    Durable,
    /// A power cut loses the data that the kernel has not written back yet.
    Settling,
    /// Data that the kernel had not written back was lost in a power cut.
    Incomplete,
}

impl Durability {
    /// Returns the durability of a state with the mark `settling`, in the epoch `epoch`.
    pub fn from_settling(settling: Option<&Settling>, epoch: &str) -> Self {
        match settling {
            None => Self::Durable,
            Some(settling) if settling.is_in_epoch(epoch) => Self::Settling,
            Some(_) => Self::Incomplete,
        }
    }

    /// Returns the word that lists print.
    pub fn name(self) -> &'static str {
        match self {
            Self::Durable => "durable",
            Self::Settling => "settling",
            Self::Incomplete => "incomplete",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_are_compared_by_their_known_parts() {
        for (own, now, same) in [
            ("boot", "boot", true),
            ("boot", "other", false),
            ("boot/7", "boot/7", true),
            // The disk was detached, or its device was created again.
            ("boot/7", "boot/8", false),
            ("boot/7", "other/7", false),
            // Without sysfs, only the boot id is known.
            ("boot/7/1", "boot/7/1", true),
            ("boot/7/1", "boot/7/2", false),
            ("boot//1", "boot/7/2", false),
            ("boot//1", "boot/7/1", true),
            // Earlier versions did not record the mounted file system.
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
}

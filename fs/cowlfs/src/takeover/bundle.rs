//! The state that a daemon hands over, and its encoding: a magic number, a version, and the fields in the encoding of
//! postcard.

use std::time::Duration;

use cowl_overlay::HandoverRecord;
use serde::{Deserialize, Serialize};

use super::ConfigRecord;
use crate::control::OwnMountRecord;
use crate::fuse::SessionRecord;

const MAGIC: &[u8; 8] = b"cowltake";

/// The version of the encoding.
///
/// Must be incremented with each change of the fields, their types or their meaning, here and in the records of other
/// modules that have no version of their own.
pub(super) const VERSION: u32 = 1;

/// The state of a daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bundle {
    /// The version of the predecessor.
    pub(crate) program: String,
    pub(crate) origin: Origin,
    pub(crate) overlay: HandoverRecord,
    pub(crate) session: SessionRecord,
    pub(crate) config: ConfigRecord,
    pub(crate) mount: OwnMountRecord,
    /// The numbers of requests, by the names of their kinds.
    pub(crate) requests: Vec<(String, u64)>,
    /// The time since the start of the mount.
    pub(crate) uptime: Duration,
    /// The number of requests that a panic has ended.
    pub(crate) panics: u64,
    /// [`crate::config::Successor::state`].
    pub(crate) state: Vec<u8>,
    pub(crate) descriptors: DescriptorCounts,
}

/// The end of the predecessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Origin {
    /// It has answered every request that had an effect, and stopped at this time of the monotonic clock.
    Stopped { since: Duration },
}

/// The descriptors that follow a bundle, in this order; the FUSE device is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DescriptorCounts {
    /// The listening control socket.
    pub(crate) listener: bool,
    /// The connection of the client that has requested the replacement.
    pub(crate) client: bool,
    /// [`crate::config::Successor::descriptors`].
    pub(crate) successor: usize,
    /// [`HandoverRecord::descriptors`].
    pub(crate) overlay: usize,
}

/// The reason why a bundle could not be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BundleError {
    /// The bytes are not a bundle.
    #[error("the state of the running daemon is damaged: {0}")]
    Damaged(&'static str),
    /// The bundle has another version.
    #[error(
        "the state of the running daemon has version {found}; this program reads version {VERSION}"
    )]
    Version {
        /// The version of the bundle.
        found: u32,
    },
}

impl DescriptorCounts {
    /// Returns the number of all descriptors.
    pub(crate) fn total(self) -> usize {
        1 + usize::from(self.listener)
            + usize::from(self.client)
            + self.successor.saturating_add(self.overlay)
    }
}

impl Bundle {
    /// Encodes the bundle.
    pub(super) fn encode(&self) -> Result<Vec<u8>, BundleError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        postcard::to_extend(self, bytes).map_err(|_| BundleError::Damaged("it cannot be encoded"))
    }

    /// Decodes a bundle. Neither the version nor any other byte is trusted.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BundleError> {
        let header = bytes
            .split_at_checked(MAGIC.len())
            .filter(|(magic, _)| magic == MAGIC)
            .and_then(|(_, rest)| rest.split_first_chunk());
        let Some((version, body)) = header else {
            return Err(BundleError::Damaged(
                "it does not begin with the magic number",
            ));
        };
        let found = u32::from_le_bytes(*version);
        if found != VERSION {
            return Err(BundleError::Version { found });
        }
        let (bundle, rest) = postcard::take_from_bytes::<Self>(body)
            .map_err(|_| BundleError::Damaged("its fields cannot be decoded"))?;
        if !rest.is_empty() || bundle.overlay.descriptors() != bundle.descriptors.overlay {
            return Err(BundleError::Damaged("its fields contradict each other"));
        }
        Ok(bundle)
    }
}

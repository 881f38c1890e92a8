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
pub(super) const VERSION: u32 = 3;

/// The state of a daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bundle {
    /// The version of the predecessor.
    pub(crate) program: String,
    pub(crate) origin: Origin,
    pub(crate) arbiter: Arbiter,
    /// Whether a process watches the keeper of the predecessor.
    pub(crate) is_supervised: bool,
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
    /// The limits and privileges that the predecessor may not change.
    pub(crate) lacking: Vec<String>,
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

/// The process that permits the successor to take over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Arbiter {
    /// The keeper of the predecessor, which starts another daemon if the predecessor is killed before.
    Keeper,
    /// None: the end of the predecessor is the permission.
    None,
}

/// The descriptors that follow a bundle, in this order; the FUSE device is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DescriptorCounts {
    /// The listening control socket.
    pub(crate) listener: bool,
    /// The connection of the client that has requested the replacement.
    pub(crate) client: bool,
    /// The connection to a process that waits for the end of the mount.
    pub(crate) supervisor: bool,
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
            + usize::from(self.supervisor)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Mounter};
    use crate::control::OwnMount;
    use crate::fuse::SessionRecord;

    fn bundle() -> Bundle {
        let layers = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [upper, work] = layers.each_ref().map(|dir| dir.path().to_path_buf());
        let space = cowl_layers::format::XattrSpace::detect();
        let upper_layer = cowl_layers::layer::Upper::open(&upper, &work, space).unwrap();
        let options = cowl_overlay::OverlayOptions::default();
        let overlay = cowl_overlay::Overlay::new(Some(upper_layer), Vec::new(), options).unwrap();
        let handover = overlay.record(&[]).unwrap();
        let (overlay, descriptors) = handover.to_parts();
        // A name that is not UTF-8.
        let odd: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(b"/x\xff".to_vec());
        let config = Config::new(vec![upper], Some((work, odd.into())), "/m".into());
        Bundle {
            program: "0.1.0".to_owned(),
            origin: Origin::Stopped {
                since: Duration::from_secs(3),
            },
            arbiter: Arbiter::Keeper,
            is_supervised: false,
            overlay,
            session: SessionRecord::for_test(),
            config: ConfigRecord::new(&config),
            mount: OwnMount::record("/m".into(), (0, 9).into(), Mounter::Daemon).to_record(),
            requests: vec![("lookup".to_owned(), 7)],
            uptime: Duration::from_secs(60),
            panics: 1,
            lacking: vec!["io-flusher".to_owned()],
            state: vec![1, 2, 3],
            descriptors: DescriptorCounts {
                listener: true,
                client: false,
                supervisor: false,
                successor: 2,
                overlay: descriptors.len(),
            },
        }
    }

    #[test]
    fn a_bundle_survives_encoding() {
        let bundle = bundle();
        let decoded = Bundle::decode(&bundle.encode().unwrap()).unwrap();
        assert_eq!(format!("{decoded:?}"), format!("{bundle:?}"));
        assert_eq!(
            decoded.descriptors.total(),
            4 + bundle.overlay.descriptors()
        );
        let config = decoded.config.clone().into_config();
        assert_eq!(ConfigRecord::new(&config), bundle.config);
    }

    #[test]
    fn damaged_bundles_are_refused() {
        let bytes = bundle().encode().unwrap();
        for length in 0..bytes.len() {
            assert!(Bundle::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        let longer = [&bytes[..], b"x"].concat();
        assert!(matches!(
            Bundle::decode(&longer),
            Err(BundleError::Damaged(_))
        ));
        let mut other = bytes.clone();
        other[0] = b'C';
        assert!(matches!(
            Bundle::decode(&other),
            Err(BundleError::Damaged(_))
        ));
        let fewer = Bundle {
            descriptors: DescriptorCounts {
                overlay: 1,
                ..bundle().descriptors
            },
            ..bundle()
        };
        let fewer = fewer.encode().unwrap();
        assert!(matches!(
            Bundle::decode(&fewer),
            Err(BundleError::Damaged(_))
        ));
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let mut bytes = bundle().encode().unwrap();
        bytes[MAGIC.len()] += 1;
        assert_eq!(
            Bundle::decode(&bytes).unwrap_err().to_string(),
            "the state of the running daemon has version 4; this program reads version 3"
        );
    }
}

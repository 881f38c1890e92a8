//! The record of containerd's snapshots in the manifests of containers (docs/decisions/0049).
//!
//! Each snapshot of containerd is a container of the store, whose manifest contains a [`ContainerdRecord`]. An active
//! snapshot has a head that a mount writes to. A committed snapshot has none: all layers of its stack are frozen.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::name::ContainerName;

/// The prefix of the names of all containers that belong to containerd. No other container can get such a name.
pub const PREFIX: &str = "ctr.";

/// The beginning of the names of snapshots into which containerd unpacks layers (`UnpackKeyFormat`).
const UNPACKED: &str = "extract-";

/// The number of hexadecimal digits of a digest in a name.
const DIGITS: usize = 32;

/// The kind of a snapshot of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerdKind {
    /// A read-only view of a committed snapshot.
    View,
    /// The root filesystem of a container, or a layer that is being unpacked.
    Active,
    /// An immutable state, the parent of others.
    Committed,
}

impl ContainerdKind {
    /// Returns the word that lists print, which is containerd's.
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// The properties of a snapshot that containerd knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerdRecord {
    /// The key: usually NAMESPACE/NUMBER/KEY, where the last part is the id of a container or a chain id.
    pub key: String,
    /// The kind.
    pub kind: ContainerdKind,
    /// The key of the parent, a committed snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The time of its creation or commit (RFC 3339, UTC).
    pub created: String,
    /// The time of its last update (RFC 3339, UTC).
    pub updated: String,
    /// The key of the active snapshot that was committed. If containerd did not receive the reply to the commit, it knows
    /// only this key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub committed_from: Option<String>,
    /// The labels of the active snapshot that was committed. Earlier versions did not record them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels_before: Option<BTreeMap<String, String>>,
    /// The number of snapshots that commands had taken of the active snapshot before its commit, and that remain in
    /// case containerd has not recorded it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub snapshots_before: u64,
    /// The number of earlier commits of the active snapshot that were undone, because containerd had not recorded them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub undone: u64,
    /// Whether all layers of the stack are frozen, so that nothing may write to the topmost one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub frozen: bool,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl ContainerdRecord {
    /// Returns the namespace and the name in the key; `None` for a key of another form.
    pub fn address(&self) -> Option<(&str, &str)> {
        split_key(&self.key)
    }

    /// Returns the record of the active snapshot that was committed.
    pub fn before_commit(&self) -> Option<Self> {
        let key = self.committed_from.clone()?;
        Some(Self {
            key,
            kind: ContainerdKind::Active,
            labels: self.labels_before.as_ref().unwrap_or(&self.labels).clone(),
            committed_from: None,
            labels_before: None,
            snapshots_before: 0,
            undone: self.undone.saturating_add(1),
            frozen: false,
            ..self.clone()
        })
    }

    /// Returns whether commands may change the container: it is active and is served by a mount of its own.
    ///
    /// An active snapshot without a parent belongs to no container, and kernel overlayfs may write to a layer that is
    /// being unpacked, so that its head cannot be frozen.
    pub fn is_open(&self) -> bool {
        self.kind == ContainerdKind::Active && self.parent.is_some() && !self.is_unpacked()
    }

    /// Returns whether containerd unpacks a layer of an image into the snapshot, which it commits afterwards.
    pub fn is_unpacked(&self) -> bool {
        let is_extraction = |(_, name): (&str, &str)| name.starts_with(UNPACKED);
        self.kind == ContainerdKind::Active && self.address().is_some_and(is_extraction)
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Splits NAMESPACE/NUMBER/NAME, the form in which containerd passes keys. The name can contain slashes.
fn split_key(key: &str) -> Option<(&str, &str)> {
    let mut parts = key.splitn(3, '/');
    let (namespace, number, name) = (parts.next()?, parts.next()?, parts.next()?);
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && !namespace.is_empty() && !name.is_empty()).then_some((namespace, name))
}

/// Returns the names that a container for an active snapshot with this key may have, the preferred one first.
///
/// The first is `ctr.NAMESPACE.ID`, with the first 12 digits only if the id consists of 64 hexadecimal ones. The last
/// depends on all bytes of the key.
pub fn active_names(key: &str) -> Vec<ContainerName> {
    let readable = split_key(key).and_then(|(namespace, id)| {
        let is_long = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let id = if is_long { id.get(..12)? } else { id };
        // A key with other characters or of another length has no readable name.
        ContainerName::parse(format!("{PREFIX}{namespace}.{id}")).ok()
    });
    readable.into_iter().chain(digest_name(key)).collect()
}

/// Returns the name of the container for a snapshot that commands do not address.
pub fn digest_name(key: &str) -> Option<ContainerName> {
    let digest = Sha256::digest(key.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    ContainerName::parse(format!("{PREFIX}{}", hex.get(..DIGITS)?)).ok()
}

/// Returns whether a name is one of containerd's.
pub fn is_reserved(name: &ContainerName) -> bool {
    name.as_str().starts_with(PREFIX)
}

/// Returns whether a name has the form that [`digest_name`] returns.
pub fn is_digest_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_if_possible_and_always_unique() {
        let long = "ab".repeat(32);
        for (key, expected) in [
            ("default/12/web", Some("ctr.default.web")),
            (
                &*format!("k8s.io/7/{long}"),
                Some("ctr.k8s.io.abababababab"),
            ),
            ("default/12/a/b", None),
            ("default/x/web", None),
            ("web", None),
            ("", None),
            ("default/1/../../etc", None),
            ("default/1/a\nb", None),
            (&*format!("default/1/{}", "x".repeat(60)), None),
        ] {
            let names = active_names(key);
            let readable = names.first().filter(|name| !is_digest_name(name.as_str()));
            assert_eq!(readable.map(ContainerName::as_str), expected, "{key:?}");
            assert!(is_digest_name(names.last().unwrap().as_str()), "{key:?}");
            assert!(names.iter().all(is_reserved));
        }
        assert_ne!(digest_name("a"), digest_name("b"));
        assert_eq!(split_key("default/12/a/b"), Some(("default", "a/b")));
    }
}

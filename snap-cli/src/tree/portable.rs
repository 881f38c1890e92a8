//! Digests of layers that do not depend on the store, so that two stores can compare their layers.
//!
//! A portable digest covers what [`super::digest`] covers, with these differences: marker xattrs have no namespace,
//! xattrs have the names that a mount shows, and attributes that a plain user could not store are the recorded ones. It
//! does not cover inode numbers of other layers, markers without an effect in a mount, and security labels, which the
//! system assigns.

use std::fmt;
use std::path::Path;

use cowl_layers::format::XattrSpace;
use serde::{Deserialize, Serialize};

use super::attrs::Xattrs;
use super::digest::Hasher;
use super::error::{OnProgress, Result};
use super::walk::{self, Item};

/// A portable digest of a layer: `layer1:` and 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortableDigest(String);

const PREFIX: &str = "layer1:";

impl PortableDigest {
    /// Parses a digest; `None` if the text is none.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix(PREFIX)?;
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (hex.len() == 64 && hex.bytes().all(is_hex)).then(|| Self(text.to_owned()))
    }
}

impl TryFrom<String> for PortableDigest {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or("invalid digest of a layer")
    }
}

impl From<PortableDigest> for String {
    fn from(digest: PortableDigest) -> Self {
        digest.0
    }
}

impl fmt::Display for PortableDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Computes the portable digest of a layer from the entries of a walk over its tree as it is on disk.
pub(crate) struct PortableHasher<'a> {
    hasher: Hasher<'a>,
    space: XattrSpace,
}

impl<'a> PortableHasher<'a> {
    /// Creates a hasher for a layer with markers in the namespace `space`.
    pub(crate) fn new(space: XattrSpace, progress: OnProgress<'a>) -> Self {
        let hasher = Hasher::for_layer("portable layer", progress);
        Self { hasher, space }
    }

    /// Adds an entry with its original attributes.
    pub(crate) fn add(&mut self, item: &Item<'_>) -> Result<()> {
        let space = self.space;
        self.hasher
            .add_item_with(item, |xattrs| portable_xattrs(space, xattrs))
    }

    /// Returns the digest.
    pub(crate) fn finish(self) -> PortableDigest {
        PortableDigest(format!("{PREFIX}{}", self.hasher.finish_hex()))
    }
}

/// Returns the portable digest of the layer with the tree `root` and markers in the namespace `space`.
pub fn digest_portable(
    root: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<PortableDigest> {
    let mut hasher = PortableHasher::new(space, progress);
    walk::visit_dir(root, &mut |item: &Item<'_>| {
        hasher.add(&item.clone().with_original_attributes(space)?)
    })?;
    Ok(hasher.finish())
}

/// The markers that have an effect in a mount, without the namespace. `cowl.ino` refers to an inode of another layer, which
/// has another number in another store.
const MARKERS: [&[u8]; 6] = [
    b"opaque",
    b"redirect",
    b"metacopy",
    b"whiteout",
    b"cowl.node",
    b"cowl.nodes",
];

/// Labels that the system assigns to a file when it is created or used.
const LABELS: [&[u8]; 3] = [b"security.selinux", b"security.ima", b"security.evm"];

/// Converts the xattrs of an object of a layer: names begin with `m` for markers, and with `v` for visible xattrs.
fn portable_xattrs(space: XattrSpace, xattrs: Xattrs) -> Xattrs {
    let value = |mark: &str| {
        let found = xattrs.iter().find(|(name, _)| name == mark.as_bytes());
        Ok::<_, std::convert::Infallible>(found.map(|(_, value)| value.clone()))
    };
    let Ok(internal) = space.internal_xattr(value);
    let mut portable = Xattrs::new();
    for (name, value) in xattrs {
        let is_internal = internal.is_some_and(|internal| internal.as_bytes() == name);
        let marker = name.strip_prefix(space.prefix().as_bytes());
        match (space.to_mount(&name), marker) {
            (Some(shown), _) if !is_internal => {
                if !LABELS.contains(&&*shown) {
                    portable.push(([b"v", &*shown].concat(), value));
                }
            }
            (_, Some(marker)) if is_internal || MARKERS.contains(&marker) => {
                portable.push(([b"m", marker].concat(), value));
            }
            (None | Some(_), _) => {}
        }
    }
    portable.sort_unstable();
    portable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_have_one_spelling() {
        let digits = "0123456789abcdef".repeat(4);
        assert!(PortableDigest::parse(&format!("layer1:{digits}")).is_some());
        for bad in [
            digits.clone(),
            format!("layer2:{digits}"),
            format!("layer1:{}", digits.to_uppercase()),
            format!("layer1:{digits}0"),
            "layer1:".to_owned(),
        ] {
            assert!(PortableDigest::parse(&bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn names_of_xattrs_do_not_depend_on_the_namespace() {
        let of = |space: XattrSpace, names: &[&str]| {
            let xattrs = names
                .iter()
                .map(|name| (name.as_bytes().to_vec(), b"x".to_vec()));
            portable_xattrs(space, xattrs.collect())
        };
        let trusted = of(
            XattrSpace::Trusted,
            &[
                "trusted.overlay.opaque",
                "trusted.overlay.cowl.ino",
                "trusted.overlay.origin",
                "security.selinux",
                "user.a",
            ],
        );
        let user = of(
            XattrSpace::User,
            &[
                "user.a",
                "user.overlay.cowl.recorded",
                "user.overlay.opaque",
            ],
        );
        assert_eq!(trusted, user);
        // The markers of an overlay inside the container are visible xattrs.
        let nested = of(XattrSpace::Trusted, &["trusted.overlay.overlay.opaque"]);
        assert_eq!(nested, of(XattrSpace::User, &["trusted.overlay.opaque"]));
        assert_ne!(nested, of(XattrSpace::Trusted, &["trusted.overlay.opaque"]));
        // A device 0:0 of a user is marked by two xattrs of cowl.
        let node = of(
            XattrSpace::Trusted,
            &[
                "trusted.overlay.cowl.node",
                "trusted.overlay.overlay.whiteout",
            ],
        );
        let names: Vec<_> = node.iter().map(|(name, _)| name.as_slice()).collect();
        assert_eq!(names, [&b"mcowl.node"[..], b"moverlay.whiteout"]);
    }
}

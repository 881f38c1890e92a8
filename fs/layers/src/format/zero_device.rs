//! Character devices 0:0 that a user created.
//!
//! On disk, such a device would be a whiteout. It is therefore stored as an empty regular file with two xattrs:
//! `cowl.node` identifies it, and the escaped `overlay.whiteout` makes a kernel overlayfs that is stacked on the mount
//! treat it as a whiteout. Its directory has the xattr `cowl.nodes`, so that listings check only such directories for
//! devices, and the escaped `overlay.opaque=x`, without which the kernel ignores xattr whiteouts in a listing.

use super::{OPAQUE_XATTR_WHITEOUTS, XattrSpace};

/// The value of `cowl.node`: a version byte. It needs no device number, because only 0:0 is stored this way.
pub const NODE: &[u8] = &[1];

/// The value of `cowl.nodes` if cowl set the directory's escaped opaque xattr, which is then not visible to users.
///
/// The first byte is a version.
pub const NODES_WITH_OPAQUE: &[u8] = &[1, 1];
/// The value of `cowl.nodes` if a user set the directory's escaped opaque xattr.
pub const NODES: &[u8] = &[1, 0];

impl XattrSpace {
    /// Returns the escaped xattr of an object that cowl set and no user, if any.
    ///
    /// `value` returns the value of an xattr on disk.
    pub fn internal_xattr<E>(
        self,
        value: impl Fn(&str) -> Result<Option<Vec<u8>>, E>,
    ) -> Result<Option<&'static str>, E> {
        if value(self.node())?.is_some() {
            return Ok(Some(self.escaped_whiteout()));
        }
        if value(self.nodes())?.is_some_and(|nodes| nodes == NODES_WITH_OPAQUE)
            && value(self.escaped_opaque())?.is_some_and(|value| value == OPAQUE_XATTR_WHITEOUTS)
        {
            return Ok(Some(self.escaped_opaque()));
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_internal_xattrs_are_hidden() {
        let space = XattrSpace::Trusted;
        let ask = |attrs: &[(&str, &[u8])]| {
            let value = |name: &str| {
                let found = attrs.iter().find(|(n, _)| *n == name);
                Ok::<_, ()>(found.map(|(_, v)| v.to_vec()))
            };
            space.internal_xattr(value).unwrap()
        };
        let (node, nodes) = (space.node(), space.nodes());
        let (whiteout, opaque) = (space.escaped_whiteout(), space.escaped_opaque());
        assert_eq!(ask(&[]), None);
        assert_eq!(ask(&[(whiteout, b"")]), None);
        assert_eq!(ask(&[(node, NODE), (whiteout, b"")]), Some(whiteout));
        assert_eq!(
            ask(&[(nodes, NODES_WITH_OPAQUE), (opaque, b"x")]),
            Some(opaque)
        );
        assert_eq!(ask(&[(nodes, NODES_WITH_OPAQUE), (opaque, b"y")]), None);
        assert_eq!(ask(&[(nodes, NODES), (opaque, b"x")]), None);
        assert_eq!(ask(&[(opaque, b"x")]), None);
    }
}

//! A character device 0:0 that a user made. As it is it would be a whiteout, so it lies on disk as an
//! empty regular file with two marks: `cowl.node`, which says what it shows, and the escaped
//! `overlay.whiteout`, by which an overlay above, that knows nothing of cowl, takes it for a whiteout.
//! Its folder has `cowl.nodes`, so that a listing knows where to look, and the escaped
//! `overlay.opaque=x`, which the kernel asks for where whiteouts are files.

use super::{OPAQUE_XATTR_WHITEOUTS, XattrSpace};

/// The value of `cowl.node`: a version byte. There is only one device that needs this.
pub const NODE: &[u8] = &[1];

/// The value of `cowl.nodes`: a version byte, and whether the escaped opaque mark beside it was set for
/// the kernel only. Then users do not see it.
pub const NODES_WITH_OPAQUE: &[u8] = &[1, 1];
/// The same where the folder's escaped opaque mark is a user's.
pub const NODES: &[u8] = &[1, 0];

impl XattrSpace {
    /// The escaped mark among an object's attributes that no user set, if there is one. `value` tells
    /// the value of an attribute on disk.
    pub fn not_a_users<E>(
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
    fn only_what_no_user_set_is_hidden() {
        let space = XattrSpace::Trusted;
        let ask = |attrs: &[(&str, &[u8])]| {
            let value = |name: &str| {
                let found = attrs.iter().find(|(n, _)| *n == name);
                Ok::<_, ()>(found.map(|(_, v)| v.to_vec()))
            };
            space.not_a_users(value).unwrap()
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

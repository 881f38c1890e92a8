//! The names of marker xattrs, and the mapping between xattr names on disk and on the mount.
//!
//! An overlay's marker xattrs are not visible on its mount. If a user sets an xattr of such a name on the mount, it is
//! stored with an additional `overlay.`, as the kernel's overlayfs does, so that overlays can be stacked.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// The xattr of the access ACL.
pub const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
/// The xattr of a directory's default ACL.
pub const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
/// The xattr of the file capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";

/// The namespace of the marker xattrs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum XattrSpace {
    /// `trusted.overlay.*`, which needs CAP_SYS_ADMIN in the initial user namespace.
    Trusted,
    /// `user.overlay.*`, as in the kernel's `userxattr` mounts, for unprivileged users.
    User,
}

macro_rules! names {
    ($($(#[$doc:meta])* $fn:ident = $name:literal;)*) => {
        impl XattrSpace {
            $($(#[$doc])*
            pub fn $fn(self) -> &'static str {
                match self {
                    Self::Trusted => concat!("trusted.overlay.", $name),
                    Self::User => concat!("user.overlay.", $name),
                }
            })*
        }
    };
}

names! {
    /// Returns the common prefix of all marker xattrs.
    prefix = "";
    /// Returns the name of the xattr of a directory that hides the layers below.
    opaque = "opaque";
    /// Returns the name of the xattr that holds an object's path in the layers below.
    redirect = "redirect";
    /// Returns the name of the xattr of a file whose content is in a lower layer.
    metacopy = "metacopy";
    /// Returns the name of the xattr that makes an empty regular file a whiteout.
    whiteout = "whiteout";
    /// Returns the name of the xattr that holds an object's visible inode number (see [`crate::format::InodeNumberXattr`]).
    ino = "cowl.ino";
    /// Returns the name of the xattr of a user's character device 0:0 (see [`crate::format::zero_device`]).
    node = "cowl.node";
    /// Returns the name of the xattr of a directory that contains such devices.
    nodes = "cowl.nodes";
    /// Returns the name of the xattr of attributes that could not be stored.
    recorded = "cowl.recorded";
    /// Returns the name of the xattr with the kernel's handle of the lower object that an object was copied up from.
    kernel_origin = "origin";
    /// Returns the name of the xattr with the difference between two link counts, which the kernel's index needs.
    kernel_nlink = "nlink";
    /// Returns the name of the whiteout xattr of an overlay that is stacked on this one.
    escaped_whiteout = "overlay.whiteout";
    /// Returns the name of the opaque xattr of an overlay that is stacked on this one.
    escaped_opaque = "overlay.opaque";
    /// Returns the prefix of the marker xattrs of an overlay that is stacked on this one.
    escaped = "overlay.";
}

impl XattrSpace {
    /// Maps an xattr's name on disk to its name on the mount; `None` if it is not visible there.
    pub fn to_mount(self, disk: &[u8]) -> Option<Cow<'_, [u8]>> {
        let Some(marker) = disk.strip_prefix(self.prefix().as_bytes()) else {
            return Some(Cow::Borrowed(disk));
        };
        let inner = marker.strip_prefix(b"overlay.")?;
        Some(Cow::Owned([self.prefix().as_bytes(), inner].concat()))
    }

    /// Maps an xattr's name on the mount to its name on disk.
    pub fn to_disk(self, mount: &[u8]) -> Cow<'_, [u8]> {
        match mount.strip_prefix(self.prefix().as_bytes()) {
            None => Cow::Borrowed(mount),
            Some(marker) => Cow::Owned([self.escaped().as_bytes(), marker].concat()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_hidden_and_escaped_names_restored() {
        for space in [XattrSpace::Trusted, XattrSpace::User] {
            for marker in [
                space.opaque(),
                space.redirect(),
                space.ino(),
                space.recorded(),
                space.prefix(),
            ] {
                assert_eq!(space.to_mount(marker.as_bytes()), None);
                let stored = space.to_disk(marker.as_bytes());
                assert_ne!(&*stored, marker.as_bytes());
                assert_eq!(space.to_mount(&stored).unwrap(), marker.as_bytes());
                let twice = space.to_disk(&stored);
                assert_eq!(space.to_mount(&twice).unwrap(), &*stored);
            }
        }
    }

    #[test]
    fn other_names_stay_as_they_are() {
        for name in [
            &b"user.x"[..],
            CAPABILITY,
            b"trusted.overlayx",
            b"user.\xff",
        ] {
            for space in [XattrSpace::Trusted, XattrSpace::User] {
                assert_eq!(space.to_mount(name).unwrap(), name);
                assert_eq!(&*space.to_disk(name), name);
            }
        }
        // Marker xattrs of the other namespace are ordinary xattrs.
        assert_eq!(
            XattrSpace::User
                .to_mount(b"trusted.overlay.opaque")
                .unwrap(),
            &b"trusted.overlay.opaque"[..]
        );
    }
}

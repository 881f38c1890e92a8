//! The names of the marks, and how names on disk and names seen through a mount map to each other.
//!
//! An overlay's own attributes never show through it. A name that a user sets through the mount and
//! that would be one of them is stored with one `overlay.` more, as the kernel does, so that overlays
//! can be stacked on each other.

use std::borrow::Cow;

/// The xattr of the access ACL.
pub const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
/// The xattr of a directory's default ACL.
pub const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
/// The xattr of the file capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";

/// Which attributes carry the marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum XattrSpace {
    /// `trusted.overlay.*`: wants CAP_SYS_ADMIN in the initial user namespace.
    Trusted,
    /// `user.overlay.*`: the kernel's `userxattr` mounts, for unprivileged users.
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
    /// The common beginning of all marks.
    prefix = "";
    /// A folder that hides what lies below it.
    opaque = "opaque";
    /// Where the layers below have this object.
    redirect = "redirect";
    /// A file whose content lies below.
    metacopy = "metacopy";
    /// A whiteout in the form of an empty regular file.
    whiteout = "whiteout";
    /// The number that this object shows (cowl's own, see [`crate::format::NumberMark`]).
    ino = "cowl.ino";
    /// A character device 0:0 that a user made (cowl's own, see [`crate::format::zero_device`]).
    node = "cowl.node";
    /// A folder that holds such devices (cowl's own).
    nodes = "cowl.nodes";
    /// The mark `whiteout` of an overlay above this one.
    escaped_whiteout = "overlay.whiteout";
    /// The mark `opaque` of an overlay above this one.
    escaped_opaque = "overlay.opaque";
    /// The beginning of an escaped mark: one that belongs to an overlay above this one.
    escaped = "overlay.";
}

impl XattrSpace {
    /// How an attribute's name on disk shows through the mount; `None` hides it.
    pub fn to_mount(self, disk: &[u8]) -> Option<Cow<'_, [u8]>> {
        let Some(mark) = disk.strip_prefix(self.prefix().as_bytes()) else {
            return Some(Cow::Borrowed(disk));
        };
        let inner = mark.strip_prefix(b"overlay.")?;
        Some(Cow::Owned([self.prefix().as_bytes(), inner].concat()))
    }

    /// Under which name an attribute named through the mount lies on disk.
    pub fn to_disk(self, mount: &[u8]) -> Cow<'_, [u8]> {
        match mount.strip_prefix(self.prefix().as_bytes()) {
            None => Cow::Borrowed(mount),
            Some(mark) => Cow::Owned([self.escaped().as_bytes(), mark].concat()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_hidden_and_escaped_names_come_back() {
        for space in [XattrSpace::Trusted, XattrSpace::User] {
            for mark in [
                space.opaque(),
                space.redirect(),
                space.ino(),
                space.prefix(),
            ] {
                assert_eq!(space.to_mount(mark.as_bytes()), None);
                let stored = space.to_disk(mark.as_bytes());
                assert_ne!(&*stored, mark.as_bytes());
                assert_eq!(space.to_mount(&stored).unwrap(), mark.as_bytes());
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
        // The other space's marks are ordinary names.
        assert_eq!(
            XattrSpace::User
                .to_mount(b"trusted.overlay.opaque")
                .unwrap(),
            &b"trusted.overlay.opaque"[..]
        );
    }
}

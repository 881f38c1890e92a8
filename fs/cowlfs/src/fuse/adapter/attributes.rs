//! Decides for how long the kernel may cache attributes. docs/decisions/0015 has the reasons.
//!
//! The kernel runs a program according to the mode in its cache. For execve(2) it refreshes a mode that is invalidated
//! or expired, but not after it has opened the file; `admission` covers the time after that.

use std::time::Duration;

use super::Adapter;
use crate::fuse::passthrough::SetidBits;
use cowl_layers::sys::stat::FileKind;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, SETID};

/// Whether the kernel checks the attributes of a reply against later invalidations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// It discards them if they were invalidated after it had sent the request: replies to LOOKUP, GETATTR and
    /// READDIRPLUS.
    IfCurrent,
    /// It always caches them: replies to SETATTR, LINK, CREATE and the other requests that create a name.
    Always,
}

impl Adapter {
    /// Returns how long the kernel may cache `attr`, the attributes of `inode`, which it knows as `number`.
    pub(super) fn attr_timeout(
        &self,
        inode: &Inode,
        number: u64,
        attr: &Attr,
        accepted: Accepted,
    ) -> Duration {
        let setid = note_setid(inode, attr);
        let may_be_stale = setid == SetidBits::Set && accepted == Accepted::Always;
        if may_be_stale || self.backing.has_volatile_attr(number, setid) {
            Duration::ZERO
        } else {
            self.cache_timeout
        }
    }

    /// Returns how long the kernel may cache `attr`, the attributes of a file in a reply to CREATE, and its name.
    ///
    /// The file is empty. Before it is worth mapping it must be extended, and that makes the kernel request its size
    /// and times again.
    pub(super) fn created_attr_timeout(&self, inode: &Inode, attr: &Attr) -> Duration {
        match note_setid(inode, attr) {
            SetidBits::Set => Duration::ZERO,
            SetidBits::Clear => self.cache_timeout,
        }
    }
}

/// Returns whether attributes to be sent have setuid or setgid bits. Notes in the inode that they were shown.
fn note_setid(inode: &Inode, attr: &Attr) -> SetidBits {
    let bits = attr.stat.perm() & SETID;
    if attr.stat.kind() != FileKind::Regular || bits == 0 {
        return SetidBits::Clear;
    }
    inode.flags().note_setid_shown(bits);
    SetidBits::Set
}

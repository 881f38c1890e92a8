//! For how long the kernel may cache attributes. docs/decisions/0015 has the reasons.
//!
//! The kernel runs a program by the mode in its cache. For execve(2) it refreshes a mode that is invalidated or
//! expired, but not after it has opened the file; see `admission` for the time from there on.

use std::time::Duration;

use super::Adapter;
use cowl_layers::sys::stat::FileKind;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, SETID};

/// How the kernel takes the attributes of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// It drops them when they were invalidated after it had sent the request: replies to LOOKUP, GETATTR and
    /// READDIRPLUS.
    IfCurrent,
    /// It takes them as they are: replies to SETATTR, LINK, CREATE and whatever else makes a name.
    Always,
}

impl Adapter {
    /// Returns how long the kernel may cache `found`, the attributes of `inode`, which it knows as `number`.
    pub(super) fn keep_attr(
        &self,
        inode: &Inode,
        number: u64,
        found: &Attr,
        accepted: Accepted,
    ) -> Duration {
        let setid = shows_setid(inode, found);
        let outdated = setid && accepted == Accepted::Always;
        if outdated || self.passing.is_unsure(number, setid) {
            Duration::ZERO
        } else {
            self.keep
        }
    }

    /// Returns how long the kernel may cache `found`, the attributes of a file that is answered as created, and
    /// its name. It is empty: what makes it worth mapping has the kernel ask for size and times again.
    pub(super) fn keep_created(&self, inode: &Inode, found: &Attr) -> Duration {
        if shows_setid(inode, found) {
            Duration::ZERO
        } else {
            self.keep
        }
    }
}

/// Whether attributes to be answered have setuid or setgid bits, which is noted.
fn shows_setid(inode: &Inode, found: &Attr) -> bool {
    let bits = found.stat.perm() & SETID;
    let setid = found.stat.kind() == FileKind::Regular && bits != 0;
    if setid {
        inode.flags().note_setid_shown(bits);
    }
    setid
}

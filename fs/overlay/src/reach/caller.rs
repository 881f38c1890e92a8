//! The caller of an operation: its ids on disk, groups and capabilities.

use rustix::thread::CapabilitySet;

use super::context::Context;
use cowl_layers::error::Result;
use cowl_layers::sys;

/// The process that requests an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The file system user id, before the id map is applied.
    pub uid: u32,
    /// The file system group id, before the id map is applied.
    pub gid: u32,
    /// The mode bits that are cleared in new objects.
    pub umask: u32,
    /// The calling thread, from which credentials are read that the protocol does not transmit; 0 if it is
    /// not visible.
    pub pid: u32,
}

impl Context<'_> {
    /// Runs `make`, which creates an object with the mode that it gets, with the caller's ids on disk.
    pub(crate) fn as_creator<T>(
        &self,
        caller: Caller,
        mode: u32,
        make: impl FnMut(u32) -> Result<T>,
    ) -> Result<T> {
        sys::creds::as_creator(self.ids_on_disk(caller), mode, make)
    }

    /// Returns the ids on disk of what the caller creates: the overflow id for an id that is not mapped.
    pub(crate) fn ids_on_disk(&self, caller: Caller) -> sys::creds::Identity {
        sys::creds::Identity {
            uid: self.options.uids.creator_to_disk(caller.uid),
            gid: self.options.gids.creator_to_disk(caller.gid),
            umask: caller.umask,
        }
    }

    /// Whether the caller is the user `uid` on disk. A caller that is not mapped is none.
    pub(crate) fn is_user(&self, caller: Caller, uid: u32) -> bool {
        self.options.uids.to_disk(caller.uid) == Some(uid)
    }

    /// Whether the caller is a member of the group `gid` on disk, as in_group_p() in the kernel.
    ///
    /// The protocol transmits only the primary group; supplementary groups are read from /proc.
    pub(crate) fn is_member(&self, caller: Caller, gid: u32) -> Result<bool> {
        let ids = &self.options.gids;
        if ids.to_disk(caller.gid) == Some(gid) {
            return Ok(true);
        }
        let groups = sys::process::groups(caller.pid)?;
        Ok(groups
            .into_iter()
            .any(|group| ids.to_disk(group) == Some(gid)))
    }
}

/// Whether the caller has a capability, which the protocol does not transmit.
///
/// If the process is not visible, assumes that exactly user 0 has it.
pub(crate) fn has_capability(caller: Caller, capability: CapabilitySet) -> Result<bool> {
    let reported = sys::process::has_capability(caller.pid, capability)?;
    Ok(reported.unwrap_or(caller.uid == 0))
}

//! The process that makes a request: its ids on disk, its groups and its capabilities.

use rustix::thread::CapabilitySet;

use super::context::Context;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys;

/// The caller of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File system user id, as the mount shows it.
    pub uid: u32,
    /// File system group id, as the mount shows it.
    pub gid: u32,
    /// Mode bits that are cleared in new objects.
    pub umask: u32,
    /// The calling thread, for credentials that the protocol does not transmit; 0 if it is not visible.
    pub pid: u32,
}

impl Context<'_> {
    /// Runs `make` with the caller's ids, as they are stored on disk, to make a new object.
    pub(crate) fn as_creator<T>(
        &self,
        caller: Caller,
        make: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        sys::creds::as_creator(self.ids_on_disk(caller)?, make)
    }

    /// Returns the caller's ids as they are stored on disk.
    pub(crate) fn ids_on_disk(&self, caller: Caller) -> Result<sys::creds::Identity> {
        let overflow = Error::Errno(Errno::OVERFLOW);
        Ok(sys::creds::Identity {
            uid: self.options.uids.to_disk(caller.uid).ok_or(overflow)?,
            gid: self.options.gids.to_disk(caller.gid).ok_or(overflow)?,
            umask: caller.umask,
        })
    }

    /// Whether the caller belongs to a group of the disk, by its own or a supplementary one (the kernel's
    /// in_group_p). The protocol transmits the first alone.
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

/// Whether the caller has a capability, which the protocol does not transmit. If the process is not visible,
/// user 0 has it.
pub(crate) fn has_capability(caller: Caller, which: CapabilitySet) -> Result<bool> {
    let reported = sys::process::has_capability(caller.pid, which)?;
    Ok(reported.unwrap_or(caller.uid == 0))
}

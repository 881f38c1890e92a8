//! Writes that preserve file capabilities.
//!
//! Every write(2) removes the capabilities of a file. Neither a change in a memory mapping nor a copy-up does, so they are
//! restored after the writes of this process.

use std::os::fd::{AsFd, OwnedFd};

use cowl_layers::error::{Errno, Result};
use cowl_layers::format::CAPABILITY;
use cowl_layers::locks::{Mutex, MutexGuard};
use cowl_layers::points::point;
use cowl_layers::sys;

use super::context::Context;
use super::object::access_path;
use crate::inode::{Inode, NO_CAPABILITIES};
use crate::ledger::Kind;

/// The locks of the capabilities, by inode number. No lock of an inode is taken while one of them is held.
static CAPABILITIES: [Mutex<()>; 16] = [const { Mutex::new(()) }; 16];

/// Waits for a write that preserves the capabilities of a file, and prevents another one.
///
/// To be called for every other change of the capabilities, which the write would undo.
pub(crate) fn lock_capabilities(inode: &Inode) -> Option<MutexGuard<'static, ()>> {
    let index = inode.ino() % CAPABILITIES.len() as u64;
    CAPABILITIES.get(index as usize).map(Mutex::lock)
}

impl Context<'_> {
    /// Runs a write to the open file `fd`, and restores the capabilities of the file, also if the write fails.
    ///
    /// They are in the ledger meanwhile, so that a successor restores them if this process is killed.
    pub(crate) fn preserving_capabilities<T>(
        &self,
        inode: &Inode,
        fd: &OwnedFd,
        write: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let facts = inode.facts();
        if facts.has_no_capabilities() {
            return write();
        }
        let locked = lock_capabilities(inode);
        let before = facts.snapshot();
        let found = match sys::xattr::get(fd.as_fd(), CAPABILITY) {
            Err(error) if error.errno() == Errno::OPNOTSUPP => None,
            other => other?,
        };
        let Some(capabilities) = found else {
            facts.note(before, NO_CAPABILITIES);
            drop(locked);
            return write();
        };
        if let Some(ledger) = self.ledger() {
            ledger.put(Kind::Capabilities, inode.ino(), &capabilities);
        }
        let written = write();
        point("before capabilities are restored");
        let restored = sys::xattr::set(fd.as_fd(), CAPABILITY, &capabilities);
        if let Some(ledger) = self.ledger() {
            ledger.delete(Kind::Capabilities, inode.ino());
        }
        written.and_then(|value| restored.map(|()| value))
    }
}

/// Restores the capabilities of a file that a predecessor was writing to when it was killed.
pub(crate) fn restore_capabilities(inode: &Inode, capabilities: &[u8]) -> Result<()> {
    let target = access_path(inode)?;
    match sys::xattr::get(target.as_fd(), CAPABILITY)? {
        Some(_) => Ok(()),
        None => sys::xattr::set(target.as_fd(), CAPABILITY, capabilities),
    }
}

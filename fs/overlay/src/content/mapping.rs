//! Writes of the kernel's writeback: content that programs changed in a mapping.
//!
//! Every write(2) removes the file's capabilities, a change in a mapping does not. So they are restored after the write.

use std::os::fd::{AsFd, OwnedFd};

use super::open::Content;
use crate::inode::{Inode, NO_CAPABILITIES};
use crate::ledger::Kind;
use cowl_layers::error::{Errno, Result};
use cowl_layers::format::CAPABILITY;
use cowl_layers::locks::Mutex;
use cowl_layers::points::point;
use cowl_layers::sys;

/// The locks of files with capabilities during a write, by inode number. Without them a second write could find that
/// the first one has removed the capabilities.
static RESTORING: [Mutex<()>; 16] = [const { Mutex::new(()) }; 16];

impl Content<'_> {
    /// Writes all of `data`, which programs changed in a mapping of the file `fd`.
    ///
    /// The kernel does not retry a short write of writeback, so the rest would be lost.
    pub(super) fn write_mapping(
        &self,
        inode: &Inode,
        fd: &OwnedFd,
        data: &[u8],
        offset: u64,
    ) -> Result<()> {
        let facts = inode.facts();
        if facts.has_no_capabilities() {
            return sys::copy::write_all(fd, data, offset);
        }
        let index = inode.ino() % RESTORING.len() as u64;
        let _restoring = RESTORING.get(index as usize).map(Mutex::lock);
        let before = facts.snapshot();
        let Some(capabilities) = self.capabilities(inode, fd)? else {
            facts.note(before, NO_CAPABILITIES);
            return sys::copy::write_all(fd, data, offset);
        };
        if let Some(ledger) = self.cx.ledger() {
            ledger.put(Kind::Capabilities, inode.ino(), &capabilities);
        }
        let written = sys::copy::write_all(fd, data, offset);
        point("before capabilities are restored");
        sys::xattr::set(fd.as_fd(), CAPABILITY, &capabilities)?;
        if let Some(ledger) = self.cx.ledger() {
            ledger.delete(Kind::Capabilities, inode.ino());
        }
        written
    }

    /// Returns the file's capabilities, which a predecessor may have removed without restoring them.
    fn capabilities(&self, inode: &Inode, fd: &OwnedFd) -> Result<Option<Vec<u8>>> {
        match sys::xattr::get(fd.as_fd(), CAPABILITY) {
            Ok(None) => Ok(self
                .cx
                .ledger()
                .and_then(|ledger| ledger.value(Kind::Capabilities, inode.ino()))
                .map(|found| found.payload)),
            Err(error) if error.errno() == Errno::OPNOTSUPP => Ok(None),
            other => other,
        }
    }
}

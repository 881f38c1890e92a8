//! Backing files by their raw numbers, which outlive the process that registered them.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;

use fuser::{BackingId, ReplyCreate, ReplyOpen};

/// A reply through which backing files are registered.
pub(super) trait Registrar {
    /// Registers a file with the kernel. Returns its number, too.
    fn register(&self, content: BorrowedFd<'_>) -> io::Result<(u32, BackingId)>;
    /// Returns the registration with this number, which a predecessor made.
    fn adopt(&self, raw: u32) -> BackingId;
}

impl Registrar for ReplyOpen {
    fn register(&self, content: BorrowedFd<'_>) -> io::Result<(u32, BackingId)> {
        let raw = self.open_backing(content)?.into_raw();
        Ok((raw, self.adopt(raw)))
    }

    fn adopt(&self, raw: u32) -> BackingId {
        // SAFETY: the number is of this session: this process or its predecessor has registered it, and nothing else
        // closes it.
        unsafe { self.wrap_backing(raw) }
    }
}

impl Registrar for ReplyCreate {
    fn register(&self, content: BorrowedFd<'_>) -> io::Result<(u32, BackingId)> {
        let raw = self.open_backing(content)?.into_raw();
        Ok((raw, self.adopt(raw)))
    }

    fn adopt(&self, raw: u32) -> BackingId {
        // SAFETY: as above.
        unsafe { self.wrap_backing(raw) }
    }
}

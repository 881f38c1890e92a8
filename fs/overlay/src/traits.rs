//! What there is to know of a file's content before somebody is let at it.

use std::os::fd::{AsFd, OwnedFd};

use super::copy_up::CAPABILITY;
use super::{FileHandle, Op};
use crate::inode::{BARE, FileState, Inode, PLAIN};
use cowl_layers::error::{Errno, Result};
use cowl_layers::sys;

/// How an ELF file begins.
const ELF: [u8; 4] = *b"\x7fELF";

impl Op<'_> {
    /// Whether an open file's content lies in the layer that is written.
    pub fn content_is_up(&self, handle: &FileHandle) -> Result<bool> {
        let file = handle.inode().file()?;
        Ok(file.data.is_none() && self.cx.stack.in_upper(&file))
    }

    /// Whether it is a program or a library: seldom written in place, and mapped by many.
    pub fn is_program(&self, handle: &FileHandle, fd: &OwnedFd) -> Result<bool> {
        if is_library(&handle.inode().file()?) {
            return Ok(true);
        }
        let runs = handle.how().exec || sys::stat::stat_fd(fd)?.perm() & 0o111 != 0;
        let mut start = [0; 4];
        Ok(runs && rustix::io::pread(fd, &mut start, 0)? == ELF.len() && start == ELF)
    }

    /// Notes that a file is neither, and lies in a layer that is only read: the next open for reading need not
    /// open its content before somebody asks for it, because the kernel may have all of it.
    pub fn note_plain(&self, inode: &Inode, before: u32) {
        inode.found(before, PLAIN);
    }

    /// Whether a write may take something else from it than its content: setuid, setgid, capabilities.
    pub fn is_privileged(&self, inode: &Inode, fd: &OwnedFd) -> Result<bool> {
        if sys::stat::stat_fd(fd)?.perm() & 0o6000 != 0 {
            return Ok(true);
        }
        if inode.is_bare() {
            return Ok(false);
        }
        let before = inode.known();
        let found = match sys::xattr::get(fd.as_fd(), CAPABILITY) {
            Ok(value) => value.is_some(),
            Err(error) if error.errno() == Errno::OPNOTSUPP => false,
            Err(error) => return Err(error),
        };
        if !found {
            inode.found(before, BARE);
        }
        Ok(found)
    }
}

/// Whether it has a library's name: `NAME.so`, `NAME.so.VERSION`.
fn is_library(file: &FileState) -> bool {
    file.aliases.iter().any(|alias| {
        let name: &[u8] = &alias.name;
        name.ends_with(b".so") || name.windows(4).any(|part| part == b".so.")
    })
}

//! Properties of an open file on which the passthrough policy depends.

use std::os::fd::{AsFd, OwnedFd};

use super::handle::FileHandle;
use crate::inode::{FileState, NO_CAPABILITIES};
use cowl_layers::error::{Errno, Result};
use cowl_layers::format::CAPABILITY;
use cowl_layers::sys;

/// The first bytes of an ELF file.
const ELF: [u8; 4] = *b"\x7fELF";

impl FileHandle {
    /// Whether the file is a program or a library.
    ///
    /// Such files are rarely written in place and are mapped by many processes. `fd` must be a descriptor of the
    /// content.
    pub fn is_program(&self, fd: &OwnedFd) -> Result<bool> {
        if is_library(&self.inode.file()?) {
            return Ok(true);
        }
        let is_executable = self.options.exec || sys::stat::stat_fd(fd)?.perm() & 0o111 != 0;
        let mut start = [0; 4];
        Ok(is_executable && rustix::io::pread(fd, &mut start, 0)? == ELF.len() && start == ELF)
    }

    /// Whether the file has setuid, setgid or capabilities, which a write may have to remove.
    ///
    /// `fd` must be a descriptor of the content.
    pub fn is_privileged(&self, fd: &OwnedFd) -> Result<bool> {
        if sys::stat::stat_fd(fd)?.perm() & 0o6000 != 0 {
            return Ok(true);
        }
        let facts = self.inode.facts();
        if facts.has_no_capabilities() {
            return Ok(false);
        }
        let before = facts.snapshot();
        let found = match sys::xattr::get(fd.as_fd(), CAPABILITY) {
            Ok(value) => value.is_some(),
            Err(error) if error.errno() == Errno::OPNOTSUPP => false,
            Err(error) => return Err(error),
        };
        if !found {
            facts.note(before, NO_CAPABILITIES);
        }
        Ok(found)
    }
}

/// Whether the file has the name of a shared library: `NAME.so` or `NAME.so.VERSION`.
fn is_library(file: &FileState) -> bool {
    file.aliases.iter().any(|alias| {
        let name: &[u8] = &alias.name;
        name.ends_with(b".so") || name.windows(4).any(|part| part == b".so.")
    })
}

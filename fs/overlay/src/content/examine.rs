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

    /// Whether the file is in a directory whose files package managers replace, such as /usr, according to one of its
    /// names. `false` if it has none.
    pub fn is_in_package_tree(&self) -> bool {
        let first_names = || {
            let mut alias = self.inode.file().ok()?.aliases.first()?.clone();
            let mut below = None;
            loop {
                let dir = alias.parent.dir().ok()?;
                match dir.alias {
                    Some(above) => below = Some(std::mem::replace(&mut alias, above).name),
                    // A removed directory has no path.
                    None if dir.removed => return None,
                    None => return Some((alias.name, below)),
                }
            }
        };
        first_names().is_some_and(|(top, below)| is_package_tree(&top, below.as_deref()))
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

/// Whether package managers replace the files below a directory of the root, with this name below it.
fn is_package_tree(top: &[u8], below: Option<&[u8]>) -> bool {
    match (top, below) {
        // A file in the root directory.
        (_, None) => false,
        (b"usr", Some(below)) => below != b"local",
        (b"nix" | b"gnu", Some(below)) => below == b"store",
        (b"bin" | b"sbin" | b"lib" | b"lib32" | b"lib64" | b"libx32", Some(_)) => true,
        _ => false,
    }
}

/// Whether the file has the name of a shared library: `NAME.so` or `NAME.so.VERSION`.
fn is_library(file: &FileState) -> bool {
    file.aliases.iter().any(|alias| {
        let name: &[u8] = &alias.name;
        name.ends_with(b".so") || name.windows(4).any(|part| part == b".so.")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trees_of_package_managers_are_recognized() {
        for (top, below, expected) in [
            ("usr", Some("bin"), true),
            ("usr", Some("local"), false),
            ("usr", None, false),
            ("bin", Some("sh"), true),
            ("lib64", Some("libc.so.6"), true),
            ("lib", None, false),
            ("nix", Some("store"), true),
            ("nix", Some("var"), false),
            ("gnu", Some("store"), true),
            ("var", Some("lib"), false),
            ("etc", Some("passwd"), false),
            ("home", Some("usr"), false),
            ("usrlocal", Some("bin"), false),
        ] {
            let found = is_package_tree(top.as_bytes(), below.map(str::as_bytes));
            assert_eq!(found, expected, "{top} {below:?}");
        }
    }
}

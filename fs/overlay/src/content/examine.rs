//! Properties of an open file on which the passthrough policy depends.

use std::os::fd::{AsFd, OwnedFd};

use super::handle::FileHandle;
use crate::inode::{FileState, NO_CAPABILITIES};
use cowl_layers::error::{Errno, Result};
use cowl_layers::format::CAPABILITY;
use cowl_layers::sys;

/// The first bytes of an ELF file.
const ELF: [u8; 4] = *b"\x7fELF";
/// The number of bytes at the start of a file by which a format is recognized.
const START: usize = 64;
/// The formats of files that programs replace, by their media types. Office documents are zip archives.
///
/// Each has a signature of at least three bytes at the start that text does not begin with. Formats with shorter
/// signatures are omitted, because a log or a database could begin with one.
const REPLACED: [&str; 16] = [
    "application/epub+zip",
    "application/font-woff",
    "application/gzip",
    "application/vnd.debian.binary-package",
    "application/vnd.rar",
    "application/wasm",
    "application/x-7z-compressed",
    "application/x-rpm",
    "application/x-xz",
    "application/zip",
    "application/zstd",
    "audio/ogg",
    "audio/x-flac",
    "image/jpeg",
    "image/png",
    "video/x-matroska",
];
/// The formats of files that programs write in place, by their media types: databases and disk images.
const WRITTEN: [&str; 2] = ["application/vnd.sqlite3", "application/x-qemu-disk"];

/// The usual way in which a program changes a file, judging by the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsualChange {
    /// The program writes a new file, which replaces the old one: images, compressed archives, fonts.
    Replace,
    /// The program writes to the file: databases, disk images.
    InPlace,
    /// The format is unknown.
    Unknown,
}

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
        Ok(is_executable && read_start(fd, &mut [0; ELF.len()]) == ELF)
    }

    /// Returns how a program usually changes the file, judging by the first bytes of its content. `fd` must be a
    /// descriptor of the content.
    pub fn usual_change(&self, fd: &OwnedFd) -> UsualChange {
        usual_change(read_start(fd, &mut [0; START]))
    }

    /// Whether the file is in a directory whose files package managers replace, such as /usr, according to one of its
    /// names. `false` if it has none.
    pub fn is_in_package_tree(&self) -> bool {
        let first_names = || {
            let mut alias = self.inode.file().ok()?.aliases.first()?.clone();
            let (mut second, mut third) = (None, None);
            loop {
                let dir = alias.parent.dir().ok()?;
                match dir.alias {
                    Some(above) => {
                        let name = std::mem::replace(&mut alias, above).name;
                        third = second.replace(name);
                    }
                    // A removed directory has no path.
                    None if dir.removed => return None,
                    None => return Some((alias.name, second, third)),
                }
            }
        };
        first_names().is_some_and(|(first, second, third)| {
            is_package_tree(&first, second.as_deref(), third.as_deref())
        })
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

/// Reads the first bytes of a file. Returns none after an error, because a program may still read the other ones.
fn read_start<'a>(fd: &OwnedFd, buffer: &'a mut [u8]) -> &'a [u8] {
    match rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut *buffer, 0)) {
        Ok(read) => buffer.get(..read).unwrap_or_default(),
        Err(error) => {
            log::debug!("cannot read the start of a file: {error}");
            &[]
        }
    }
}

/// Whether package managers replace the files whose paths begin with these names.
fn is_package_tree(first: &[u8], second: Option<&[u8]>, third: Option<&[u8]>) -> bool {
    match (first, second, third) {
        // A file in the root directory.
        (_, None, _) => false,
        // rpm has its database in /usr/lib/sysimage.
        (b"usr", Some(second), third) => {
            second != b"local" && (second, third) != (b"lib", Some(b"sysimage"))
        }
        (b"nix" | b"gnu", Some(second), _) => second == b"store",
        (b"bin" | b"sbin" | b"lib32" | b"lib64" | b"libx32", Some(_), _) => true,
        (b"lib", Some(second), _) => second != b"sysimage",
        _ => false,
    }
}

/// Returns how a file that begins with these bytes is usually changed.
fn usual_change(start: &[u8]) -> UsualChange {
    let Some(format) = infer::get(start) else {
        return UsualChange::Unknown;
    };
    let format = format.mime_type();
    if WRITTEN.contains(&format) {
        UsualChange::InPlace
    } else if REPLACED.contains(&format) {
        UsualChange::Replace
    } else {
        UsualChange::Unknown
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
        for (path, expected) in [
            ("usr/bin", true),
            ("usr/bin/sh", true),
            ("usr/local/lib", false),
            ("usr", false),
            ("usr/lib/locale", true),
            ("usr/lib/sysimage", false),
            ("usr/share/sysimage", true),
            ("bin/sh", true),
            ("lib64/libc.so.6", true),
            ("lib", false),
            ("lib/sysimage/rpm", false),
            ("lib/modules", true),
            ("nix/store/x", true),
            ("nix/var/x", false),
            ("gnu/store/x", true),
            ("var/lib/dpkg", false),
            ("etc/passwd", false),
            ("home/usr/bin", false),
            ("usrlocal/bin", false),
        ] {
            let mut names = path.split('/').map(str::as_bytes);
            let first = names.next().unwrap();
            let found = is_package_tree(first, names.next(), names.next());
            assert_eq!(found, expected, "{path}");
        }
    }

    #[test]
    fn formats_are_recognized_by_their_first_bytes() {
        let tar = [&[b'x'; 257], &b"ustar\0"[..]].concat();
        for (start, expected) in [
            (&b"\x89PNG\r\n\x1a\n"[..], UsualChange::Replace),
            (b"PK\x03\x04\x14\0\x08\0", UsualChange::Replace),
            (
                b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\0\0\0\0\0\0\0\0\0\0\0\0\x13\0\0\0[Content_Types].xml",
                UsualChange::Replace,
            ),
            (
                b"PK\x03\x04\x14\0\0\x08\0\0\0\0!\0\0\0\0\0\0\0\0\0\0\0\0\0\x08\0\0\0mimetypeapplication/vnd.oas",
                UsualChange::Replace,
            ),
            (b"\x1f\x8b\x08\0\0\0\0\0", UsualChange::Replace),
            (b"\xfd7zXZ\0\0\x04", UsualChange::Replace),
            (b"\x28\xb5\x2f\xfd\x04\x58\0\0", UsualChange::Replace),
            (b"SQLite format 3\0\x10\0\x01\x01", UsualChange::InPlace),
            (b"\xff\xd8\xff\xe0\0\x10JFIF", UsualChange::Replace),
            (b"QFI\xfb\0\0\0\x03", UsualChange::InPlace),
            (b"2026-11-30 12:00:00 started\n", UsualChange::Unknown),
            (b"BMC started\n", UsualChange::Unknown),
            (b"BC: a log\n", UsualChange::Unknown),
            (b"MZ,x,y\n", UsualChange::Unknown),
            (b"GIF or PNG?\n", UsualChange::Unknown),
            (b"%!PS or %PDF-1.7\n", UsualChange::Unknown),
            (b"\0\x02\0\x01a checksum", UsualChange::Unknown),
            (b"\x30\x82\x01\x0a", UsualChange::Unknown),
            (b"\0\x01\0\0\0a font or a counter", UsualChange::Unknown),
            (b"<!DOCTYPE html><html>", UsualChange::Unknown),
            (b"#!/bin/sh\nexit 0\n", UsualChange::Unknown),
            (&[0; START], UsualChange::Unknown),
            (&tar, UsualChange::Unknown),
            (b"", UsualChange::Unknown),
        ] {
            assert_eq!(usual_change(start), expected, "{start:?}");
        }
    }
}

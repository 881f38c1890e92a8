//! Opens the directories of a stack through private mounts.
//!
//! So the file systems below the layers can be unmounted from the tree while the overlay is mounted, and reads of lower
//! layers update no atime.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Errno, Error, Result};
use crate::shown::Show as _;
use crate::sys;
use crate::sys::private::{Through, clone_mount, clone_without_id_map};

/// The way by which a directory was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// Through a private mount, which has `nodev`.
    PrivateMount,
    /// By its path.
    Path,
}

/// Opens a layer's root directory for reading.
pub(super) fn for_reading(path: &Path) -> Result<(OwnedFd, Reached)> {
    let plain = sys::dir::open_root(path)?;
    Ok(match clone_mount(plain.as_fd(), Through::Reading) {
        Ok(private) => (private, Reached::PrivateMount),
        Err(error) => {
            log::debug!("no private mount of {}: {error}", path.shown());
            (plain, Reached::Path)
        }
    })
}

/// Opens a layer's root directory for reading, with the ids of the file system even if its mount is idmapped.
pub(super) fn without_id_map(path: &Path) -> Result<OwnedFd> {
    clone_without_id_map(sys::dir::open_root(path)?.as_fd())
}

/// Reopens directories that are written, such as an upper layer's root and its work directory, given as descriptors and
/// paths, through a private mount.
///
/// All are accessed through one mount, because a rename between two mounts fails with EXDEV, even on one file system.
/// Reports whether that mount is private.
pub(super) fn for_writing<const N: usize>(
    plain: [OwnedFd; N],
    paths: [&Path; N],
    through: Through,
) -> ([OwnedFd; N], Reached) {
    match through_one_mount(&plain, paths, through) {
        Ok(dirs) => (dirs, Reached::PrivateMount),
        Err(error) => {
            let first = paths.first().copied().unwrap_or(Path::new(""));
            log::debug!("no private mount of {}: {error}", first.shown());
            (plain, Reached::Path)
        }
    }
}

fn through_one_mount<const N: usize>(
    plain: &[OwnedFd; N],
    paths: [&Path; N],
    through: Through,
) -> Result<[OwnedFd; N]> {
    let failed = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let mut resolved = Vec::with_capacity(N);
    for path in paths {
        resolved.push(path.canonicalize().map_err(failed)?);
    }
    let mut common = resolved.first().cloned().unwrap_or_default();
    for path in &resolved {
        common = (common.components())
            .zip(path.components())
            .take_while(|(one, two)| one == two)
            .map(|(component, _)| component)
            .collect();
    }
    let mount = clone_mount(sys::dir::open_root(&common)?.as_fd(), through)?;
    let open = |path: &Path, plain: &OwnedFd| -> Result<OwnedFd> {
        let below = path.strip_prefix(&common).map_err(|_| Errno::INVAL)?;
        let dir = sys::dir::open_dir(mount.as_fd(), below.as_os_str().as_bytes())?;
        let (found, wanted) = (sys::stat::stat_fd(&dir)?, sys::stat::stat_fd(plain)?);
        if (found.dev, found.ino) == (wanted.dev, wanted.ino) {
            Ok(dir)
        } else {
            // Another file system is mounted on the path; a private mount does not include it.
            Err(Error::Errno(Errno::XDEV))
        }
    };
    let mut opened = Vec::with_capacity(N);
    for (path, plain) in resolved.iter().zip(plain) {
        opened.push(open(path, plain)?);
    }
    opened.try_into().map_err(|_| Error::Errno(Errno::INVAL))
}

//! Opens the directories of a stack without keeping their file systems from being unmounted, and without updating
//! access times in layers that are only read.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Errno, Error, Result};
use crate::shown::Show as _;
use crate::sys;
use crate::sys::private::{Through, mount_of};

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
    Ok(match mount_of(plain.as_fd(), Through::Reading) {
        Ok(private) => (private, Reached::PrivateMount),
        Err(error) => {
            log::debug!("no private mount of {}: {error}", path.shown());
            (plain, Reached::Path)
        }
    })
}

/// Opens an upper's root directory and its work directory, given as descriptors and paths, through a private mount
/// if possible. Both go through one mount, because nothing can be renamed from one mount to another.
pub(super) fn for_writing(
    plain: [OwnedFd; 2],
    paths: [&Path; 2],
    through: Through,
) -> ([OwnedFd; 2], Reached) {
    match through_one_mount(&plain, paths, through) {
        Ok(dirs) => (dirs, Reached::PrivateMount),
        Err(error) => {
            log::debug!("no private mount of {}: {error}", paths[0].shown());
            (plain, Reached::Path)
        }
    }
}

fn through_one_mount(
    plain: &[OwnedFd; 2],
    paths: [&Path; 2],
    through: Through,
) -> Result<[OwnedFd; 2]> {
    let [upper, work] = paths.map(Path::canonicalize);
    let failed = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let (upper, work) = (upper.map_err(failed)?, work.map_err(failed)?);
    let common: PathBuf = upper
        .components()
        .zip(work.components())
        .take_while(|(one, two)| one == two)
        .map(|(component, _)| component)
        .collect();
    let mount = mount_of(sys::dir::open_root(&common)?.as_fd(), through)?;
    let open = |path: &Path, plain: &OwnedFd| -> Result<OwnedFd> {
        let below = path.strip_prefix(&common).map_err(|_| Errno::INVAL)?;
        let folder = sys::dir::open_dir(mount.as_fd(), below.as_os_str().as_bytes())?;
        let (found, wanted) = (sys::stat::stat_fd(&folder)?, sys::stat::stat_fd(plain)?);
        if (found.dev, found.ino) == (wanted.dev, wanted.ino) {
            Ok(folder)
        } else {
            // Something else is mounted on the way there, which a private mount leaves out.
            Err(Error::Errno(Errno::XDEV))
        }
    };
    let [plain_upper, plain_work] = plain;
    Ok([open(&upper, plain_upper)?, open(&work, plain_work)?])
}

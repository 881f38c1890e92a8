//! Opening the folders of a stack in a way that keeps nobody else from unmounting what they lie on,
//! and leaves no trace in what is only read.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Errno, Error, Result};
use crate::shown::Show as _;
use crate::sys;
use crate::sys::private::{Through, mount_of};

/// A layer's root directory, to be read, and whether it is reached through a private mount.
pub(super) fn for_reading(path: &Path) -> Result<(OwnedFd, bool)> {
    let plain = sys::dir::open_root(path)?;
    Ok(match mount_of(plain.as_fd(), Through::Reading) {
        Ok(private) => (private, true),
        Err(error) => {
            log::debug!("no private mount of {}: {error}", path.shown());
            (plain, false)
        }
    })
}

/// An upper's root folder and its work folder, given as plain descriptors and paths. Both go through one
/// mount, for nothing can be renamed from one mount to another. Reports whether it is a private one.
pub(super) fn for_writing(
    plain: [OwnedFd; 2],
    paths: [&Path; 2],
    through: Through,
) -> ([OwnedFd; 2], bool) {
    match through_one_mount(&plain, paths, through) {
        Ok(folders) => (folders, true),
        Err(error) => {
            log::debug!("no private mount of {}: {error}", paths[0].shown());
            (plain, false)
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

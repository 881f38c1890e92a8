//! Names in the frozen layer that reserve space for copies.
//!
//! A copy needs a name beside the file that it is about to replace. The name could need space in the directory when the
//! move can no longer be undone, so it is created before: as a whiteout, which hides nothing and which programs do not
//! see, and which a second name of the copy replaces later.

use std::os::fd::BorrowedFd;

use crate::error::{Errno, Error, Result};
use crate::name::Name;
use crate::sys;
use crate::sys::node::RenameMode;
use crate::sys::stat::FileKind;

/// The whiteout in the directory of the moves to which placeholders are linked.
pub(super) const SOURCE: &[u8] = b"placeholder";

/// The errors of a kernel that permits no device.
const NO_DEVICES: [Errno; 4] = [Errno::PERM, Errno::OPNOTSUPP, Errno::INVAL, Errno::ACCESS];

/// Returns the name of the placeholder with this number.
pub(super) fn name(temporary: &Name, index: usize) -> Result<Name> {
    Name::new([temporary.as_bytes(), format!("-{index:x}").as_bytes()].concat())
}

/// Returns the second name, in the directory of the moves, of the copy that is to replace the placeholder.
fn second_name(index: usize) -> Vec<u8> {
    format!("n{index:x}").into_bytes()
}

/// Creates the whiteout to which placeholders are linked. Returns whether devices can be created; without placeholders, a
/// full disk can interrupt a move.
pub(super) fn create_source(moves: BorrowedFd<'_>) -> Result<bool> {
    match sys::node::mknod(moves, SOURCE, FileKind::CharDevice, 0, 0) {
        Ok(()) => Ok(true),
        Err(Error::Errno(error)) if NO_DEVICES.contains(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Creates the second name of the copy that is to replace the placeholder with this number.
pub(super) fn create_second_name(moves: BorrowedFd<'_>, copy: &[u8], index: usize) -> Result<()> {
    sys::node::link(moves, copy, moves, &second_name(index))
}

/// Creates a placeholder in the directory, with the name.
pub(super) fn create(moves: BorrowedFd<'_>, (dir, name): (BorrowedFd<'_>, &Name)) -> Result<()> {
    match sys::node::link(moves, SOURCE, dir, name) {
        // With too many links, it is a whiteout of its own.
        Err(Error::Errno(Errno::MLINK)) => sys::node::mknod(dir, name, FileKind::CharDevice, 0, 0),
        linked => linked,
    }
}

/// Replaces a placeholder by the copy, unless that was done before.
///
/// After a power cut, the placeholder or the second name may be missing, because only the list was synced.
pub(super) fn fill(
    moves: BorrowedFd<'_>,
    copy: &[u8],
    (dir, name): (BorrowedFd<'_>, &Name),
    index: usize,
) -> Result<()> {
    match sys::stat::stat_at(dir, name) {
        Ok(found) if found.is_whiteout_device() => {
            match sys::node::rename(moves, &second_name(index), dir, name, RenameMode::Replace) {
                Err(error) if error.is_absent() => {}
                renamed => return renamed,
            }
            sys::node::unlink(dir, name)?;
        }
        Ok(found) if found.ino == sys::stat::stat_at(moves, copy)?.ino => return Ok(()),
        Ok(_) => sys::node::unlink(dir, name)?,
        Err(error) if error.is_absent() => {}
        Err(error) => return Err(error),
    }
    sys::node::link(moves, copy, dir, name)
}

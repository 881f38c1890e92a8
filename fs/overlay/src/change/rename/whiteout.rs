//! Renames that leave a whiteout at the old name.

use super::side::Side;
use crate::plan::UpperEntry;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::{Upper, WhiteoutForm};
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;

/// Moves an object and leaves a whiteout at its old name, in the way that the upper's file system supports.
pub(super) fn leave_whiteout(upper: &Upper, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
    if upper.whiteout_form() == WhiteoutForm::MarkedFile {
        return by_exchange(upper, from, to);
    }
    let (from_fd, to_fd) = (from.fd(), to.fd());
    match sys::node::rename(from_fd, from.name, to_fd, to.name, RenameMode::Whiteout) {
        Err(Error::Errno(Errno::INVAL | Errno::NOSYS)) => by_exchange(upper, from, to),
        // The kernel makes an inode for the whiteout; a link to the shared one needs none.
        Err(Error::Errno(Errno::NOSPC | Errno::DQUOT)) => by_link(upper, from, to),
        other => other,
    }
}

/// Emulates RENAME_WHITEOUT on a file system without it: the whiteout is put at the new name first, where it
/// changes nothing or replaces the object that is to be replaced, and then the two are exchanged.
fn by_exchange(upper: &Upper, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
    let (from_fd, to_fd) = (from.fd(), to.fd());
    let whiteout = upper.stage_whiteout(from_fd)?;
    let how = match to.state.upper {
        UpperEntry::Nothing => RenameMode::NoReplace,
        UpperEntry::Whiteout | UpperEntry::Object => RenameMode::Exchange,
    };
    whiteout.commit(to_fd, to.name, how)?;
    sys::node::rename(from_fd, from.name, to_fd, to.name, RenameMode::Exchange)
}

/// Emulates RENAME_WHITEOUT on a full disk. In steps: a power cut between them leaves the replaced or the moved
/// object under the old name as well.
fn by_link(upper: &Upper, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
    let (from_fd, to_fd) = (from.fd(), to.fd());
    let exchange = || {
        let how = RenameMode::Exchange;
        sys::node::rename(from_fd, from.name, to_fd, to.name, how)
    };
    let or_roll_back = |done: Result<()>, back: &dyn Fn() -> Result<()>| {
        if done.is_err()
            && let Err(error) = back()
        {
            log::error!(
                "{} cannot be renamed back to {}: {error}",
                to.name,
                from.name
            );
        }
        done
    };
    match to.state.upper {
        UpperEntry::Whiteout => by_exchange(upper, from, to),
        UpperEntry::Nothing if !to.state.below => by_exchange(upper, from, to),
        UpperEntry::Nothing => {
            let how = RenameMode::NoReplace;
            sys::node::rename(from_fd, from.name, to_fd, to.name, how)?;
            let back = || sys::node::rename(to_fd, to.name, from_fd, from.name, how);
            or_roll_back(upper.whiteout_new(from_fd, from.name), &back)
        }
        UpperEntry::Object => {
            let whiteout = upper.stage_whiteout(from_fd)?;
            exchange()?;
            // The replaced object is removed with the staged name.
            let done = whiteout.commit(from_fd, from.name, RenameMode::Exchange);
            or_roll_back(done, &exchange)
        }
    }
}

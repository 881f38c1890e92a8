//! Renames that leave a whiteout at the old name, natively or emulated.

use super::side::Side;
use crate::plan::UpperEntry;
use crate::reach::Context;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::WhiteoutForm;
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;

/// Moves an object and leaves a whiteout at its old name, in the way that the upper layer's file system supports.
pub(super) fn leave_whiteout(cx: &Context<'_>, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
    let upper = cx.stack.upper()?;
    if upper.whiteout_form() == WhiteoutForm::MarkedFile {
        return leave_by_exchange(cx, from, to);
    }
    let (from_fd, to_fd) = (from.fd(), to.fd());
    match sys::node::rename(from_fd, from.name, to_fd, to.name, RenameMode::Whiteout) {
        Err(Error::Errno(Errno::INVAL | Errno::NOSYS)) => leave_by_exchange(cx, from, to),
        // RENAME_WHITEOUT allocates an inode; a hard link to the shared whiteout does not.
        Err(Error::Errno(Errno::NOSPC | Errno::DQUOT)) => leave_by_link(cx, from, to),
        other => other,
    }
}

/// Emulates RENAME_WHITEOUT on a file system without it.
///
/// Puts the whiteout at the new name first, where it hides nothing or replaces the object that the rename replaces,
/// and then exchanges the two names.
fn leave_by_exchange(cx: &Context<'_>, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
    let upper = cx.stack.upper()?;
    let (from_fd, to_fd) = (from.fd(), to.fd());
    let whiteout = upper.stage_whiteout(from_fd)?;
    match to.state.upper {
        UpperEntry::Nothing => whiteout.commit(to_fd, to.name)?,
        UpperEntry::Whiteout | UpperEntry::Object => {
            whiteout.replace((to_fd, to.name), RenameMode::Exchange, cx.order()?)?;
        }
    }
    sys::node::rename(from_fd, from.name, to_fd, to.name, RenameMode::Exchange)
}

/// Emulates RENAME_WHITEOUT on a full disk, without allocating an inode.
///
/// This takes several steps. After a power cut between them, the replaced or the moved object also exists under the
/// old name.
fn leave_by_link(cx: &Context<'_>, from: &Side<'_>, to: &Side<'_>) -> Result<()> {
    let upper = cx.stack.upper()?;
    let (from_fd, to_fd) = (from.fd(), to.fd());
    let exchange = || {
        let mode = RenameMode::Exchange;
        sys::node::rename(from_fd, from.name, to_fd, to.name, mode)
    };
    let or_roll_back = |done: Result<()>, back: &dyn Fn() -> Result<()>| {
        if done.is_err()
            && let Err(error) = back()
        {
            log::error!(
                "cannot rename {} back to {}: {error}",
                to.name.shown(),
                from.name.shown()
            );
        }
        done
    };
    match to.state.upper {
        UpperEntry::Whiteout => leave_by_exchange(cx, from, to),
        UpperEntry::Nothing if !to.state.below => leave_by_exchange(cx, from, to),
        UpperEntry::Nothing => {
            let mode = RenameMode::NoReplace;
            sys::node::rename(from_fd, from.name, to_fd, to.name, mode)?;
            let back = || sys::node::rename(to_fd, to.name, from_fd, from.name, mode);
            or_roll_back(upper.whiteout_new(from_fd, from.name), &back)
        }
        UpperEntry::Object => {
            let whiteout = upper.stage_whiteout(from_fd)?;
            exchange()?;
            // The replaced object is removed with the staged name.
            let mode = RenameMode::Exchange;
            let done = whiteout.replace((from_fd, from.name), mode, cx.order()?);
            or_roll_back(done, &exchange)
        }
    }
}

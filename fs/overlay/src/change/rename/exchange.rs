//! Renames that exchange two objects.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::side::{Side, own_location, record_move};
use crate::copy_up::set_opaque;
use crate::inode::{Inode, PLAIN_DATA};
use crate::reach::Context;
use cowl_layers::error::Result;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;

/// Exchanges two objects of the upper.
pub(super) fn exchange(
    cx: &Context<'_>,
    (from, to): (&Side<'_>, &Side<'_>),
    inode: &Arc<Inode>,
    target: &Arc<Inode>,
) -> Result<()> {
    for (moved, there) in [(inode, to), (target, from)] {
        // A directory that is in the upper alone must not merge with one below its new name.
        if moved.is_dir() && moved.dir()?.locs.len() == 1 && there.dir.locs.len() > 1 {
            set_opaque(cx, (*moved.dir()?.top()?.fd()?).as_fd())?;
        }
    }
    let own = own_location(&cx.stack, inode)?;
    let targets = own_location(&cx.stack, target)?;
    inode.update_states(Some(target), |state, others| {
        let one = own.as_ref().map(|dir| dir.moving());
        let two = targets.as_ref().map(|dir| dir.moving());
        sys::node::rename(from.fd(), from.name, to.fd(), to.name, RenameMode::Exchange)?;
        record_move(state, one, from, to);
        if let Some(state) = others {
            record_move(state, two, to, from);
        }
        Ok(())
    })?;
    for moved in [inode, target] {
        moved.facts().forget(PLAIN_DATA);
    }
    for changed in [inode, target, from.parent, to.parent] {
        changed.note_change();
    }
    Ok(())
}

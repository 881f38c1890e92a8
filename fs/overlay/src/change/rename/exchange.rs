//! Renames that exchange two objects (RENAME_EXCHANGE).

use std::os::fd::AsFd;
use std::sync::Arc;

use super::side::{Side, intent, own_location, record_move};
use crate::copy_up::set_opaque;
use crate::inode::{Inode, PLAIN_DATA};
use crate::ledger::Change;
use crate::reach::Context;
use cowl_layers::error::Result;
use cowl_layers::sys;
use cowl_layers::sys::node::RenameMode;

/// Exchanges two objects of the upper layer.
pub(super) fn exchange(
    cx: &Context<'_>,
    (from, to): (&Side<'_>, &Side<'_>),
    inode: &Arc<Inode>,
    target: &Arc<Inode>,
) -> Result<()> {
    for (moved, new_side) in [(inode, to), (target, from)] {
        // A directory that exists only in the upper layer must not merge with a lower one at its new path.
        if moved.is_dir() && moved.dir()?.locs.len() == 1 && new_side.dir.locs.len() > 1 {
            set_opaque(cx, (*moved.dir()?.top()?.fd()?).as_fd())?;
        }
    }
    let inode_dir = own_location(&cx.stack, inode)?;
    let target_dir = own_location(&cx.stack, target)?;
    inode.update_states(Some(target), |state, others| {
        let inode_move = inode_dir.as_ref().map(|dir| dir.moving());
        let target_move = target_dir.as_ref().map(|dir| dir.moving());
        let intent = intent(Change::Exchange, inode, from, to);
        cx.commit(&intent, || {
            sys::node::rename(from.fd(), from.name, to.fd(), to.name, RenameMode::Exchange)
        })?;
        record_move(state, inode_move, from, to);
        if let Some(state) = others {
            record_move(state, target_move, to, from);
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

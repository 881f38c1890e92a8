//! Mounts whose daemon died, or that a killed command was about to replace.

use crate::container::state::{self, Mounted, RunState};
use crate::container::{Container, dead, query};
use crate::error::Result;
use crate::store::kernel::Driver;
use cowl_layers::shown::Show as _;

/// Removes the mount that a dead daemon or a killed command left, and its state. Returns the state.
pub(super) fn remove_dead(container: &Container<'_>) -> Result<Option<RunState>> {
    let dead = unmount_dead(container)?;
    if dead.is_some() {
        state::remove(container.store(), container.id())?;
    }
    Ok(dead)
}

/// Removes the mount that a dead daemon or a killed command left. Returns its state; `None` if there is no such mount.
fn unmount_dead(container: &Container<'_>) -> Result<Option<RunState>> {
    let (store, id) = (container.store(), container.id());
    let state = match container.mounted()? {
        Mounted::No => return Ok(None),
        Mounted::Alive(state) if !state.replacing => return Ok(None),
        // A command was killed before it mounted the container again. If the mount is still here, or its daemon still
        // writes to a layer, the command had not even unmounted it: an unmounted daemon writes to no layer.
        Mounted::Alive(state) if state.is_here()? || query::written_layer(store, id)?.is_some() => {
            let replacing = false;
            state::write(store, id, &RunState { replacing, ..state })?;
            return Ok(None);
        }
        Mounted::Alive(state) => state,
        // The command had unmounted it. Another file system may have its device number by now.
        Mounted::Dead(state) if state.driver() == Driver::Kernel => return Ok(Some(state)),
        Mounted::Dead(state) => {
            dead::unmount(store, id, &state)?;
            return Ok(Some(state));
        }
    };
    dead::detach(&state)?;
    Ok(Some(state))
}

/// Mounts a container again that a dead daemon or a killed command left unmounted, unless its layers are frozen.
pub(super) fn remount(container: &Container<'_>) -> Result<()> {
    if container.manifest().written_head().is_none() {
        return remove_dead(container).map(drop);
    }
    let Some(state) = unmount_dead(container)? else {
        return Ok(());
    };
    let (store, id, name) = (container.store(), container.id(), container.name());
    let reason = state::end_reason(store, id, &state)?;
    let died = match state.replacing {
        true => format!("a command was killed before it mounted {name} again"),
        false => dead::describe_end(name, state.pid, reason.as_deref()),
    };
    if state.in_lxc {
        state::remove(store, id)?;
        log::warn!("{died}; restart its LXC container, whose files are inaccessible");
        return Ok(());
    }
    if state.transient {
        state::remove(store, id)?;
        log::warn!("{died}; its mount was removed");
        return Ok(());
    }
    let mount_point = state.mountpoint.shown();
    match container.remount(&state) {
        Ok(()) => {
            log::warn!("{died}: mounted again at {mount_point}");
            for stranded in dead::list_stranded(store, id)? {
                let what = dead::describe_stranded(container, &stranded);
                log::warn!("{what}: restart these processes");
            }
        }
        // The command itself may not need the mount.
        Err(error) => log::warn!(
            "{died}; cannot mount it again at {mount_point}: {error}; {}",
            dead::commands(name)
        ),
    }
    Ok(())
}

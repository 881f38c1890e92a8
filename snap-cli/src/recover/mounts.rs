//! The mount of a daemon that died, or that a command was about to replace when it was killed.

use crate::container::state::{self, Mounted, RunState};
use crate::container::{Container, dead, query};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// Unmounts what a dead daemon, or a killed command, left, and removes its state. Returns the state.
pub(super) fn remove_dead(container: &Container<'_>) -> Result<Option<RunState>> {
    let dead = unmount_dead(container)?;
    if dead.is_some() {
        state::remove(container.store(), container.id())?;
    }
    Ok(dead)
}

fn unmount_dead(container: &Container<'_>) -> Result<Option<RunState>> {
    let (store, id) = (container.store(), container.id());
    let state = match container.mounted()? {
        Mounted::No => return Ok(None),
        Mounted::Alive(state) if !state.replacing => return Ok(None),
        // A command was killed just before it unmounted, or between that and the new mount. A daemon that was
        // unmounted writes to no layer.
        Mounted::Alive(state) if state.is_here()? || query::written_layer(store, id)?.is_some() => {
            let replacing = false;
            state::write(store, id, &RunState { replacing, ..state })?;
            return Ok(None);
        }
        Mounted::Alive(state) => state,
        Mounted::Dead(state) => {
            dead::note(store, id, &state)?;
            state
        }
    };
    if state.is_here()? {
        cowl_layers::sys::mount::unmount_lazily(&state.mountpoint)
            .map_err(|e| Error::at("unmount the dead mount at", &state.mountpoint, e))?;
    }
    Ok(Some(state))
}

/// Mounts again what a dead daemon, or a killed command, left unmounted.
pub(super) fn remount(container: &Container<'_>) -> Result<()> {
    let Some(state) = unmount_dead(container)? else {
        return Ok(());
    };
    let (store, id, name) = (container.store(), container.id(), container.name());
    let died = match state.replacing {
        true => format!("a command that was to mount {name} anew had been killed"),
        false => format!("the daemon of {name} (pid {}) had died", state.pid),
    };
    if state.transient {
        state::remove(store, id)?;
        log::warn!("{died}; its mount is gone");
        return Ok(());
    }
    let place = state.mountpoint.shown();
    match container.mount_again(&state) {
        Ok(()) => {
            log::warn!("{died}: mounted anew at {place}");
            for stranded in dead::stranded(store, id)? {
                let what = dead::describe_stranded(container, stranded.daemon, &stranded.users);
                log::warn!("{what}: start it anew");
            }
        }
        // The command may well succeed without the mount.
        Err(error) => log::warn!("{died}, and mounting anew at {place} failed: {error}"),
    }
    Ok(())
}

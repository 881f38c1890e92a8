//! The end of the mounts of a snapshot that is committed or removed.
//!
//! containerd commits and removes while its bind mounts still exist, and leaves them behind if it is killed. They are
//! unmounted with the container. If the operation fails, they are restored.

use cowl_layers::shown::Show as _;
use cowl_layers::sys::mount;
use rustix::io::Errno;

use crate::container::detach::{self, Ending};
use crate::container::mount::{AfterUnmount, MountRequest};
use crate::container::state::{Lifetime, Mounted, RunState};
use crate::container::{Container, browse, daemon};
use crate::error::{Error, Kind, Result};
use crate::host::mountinfo::{self, Mount};
use crate::shell::quoted;
use crate::store::kernel::Driver;

/// The mounts of a container that were ended.
#[derive(Debug, Default)]
pub(super) struct EndedMounts {
    /// The bind mounts of the whole container, in the order in which they were unmounted.
    binds: Vec<Mount>,
    /// The container's own mount.
    own: Option<RunState>,
}

impl EndedMounts {
    /// Unmounts a container, its bind mounts, and the snapshots of it that commands have mounted.
    ///
    /// Fails with `Busy` if one is in use. Then the container and its bind mounts exist as before. Snapshots are unmounted
    /// first, and are not mounted again.
    pub(super) fn end(container: &Container<'_>) -> Result<Self> {
        let mut ended = Self::default();
        let done = ended.end_all(container).map_err(|error| match error.kind {
            // The hint of the error concerns commands.
            Kind::Busy => error.hint("end its task, and unmount it where it is mounted"),
            _ => error,
        });
        ended.or_restore(container, done)
    }

    /// Returns the result of an operation on the container. If it failed, restores the mounts.
    pub(super) fn or_restore(self, container: &Container<'_>, done: Result<()>) -> Result<Self> {
        match done {
            Ok(()) => Ok(self),
            Err(error) => {
                self.restore(container);
                Err(error)
            }
        }
    }

    fn end_all(&mut self, container: &Container<'_>) -> Result<()> {
        let mounted = container.mounted()?;
        if let Mounted::Alive(state) = &mounted {
            state.refuse_covered(container.name())?;
        }
        browse::close(container, Ending::Orderly, |_| true)?;
        if let Mounted::Alive(state) = &mounted {
            self.end_binds(container, state)?;
        }
        self.own = container.unmount(AfterUnmount::StayUnmounted)?;
        Ok(())
    }

    /// Unmounts the bind mounts of the whole container in this mount namespace, unless anything is in use.
    fn end_binds(&mut self, container: &Container<'_>, state: &RunState) -> Result<()> {
        let Some(device) = state.device()? else {
            return Ok(());
        };
        let mounts = mountinfo::read()?;
        let binds: Vec<_> = mounts
            .iter()
            .filter(|mount| mount.device == device && mount.at != state.mountpoint)
            .collect();
        // The unmount of the container itself reports everything else that is in use.
        if binds.is_empty() || !detach::users(state.pid, Some(device))?.is_empty() {
            return Ok(());
        }
        refuse_others(container, &mounts, &binds)?;
        if state.driver() == Driver::Fuse {
            // Fails if the daemon does not answer.
            daemon::connect(container.store(), container.id())?;
        }
        // The last one first: a later mount may be over an earlier one.
        for bind in binds.iter().rev() {
            log::info!("unmounting {}, which nothing uses", bind.at.shown());
            match mount::unmount_exactly(bind).map_err(cowl_layers::Error::errno) {
                Ok(()) => self.binds.push((*bind).clone()),
                // containerd has unmounted it in the meantime, and may have mounted another snapshot there.
                Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(Errno::BUSY) => return Err(in_use(container, bind)),
                Err(error) => {
                    return Err(Error::at("unmount", &bind.at, std::io::Error::from(error)));
                }
            }
        }
        Ok(())
    }

    /// Mounts again what was unmounted. Failures are logged: the next request for the mounts mounts the container.
    fn restore(&self, container: &Container<'_>) {
        if self.binds.is_empty() && self.own.is_none() {
            return;
        }
        let mounted = || match (container.mounted()?, &self.own) {
            (Mounted::No, Some(own)) => container.remount(own).map(|()| own.mountpoint.clone()),
            _ => container.mount_unrecorded(MountRequest::of(Lifetime::UntilUnmounted)),
        };
        let from = match mounted() {
            Ok(from) => from,
            Err(error) => {
                log::error!("cannot mount {} again: {error}", container.name());
                return;
            }
        };
        for bind in self.binds.iter().rev() {
            match mount::bind_again(&from, bind) {
                Ok(()) => log::info!("mounted {} again", bind.at.shown()),
                Err(error) => {
                    let error = std::io::Error::from(error.errno());
                    log::error!("cannot mount {} again: {error}", bind.at.shown());
                }
            }
        }
    }
}

/// Fails if a mount prevents the unmount: one of a part of the container, or of another file system in it.
fn refuse_others(container: &Container<'_>, mounts: &[Mount], binds: &[&Mount]) -> Result<()> {
    if let Some(part) = binds.iter().find(|bind| bind.root.as_os_str() != "/") {
        return Err(in_use(container, part));
    }
    let is_over = |bind: &Mount| {
        let top = mountinfo::topmost(mounts, &bind.at);
        top.is_none_or(|top| binds.iter().all(|bind| bind.id != top.id))
    };
    let is_below = |mount: &Mount| binds.iter().any(|bind| mount.parent == bind.id);
    let is_bind = |mount: &Mount| binds.iter().any(|bind| mount.id == bind.id);
    let obstacle = mounts
        .iter()
        .find(|mount| !is_bind(mount) && is_below(mount));
    let covered = binds.iter().find(|bind| is_over(bind)).copied();
    match obstacle.or(covered) {
        Some(obstacle) => Err(in_use(container, obstacle)),
        None => Ok(()),
    }
}

fn in_use(container: &Container<'_>, mount: &Mount) -> Error {
    Error::busy(format!(
        "{} is in use: mounted at {}",
        container.name(),
        mount.at.shown()
    ))
    .hint(format!("unmount it there: umount {}", quoted(&mount.at)))
}

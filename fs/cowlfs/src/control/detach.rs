//! Unmounting, without a delay for large caches, but only if no process uses the mount in any mount namespace.
//!
//! Copies of the mount in other mount namespaces that no process uses do not prevent it: they are detached. If that is
//! impossible, because a copy is locked or its namespace contains no visible process, the connection is aborted; by
//! then no process can write through the copy any more.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::own_mount::{self, FoundMount, OwnMount, Role};
use super::{Bind, Response};
use crate::config::Mounter;
use cowl_layers::error::Errno;
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::namespace::{AbortSwitch, HASTY, Inside, PATIENT};
use cowl_layers::sys::users::Device;
use cowl_overlay::Overlay;

/// The time for which a closed file may count as open: RELEASE is asynchronous.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(200);
/// The time that the file system may take to end after its last mount was detached.
pub(super) const END_TIMEOUT: Duration = Duration::from_secs(1);
/// The number of searches for copies. Race: a mount may be copied while another copy is detached.
const ROUNDS: usize = 3;

/// A file system whose mount was unmounted.
#[derive(Debug)]
pub(super) struct Detached {
    /// A detached mount that keeps the file system, and with it this process, alive until the response was sent.
    alive: Option<OwnedFd>,
    /// Copies remain that cannot be detached.
    has_copies: bool,
}

impl Detached {
    /// Ends the file system: drops the last mount, or aborts the connection.
    pub(super) fn end(self, connection: &FuseConnection) {
        let connection = connection.clone();
        drop(self.alive);
        let timeout = if self.has_copies {
            Duration::ZERO
        } else {
            END_TIMEOUT
        };
        let aborted = connection.clone();
        let thread = thread::Builder::new().spawn(move || {
            if !connection.wait_for_end(timeout) {
                log::info!("cannot detach all copies of the mount: aborting the connection");
                connection.abort();
            }
        });
        if let Err(error) = thread {
            log::warn!("cannot start a thread: {error}: aborting the connection");
            aborted.abort();
        }
    }
}

/// The connection of the file system: its end, and a means to abort it.
#[derive(Clone, Debug, Default)]
pub(crate) struct FuseConnection {
    has_ended: Arc<AtomicBool>,
    switch: Option<Arc<AbortSwitch>>,
}

impl FuseConnection {
    /// Opens the abort switch of a file system, which must be mounted. Without the privilege for it, [`Self::abort`]
    /// exits.
    pub(crate) fn open(device: Device) -> Self {
        let switch = AbortSwitch::open(device);
        let switch = switch.inspect_err(|error| log::debug!("cannot open fusectl: {error}"));
        Self {
            has_ended: Arc::default(),
            switch: switch.ok().map(Arc::new),
        }
    }

    /// Records that the last request was answered.
    pub(crate) fn record_end(&self) {
        self.has_ended.store(true, Ordering::Release);
    }

    /// Waits for the end. Returns false on a timeout.
    pub(super) fn wait_for_end(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        while !self.has_ended.load(Ordering::Acquire) {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Aborts the connection, even if the mount is in use.
    pub(super) fn abort(&self) {
        if self.wait_for_end(Duration::ZERO) {
            return;
        }
        match self.switch.as_ref().map(|switch| switch.abort()) {
            Some(Ok(())) => return,
            Some(Err(error)) => log::warn!("cannot abort the connection: {error}"),
            None => {}
        }
        // The kernel aborts the connection when the last descriptor of /dev/fuse is closed.
        log::info!("exiting, which aborts the connection");
        std::process::exit(0);
    }
}

/// Unmounts the file system, or returns the response that refuses it.
pub(super) fn detach(overlay: &Overlay, mount: &OwnMount) -> Result<Detached, Response> {
    detach_own(mount, || detach_copies(overlay, mount))
}

/// Unmounts the mount itself and then, with `copies`, its copies. If that is refused, the mount is attached again.
fn detach_own(
    mount: &OwnMount,
    copies: impl FnOnce() -> Result<bool, Response>,
) -> Result<Detached, Response> {
    let failed = |step: &'static str| {
        move |error: cowl_layers::Error| Response::Failed {
            message: format!("cannot {step} {}: {error}", mount.path.shown()),
        }
    };
    // ESTALE: another file system is mounted over it.
    let covered = |error: cowl_layers::Error| match error.errno() {
        Errno::STALE => Response::Failed {
            message: format!(
                "another file system is mounted over {}: unmount that first",
                mount.path.shown()
            ),
        },
        _ => failed("unmount")(error),
    };
    if mount.mounter == Mounter::Other {
        return Err(Response::Failed {
            message: format!(
                "{} is mounted in another namespace, and cannot be unmounted before this namespace ends",
                mount.path.shown()
            ),
        });
    }
    let found = mount.find_all().map_err(failed("find"))?;
    refuse_users(mount, &found)?;
    let own = found.iter().find(|one| one.role == Role::Own);
    // A clone keeps the file system alive, so that the unmount does not wait until the kernel has dropped every cached
    // inode, and so that a refusal below can roll the unmount back.
    let alive = match own {
        Some(own) => {
            let alive = own
                .run_inside(PATIENT, Inside::clone_mount)
                .map_err(covered)?;
            match own.run_inside(PATIENT, Inside::unmount) {
                Ok(()) => {}
                Err(error) if error.errno() == Errno::BUSY => {
                    return Err(Response::InUse {
                        pids: Vec::new(),
                        binds: Vec::new(),
                    });
                }
                Err(error) => return Err(covered(error)),
            }
            Some(alive)
        }
        None => found
            .first()
            .and_then(|one| one.run_inside(HASTY, Inside::clone_mount).ok()),
    };
    // Copies to which the unmount propagates are unmounted already.
    match copies() {
        Ok(has_copies) => Ok(Detached { alive, has_copies }),
        Err(response) => {
            if let (Some(own), Some(alive)) = (own, alive) {
                own.run_inside(PATIENT, move |_, mount| {
                    sys::mount::attach(&alive, &mount.at)
                })
                .map_err(failed("restore the mount at"))?;
            }
            Err(response)
        }
    }
}

/// Unmounts a file system without a daemon, or returns the response that refuses it.
///
/// Such a file system cannot be aborted, so a copy that cannot be detached prevents the unmount.
pub(super) fn detach_without_daemon(mount: &OwnMount) -> Result<(), Response> {
    detach_own(mount, || match detach_unused(mount)? {
        0 => Ok(false),
        _ => {
            let found = find_copies(mount)?;
            let pids = found.iter().map(|one| one.namespace.pid).collect();
            Err(Response::InUse {
                pids,
                binds: Vec::new(),
            })
        }
    })
    .map(drop)
}

/// Detaches the remaining copies after the mount itself was unmounted, or returns the response that refuses it.
pub(super) fn end_copies(overlay: &Overlay, mount: &OwnMount) -> Result<Detached, Response> {
    let alive = None;
    detach_copies(overlay, mount).map(|has_copies| Detached { alive, has_copies })
}

fn find_copies(mount: &OwnMount) -> Result<Vec<FoundMount>, Response> {
    mount.find_all().map_err(|error| Response::Failed {
        message: format!("cannot find the copies of {}: {error}", mount.path.shown()),
    })
}

/// Detaches the copies of the mount, which no process may use. Returns how many remain.
fn detach_unused(mount: &OwnMount) -> Result<usize, Response> {
    let mut remaining = 0;
    for _ in 0..ROUNDS {
        let found = find_copies(mount)?;
        if found.is_empty() {
            remaining = 0;
            break;
        }
        // Checked here, and again below, because processes can start to use a copy until it is detached.
        refuse_users(mount, &found)?;
        remaining = own_mount::detach_all(&found);
        if remaining > 0 {
            break;
        }
    }
    refuse_users(mount, &[])?;
    Ok(remaining)
}

/// Detaches the copies of the mount and releases the upper layer. Returns whether copies remain.
fn detach_copies(overlay: &Overlay, mount: &OwnMount) -> Result<bool, Response> {
    let remaining = detach_unused(mount)?;
    let until = Instant::now() + RELEASE_TIMEOUT;
    // Without open requests, only processes that use the mount are known.
    while let Some((readers, writers)) = overlay.open_files().filter(|open| *open != (0, 0)) {
        if Instant::now() >= until {
            // The descriptor is not held by a process, but by a loop device, for example, or by a message in a socket.
            return Err(Response::Busy { writers, readers });
        }
        thread::sleep(Duration::from_millis(5));
    }
    overlay.retire().map_err(|writers| Response::Busy {
        writers,
        readers: 0,
    })?;
    Ok(remaining > 0)
}

/// Returns the response that refuses an unmount, if a process uses the file system, or it is deliberately mounted
/// elsewhere.
pub(super) fn refuse_users(mount: &OwnMount, found: &[FoundMount]) -> Result<(), Response> {
    let users = sys::users::list(mount.device, &[std::process::id()]);
    let users = users.map_err(|error| Response::Failed {
        message: format!("cannot list processes: {error}"),
    })?;
    let is_deliberate = |one: &&FoundMount| matches!(one.role, Role::Bind | Role::Overlay);
    let binds: Vec<_> = found
        .iter()
        .filter(is_deliberate)
        .map(|one| Bind {
            pid: one.namespace.pid,
            at: one.mount.at.as_os_str().as_bytes().to_vec(),
            overlay: one.role == Role::Overlay,
        })
        .collect();
    if users.is_empty() && binds.is_empty() {
        return Ok(());
    }
    // The client lists the processes itself.
    let pids = Vec::new();
    Err(Response::InUse { pids, binds })
}

//! Ending a mount at once, whatever the size of its caches, but only while nothing uses it anywhere.
//!
//! Copies of the mount in other mount namespaces that no process uses are in nobody's way: they are taken out of
//! their trees. Where that is impossible, because they are locked or no process shows the way to them, the
//! connection is broken off; by then nothing can be written through it any more.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::place::{self, Found, Place, Role};
use super::{Answer, Bind};
use cowl_layers::error::Errno;
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::namespace::{AbortSwitch, HASTY, Inside, PATIENT};
use cowl_layers::sys::users::Device;
use cowl_overlay::Overlay;

/// How long a file that was closed may count as open: the kernel reports it a moment later.
const CLOSING: Duration = Duration::from_millis(200);
/// How long a mount that is in no tree any more may take to end by itself.
pub(super) const ENDING: Duration = Duration::from_secs(1);
/// How often copies are searched anew: one may be copied while another is detached.
const ROUNDS: usize = 3;

/// A mount that is in no tree any more.
#[derive(Debug)]
pub(super) struct Detached {
    /// A mount that keeps the file system alive, and with it this process. To be dropped after the answer.
    alive: Option<OwnedFd>,
    /// Copies stay that can't be detached.
    locked: bool,
}

impl Detached {
    /// Lets the file system end, or ends it.
    pub(super) fn end(self, session: &Session) {
        let session = session.clone();
        drop(self.alive);
        let patience = if self.locked { Duration::ZERO } else { ENDING };
        thread::spawn(move || {
            if !session.ends_within(patience) {
                log::info!("copies of the mount are out of reach: the connection is broken off");
                session.abort();
            }
        });
    }
}

/// The session of a mount: whether the kernel still sends requests, and how to end that.
#[derive(Clone, Debug, Default)]
pub(crate) struct Session {
    ended: Arc<AtomicBool>,
    switch: Option<Arc<AbortSwitch>>,
}

impl Session {
    /// The session of a file system that is mounted.
    pub(crate) fn of(device: Device) -> Self {
        let switch = AbortSwitch::open(device);
        let switch = switch.inspect_err(|error| log::debug!("no fusectl: {error}"));
        Self {
            ended: Arc::default(),
            switch: switch.ok().map(Arc::new),
        }
    }

    /// Notes that the last request was answered.
    pub(crate) fn has_ended(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Waits for the end; whether it came in time.
    pub(super) fn ends_within(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while !self.ended.load(Ordering::Acquire) {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Ends it, whatever uses the mount.
    pub(super) fn abort(&self) {
        if self.ends_within(Duration::ZERO) {
            return;
        }
        match self.switch.as_ref().map(|switch| switch.abort()) {
            Some(Ok(())) => return,
            Some(Err(error)) => log::warn!("cannot break off the connection: {error}"),
            None => {}
        }
        // With the last descriptor of /dev/fuse the connection ends, too.
        log::info!("the process ends, and with it the connection");
        std::process::exit(0);
    }
}

/// Unmounts.
pub(super) fn detach(overlay: &Overlay, place: &Place) -> Result<Detached, Answer> {
    let failed = |what: &'static str| {
        move |error: cowl_layers::Error| Answer::Failed {
            why: format!("cannot {what} {}: {error}", place.path.shown()),
        }
    };
    // Something else may be mounted over it.
    let covered = |error: cowl_layers::Error| match error.errno() {
        Errno::STALE => Answer::Failed {
            why: format!(
                "another file system is mounted over {}: unmount that first",
                place.path.shown()
            ),
        },
        _ => failed("unmount")(error),
    };
    let found = place.find().map_err(failed("find"))?;
    refuse_users(place, &found)?;
    let own = found.iter().find(|one| one.role == Role::Own);
    // Keeps the file system alive, so that the unmount need not wait until the kernel has dropped every cached
    // inode, and so that it can be put back.
    let alive = match own {
        Some(own) => {
            let alive = own.act(PATIENT, Inside::clone_mount).map_err(covered)?;
            match own.act(PATIENT, Inside::unmount) {
                Ok(()) => {}
                Err(error) if error.errno() == Errno::BUSY => {
                    return Err(Answer::InUse {
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
            .and_then(|one| one.act(HASTY, Inside::clone_mount).ok()),
    };
    // Copies that follow this one were unmounted with it.
    match detach_copies(overlay, place) {
        Ok(locked) => Ok(Detached { alive, locked }),
        Err(answer) => {
            if let (Some(own), Some(alive)) = (own, alive) {
                own.act(PATIENT, move |_, mount| {
                    sys::mount::attach(&alive, &mount.at)
                })
                .map_err(failed("put back the mount at"))?;
            }
            Err(answer)
        }
    }
}

/// Ends what is left of a mount that was unmounted.
pub(super) fn end_copies(overlay: &Overlay, place: &Place) -> Result<Detached, Answer> {
    let alive = None;
    detach_copies(overlay, place).map(|locked| Detached { alive, locked })
}

/// Detaches what is left elsewhere and lets go of the layer that is written. Whether copies stay.
fn detach_copies(overlay: &Overlay, place: &Place) -> Result<bool, Answer> {
    let failed = |error: cowl_layers::Error| Answer::Failed {
        why: format!("cannot find the copies of {}: {error}", place.path.shown()),
    };
    let mut locked = 0;
    for _ in 0..ROUNDS {
        let found = place.find().map_err(failed)?;
        if found.is_empty() {
            locked = 0;
            break;
        }
        // Before they are detached, and again when they can't be reached any more.
        refuse_users(place, &found)?;
        locked = place::detach_all(&found);
        if locked > 0 {
            break;
        }
    }
    refuse_users(place, &[])?;
    let until = Instant::now() + CLOSING;
    loop {
        let (readers, writers) = overlay.open_files();
        if (readers, writers) == (0, 0) {
            break;
        }
        if Instant::now() >= until {
            // Held by no process: by a loop device, say, or in a message that nobody has received.
            return Err(Answer::Busy { writers, readers });
        }
        thread::sleep(Duration::from_millis(5));
    }
    overlay.retire().map_err(|writers| Answer::Busy {
        writers,
        readers: 0,
    })?;
    Ok(locked > 0)
}

/// Refuses while a process uses the file system, or it is mounted somewhere on purpose.
pub(super) fn refuse_users(place: &Place, found: &[Found]) -> Result<(), Answer> {
    let users = sys::users::list(place.device, &[std::process::id()]);
    let users = users.map_err(|error| Answer::Failed {
        why: format!("cannot list processes: {error}"),
    })?;
    let on_purpose = |one: &&Found| matches!(one.role, Role::Bind | Role::Overlay);
    let binds: Vec<_> = found
        .iter()
        .filter(on_purpose)
        .map(|one| Bind {
            pid: one.namespace.pid,
            at: one.mount.at.as_os_str().as_bytes().to_vec(),
            overlay: one.role == Role::Overlay,
        })
        .collect();
    if users.is_empty() && binds.is_empty() {
        return Ok(());
    }
    // Who asks finds and names the processes itself.
    let pids = Vec::new();
    Err(Answer::InUse { pids, binds })
}

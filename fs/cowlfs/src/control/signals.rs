//! Signal handling: logging statistics, and ending the mount.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::server::Flush;
use super::{FuseConnection, OwnMount, StatsSource, detach, own_mount};
use crate::config::Mounter;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::namespace::{HASTY, Inside};
use cowl_layers::sys::process::CHECK;
use cowl_overlay::Overlay;

/// The time for which programs may continue to use the mount after a signal that ends it.
const GRACE: Duration = Duration::from_secs(5);

/// The signals that a daemon handles. They are blocked in all of its threads.
#[derive(Debug)]
pub(crate) struct Signals(Option<SigSet>);

/// The parts of a daemon that are needed to end its mount.
pub(crate) struct SignalTarget {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) mount: OwnMount,
    pub(crate) stats: StatsSource,
    pub(crate) flush: Arc<Flush>,
    pub(crate) connection: FuseConnection,
}

impl Signals {
    /// Blocks the signals. Must be called before a second thread is started.
    pub(crate) fn block() -> Self {
        let mut set = SigSet::empty();
        let ends = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
        for signal in ends.into_iter().chain([Signal::SIGUSR1, CHECK]) {
            set.add(signal);
        }
        match set.thread_block() {
            Ok(()) => Self(Some(set)),
            Err(error) => {
                log::warn!("cannot block signals: {error}");
                Self(None)
            }
        }
    }

    /// Starts a thread that handles the signals.
    ///
    /// SIGUSR1 logs the statistics. SIGUSR2 ends the mount if it was unmounted and only unused copies remain. Any
    /// other signal ends the mount and the daemon; a second one does so immediately.
    pub(crate) fn handle(self, target: SignalTarget) -> io::Result<()> {
        let Some(set) = self.0 else { return Ok(()) };
        let target = Arc::new(target);
        let handle = move || {
            let ending = AtomicBool::new(false);
            loop {
                match set.wait() {
                    // Logged as a warning, because the user requested it and the default log level drops anything
                    // lower.
                    Ok(Signal::SIGUSR1) => match target.stats.read() {
                        Ok(stats) => log::warn!("{stats}"),
                        Err(error) => log::warn!("cannot read the statistics: {error}"),
                    },
                    Ok(CHECK) => target.check(),
                    Ok(signal) if ending.swap(true, Ordering::Relaxed) => {
                        log::warn!("{signal} again: aborting the connection");
                        target.connection.abort();
                    }
                    Ok(signal) => {
                        log::info!("{signal}: unmounting {}", target.mount.path.shown());
                        let ended = target.clone();
                        let thread = thread::Builder::new().spawn(move || ended.end());
                        if let Err(error) = thread {
                            // Without it, a second signal is handled only after the unmount.
                            log::warn!("cannot start a thread: {error}");
                            target.end();
                        }
                    }
                    Err(error) => {
                        log::warn!("cannot wait for signals: {error}");
                        return;
                    }
                }
            }
        };
        let name = "signals".to_owned();
        thread::Builder::new().name(name).spawn(handle).map(drop)
    }
}

impl SignalTarget {
    /// Ends the session if the mount was unmounted and only unused copies in other mount namespaces remain.
    fn check(&self) {
        if self.mount.mounter == Mounter::Other {
            return;
        }
        let found = match self.mount.find_all() {
            Ok(found) => found,
            Err(error) => return log::warn!("cannot find the mount: {error}"),
        };
        let is_visible = self.mount.is_origin_visible();
        if found.is_empty() || found.iter().any(|one| one.role != own_mount::Role::Copy) {
            return;
        }
        if is_visible != Some(true) {
            // The mount's own namespace is not visible, and the mount may be in use there. Detach copies, but do not
            // abort.
            if is_visible == Some(false) && detach::refuse_users(&self.mount, &found).is_ok() {
                own_mount::detach_all(&found);
            }
            return;
        }
        match detach::end_copies(&self.overlay, &self.mount) {
            Ok(detached) => detached.end(&self.connection),
            Err(refused) => log::info!("copies of the mount are in use: {refused:?}"),
        }
    }

    /// Detaches the mount from every namespace, writes back dirty data, and ends the session after the last use, or
    /// when the grace period is over.
    fn end(&self) {
        let mut alive = None;
        match self.mount.find_all() {
            // Deliberate mounts elsewhere, such as a container's root, end with the connection.
            Ok(mut found) => {
                found
                    .retain(|one| matches!(one.role, own_mount::Role::Own | own_mount::Role::Copy));
                // Keeps the file system alive until the writeback is complete.
                alive = found
                    .first()
                    .and_then(|one| one.run_inside(HASTY, Inside::clone_mount).ok());
                own_mount::detach_all(&found);
            }
            Err(error) => log::warn!("cannot find the mount: {error}"),
        }
        self.write_back();
        drop(alive);
        if self.connection.wait_for_end(detach::END_TIMEOUT) {
            return;
        }
        let unused = || {
            // The processes that use the mount of another process are invisible.
            if self.mount.mounter == Mounter::Other {
                return false;
            }
            let found = self.mount.find_all().unwrap_or_default();
            self.overlay.open_files() == Some((0, 0))
                && detach::refuse_users(&self.mount, &found).is_ok()
        };
        if unused() {
            log::info!("cannot detach all copies of the mount: aborting the connection");
            return self.connection.abort();
        }
        if self.connection.wait_for_end(GRACE) {
            return;
        }
        let open = match self.overlay.open_files() {
            Some((readers, writers)) => {
                format!(" ({readers} files open for reading, {writers} for writing)")
            }
            None => String::new(),
        };
        let path = self.mount.path.shown();
        log::warn!("aborting the connection: {path} is still in use{open}");
        self.write_back();
        self.connection.abort();
    }

    fn write_back(&self) {
        for ino in cowl_overlay::unopened::possibly_mapped(&self.overlay) {
            if let Err(error) = (self.flush)(ino) {
                log::warn!("cannot write back mapped pages: {error}");
            }
        }
        if let Err(error) = self.overlay.sync_upper() {
            log::warn!("cannot sync the upper layer: {error}");
        }
    }
}

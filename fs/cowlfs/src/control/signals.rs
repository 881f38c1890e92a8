//! Signal handling: logging statistics, and ending the mount.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::server::Flush;
use super::{Gauge, Place, Session, detach, place};
use cowl_layers::shown::Show as _;
use cowl_layers::sys::namespace::{HASTY, Inside};
use cowl_layers::sys::process::CHECK;
use cowl_overlay::Overlay;

/// How long programs may continue to use the mount after a signal that ends it.
const GRACE: Duration = Duration::from_secs(5);

/// The signals that a daemon handles. They are blocked in all of its threads.
#[derive(Debug)]
pub(crate) struct Signals(Option<SigSet>);

/// The parts of a daemon that are needed to end its mount.
pub(crate) struct Mounted {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) place: Place,
    pub(crate) gauge: Gauge,
    pub(crate) flush: Arc<Flush>,
    pub(crate) session: Session,
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

    /// Waits for signals in a thread of its own.
    ///
    /// SIGUSR1 logs the statistics. SIGUSR2 ends the mount if it was unmounted and only unused copies remain. Any
    /// other signal ends the mount and the daemon; a second one does so immediately.
    pub(crate) fn watch(self, mounted: Mounted) {
        let Some(set) = self.0 else { return };
        let mounted = Arc::new(mounted);
        thread::spawn(move || {
            let ending = AtomicBool::new(false);
            loop {
                match set.wait() {
                    // Logged as a warning, because the user requested it and the default log level drops anything
                    // lower.
                    Ok(Signal::SIGUSR1) => match mounted.gauge.read() {
                        Ok(stats) => log::warn!("{stats}"),
                        Err(error) => log::warn!("cannot read the statistics: {error}"),
                    },
                    Ok(CHECK) => mounted.check(),
                    Ok(signal) if ending.swap(true, Ordering::Relaxed) => {
                        log::warn!("{signal} again: aborting the connection");
                        mounted.session.abort();
                    }
                    Ok(signal) => {
                        log::info!("{signal}: unmounting {}", mounted.place.path.shown());
                        let mounted = mounted.clone();
                        thread::spawn(move || mounted.end());
                    }
                    Err(error) => {
                        log::warn!("waiting for signals: {error}");
                        return;
                    }
                }
            }
        });
    }
}

impl Mounted {
    /// Ends the session if the mount was unmounted and only unused copies in other mount namespaces remain.
    fn check(&self) {
        let found = match self.place.find() {
            Ok(found) => found,
            Err(error) => return log::warn!("cannot find the mount: {error}"),
        };
        let home = self.place.sees_home();
        if found.is_empty() || found.iter().any(|one| one.role != place::Role::Copy) {
            return;
        }
        if home != Some(true) {
            // The mount's own namespace is not visible, and the mount may be in use there. Detach copies, but do not
            // abort.
            if home == Some(false) && detach::refuse_users(&self.place, &found).is_ok() {
                place::detach_all(&found);
            }
            return;
        }
        match detach::end_copies(&self.overlay, &self.place) {
            Ok(detached) => detached.end(&self.session),
            Err(refused) => log::info!("copies of the mount are in use: {refused:?}"),
        }
    }

    /// Detaches the mount from every namespace, writes back dirty data, and ends the session when the last user is
    /// gone or the grace period is over.
    fn end(&self) {
        let mut alive = None;
        match self.place.find() {
            // Deliberate mounts elsewhere, such as a container's root, end with the connection.
            Ok(mut found) => {
                found.retain(|one| matches!(one.role, place::Role::Own | place::Role::Copy));
                // Keeps the file system alive until the writeback is complete.
                alive = found
                    .first()
                    .and_then(|one| one.act(HASTY, Inside::clone_mount).ok());
                place::detach_all(&found);
            }
            Err(error) => log::warn!("cannot find the mount: {error}"),
        }
        self.write_back();
        drop(alive);
        if self.session.ends_within(detach::ENDING) {
            return;
        }
        let unused = || {
            let found = self.place.find().unwrap_or_default();
            self.overlay.open_files() == (0, 0) && detach::refuse_users(&self.place, &found).is_ok()
        };
        if unused() {
            log::info!("cannot detach all copies of the mount: aborting the connection");
            return self.session.abort();
        }
        if self.session.ends_within(GRACE) {
            return;
        }
        let (readers, writers) = self.overlay.open_files();
        log::warn!(
            "{} is in use still ({readers} files open for reading, {writers} for writing): the connection is broken off",
            self.place.path.shown()
        );
        self.write_back();
        self.session.abort();
    }

    fn write_back(&self) {
        for ino in self.overlay.inodes_with_writers() {
            if let Err(error) = (self.flush)(ino) {
                log::warn!("cannot write back mapped pages: {error}");
            }
        }
        if let Err(error) = self.overlay.sync_upper() {
            log::warn!("cannot sync the upper layer: {error}");
        }
    }
}

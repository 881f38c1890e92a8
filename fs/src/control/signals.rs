//! Signals: a line in the log of what was done so far, and the end of the mount.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::server::Flush;
use super::{Gauge, Place, Session, detach, place};
use crate::overlay::Overlay;
use crate::shown::Show as _;
use crate::sys::namespace::{HASTY, Inside};
use crate::sys::process::CHECK;

/// How long programs that use the mount may go on after the signal that ends it.
const GRACE: Duration = Duration::from_secs(5);

/// The signals that a daemon acts on, blocked in all its threads.
#[derive(Debug)]
pub(crate) struct Signals(Option<SigSet>);

/// What ending a mount takes.
pub(crate) struct Mounted {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) place: Place,
    pub(crate) gauge: Gauge,
    pub(crate) flush: Arc<Flush>,
    pub(crate) session: Session,
}

impl Signals {
    /// Blocks them, before there is a second thread.
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

    /// Waits for them in a thread of its own. SIGUSR1 logs what was done so far. SIGUSR2 ends the mount if only
    /// copies of it are left that nothing uses. Every other one ends the mount, and with it the daemon; a second
    /// one does so at once.
    pub(crate) fn watch(self, mounted: Mounted) {
        let Some(set) = self.0 else { return };
        let mounted = Arc::new(mounted);
        thread::spawn(move || {
            let ending = AtomicBool::new(false);
            loop {
                match set.wait() {
                    // A warning, because it was asked for and the log keeps nothing less.
                    Ok(Signal::SIGUSR1) => match mounted.gauge.read() {
                        Ok(stats) => log::warn!("{stats}"),
                        Err(error) => log::warn!("what was done is not known: {error}"),
                    },
                    Ok(CHECK) => mounted.check(),
                    Ok(signal) if ending.swap(true, Ordering::Relaxed) => {
                        log::warn!("{signal} again: the connection is broken off");
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
    /// Ends the session when the mount was unmounted, and unused copies in other mount namespaces are all that is
    /// left of it. Otherwise nothing changes.
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
            // It may be in use in its own namespace, which is not visible: nothing is forced.
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

    /// Takes the mount out of every tree that it is in, writes back what is not on the disk yet, and ends the
    /// session: when the last user has gone, or after a while.
    fn end(&self) {
        let mut alive = None;
        match self.place.find() {
            // What was mounted elsewhere on purpose, a container's root for one, ends with the connection.
            Ok(mut found) => {
                found.retain(|one| matches!(one.role, place::Role::Own | place::Role::Copy));
                // Until all is written back.
                alive = found
                    .first()
                    .and_then(|one| one.act(HASTY, Inside::clone_of).ok());
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
            log::info!("copies of the mount are out of reach: the connection is broken off");
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
        for ino in self.overlay.written() {
            if let Err(error) = (self.flush)(ino) {
                log::warn!("cannot have the kernel write what it keeps: {error}");
            }
        }
        if let Err(error) = self.overlay.sync_upper() {
            log::warn!("cannot sync the upper layer: {error}");
        }
    }
}

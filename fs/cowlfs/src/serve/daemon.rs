//! A daemon whose mount is attached: its threads, from the first request to the unmount.

use std::num::NonZeroUsize;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::{failed, locating};
use crate::config::{CACHE_TIMEOUT, Config, Passthrough};
use crate::control::{
    self, FuseConnection, OwnMount, ServedMount, SignalTarget, Signals, StatsSource,
};
use crate::fuse::{self, SessionSettings};
use crate::keeper::Custody;
use crate::requests::Requests;
use crate::start::{Begun, Event, Serving};
use crate::takeover::Predecessor;
use cowl_layers::error::Errno;
use cowl_layers::setup::SetupError;
use cowl_layers::sys;
use cowl_overlay::Overlay;

/// The number of descriptors for which the kernel's table is large enough from the start: about as many as layers and
/// open files have together.
const DESCRIPTORS: u64 = 4096;

/// A daemon whose mount is attached.
pub(super) struct Daemon {
    pub(super) serving: Serving,
    pub(super) config: Config,
    pub(super) mount: OwnMount,
    pub(super) requests: Arc<Requests>,
    /// When `requests` were created, and the time for which the mount was served before.
    pub(super) uptime: (Instant, Duration),
    /// A process that waits until the last process of the mount has closed this connection.
    pub(super) supervisor: Option<Arc<UnixStream>>,
    pub(super) listener: Option<UnixListener>,
    pub(super) lacking: Vec<String>,
}

impl Daemon {
    /// Starts all threads, reports the event when requests are answered, and returns when the session has ended.
    pub(super) fn run(self, signals: Signals, on: impl FnOnce(Event)) -> Result<(), SetupError> {
        let Serving {
            overlay,
            attached,
            custody,
            begun,
        } = self.serving;
        let device = self.mount.device;
        cowl_overlay::unopened::set_device(&overlay, device);
        let (ended, kept) = (overlay.clone(), custody.clone());
        let stats = StatsSource::new(overlay.clone(), self.requests, self.uptime, custody.clone());
        let cannot = |error| failed(format!("cannot start a thread: {error}"));
        let flusher = attached.flusher();
        let flush: Arc<control::Flush> = Arc::new(Box::new(move |ino| flusher.flush(ino)));
        // There is no other thread yet.
        attached.expand_descriptor_table(DESCRIPTORS);
        let (session, source) = attached.start().map_err(cannot)?;
        let passthrough = source.passthrough();
        let connection = FuseConnection::open(self.mount.device);
        let target = SignalTarget {
            overlay: overlay.clone(),
            mount: self.mount.clone(),
            stats: stats.clone(),
            flush: flush.clone(),
            connection: connection.clone(),
        };
        signals.handle(target).map_err(cannot)?;
        // The kernel's requests are answered from here on: those of programs must not wait for the rest.
        let session = thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || session.run())
            .map_err(cannot)?;
        let sharing = |error| failed(format!("cannot share the socket: {error}"));
        let listener = self.listener.as_ref().map(|listener| listener.try_clone());
        let predecessor = Predecessor {
            session: source,
            overlay: overlay.clone(),
            config: self.config.clone(),
            mount: self.mount.clone(),
            stats: stats.clone(),
            listener: listener.transpose().map_err(sharing)?,
            lacking: self.lacking.clone(),
            custody: custody.clone(),
            supervisor: self.supervisor,
        };
        let served = ServedMount {
            overlay,
            config: self.config,
            mount: self.mount,
            stats,
            flush,
            passthrough,
            connection: connection.clone(),
            lacking: self.lacking,
            custody: custody.clone(),
            upgrade: Box::new(move |program| predecessor.hand_over(program)),
        };
        control::serve(self.listener, served).map_err(cannot)?;
        on(match begun {
            Begun::Mounted => Event::Mounted(device),
            Begun::TakenOver => Event::TakenOver(device),
            Begun::Continued => Event::Continued(device),
        });
        if let Some(custody) = custody
            && let Err(error) = custody.report_serving()
        {
            log::warn!("cannot notify the keeper: {error}");
        }
        if let Err(error) = locating::start(&ended) {
            log::warn!("objects are only located when they are used: {error}");
        }
        let served = session.join();
        connection.record_end();
        session_result(served).inspect(|()| release(&ended, kept.as_deref()))
    }
}

/// Returns the result of a session. If it is an error, threads may still answer requests.
fn session_result(joined: thread::Result<std::io::Result<()>>) -> Result<(), SetupError> {
    match joined {
        Err(_) => Err(failed("the session ended with a panic".to_owned())),
        Ok(Err(error)) if error.raw_os_error() == Some(Errno::CONNABORTED.raw_os_error()) => {
            // Not a failure: a process aborted the connection deliberately, through its file in /sys/fs/fuse.
            log::warn!("the connection was aborted");
            Ok(())
        }
        Ok(Err(error)) => Err(failed(format!("the session ended: {error}"))),
        Ok(Ok(())) => Ok(()),
    }
}

/// Releases the layers of a mount that has ended.
fn release(overlay: &Overlay, custody: Option<&Custody>) {
    overlay.release_locks();
    if let Some(custody) = custody
        && let Err(error) = custody.report_end()
    {
        log::debug!("cannot notify the keeper: {error}");
    }
}

/// Returns the settings of the session.
pub(super) fn session_settings(config: &Config, requests: &Arc<Requests>) -> SessionSettings {
    let threads = config.threads.unwrap_or_else(|| {
        let cpus = thread::available_parallelism().map_or(2, NonZeroUsize::get);
        cpus.clamp(4, 16)
    });
    SessionSettings {
        threads,
        cache_timeout: config.cache_timeout,
        cache_listings: config.cache_timeout >= CACHE_TIMEOUT,
        busy_poll: config.busy_poll,
        awake: config.awake,
        requests: requests.clone(),
        mounter: config.mounter,
        live_layers: config.overlay.live_layers,
        passthrough: match config.passthrough {
            // By passthrough, the kernel syncs a write only if the file was opened with O_SYNC.
            Passthrough::Auto | Passthrough::All if config.mount.sync => Passthrough::Read,
            chosen => chosen,
        },
        coherence: config.coherence,
        // The kernel's condition for FUSE_DEV_IOC_BACKING_OPEN. Without passthrough, other file systems can be stacked
        // on the mount.
        may_use_passthrough: sys::process::is_initial_admin(),
        stack: match config.snapshots {
            true => fuse::StackMode::Pushable,
            false => fuse::StackMode::Fixed,
        },
    }
}

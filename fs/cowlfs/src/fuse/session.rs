//! A session with the kernel, from the protocol handshake to the unmount.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use fuser::{Session, SessionACL};

use super::adapter::Adapter;
use super::settings::SessionSettings;
use super::workers::{self, BusyPoll, WorkerPool};
use crate::choices::Awake;
use cowl_layers::sys::idle::{self, LatencyRequest};
use cowl_layers::sys::mount::{self, MountOptions, PreparedMount};
use cowl_layers::sys::users::Device;
use cowl_overlay::Overlay;

/// A session after the protocol handshake; its mount is not attached yet.
pub(crate) struct Prepared {
    attached: Attached,
    mount: PreparedMount,
}

/// A session whose mount is attached; its threads do not run yet.
pub(crate) struct Attached {
    session: Session<Adapter>,
    pool: Arc<WorkerPool>,
    /// The device, for the monitor.
    monitored: OwnedFd,
    awake: Awake,
}

/// An error that prevented a session.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// Opening /dev/fuse failed.
    Device(cowl_layers::Error),
    /// The kernel refused to create the file system.
    Mount(cowl_layers::Error),
    /// The protocol handshake failed.
    Handshake(io::Error),
}

/// Opens /dev/fuse.
pub(crate) fn open_device() -> Result<OwnedFd, SessionError> {
    mount::open_device().map_err(SessionError::Device)
}

/// Creates the file system and performs the protocol handshake.
pub(crate) fn prepare(
    device: OwnedFd,
    overlay: Arc<Overlay>,
    options: &MountOptions,
    settings: &SessionSettings,
) -> Result<Prepared, SessionError> {
    let duplicate = || device.try_clone().map_err(SessionError::Handshake);
    let (polled, monitored) = (duplicate()?, duplicate()?);
    let busy_poll = BusyPoll::new(polled, settings.busy_poll);
    let pool = Arc::new(WorkerPool::new(settings.threads));
    let mount = PreparedMount::new(device.as_fd(), options).map_err(SessionError::Mount)?;
    let mut config = fuser::Config::default();
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(settings.threads);
    let acl = config.acl;
    // `from_fd` leaves mounting and unmounting to this process. fuser unmounts by path: if another process had
    // unmounted the file system already, fuser would unmount an unrelated one that was mounted there since.
    let adapter = Adapter::new(overlay, settings, pool.clone(), busy_poll);
    let notifier = adapter.notifier.clone();
    let session =
        Session::from_fd(adapter, device, acl, config).map_err(SessionError::Handshake)?;
    notifier.get_or_init(|| session.notifier());
    let attached = Attached {
        session,
        pool,
        monitored,
        awake: settings.awake,
    };
    Ok(Prepared { attached, mount })
}

/// Opens a latency request, if it is configured and permitted. Without one, requests only take longer.
fn open_latency_request(awake: Awake) -> Option<LatencyRequest> {
    if awake == Awake::Off || (awake == Awake::Auto && !idle::is_small_guest_that_halts()) {
        return None;
    }
    match LatencyRequest::new() {
        Ok(request) => Some(request),
        Err(error) => {
            let level = if awake == Awake::On {
                log::Level::Warn
            } else {
                log::Level::Info
            };
            log::log!(
                level,
                "CPUs are not kept awake: /dev/cpu_dma_latency: {error}"
            );
            None
        }
    }
}

/// Makes the kernel write back dirty pages of files.
#[derive(Debug)]
pub(crate) struct Flusher(fuser::Notifier);

impl Flusher {
    /// Writes back everything that programs have stored in the file through mappings, and waits for it.
    ///
    /// It invalidates the file's pages, because that is the only operation for which the kernel waits for them: since
    /// Linux 6.16, syncfs(2) only starts the writeback of FUSE files.
    pub(crate) fn flush(&self, ino: u64) -> io::Result<()> {
        match self.0.inval_inode(fuser::INodeNo(ino), 0, 0) {
            // The kernel has no such inode, and so no pages of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

impl Prepared {
    /// Returns the session's flusher. It works while the session runs.
    pub(crate) fn flusher(&self) -> Flusher {
        Flusher(self.attached.session.notifier())
    }

    /// Returns the device number of the file system.
    pub(crate) fn device(&self) -> Result<Device, cowl_layers::Error> {
        self.mount.device()
    }

    /// Attaches the mount at a mount point.
    pub(crate) fn attach(self, mountpoint: &Path) -> Result<Attached, cowl_layers::Error> {
        self.mount.attach(mountpoint)?;
        Ok(self.attached)
    }
}

impl Attached {
    /// Starts the monitor, and returns the session to run.
    ///
    /// Threads remain in the mount namespace in which they were started.
    pub(crate) fn start(self) -> io::Result<Session<Adapter>> {
        let latency = open_latency_request(self.awake);
        workers::start_monitor(&self.pool, self.monitored, latency)?;
        Ok(self.session)
    }
}

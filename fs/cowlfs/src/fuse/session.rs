//! A session with the kernel, from the protocol handshake to the unmount.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use fuser::{Session, SessionACL};

use super::adapter::{Adapter, Negotiated, Origin, RecoveredValues};
use super::handover::{SessionRecord, SessionSource};
use super::settings::SessionSettings;
use super::workers::{self, BusyPoll, WorkerPool};
use crate::choices::Awake;
use cowl_layers::sys::fuse_device;
use cowl_layers::sys::idle::{self, LatencyRequest};
use cowl_layers::sys::limits;
use cowl_layers::sys::mount::{self, MountOptions, PreparedMount};
use cowl_layers::sys::users::Device;
use cowl_overlay::{FileHandle, Ledger, Overlay};

/// The start of the names of the threads that read requests, which the protocol library chooses.
pub(crate) const WORKER_NAME: &str = "fuser-";

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
    source: SessionSource,
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
    let mount = PreparedMount::new(device.as_fd(), options).map_err(SessionError::Mount)?;
    let attached = begin(device, overlay, options, settings)?;
    Ok(Prepared { attached, mount })
}

/// Performs the protocol handshake for a file system that was mounted with this device.
pub(crate) fn begin(
    device: OwnedFd,
    overlay: Arc<Overlay>,
    options: &MountOptions,
    settings: &SessionSettings,
) -> Result<Attached, SessionError> {
    let duplicate = || device.try_clone().map_err(SessionError::Handshake);
    let (polled, monitored, registered) = (duplicate()?, duplicate()?, duplicate()?);
    let handed_over = duplicate()?;
    let busy_poll = BusyPoll::new(polled, settings.busy_poll);
    let pool = Arc::new(WorkerPool::new(settings.threads));
    let config = session_config(options, settings);
    let acl = config.acl;
    // `from_fd` leaves mounting and unmounting to this process. fuser unmounts by path: if another process had
    // unmounted the file system already, fuser would unmount an unrelated one that was mounted there since.
    let origin = Origin::New(registered);
    let adapter = Adapter::new(overlay, settings, pool.clone(), busy_poll, origin);
    let state = adapter.state();
    let notifier = adapter.notifier.clone();
    let session =
        Session::from_fd(adapter, device, acl, config).map_err(SessionError::Handshake)?;
    notifier.get_or_init(|| session.notifier());
    Ok(Attached {
        session,
        pool,
        monitored,
        awake: settings.awake,
        source: SessionSource::new(handed_over, state),
    })
}

/// Returns the configuration of the protocol library.
fn session_config(options: &MountOptions, settings: &SessionSettings) -> fuser::Config {
    let mut config = fuser::Config::default();
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(settings.threads);
    config
}

/// The process whose session this one continues, with its state.
pub(crate) enum Predecessor<'a> {
    /// It has handed the session over, and waits for this process to be ready.
    Running(SessionRecord, HashMap<u64, Arc<FileHandle>>),
    /// It was killed. The values are from its ledger; the ledger is that of this process.
    Killed(Negotiated, &'a RecoveredValues, &'a Arc<Ledger>),
}

/// Continues the session of another process on this device.
///
/// The handshake is with a socket instead of the kernel, because the kernel sends INIT only once. The device takes the
/// socket's descriptor number afterwards.
pub(crate) fn resume(
    device: OwnedFd,
    overlay: Arc<Overlay>,
    predecessor: Predecessor<'_>,
    options: &MountOptions,
    settings: &SessionSettings,
) -> io::Result<Attached> {
    let (polled, monitored) = (device.try_clone()?, device.try_clone()?);
    let (handed_over, registered) = (device.try_clone()?, device.try_clone()?);
    let busy_poll = BusyPoll::new(polled, settings.busy_poll);
    let pool = Arc::new(WorkerPool::new(settings.threads));
    let create = |origin, negotiated| {
        Adapter::new(overlay, settings, pool.clone(), busy_poll, origin).continuing(negotiated)
    };
    let (adapter, negotiated) = match predecessor {
        Predecessor::Running(record, files) => {
            let SessionRecord {
                adapter,
                next_handle,
            } = record;
            let negotiated = adapter.negotiated;
            let origin = Origin::Predecessor(registered, Box::new(adapter), files, next_handle);
            (create(origin, negotiated), negotiated)
        }
        Predecessor::Killed(negotiated, values, ledger) => {
            // Its registrations are those of this process, because it has ended.
            let adapter = create(Origin::New(registered), negotiated);
            adapter.restore(values, ledger);
            (adapter, negotiated)
        }
    };
    let (state, notifier) = (adapter.state(), adapter.notifier.clone());
    let config = session_config(options, settings);
    let acl = config.acl;
    let (mut kernel, socket) = UnixStream::pair()?;
    kernel.write_all(&negotiated.to_init_request())?;
    let session = Session::from_fd(adapter, socket.into(), acl, config)?;
    if state.negotiated() != Some(negotiated) {
        return Err(io::Error::other(
            "it does not request the capabilities that the mount has",
        ));
    }
    fuse_device::substitute(session.as_fd(), device.as_fd()).map_err(errno)?;
    notifier.get_or_init(|| session.notifier());
    Ok(Attached {
        session,
        pool,
        monitored,
        awake: settings.awake,
        source: SessionSource::new(handed_over, state),
    })
}

fn errno(error: cowl_layers::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno().raw_os_error())
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
    /// Returns the outcome of the handshake.
    pub(crate) fn negotiated(&self) -> Option<Negotiated> {
        self.source.negotiated()
    }

    /// Writes the open files and the states of passthrough to a new ledger.
    pub(crate) fn note_all(&self, ledger: &Arc<Ledger>) {
        self.source.note_all(ledger);
    }

    /// Makes the kernel send the requests again that a predecessor has read and not answered.
    pub(crate) fn resend(&self) -> io::Result<()> {
        fuse_device::resend(self.monitored.as_fd())
    }

    /// Returns the session's flusher. It works while the session runs.
    pub(crate) fn flusher(&self) -> Flusher {
        Flusher(self.session.notifier())
    }

    /// Expands the table of descriptors to this many. To be called before [`Self::start`].
    pub(crate) fn expand_descriptor_table(&self, count: u64) {
        limits::expand_descriptor_table(self.monitored.as_fd(), count);
    }

    /// Starts the monitor, and returns the session to run and the means to hand it over.
    ///
    /// Threads remain in the mount namespace in which they were started.
    pub(crate) fn start(self) -> io::Result<(Session<Adapter>, SessionSource)> {
        let latency = open_latency_request(self.awake);
        workers::start_monitor(&self.pool, self.monitored, latency)?;
        Ok((self.session, self.source))
    }

    /// Makes everything that the predecessor has registered with the kernel that of this process. The predecessor must
    /// have ended.
    pub(crate) fn assume(&self) {
        self.source.assume();
    }
}

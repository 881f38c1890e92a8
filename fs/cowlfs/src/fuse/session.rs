//! A session with the kernel, from the protocol handshake to the unmount.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use fuser::{Session, SessionACL};

use super::adapter::{Adapter, InitOutcome, RecoveredValues};
use super::settings::SessionSettings;
use super::workers::{self, BusyPoll, WorkerPool};
use crate::choices::Awake;
use cowl_layers::sys::fd;
use cowl_layers::sys::idle::{self, LatencyRequest};
use cowl_layers::sys::mount::{self, MountOptions, PreparedMount};
use cowl_layers::sys::users::Device;
use cowl_overlay::{Ledger, Overlay};

/// A session after the protocol handshake; its mount is not attached yet.
pub(crate) struct Prepared {
    attached: Attached,
    mount: PreparedMount,
    offered: Arc<OnceLock<InitOutcome>>,
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
    let (acl, config) = session_config(options, settings);
    // `from_fd` leaves mounting and unmounting to this process. fuser unmounts by path: if another process had
    // unmounted the file system already, fuser would unmount an unrelated one that was mounted there since.
    let adapter = Adapter::new(overlay, settings, pool.clone(), busy_poll);
    let (notifier, offered) = (adapter.notifier.clone(), adapter.offered.clone());
    let session =
        Session::from_fd(adapter, device, acl, config).map_err(SessionError::Handshake)?;
    notifier.get_or_init(|| session.notifier());
    let attached = Attached {
        session,
        pool,
        monitored,
        awake: settings.awake,
    };
    Ok(Prepared {
        attached,
        mount,
        offered,
    })
}

/// A successor's connection to the kernel.
pub(crate) struct Successor<'a> {
    /// The device of the predecessor.
    pub(crate) device: OwnedFd,
    /// The kernel's offer to the first process.
    pub(crate) offered: InitOutcome,
    /// The state of the predecessor.
    pub(crate) values: &'a RecoveredValues,
    /// The ledger of this process.
    pub(crate) ledger: &'a Arc<Ledger>,
}

/// Continues the session of a predecessor that has ended.
pub(crate) fn resume(
    from: Successor<'_>,
    overlay: Arc<Overlay>,
    options: &MountOptions,
    settings: &SessionSettings,
) -> io::Result<Attached> {
    let Successor {
        device,
        offered,
        values,
        ledger,
    } = from;
    let (polled, monitored) = (device.try_clone()?, device.try_clone()?);
    let pool = Arc::new(WorkerPool::new(settings.threads));
    let busy_poll = BusyPoll::new(polled, settings.busy_poll);
    let adapter = Adapter::new(overlay, settings, pool.clone(), busy_poll);
    adapter.restore(values, ledger);
    let notifier = adapter.notifier.clone();
    // The handshake is repeated with a socket instead of the device, which then takes the place of the socket.
    let (kernel, daemon) = UnixStream::pair()?;
    (&kernel).write_all(&init_request(offered))?;
    let number = daemon.as_raw_fd();
    let (acl, config) = session_config(options, settings);
    let session = Session::from_fd(adapter, daemon.into(), acl, config)?;
    fd::replace(number, device.as_fd()).map_err(errno)?;
    notifier.get_or_init(|| session.notifier());
    Ok(Attached {
        session,
        pool,
        monitored,
        awake: settings.awake,
    })
}

fn errno(error: cowl_layers::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno().raw_os_error())
}

/// Returns an INIT request with the same offer.
fn init_request(offered: InitOutcome) -> Vec<u8> {
    const LENGTH: u32 = 104;
    const INIT: u32 = 26;
    // The upper half of the flags is valid.
    const INIT_EXT: u64 = 1 << 30;
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    let mut push = |words: &[u32]| bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    let (low, high) = (offered.flags | INIT_EXT, offered.flags >> 32);
    // The header: length, opcode, unique, node id, uid, gid, pid, padding.
    push(&[LENGTH, INIT, 1, 0, 0, 0, 0, 0, 0, 0]);
    #[allow(clippy::cast_possible_truncation, reason = "the halves of the flags")]
    push(&[7, 40, MAX_READAHEAD, low as u32, high as u32]);
    push(&[0; 11]);
    bytes
}

/// The readahead in the repeated handshake. The kernel does not get the reply.
const MAX_READAHEAD: u32 = 1 << 20;

fn session_config(
    options: &MountOptions,
    settings: &SessionSettings,
) -> (SessionACL, fuser::Config) {
    let mut config = fuser::Config::default();
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(settings.threads);
    (config.acl, config)
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
    /// Returns what the kernel offered in the handshake.
    pub(crate) fn offered(&self) -> Option<InitOutcome> {
        self.offered.get().copied()
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
    /// Makes the kernel send the requests again that a predecessor has read and not answered.
    pub(crate) fn resend(&self) -> io::Result<()> {
        mount::resend(self.monitored.as_fd()).map_err(errno)
    }

    /// Returns the session's flusher. It works while the session runs.
    pub(crate) fn flusher(&self) -> Flusher {
        Flusher(self.session.notifier())
    }

    /// Starts the monitor, and returns the session to run.
    ///
    /// Threads remain in the mount namespace in which they were started.
    pub(crate) fn start(self) -> io::Result<Session<Adapter>> {
        let latency = open_latency_request(self.awake);
        workers::start_monitor(&self.pool, self.monitored, latency)?;
        Ok(self.session)
    }
}

//! The daemon: opens and locks the layers, mounts them, and serves requests until the unmount.

use std::num::NonZeroUsize;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crate::config::{
    CACHE_TIMEOUT, Config, ControlSocket, LIVE_CACHE_TIMEOUT, LiveLayers, Passthrough,
};
use crate::control::{self, FuseConnection, OwnMount, SignalTarget, Signals, StatsSource};
use crate::fuse::{self, SessionError, SessionSettings};
use crate::limits;
use crate::requests::Requests;
use crate::start::{Event, Serving, Start};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::lock::{self, LayerLock};
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::setup::{SetupError, SetupKind, shown};
use cowl_layers::sys;
use cowl_layers::sys::users::Device;
use cowl_overlay::Overlay;

/// The readahead of the kernel in KiB, which is the maximum size of a request.
const READ_AHEAD: u32 = 1024;

/// Mounts, reports each [`Event`], and serves requests until the unmount.
///
/// After it has attached the mount, the process moves to a mount namespace of its own that does not contain the mount,
/// so that the mount ends with the namespace in which it was created.
///
/// With a keeper (docs/decisions/0035), this returns in the process of a daemon, which can be another one than the
/// caller's. The caller's process then exits with the code of that process.
pub fn serve(config: Config, mut on: impl FnMut(Event)) -> Result<(), SetupError> {
    let SetUp {
        config,
        start,
        signals,
        requests,
        listener,
        mount,
        lacking,
    } = set_up(config)?;
    let device = mount.device;
    let serving = start.begin(&config, &mut on)?;
    let Serving {
        overlay,
        attached,
        custody,
        is_continued,
    } = serving;
    let flusher = attached.flusher();
    let session = attached
        .start()
        .map_err(|error| failed(format!("cannot start a thread: {error}")))?;
    let stats = StatsSource::new(overlay.clone(), requests);
    let connection = FuseConnection::open(device);
    let flush: Arc<control::Flush> = Arc::new(Box::new(move |ino| flusher.flush(ino)));
    let handled = signals.handle(SignalTarget {
        overlay: overlay.clone(),
        mount: mount.clone(),
        stats: stats.clone(),
        flush: flush.clone(),
        connection: connection.clone(),
    });
    handled.map_err(|error| failed(format!("cannot start a thread: {error}")))?;
    if let Some(listener) = listener {
        let served = control::ServedMount {
            overlay,
            config,
            mount,
            stats,
            flush,
            connection: connection.clone(),
            lacking,
            custody: custody.clone(),
        };
        control::serve(listener, served)
            .map_err(|error| failed(format!("cannot start a thread: {error}")))?;
    }
    on(if is_continued {
        Event::Continued(device)
    } else {
        Event::Mounted(device)
    });
    if let Some(custody) = custody
        && let Err(error) = custody.report_serving()
    {
        log::warn!("cannot notify the keeper: {error}");
    }
    let served = session.run();
    connection.record_end();
    match served {
        Err(error) if error.raw_os_error() == Some(Errno::CONNABORTED.raw_os_error()) => {
            // Not a failure: a process aborted the connection deliberately, through its file in /sys/fs/fuse.
            log::warn!("the connection was aborted");
            Ok(())
        }
        Err(error) => Err(failed(format!("the session ended: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// A mount that was set up, with what its daemon needs beside [`Start`].
struct SetUp {
    config: Config,
    start: Start,
    signals: Signals,
    requests: Arc<Requests>,
    listener: Option<UnixListener>,
    mount: OwnMount,
    lacking: Vec<String>,
}

/// Opens and locks the layers, mounts them, and leaves the mount namespace.
fn set_up(mut config: Config) -> Result<SetUp, SetupError> {
    check_proc()?;
    let lacking = limits::set_up();
    if !lacking.is_empty() {
        log::info!("the daemon may not change: {}", lacking.join(", "));
    }
    config.mountpoint = check_mountpoint(&config.mountpoint)?;
    check_layers_apart(&config)?;
    let layers = LowerLayers::open(&mut config)?;
    let device = fuse::open_device().map_err(|error| explain(error, &config.mountpoint))?;
    let (overlay, locks) = layers.into_overlay(&config)?;
    let signals = Signals::block();
    let requests = Arc::new(Requests::default());
    let settings = session_settings(&config, &requests);
    let kept_device = device
        .try_clone()
        .map_err(|error| failed(format!("cannot duplicate a descriptor: {error}")))?;
    let prepared = fuse::prepare(device, overlay.clone(), &config.mount, &settings)
        .map_err(|error| explain(error, &config.mountpoint))?;
    let listener = listen(&config)?;
    let device = prepared
        .device()
        .map_err(|error| SetupError::at("cannot stat the mount for", &config.mountpoint, error))?;
    let offered = prepared.offered();
    let attached = prepared
        .attach(&config.mountpoint)
        .map_err(|error| SetupError::at("cannot mount at", &config.mountpoint, error))?;
    if let Err(error) = sys::mount::read_ahead(device, READ_AHEAD) {
        // Without the privilege or /sys, reads are only slower.
        log::debug!("cannot set the readahead: {error}");
    }
    let mount = OwnMount::record(config.mountpoint.clone(), device);
    leave_namespace(&config, device);
    // Held until the process exits.
    overlay.hold_locks(locks);
    let start = Start {
        overlay,
        attached,
        kept_device,
        offered,
        settings,
    };
    Ok(SetUp {
        config,
        start,
        signals,
        requests,
        listener,
        mount,
        lacking,
    })
}

/// The opened lower layers, with their locks.
struct LowerLayers {
    space: XattrSpace,
    lowers: Vec<Arc<Layer>>,
    data: Vec<Arc<Layer>>,
    locks: Vec<Arc<LayerLock>>,
}

impl LowerLayers {
    fn open(config: &mut Config) -> Result<Self, SetupError> {
        let is_live = config.live_layers == LiveLayers::Allowed;
        if is_live
            && let Some((upper, _)) = config.upper.take_if(|(upper, _)| lock::is_written(upper))
        {
            config.lowers.insert(0, upper);
        }
        let mut layers = Self {
            space: config.space.unwrap_or_else(XattrSpace::detect),
            lowers: Vec::new(),
            data: Vec::new(),
            locks: Vec::new(),
        };
        layers.lowers = layers.open_locked(config, &config.lowers)?;
        layers.data = layers.open_locked(config, &config.data_only)?;
        if layers.locks.len() < layers.lowers.len() + layers.data.len() {
            config.overlay.live_layers = true;
            config.cache_timeout = config.cache_timeout.min(LIVE_CACHE_TIMEOUT);
            config.passthrough = Passthrough::Off;
        }
        if layers.lowers.is_empty() && config.upper.is_none() {
            return Err(SetupError::new(
                SetupKind::Usage,
                "no layer to mount",
                "specify at least one with -o lowerdir=PATH",
            ));
        }
        Ok(layers)
    }

    fn open_locked(
        &mut self,
        config: &Config,
        paths: &[PathBuf],
    ) -> Result<Vec<Arc<Layer>>, SetupError> {
        let mut layers = Vec::new();
        for path in paths {
            let layer = self.open_one(config, path)?;
            let (layer, lock) = match config.live_layers {
                LiveLayers::Refused => {
                    let (layer, lock) = lock::for_reading(layer)?;
                    (layer, Some(lock))
                }
                LiveLayers::Allowed => lock::for_reading_live(layer)?,
            };
            if lock.is_none() {
                log::warn!(
                    "another mount writes to the layer {}: its changes appear with a delay of up to {} s",
                    shown(path),
                    config.cache_timeout.min(LIVE_CACHE_TIMEOUT).as_secs_f64()
                );
            }
            self.locks.extend(lock);
            layers.push(layer);
        }
        Ok(layers)
    }

    fn open_one(&self, config: &Config, path: &Path) -> Result<Arc<Layer>, SetupError> {
        match config.foreign {
            true => Layer::open_foreign(path, self.space),
            false => Layer::open(path, self.space),
        }
    }

    /// Opens the upper layer, last, because it creates entries in the work directory: a refused mount leaves nothing
    /// there. Returns the overlay and the locks.
    fn into_overlay(
        self,
        config: &Config,
    ) -> Result<(Arc<Overlay>, Vec<Arc<LayerLock>>), SetupError> {
        let upper = match &config.upper {
            Some((upper, work)) => {
                let layer = self.open_one(config, upper)?;
                Some(Upper::from_layer(config.mount.through(), layer, work)?)
            }
            None => None,
        };
        let cannot =
            |error| SetupError::at("cannot read the layers for", &config.mountpoint, error);
        let build = || {
            let options = config.overlay.clone();
            let overlay = Overlay::new(upper.clone(), self.lowers.clone(), options);
            overlay.map(|overlay| overlay.with_data_layers(self.data.clone()))
        };
        let mut overlay = build().map_err(cannot)?;
        if overlay.adopt_kernel_index().map_err(cannot)? {
            overlay = build().map_err(cannot)?;
        }
        // `upper` is dropped here: the overlay alone holds it, and releases its locks when it drops it.
        Ok((Arc::new(overlay), self.locks))
    }
}

/// Returns the settings of the session.
fn session_settings(config: &Config, requests: &Arc<Requests>) -> SessionSettings {
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

/// Creates the control socket, if the configuration has one.
fn listen(config: &Config) -> Result<Option<UnixListener>, SetupError> {
    let Some(socket) = &config.control else {
        return Ok(None);
    };
    let cannot = |error| failed(format!("cannot listen on {}: {error}", shown(socket)));
    match control::listen(socket).map_err(cannot) {
        Err(error) if config.control_socket == ControlSocket::Optional => {
            log::error!("{error}: the mount has no control socket");
            Ok(None)
        }
        listener => listener.map(Some),
    }
}

/// Returns an error if /proc is not mounted.
fn check_proc() -> Result<(), SetupError> {
    if sys::process::has_proc() {
        return Ok(());
    }
    Err(SetupError::new(
        SetupKind::Host,
        "/proc is not mounted: cowlfs accesses open files through /proc/self/fd",
        "run 'mount -t proc proc /proc'",
    ))
}

fn failed(message: String) -> SetupError {
    SetupError::new(SetupKind::Host, message, "")
}

/// Changes the flags of an existing mount.
pub fn remount(config: &Config) -> Result<(), SetupError> {
    let mountpoint = check_mountpoint(&config.mountpoint)?;
    let mut options = config.mount.clone();
    let is_sync = sys::mount::is_sync(&mountpoint)
        .map_err(|error| SetupError::at("cannot stat the mount at", &mountpoint, error))?;
    if options.sync && !is_sync {
        log::warn!("option sync is ignored by a remount: unmount, and mount with it");
    }
    options.sync = is_sync;
    sys::mount::remount(&mountpoint, &options).map_err(|error| {
        let refused = SetupError::at("cannot remount", &mountpoint, error);
        match error.errno() {
            Errno::INVAL => refused
                .kind(SetupKind::Usage)
                .hint("nothing is mounted there: check the path"),
            Errno::BUSY => refused
                .kind(SetupKind::Busy)
                .hint("close the files that are open for writing"),
            _ => refused,
        }
    })
}

/// Returns the absolute path of the mount point, because the daemon changes its working directory.
fn check_mountpoint(path: &Path) -> Result<PathBuf, SetupError> {
    let cannot = |error: cowl_layers::Error| {
        let hint = match error.errno() {
            Errno::NOENT => "create the directory first",
            Errno::NOTDIR => "specify a directory",
            Errno::NOTCONN => "a dead mount is in the way: unmount it first",
            _ => "",
        };
        SetupError::at("cannot use the mount point", path, error)
            .hint(hint)
            .kind(SetupKind::Usage)
    };
    drop(sys::dir::open_root(path).map_err(cannot)?);
    path.canonicalize().map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        cannot(errno.into())
    })
}

/// Refuses a lower layer inside the upper layer or its work directory, and the other way round.
///
/// Such a lower layer would change while it is mounted.
fn check_layers_apart(config: &Config) -> Result<(), SetupError> {
    let Some((upper, work)) = &config.upper else {
        return Ok(());
    };
    for lower in config.lowers.iter().chain(&config.data_only) {
        for written in [upper, work] {
            let (Ok(one), Ok(two)) = (lower.canonicalize(), written.canonicalize()) else {
                // The error is reported when they are opened.
                continue;
            };
            if one.starts_with(&two) || two.starts_with(&one) {
                return Err(SetupError::new(
                    SetupKind::Usage,
                    format!(
                        "one of {} and {} contains the other",
                        shown(lower),
                        shown(written)
                    ),
                    "specify separate directories",
                ));
            }
        }
    }
    Ok(())
}

/// Returns the error of a mount for an error of the session.
fn explain(error: SessionError, mountpoint: &Path) -> SetupError {
    match error {
        SessionError::Device(error) => {
            let hint = match error.errno() {
                Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                    "load the module with 'modprobe fuse', or give the container the device"
                }
                Errno::ACCESS | Errno::PERM => {
                    "run as root, or grant this user read and write permission on /dev/fuse"
                }
                _ => "",
            };
            SetupError::at("cannot open", Path::new("/dev/fuse"), error).hint(hint)
        }
        SessionError::Mount(error) => {
            let hint = match error.errno() {
                Errno::PERM => "run as root, or in a user namespace of your own (unshare -Urm)",
                Errno::INVAL => "check that /dev/fuse is the FUSE device",
                _ => "",
            };
            SetupError::at("cannot mount at", mountpoint, error).hint(hint)
        }
        SessionError::Handshake(error) => SetupError::new(
            SetupKind::Host,
            format!("the kernel and cowlfs cannot agree on a protocol version: {error}"),
            "",
        ),
    }
}

/// Moves to a mount namespace with only the mounts that this process still accesses by path: /proc, /sys and /dev, and
/// the paths in the configuration.
fn leave_namespace(config: &Config, device: Device) {
    let mut keep = vec![
        Path::new("/"),
        Path::new("/proc"),
        Path::new("/sys"),
        Path::new("/dev/null"),
    ];
    keep.extend(config.reach.iter().map(PathBuf::as_path));
    if config.snapshots {
        keep.extend(config.upper.iter().map(|(upper, _)| upper.as_path()));
    }
    if let Err(error) = sys::namespace::leave(&keep, device) {
        log::info!("cannot leave the mount namespace: {error}");
    }
}

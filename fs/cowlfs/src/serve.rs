//! The daemon: opens and locks the layers, mounts, serves until the mount is gone.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crate::config::{Config, KEEP};
use crate::control::{self, Gauge, Mounted, Place, Session, Signals};
use crate::fuse::{self, Serving, SessionError};
use crate::requests::Requests;
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, Upper, lock};
use cowl_layers::setup::{SetupError, SetupKind, shown};
use cowl_layers::sys;
use cowl_layers::sys::users::Device;
use cowl_overlay::Overlay;

/// How much the kernel reads ahead, in KiB: as much as the largest request brings.
const READ_AHEAD: u32 = 1024;

/// Mounts, calls `ready` with the mount's device number once it is there, and serves until it is unmounted.
///
/// Once the mount is attached, the process moves to a mount namespace of its own, without the mount, so that the
/// mount ends with the namespace that it was made in.
pub fn serve(mut config: Config, ready: impl FnOnce(Device)) -> Result<(), SetupError> {
    sys::process::raise_open_files();
    config.mountpoint = check_mountpoint(&config.mountpoint)?;
    check_layers_apart(&config)?;
    let layers = Layers::open(&config)?;
    let device = fuse::open_device().map_err(|error| explain(error, &config.mountpoint))?;
    let (overlay, locks) = layers.into_overlay(&config)?;
    let signals = Signals::block();
    let requests = Arc::new(Requests::default());
    let prepared = fuse::prepare(
        device,
        overlay.clone(),
        &config.mount,
        &serving(&config, &requests),
    )
    .map_err(|error| explain(error, &config.mountpoint))?;
    let listener = config.control.as_deref().map(listen).transpose()?;
    let device = prepared.device().map_err(|error| {
        SetupError::at("cannot look at the mount for", &config.mountpoint, error)
    })?;
    let flusher = prepared.flusher();
    let attached = prepared
        .attach(&config.mountpoint)
        .map_err(|error| SetupError::at("cannot mount at", &config.mountpoint, error))?;
    if let Err(error) = sys::mount::read_ahead(device, READ_AHEAD) {
        // Only slower: without the right to it, or without /sys.
        log::debug!("reading ahead stays as it is: {error}");
    }
    let place = Place::attached(config.mountpoint.clone(), device);
    leave_namespace(&config, device);
    let session = attached
        .start()
        .map_err(|error| failed(format!("cannot start a thread: {error}")))?;
    let gauge = Gauge::new(overlay.clone(), requests);
    let state = Session::of(device);
    let flush: Arc<control::Flush> = Arc::new(Box::new(move |ino| flusher.flush(ino)));
    signals.watch(Mounted {
        overlay: overlay.clone(),
        place: place.clone(),
        gauge: gauge.clone(),
        flush: flush.clone(),
        session: state.clone(),
    });
    // Held for as long as the process lives.
    overlay.hold_locks(locks);
    if let Some(listener) = listener {
        let serving = control::Serving {
            overlay,
            config,
            place,
            gauge,
            flush,
            session: state.clone(),
        };
        control::serve(listener, serving);
    }
    ready(device);
    let served = session.run();
    state.has_ended();
    match served {
        Err(error) if error.raw_os_error() == Some(Errno::CONNABORTED.raw_os_error()) => {
            // Through the connection's abort file in /sys/fs/fuse: the mount was ended on purpose.
            log::warn!("the connection was aborted");
            Ok(())
        }
        Err(error) => Err(failed(format!("the session ended: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// The opened layers that are only read, each with its lock.
struct Layers {
    space: XattrSpace,
    lowers: Vec<Arc<Layer>>,
    data: Vec<Arc<Layer>>,
    locks: Vec<OwnedFd>,
}

impl Layers {
    fn open(config: &Config) -> Result<Self, SetupError> {
        let mut layers = Self {
            space: config.space.unwrap_or_else(XattrSpace::detect),
            lowers: Vec::new(),
            data: Vec::new(),
            locks: Vec::new(),
        };
        layers.lowers = layers.open_locked(config, &config.lowers)?;
        layers.data = layers.open_locked(config, &config.data_only)?;
        if layers.lowers.is_empty() && config.upper.is_none() {
            return Err(SetupError::new(
                SetupKind::Usage,
                "there is no layer to mount",
                "name at least one with -o lowerdir=PATH",
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
            self.locks.push(lock::for_reading(&layer)?);
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
    fn into_overlay(self, config: &Config) -> Result<(Arc<Overlay>, Vec<OwnedFd>), SetupError> {
        let upper = match &config.upper {
            Some((upper, work)) => {
                let layer = self.open_one(config, upper)?;
                Some(Upper::from_layer(config.mount.through(), layer, work)?)
            }
            None => None,
        };
        let cannot =
            |error| SetupError::at("cannot read the layers for", &config.mountpoint, error);
        let make = || {
            let options = config.overlay.clone();
            let made = Overlay::new(upper.clone(), self.lowers.clone(), options);
            made.map(|overlay| overlay.with_data_layers(self.data.clone()))
        };
        let mut overlay = make().map_err(cannot)?;
        if overlay.adopt_kernel_index().map_err(cannot)? {
            overlay = make().map_err(cannot)?;
        }
        // `upper` is dropped here: the overlay alone holds it, and releases its locks when it drops it.
        Ok((Arc::new(overlay), self.locks))
    }
}

/// How requests are served.
fn serving(config: &Config, requests: &Arc<Requests>) -> Serving {
    let threads = config.threads.unwrap_or_else(|| {
        let cpus = thread::available_parallelism().map_or(2, NonZeroUsize::get);
        cpus.clamp(4, 16)
    });
    Serving {
        threads,
        keep: config.keep,
        keep_listings: config.keep >= KEEP,
        lookout: config.lookout,
        awake: config.awake,
        requests: requests.clone(),
        passthrough: config.passthrough,
        coherence: config.coherence,
        // The kernel's condition for FUSE_DEV_IOC_BACKING_OPEN. Without passthrough, other file systems can be stacked
        // on the mount.
        may_pass: sys::process::is_initial_admin(),
        may_be_pushed: config.snapshots,
    }
}

fn listen(socket: &Path) -> Result<UnixListener, SetupError> {
    let cannot = |error| failed(format!("cannot listen on {}: {error}", shown(socket)));
    control::listen(socket).map_err(cannot)
}

fn failed(what: String) -> SetupError {
    SetupError::new(SetupKind::Host, what, "")
}

/// Changes the flags of a mount that is there.
pub fn remount(config: &Config) -> Result<(), SetupError> {
    let place = check_mountpoint(&config.mountpoint)?;
    sys::mount::remount(&place, &config.mount).map_err(|error| {
        let refused = SetupError::at("the kernel refuses to remount", &place, error);
        match error.errno() {
            Errno::INVAL => refused
                .kind(SetupKind::Usage)
                .hint("nothing is mounted there"),
            Errno::BUSY => refused
                .kind(SetupKind::Busy)
                .hint("a file is open for writing there"),
            _ => refused,
        }
    })
}

/// The mount point's absolute path: the daemon leaves the folder that it was started in.
fn check_mountpoint(path: &Path) -> Result<PathBuf, SetupError> {
    let told = |error: cowl_layers::Error| {
        let hint = match error.errno() {
            Errno::NOENT => "make the folder first",
            Errno::NOTDIR => "a mount point must be a folder",
            Errno::NOTCONN => "a dead mount is in the way: umount it first",
            _ => "",
        };
        SetupError::at("cannot use the mount point", path, error)
            .hint(hint)
            .kind(SetupKind::Usage)
    };
    drop(sys::dir::open_root(path).map_err(told)?);
    path.canonicalize().map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        told(errno.into())
    })
}

/// A lower inside the upper, or the other way round, would change under its own feet.
fn check_layers_apart(config: &Config) -> Result<(), SetupError> {
    let Some((upper, work)) = &config.upper else {
        return Ok(());
    };
    for lower in config.lowers.iter().chain(&config.data_only) {
        for written in [upper, work] {
            let (Ok(one), Ok(two)) = (lower.canonicalize(), written.canonicalize()) else {
                // Whatever is wrong with them is told when they are opened.
                continue;
            };
            if one.starts_with(&two) || two.starts_with(&one) {
                return Err(SetupError::new(
                    SetupKind::Usage,
                    format!(
                        "the layers {} and {} lie in one another",
                        shown(lower),
                        shown(written)
                    ),
                    "name separate folders",
                ));
            }
        }
    }
    Ok(())
}

fn explain(error: SessionError, mountpoint: &Path) -> SetupError {
    match error {
        SessionError::Device(error) => {
            let hint = match error.errno() {
                Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                    "load the module with 'modprobe fuse', or give the container the device"
                }
                Errno::ACCESS | Errno::PERM => {
                    "run as root, or ask for read and write permission on /dev/fuse"
                }
                _ => "",
            };
            SetupError::at("cannot open", Path::new("/dev/fuse"), error).hint(hint)
        }
        SessionError::Mount(error) => {
            let hint = match error.errno() {
                Errno::PERM => "run as root, or in a user namespace of your own (unshare -Urm)",
                Errno::INVAL => "is /dev/fuse the FUSE device?",
                _ => "",
            };
            SetupError::at("the kernel refuses the mount for", mountpoint, error).hint(hint)
        }
        SessionError::Greeting(error) => SetupError::new(
            SetupKind::Host,
            format!("the kernel and cowlfs can't agree on a protocol: {error}"),
            "",
        ),
    }
}

/// Moves to a mount namespace that holds what this process still has to reach by a path: its own files in /proc
/// and /dev, and what the configuration names for later.
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
        log::info!("stays in the mount namespace that it was started in: {error}");
    }
}

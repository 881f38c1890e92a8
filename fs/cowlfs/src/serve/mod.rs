//! The daemon: opens and locks the layers, mounts them, and serves requests until the unmount.
//!
//! `layers` opens the layers, `daemon` runs a mount, and `successor` continues one of another process.

mod daemon;
mod layers;
mod locating;
mod successor;

pub use successor::Takeover;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::daemon::{Daemon, session_settings};
use self::layers::LowerLayers;
use crate::config::{Config, ControlSocket, MountPath, Mounter};
use crate::control::{self, OwnMount, Signals};
use crate::fuse::{self, Attached, SessionError, SessionSettings};
use crate::limits;
use crate::requests::Requests;
use crate::start::{Event, Start};
use cowl_layers::error::Errno;
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
pub fn serve(mut config: Config, on: impl FnMut(Event)) -> Result<(), SetupError> {
    check_proc()?;
    config.mountpoint = match config.path {
        MountPath::Resolved => check_mountpoint(&config.mountpoint)?,
        // Attaching the mount fails if there is a symbolic link.
        MountPath::Exact => config.mountpoint,
    };
    let device = fuse::open_device().map_err(|error| explain(error, &config.mountpoint))?;
    serve_from(config, MountSource::Own(device), on)
}

/// Serves a mount that another process makes in its namespaces, as [`serve`] does for one of its own.
///
/// `receive` runs when the layers are open, in the only thread of this process. It waits for the mount. The mount
/// ends with the namespace in which it is: this process can neither find nor unmount it.
pub fn serve_passed(
    config: Config,
    receive: impl FnOnce() -> Result<PassedMount, SetupError>,
    on: impl FnMut(Event),
) -> Result<(), SetupError> {
    check_proc()?;
    let config = Config {
        mounter: Mounter::Other,
        ..config
    };
    serve_from(config, MountSource::Passed(Box::new(receive)), on)
}

/// A mount that another process has made.
#[derive(Debug)]
pub struct PassedMount {
    /// The descriptor of /dev/fuse with which it was mounted. No process has read from it.
    pub device: OwnedFd,
    /// The device number of its file system.
    pub number: Device,
}

/// Waits for a mount of another process.
type Receive<'a> = Box<dyn FnOnce() -> Result<PassedMount, SetupError> + 'a>;

/// The origin of a mount.
enum MountSource<'a> {
    /// This process mounts, with this descriptor of /dev/fuse.
    Own(OwnedFd),
    /// Another process mounts, and passes the mount.
    Passed(Receive<'a>),
}

/// A mount whose handshake is complete.
struct Begun {
    attached: Attached,
    /// A descriptor of the device for the keeper.
    kept_device: OwnedFd,
    number: Device,
    listener: Option<UnixListener>,
}

fn serve_from(
    mut config: Config,
    source: MountSource<'_>,
    mut on: impl FnMut(Event),
) -> Result<(), SetupError> {
    let lacking = limits::set_up();
    if !lacking.is_empty() {
        log::info!("the daemon may not change: {}", lacking.join(", "));
    }
    check_layers_apart(&config)?;
    let layers = LowerLayers::open(&mut config)?;
    let (overlay, locks) = layers.into_overlay(&config)?;
    let (device, number) = match source {
        MountSource::Own(device) => (device, None),
        MountSource::Passed(receive) => {
            let PassedMount { device, number } = receive()?;
            (device, Some(number))
        }
    };
    let signals = Signals::block();
    let (requests, started) = (create_requests()?, Instant::now());
    let settings = session_settings(&config, &requests);
    let begun = match number {
        None => mount(device, &overlay, &config, &settings)?,
        Some(number) => begin_passed((device, number), &overlay, &config, &settings)?,
    };
    let Begun {
        attached,
        kept_device,
        number,
        listener,
    } = begun;
    if let Err(error) = sys::mount::read_ahead(number, READ_AHEAD) {
        // Without the privilege or /sys, reads are only slower.
        log::debug!("cannot set the readahead: {error}");
    }
    let mount = OwnMount::record(config.mountpoint.clone(), number, config.mounter);
    leave_namespace(&config, number);
    // Held until the process exits.
    overlay.hold_locks(locks);
    let start = Start {
        overlay,
        attached,
        kept_device,
        settings,
        predecessor: None,
    };
    let daemon = Daemon {
        serving: start.begin(&config, &mut on)?,
        config,
        mount,
        requests,
        uptime: (started, Duration::ZERO),
        supervisor: None,
        listener,
        lacking,
    };
    daemon.run(signals, on)
}

/// Mounts at the mount point.
fn mount(
    device: OwnedFd,
    overlay: &Arc<Overlay>,
    config: &Config,
    settings: &SessionSettings,
) -> Result<Begun, SetupError> {
    let kept_device = duplicate(&device)?;
    let prepared = fuse::prepare(device, overlay.clone(), &config.mount, settings)
        .map_err(|error| explain(error, &config.mountpoint))?;
    let listener = listen(config)?;
    let number = prepared
        .device()
        .map_err(|error| SetupError::at("cannot stat the mount for", &config.mountpoint, error))?;
    let attached = prepared
        .attach(&config.mountpoint)
        .map_err(|error| SetupError::at("cannot mount at", &config.mountpoint, error))?;
    Ok(Begun {
        attached,
        kept_device,
        number,
        listener,
    })
}

/// Performs the handshake of a mount that another process has made.
fn begin_passed(
    (device, number): (OwnedFd, Device),
    overlay: &Arc<Overlay>,
    config: &Config,
    settings: &SessionSettings,
) -> Result<Begun, SetupError> {
    let kept_device = duplicate(&device)?;
    let listener = listen(config)?;
    let attached = fuse::begin(device, overlay.clone(), &config.mount, settings)
        .map_err(|error| explain(error, &config.mountpoint))?;
    Ok(Begun {
        attached,
        kept_device,
        number,
        listener,
    })
}

fn duplicate(device: &OwnedFd) -> Result<OwnedFd, SetupError> {
    let copy = device.try_clone();
    copy.map_err(|error| failed(format!("cannot duplicate a descriptor: {error}")))
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

/// Creates the counters that all processes of the mount share.
fn create_requests() -> Result<Arc<Requests>, SetupError> {
    let created = Requests::create().map(Arc::new);
    created.map_err(|error| failed(format!("cannot map shared memory: {error}")))
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
    // A program of another version is started from there.
    let program = std::env::current_exe().ok();
    keep.extend(program.as_deref().and_then(Path::parent));
    if config.snapshots {
        keep.extend(config.upper.iter().map(|(upper, _)| upper.as_path()));
    }
    if let Err(error) = sys::namespace::leave(&keep, device) {
        log::info!("cannot leave the mount namespace: {error}");
    }
}

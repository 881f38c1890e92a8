//! The daemon: opens and locks the layers, mounts, serves until the mount is gone.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use crate::config::{Config, KEEP};
use crate::control::{self, Gauge, Place};
use crate::error::Errno;
use crate::format::XattrSpace;
use crate::fuse::{self, Serving, SessionError};
use crate::layer::{Layer, Upper, lock};
use crate::overlay::Overlay;
use crate::requests::Requests;
use crate::setup::{SetupError, SetupKind, shown};
use crate::shown::Show as _;
use crate::sys;

/// How much the kernel reads ahead, in KiB: as much as the largest request brings.
const READ_AHEAD: u32 = 1024;

/// Mounts, calls `ready` once the mount is there, and serves until it is unmounted.
pub fn serve(mut config: Config, ready: impl FnOnce()) -> Result<(), SetupError> {
    sys::process::raise_open_files();
    config.mountpoint = check_mountpoint(&config.mountpoint)?;
    check_layers_apart(&config)?;
    let space = config.space.unwrap_or_else(XattrSpace::detect);
    let mut locks = Vec::new();
    let mut lowers = Vec::new();
    let open = |path: &Path| match config.foreign {
        true => Layer::open_foreign(path, space),
        false => Layer::open(path, space),
    };
    let mut data = Vec::new();
    for (paths, layers) in [
        (&config.lowers, &mut lowers),
        (&config.data_only, &mut data),
    ] {
        for path in paths {
            let layer = open(path)?;
            locks.push(lock::for_reading(&layer)?);
            layers.push(layer);
        }
    }
    if lowers.is_empty() && config.upper.is_none() {
        return Err(SetupError::new(
            SetupKind::Usage,
            "there is no layer to mount",
            "name at least one with -o lowerdir=PATH",
        ));
    }
    let device = fuse::open_device().map_err(|error| explain(error, &config.mountpoint))?;
    // Last, because it makes things in the work folder: a refused mount leaves nothing there.
    let upper = match &config.upper {
        Some((upper, work)) => Some(Upper::of(config.mount.through(), open(upper)?, work)?),
        None => None,
    };
    let told = |error| SetupError::at("cannot read the layers for", &config.mountpoint, error);
    let make = || {
        let made = Overlay::new(upper.clone(), lowers.clone(), config.behaviour.clone());
        made.map(|overlay| overlay.over_data(data.clone()))
    };
    let mut overlay = make().map_err(told)?;
    if overlay.take_over_index().map_err(told)? {
        overlay = make().map_err(told)?;
    }
    let overlay = Arc::new(overlay);
    let signals = block_signals();
    let threads = config.threads.unwrap_or_else(|| {
        let cpus = thread::available_parallelism().map_or(2, NonZeroUsize::get);
        cpus.clamp(4, 16)
    });
    let requests = Arc::new(Requests::default());
    let serving = Serving {
        threads,
        keep: config.keep,
        keep_listings: config.keep >= KEEP,
        lookout: config.lookout,
        awake: config.awake,
        requests: requests.clone(),
        passthrough: config.passthrough,
        coherence: config.coherence,
        // The kernel's rule for BACKING_OPEN. Without it the mount is a file system that others can lie on as
        // ever.
        may_pass: sys::process::is_initial_admin(),
        may_be_pushed: config.snapshots,
    };
    let prepared = fuse::prepare(device, overlay.clone(), &config.mount, &serving)
        .map_err(|error| explain(error, &config.mountpoint))?;
    let listener = match &config.control {
        Some(socket) => Some(control::listen(socket).map_err(|error| {
            SetupError::new(
                SetupKind::Host,
                format!("cannot listen on {}: {error}", shown(socket)),
                "",
            )
        })?),
        None => None,
    };
    let device = prepared.device().map_err(|error| {
        SetupError::at("cannot look at the mount for", &config.mountpoint, error)
    })?;
    let flusher = prepared.flusher();
    let session = prepared
        .attach(&config.mountpoint)
        .map_err(|error| SetupError::at("cannot mount at", &config.mountpoint, error))?;
    if let Err(error) = sys::mount::read_ahead(device, READ_AHEAD) {
        // Only slower: without the right to it, or without /sys.
        log::debug!("reading ahead stays as it is: {error}");
    }
    let place = Place {
        path: config.mountpoint.clone(),
        device,
    };
    let gauge = Gauge::new(overlay.clone(), requests);
    watch_signals(signals, place.clone(), gauge.clone());
    // Held for as long as the process lives.
    overlay.keep_locks(locks);
    if let Some(listener) = listener {
        let serving = control::Serving {
            overlay,
            config,
            place,
            gauge,
            flush: Box::new(move |ino| flusher.flush(ino)),
        };
        control::serve(listener, serving);
    }
    ready();
    match session.run() {
        Err(error) if error.raw_os_error() == Some(Errno::CONNABORTED.raw_os_error()) => {
            // Somebody used the abort switch of this connection: the mount is dead, and that was asked for.
            log::warn!("the connection was aborted");
            Ok(())
        }
        Err(error) => Err(SetupError::new(
            SetupKind::Host,
            format!("the session broke off: {error}"),
            "",
        )),
        Ok(()) => Ok(()),
    }
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
    let told = |error: crate::Error| {
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

/// Blocks the signals that the daemon acts on, before there is a second thread.
fn block_signals() -> Option<SigSet> {
    let mut set = SigSet::empty();
    let ends = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    for signal in ends.into_iter().chain([Signal::SIGUSR1]) {
        set.add(signal);
    }
    match set.thread_block() {
        Ok(()) => Some(set),
        Err(error) => {
            log::warn!("cannot block signals: {error}");
            None
        }
    }
}

/// SIGUSR1 has it said in the log what was done so far. Every other signal takes the mount out of the tree;
/// the daemon goes on until its last user is gone.
fn watch_signals(set: Option<SigSet>, place: Place, gauge: Gauge) {
    let Some(set) = set else { return };
    thread::spawn(move || {
        loop {
            match set.wait() {
                Ok(Signal::SIGUSR1) => {
                    // A warning, because somebody asked for it and the log keeps nothing less.
                    match gauge.read() {
                        Ok(stats) => log::warn!("{stats}"),
                        Err(error) => log::warn!("what was done can't be told: {error}"),
                    }
                    continue;
                }
                Ok(signal) => log::info!("{signal}: unmounting {}", place.path.shown()),
                Err(error) => log::warn!("waiting for signals: {error}"),
            }
            if !place.is_ours() {
                log::warn!("{} is not this mount any more", place.path.shown());
            } else if let Err(error) = sys::mount::unmount_lazily(&place.path) {
                log::warn!("cannot unmount {}: {error}", place.path.shown());
            }
        }
    });
}

//! A session with the kernel, from the first request to the unmount.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use fuser::{Session, SessionACL};

use super::adapter::Adapter;
use super::serving::Serving;
use super::workers::{self, Crew, Lookout};
use crate::choices::Awake;
use cowl_layers::sys::idle::{self, Wish};
use cowl_layers::sys::mount::{self, MountOptions, PreparedMount};
use cowl_layers::sys::users::Device;
use cowl_overlay::Overlay;

/// A session that the kernel has greeted; its mount is not in the tree yet.
pub(crate) struct Prepared {
    attached: Attached,
    mount: PreparedMount,
}

/// A session whose mount is in the tree, before its first thread runs.
pub(crate) struct Attached {
    session: Session<Adapter>,
    crew: Arc<Crew>,
    watched: OwnedFd,
    awake: Awake,
}

/// Why there is no session.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// /dev/fuse can't be opened.
    Device(cowl_layers::Error),
    /// The kernel refuses the file system.
    Mount(cowl_layers::Error),
    /// The greeting failed.
    Greeting(io::Error),
}

/// Opens /dev/fuse.
pub(crate) fn open_device() -> Result<OwnedFd, SessionError> {
    mount::open_device().map_err(SessionError::Device)
}

/// Makes the file system and answers the kernel's greeting.
pub(crate) fn prepare(
    device: OwnedFd,
    overlay: Arc<Overlay>,
    options: &MountOptions,
    serving: &Serving,
) -> Result<Prepared, SessionError> {
    let again = || device.try_clone().map_err(SessionError::Greeting);
    let (looked_at, watched) = (again()?, again()?);
    let lookout = Lookout::new(looked_at, serving.lookout);
    let crew = Arc::new(Crew::new(serving.threads));
    let mount = PreparedMount::new(device.as_fd(), options).map_err(SessionError::Mount)?;
    let mut config = fuser::Config::default();
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(serving.threads);
    let acl = config.acl;
    // `from_fd` leaves mounting and unmounting to us: fuser's own unmount would, after somebody
    // else's, unmount whatever lies at the path by then.
    let adapter = Adapter::new(overlay, serving, crew.clone(), lookout);
    let notifier = adapter.notifier.clone();
    let session = Session::from_fd(adapter, device, acl, config).map_err(SessionError::Greeting)?;
    notifier.get_or_init(|| session.notifier());
    let attached = Attached {
        session,
        crew,
        watched,
        awake: serving.awake,
    };
    Ok(Prepared { attached, mount })
}

/// The wish for awake CPUs, where it is asked for and can be had. Without it everything is only slower.
fn wish(asked: Awake) -> Option<Wish> {
    if asked == Awake::Off || (asked == Awake::Auto && !idle::is_small_guest_that_halts()) {
        return None;
    }
    match Wish::new() {
        Ok(wish) => Some(wish),
        Err(error) => {
            let level = if asked == Awake::On {
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

/// Has the kernel hand over what it keeps of files.
#[derive(Debug)]
pub(crate) struct Flusher(fuser::Notifier);

impl Flusher {
    /// Comes back when everything that programs stored in the file through mappings has been written. (To
    /// drop its pages is the one thing for which the kernel waits for them: since Linux 6.16 syncfs(2) only
    /// begins.)
    pub(crate) fn flush(&self, ino: u64) -> io::Result<()> {
        match self.0.inval_inode(fuser::INodeNo(ino), 0, 0) {
            // It keeps nothing of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

impl Prepared {
    /// For the time while the session runs.
    pub(crate) fn flusher(&self) -> Flusher {
        Flusher(self.attached.session.notifier())
    }

    /// The mount's device number.
    pub(crate) fn device(&self) -> Result<Device, cowl_layers::Error> {
        self.mount.device()
    }

    /// Puts the mount at its place.
    pub(crate) fn attach(self, at: &Path) -> Result<Attached, cowl_layers::Error> {
        self.mount.attach(at)?;
        Ok(self.attached)
    }
}

impl Attached {
    /// Starts to watch over the threads that will answer. Threads stay in the mount namespace that they were
    /// started in.
    pub(crate) fn start(self) -> io::Result<Session<Adapter>> {
        workers::start(&self.crew, self.watched, wish(self.awake))?;
        Ok(self.session)
    }
}

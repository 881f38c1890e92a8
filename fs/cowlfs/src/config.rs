//! The configuration of a mount: validated values, without parsing or system calls.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

pub use crate::choices::{
    Awake, Coherence, ControlSocket, Keeper, LiveLayers, MountPath, Mounter, Passthrough,
    Supervision, choice_name, find_choice,
};
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::mount::MountOptions;
use cowl_overlay::OverlayOptions;

/// The default time for which the kernel may cache names and attributes.
///
/// Every change goes through the mount, so there is no need for a limit. A year does not overflow in any arithmetic.
pub const CACHE_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The maximum time for which the kernel may cache names and attributes if another mount writes to a layer. It is the
/// default of FUSE programs.
pub const LIVE_CACHE_TIMEOUT: Duration = Duration::from_secs(1);

/// The default time for which a thread polls for the next request. A program that sends one request after the other
/// sends the next one within this time.
pub const BUSY_POLL: Duration = Duration::from_micros(30);

/// The configuration of a mount.
#[derive(Clone, Debug)]
pub struct Config {
    /// The lower layers, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Data-only layers below the lower layers, topmost first. They have the content of metacopies,
    /// but no visible names.
    pub data_only: Vec<PathBuf>,
    /// The upper layer and its work directory. Without them the mount is read-only.
    pub upper: Option<(PathBuf, PathBuf)>,
    /// The mount point.
    pub mountpoint: PathBuf,
    /// The use of its path.
    pub path: MountPath,
    /// The process that mounts.
    pub mounter: Mounter,
    /// Flags and names of the mount.
    pub mount: MountOptions,
    /// The options of the overlay.
    pub overlay: OverlayOptions,
    /// The namespace of marker xattrs; `None` selects the one that this process can write.
    pub space: Option<XattrSpace>,
    /// Whether the markers of fuse-overlayfs and of tar layers are read as well.
    pub foreign: bool,
    /// The number of worker threads; `None` for one per CPU, but at least four, because disks can block them.
    pub threads: Option<usize>,
    /// The time for which the kernel may cache names and attributes.
    pub cache_timeout: Duration,
    /// The time for which a thread that has answered a request polls for the next one before it sleeps.
    pub busy_poll: Duration,
    /// Whether idle CPUs are kept awake during a burst of requests.
    pub awake: Awake,
    /// The files that the kernel reads and writes without requests to the daemon.
    pub passthrough: Passthrough,
    /// The content that old descriptors of lower files show.
    pub coherence: Coherence,
    /// Whether a layer to which another mount writes can be mounted read-only.
    pub live_layers: LiveLayers,
    /// The path of the control socket.
    pub control: Option<PathBuf>,
    /// Whether the mount fails if the control socket cannot be created.
    pub control_socket: ControlSocket,
    /// Whether a control client may push a new top layer.
    pub snapshots: bool,
    /// Paths that this process uses later. They remain reachable when it leaves its original mount namespace.
    pub reach: Vec<PathBuf>,
    /// Whether the mount outlives its daemon.
    pub keeper: Keeper,
    /// Whether this process must last as long as the mount.
    pub supervision: Supervision,
    /// Receives a message when a client asks for the frozen layers to be synced.
    pub settle: Option<Sender<()>>,
    /// The means by which another process takes over from this one; `None` if none can.
    pub successor: Option<Successor>,
}

/// The start of a process that takes over a mount (docs/decisions/0034).
#[derive(Clone, Debug, Default)]
pub struct Successor {
    /// The arguments of the program. It calls [`crate::Takeover::receive`].
    pub arguments: Vec<OsString>,
    /// Further state of this program. Only the successor interprets it.
    pub state: Vec<u8>,
    /// Further descriptors of this program.
    pub descriptors: Vec<Arc<OwnedFd>>,
}

impl Config {
    /// Creates the configuration of a mount of these layers, with the defaults for a container.
    pub fn new(
        lowers: Vec<PathBuf>,
        upper: Option<(PathBuf, PathBuf)>,
        mountpoint: PathBuf,
    ) -> Self {
        let read_only = upper.is_none();
        Self {
            lowers,
            data_only: Vec::new(),
            upper,
            mountpoint,
            path: MountPath::default(),
            mounter: Mounter::default(),
            mount: MountOptions {
                source: "cowlfs".into(),
                subtype: "cowlfs".into(),
                read_only,
                allow_other: true,
                ..MountOptions::default()
            },
            overlay: OverlayOptions {
                metacopy: true,
                ..OverlayOptions::default()
            },
            space: None,
            foreign: false,
            threads: None,
            cache_timeout: CACHE_TIMEOUT,
            busy_poll: BUSY_POLL,
            awake: Awake::default(),
            passthrough: Passthrough::default(),
            coherence: Coherence::default(),
            live_layers: LiveLayers::Refused,
            control: None,
            control_socket: ControlSocket::Required,
            snapshots: false,
            reach: Vec::new(),
            keeper: Keeper::default(),
            supervision: Supervision::default(),
            settle: None,
            successor: None,
        }
    }

    /// Sets the policy of a mount of a container that `cowl` manages, and leaves the layers, paths and options of its
    /// user as they are.
    ///
    /// Both `cowl` and `cowlfs -o managed` call this, so that a measurement of one is valid for the other.
    pub fn manage(&mut self) {
        self.snapshots = true;
        // The layers of a store have no markers of other programs.
        self.foreign = false;
        self.control_socket = ControlSocket::Required;
    }
}

//! What a mount is to be: checked values, no parsing and no system calls.

use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::Duration;

pub use crate::choices::{Awake, Coherence, Passthrough, name_of, named};
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::mount::MountOptions;
use cowl_overlay::OverlayOptions;

/// How long the kernel may keep names and attributes: everything changes through the mount, so for as
/// long as it likes. A year, because that is a number that no arithmetic on it overflows.
pub const KEEP: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long a thread looks out for the next request: a program that waits for one answer after the other
/// sends it within this time.
pub const LOOKOUT: Duration = Duration::from_micros(30);

/// A mount.
#[derive(Clone, Debug)]
pub struct Config {
    /// Layers that are only read, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Layers below those that show nothing but hold the content of metacopies, topmost first.
    pub data_only: Vec<PathBuf>,
    /// The layer that is written, and its work folder. Without it the mount is read-only.
    pub upper: Option<(PathBuf, PathBuf)>,
    /// Where it shows.
    pub mountpoint: PathBuf,
    /// Flags and names of the mount.
    pub mount: MountOptions,
    /// Choices of the overlay.
    pub overlay: OverlayOptions,
    /// Where the marks lie; `None`: what this process can write.
    pub space: Option<XattrSpace>,
    /// Marks of fuse-overlayfs and of tar layers are read as well.
    pub foreign: bool,
    /// Threads that serve requests; `None`: as many as CPUs, at least four, because disks hold them up.
    pub threads: Option<usize>,
    /// How long the kernel may keep names and attributes.
    pub keep: Duration,
    /// How long a thread that has answered a request looks out for the next one before it sleeps.
    pub lookout: Duration,
    /// Whether idle CPUs are kept awake while requests come in numbers.
    pub awake: Awake,
    /// Which files the kernel reads and writes by itself.
    pub passthrough: Passthrough,
    /// What old descriptors of lower files show.
    pub coherence: Coherence,
    /// A socket on which the daemon can be asked and told things.
    pub control: Option<PathBuf>,
    /// Whether it may be told there to put a new layer on top.
    pub snapshots: bool,
    /// Paths that this process uses later: they stay in reach when it leaves the mount namespace that it was
    /// started in.
    pub reach: Vec<PathBuf>,
    /// Receives a message when a client asks for the frozen layers to be synced.
    pub settle: Option<Sender<()>>,
}

impl Config {
    /// A mount of these layers with everything else as a container wants it.
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
            keep: KEEP,
            lookout: LOOKOUT,
            awake: Awake::default(),
            passthrough: Passthrough::default(),
            coherence: Coherence::default(),
            control: None,
            snapshots: false,
            reach: Vec::new(),
            settle: None,
        }
    }
}

//! What a mount is to be: checked values, no parsing and no system calls.

use std::path::PathBuf;
use std::time::Duration;

use crate::format::XattrSpace;
use crate::overlay::Behaviour;
use crate::sys::mount::MountOptions;

/// How long the kernel may keep names and attributes: everything changes through the mount, so for as
/// long as it likes. A year, because that is a number that no arithmetic on it overflows.
pub const KEEP: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long a thread looks out for the next request: a program that waits for one answer after the other
/// sends it within this time.
pub const LOOKOUT: Duration = Duration::from_micros(30);

/// Which files the kernel reads and writes by itself, without asking the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Passthrough {
    /// Those that it can, as long as nobody can take a snapshot of the mount; else as [`Self::Read`].
    #[default]
    Auto,
    /// Files in the upper, and programs and libraries wherever they are.
    All,
    /// Programs and libraries, for reading.
    Read,
    /// None.
    Off,
}

impl Passthrough {
    /// All of them, by the names that options give them.
    pub const NAMES: [(&str, Self); 4] = [
        ("auto", Self::Auto),
        ("all", Self::All),
        ("read", Self::Read),
        ("off", Self::Off),
    ];
}

/// What a descriptor of a lower file shows that was opened before the file was written to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Coherence {
    /// What was written, as on a plain folder; of programs and libraries what was.
    #[default]
    Posix,
    /// What was, as on overlayfs of the kernel. Then the kernel reads all lower files by itself.
    Overlay,
}

impl Coherence {
    /// Both, by the names that options give them.
    pub const NAMES: [(&str, Self); 2] = [("posix", Self::Posix), ("overlay", Self::Overlay)];
}

/// What an option's value names.
pub fn named<T: Copy>(names: &[(&str, T)], value: &str) -> Option<T> {
    let found = names.iter().find(|(name, _)| *name == value);
    found.map(|(_, what)| *what)
}

/// The name that options give something.
pub fn name_of<T: PartialEq>(names: &[(&'static str, T)], what: &T) -> &'static str {
    let found = names.iter().find(|(_, known)| known == what);
    found.map_or("", |(name, _)| name)
}

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
    pub behaviour: Behaviour,
    /// Where the marks lie; `None`: what this process can write.
    pub space: Option<XattrSpace>,
    /// Marks of fuse-overlayfs and of tar layers are read as well.
    pub foreign: bool,
    /// Threads that serve requests; `None`: as many as CPUs, at least two.
    pub threads: Option<usize>,
    /// How long the kernel may keep names and attributes.
    pub keep: Duration,
    /// How long a thread that has answered a request looks out for the next one before it sleeps.
    pub lookout: Duration,
    /// Which files the kernel reads and writes by itself.
    pub passthrough: Passthrough,
    /// What old descriptors of lower files show.
    pub coherence: Coherence,
    /// A socket on which the daemon can be asked and told things.
    pub control: Option<PathBuf>,
    /// Whether it may be told there to put a new layer on top.
    pub snapshots: bool,
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
            behaviour: Behaviour {
                metacopy: true,
                ..Behaviour::default()
            },
            space: None,
            foreign: false,
            threads: None,
            keep: KEEP,
            lookout: LOOKOUT,
            passthrough: Passthrough::default(),
            coherence: Coherence::default(),
            control: None,
            snapshots: false,
        }
    }
}

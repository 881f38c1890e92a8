//! Enumerated options of a mount, with their names in option strings and configuration files.

use serde::{Deserialize, Serialize};

/// The files that the kernel reads and writes without requests to the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Passthrough {
    /// Like [`Self::All`], if no snapshot of the mount can be taken; otherwise like [`Self::Read`].
    #[default]
    Auto,
    /// Files in the upper layer, and programs and libraries in all layers.
    All,
    /// Programs and libraries in lower layers, for reading.
    Read,
    /// None.
    Off,
}

impl Passthrough {
    /// All variants with their names.
    pub const NAMES: [(&str, Self); 4] = [
        ("auto", Self::Auto),
        ("all", Self::All),
        ("read", Self::Read),
        ("off", Self::Off),
    ];
}

/// The content that a descriptor of a lower file shows if it was opened before the file was copied up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Coherence {
    /// Like [`Coherence::Posix`], but descriptors of large files that programs replace (images, for example, and files
    /// in /usr) show the old content too. Passthrough is used for these files.
    #[default]
    Packages,
    /// The new content, as on a plain directory. Descriptors of programs and libraries show the old one.
    Posix,
    /// The old content, as on kernel overlayfs. Passthrough is used for all lower files.
    Overlay,
}

impl Coherence {
    /// All variants with their names.
    pub const NAMES: [(&str, Self); 3] = [
        ("packages", Self::Packages),
        ("posix", Self::Posix),
        ("overlay", Self::Overlay),
    ];
}

/// The process that mounts the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mounter {
    /// The daemon.
    #[default]
    Daemon,
    /// A process in other namespaces, which passes the daemon the descriptor of its mount
    /// ([`crate::serve_passed`]).
    ///
    /// The daemon can neither find nor unmount the mount, and the process ids in requests are those of another
    /// namespace.
    Other,
}

/// The use of a path as a mount point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MountPath {
    /// Symbolic links in it are followed.
    #[default]
    Resolved,
    /// The caller has checked it. It must not contain symbolic links, which another user may have put there since.
    Exact,
}

/// Whether idle CPUs are kept awake during a burst of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Awake {
    /// On small virtual machines whose idle CPUs halt.
    #[default]
    Auto,
    /// If it is permitted.
    On,
    /// Never.
    Off,
}

impl Awake {
    /// All variants with their names.
    pub const NAMES: [(&str, Self); 3] =
        [("auto", Self::Auto), ("on", Self::On), ("off", Self::Off)];
}

/// Whether a second process starts a new daemon if the daemon is killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Keeper {
    /// If the kernel supports it.
    #[default]
    On,
    /// Never: the mount ends with the daemon.
    Off,
}

impl Keeper {
    /// All variants with their names.
    pub const NAMES: [(&str, Self); 2] = [("on", Self::On), ("off", Self::Off)];
}

/// Whether another process, such as a service manager, watches the process that was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Supervision {
    /// It ends when another process has taken over.
    #[default]
    Off,
    /// It ends with the mount.
    On,
}

/// Whether a mount fails if its control socket cannot be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlSocket {
    /// It fails: a program needs the socket to manage the mount.
    Required,
    /// It is mounted without a socket.
    Optional,
}

/// Whether a layer to which another mount writes can be mounted read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LiveLayers {
    /// The mount is refused.
    Refused,
    /// It is mounted with caches that expire.
    Allowed,
}

/// Returns the choice with this name.
pub fn find_choice<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    let found = names.iter().find(|(other, _)| *other == name);
    found.map(|(_, choice)| *choice)
}

/// Returns the name of a choice.
pub fn choice_name<T: PartialEq>(names: &[(&'static str, T)], choice: &T) -> &'static str {
    let found = names.iter().find(|(_, other)| other == choice);
    found.map_or("", |(name, _)| name)
}

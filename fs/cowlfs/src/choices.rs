//! Choices of a mount that have names.

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

/// Whether idle CPUs are kept awake while requests come in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Awake {
    /// On a small virtual machine whose idle CPUs halt.
    #[default]
    Auto,
    /// Wherever this process may.
    On,
    /// Never.
    Off,
}

impl Awake {
    /// All of them, by the names that options give them.
    pub const NAMES: [(&str, Self); 3] =
        [("auto", Self::Auto), ("on", Self::On), ("off", Self::Off)];
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

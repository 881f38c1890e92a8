//! The error type of everything below the FUSE adapter. Every error maps to an errno.
//!
//! An [`Error`] never allocates: ENOENT is the most frequent result of a file system's lookups.

use std::fmt;

pub use rustix::io::Errno;

/// A result of the overlay core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the overlay core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// A system call on a layer failed, or the operation is refused with this errno.
    Errno(Errno),
    /// A layer violates the on-disk format; the text describes how.
    Damaged(&'static str),
}

impl Error {
    /// ENOENT.
    pub const NOT_FOUND: Self = Self::Errno(Errno::NOENT);

    /// Returns the errno that a program on the mount gets.
    pub fn errno(self) -> Errno {
        match self {
            Self::Errno(errno) => errno,
            Self::Damaged(_) => Errno::IO,
        }
    }

    /// Whether the error means that a name is absent: ENOENT or ENOTDIR.
    ///
    /// All other errors must be propagated. If an I/O error were treated as "absent", an object that this layer hides
    /// would reappear from a lower layer.
    pub fn is_absent(self) -> bool {
        matches!(self, Self::Errno(Errno::NOENT | Errno::NOTDIR))
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<nix::errno::Errno> for Error {
    fn from(errno: nix::errno::Errno) -> Self {
        Self::Errno(Errno::from_raw_os_error(errno as i32))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno) => errno.fmt(f),
            Self::Damaged(violation) => write!(f, "damaged layer: {violation}"),
        }
    }
}

impl std::error::Error for Error {}

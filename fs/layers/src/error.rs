//! What can go wrong below the protocol adapter, as one small value with a total mapping to an errno.
//!
//! Nothing here allocates: "no such name" is the most common answer of a file system.

use std::fmt;

pub use rustix::io::Errno;

/// A result of the overlay core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the overlay core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// A system call on a layer failed, or the operation is refused with this errno.
    Errno(Errno),
    /// A layer holds something that the format does not allow; the text says what.
    Damaged(&'static str),
}

impl Error {
    /// No such name.
    pub const NOT_FOUND: Self = Self::Errno(Errno::NOENT);

    /// The errno that the caller of the file system sees.
    pub fn errno(self) -> Errno {
        match self {
            Self::Errno(errno) => errno,
            Self::Damaged(_) => Errno::IO,
        }
    }

    /// Whether this says that a name is absent. Only ENOENT and ENOTDIR do: any other error goes up,
    /// because an I/O error taken for "absent" would bring back what lies below.
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
            Self::Damaged(what) => write!(f, "damaged layer: {what}"),
        }
    }
}

impl std::error::Error for Error {}

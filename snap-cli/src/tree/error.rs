//! Errors and progress of operations on trees.
//!
//! Each error states the attempted operation and the path, and has its cause as source.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use cowl_layers::error::Errno;
use cowl_layers::view::LayerPath;

/// The result of an operation on a tree.
pub type Result<T, E = TreeError> = std::result::Result<T, E>;

/// The kind of a failure, for exit codes and hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A system call failed.
    Io,
    /// The caller lacks a privilege.
    NotPermitted,
    /// A named object does not exist.
    NotFound,
    /// The disk or the quota is full.
    NoSpace,
    /// The input is not an archive of a supported kind.
    NotAnArchive,
    /// The input is empty.
    Empty,
    /// The input ends too early.
    Truncated,
    /// The input, or a layer, is damaged.
    Damaged,
    /// The input is well formed but refused, for example because it leads outside of the tree.
    Refused,
    /// The input exceeds a limit.
    Limit,
    /// The input is a container image instead of a root filesystem.
    Image,
    /// The input is a whole container instead of a tree.
    WholeContainer,
    /// One of source and target contains the other.
    Overlap,
}

/// An error of an operation on a tree.
#[derive(Debug)]
pub struct TreeError {
    kind: ErrorKind,
    what: String,
    path: Option<PathBuf>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl TreeError {
    /// Creates an error without a source.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            path: None,
            source: None,
        }
    }

    /// Creates an error from an I/O error, whose errno determines the kind.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let kind = source.raw_os_error().map_or_else(
            || match source.kind() {
                io::ErrorKind::UnexpectedEof => ErrorKind::Truncated,
                _ => ErrorKind::Io,
            },
            |raw| kind_of(Errno::from_raw_os_error(raw)),
        );
        Self {
            source: Some(Box::new(source)),
            ..Self::new(kind, what)
        }
    }

    /// Sets the path (bytes, as in the tree or the archive).
    #[must_use]
    pub fn at(mut self, path: impl Into<Vec<u8>>) -> Self {
        self.path = Some(PathBuf::from(std::ffi::OsString::from_vec(path.into())));
        self
    }

    /// Sets the source.
    #[must_use]
    pub fn because(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Returns the kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the message.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Returns the path in the tree or the archive, which is relative in most cases.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

fn kind_of(errno: Errno) -> ErrorKind {
    match errno {
        Errno::PERM | Errno::ACCESS => ErrorKind::NotPermitted,
        Errno::NOENT | Errno::NOTDIR => ErrorKind::NotFound,
        Errno::NOSPC | Errno::DQUOT => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    }
}

impl fmt::Display for TreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(path) = &self.path {
            // Debug, not display: a newline or an escape code in a name must not reach a terminal.
            write!(f, ": {path:?}")?;
        }
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl StdError for TreeError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Adds a message and a path to low-level errors.
pub(crate) trait Context<T> {
    /// Adds a message and a path.
    fn context(self, what: &str, path: &[u8]) -> Result<T>;

    /// Like [`Self::context`], with a path whose bytes are only built for an error.
    fn context_at(self, what: &str, path: &LayerPath) -> Result<T>;
}

impl<T> Context<T> for cowl_layers::error::Result<T> {
    fn context(self, what: &str, path: &[u8]) -> Result<T> {
        self.map_err(|error| {
            let kind = match error {
                cowl_layers::error::Error::Errno(errno) => kind_of(errno),
                cowl_layers::error::Error::Damaged(_) => ErrorKind::Damaged,
            };
            TreeError::new(kind, what).at(path).because(error)
        })
    }

    fn context_at(self, what: &str, path: &LayerPath) -> Result<T> {
        self.or_else(|error| Err(error).context(what, &path.to_bytes()))
    }
}

impl<T> Context<T> for std::result::Result<T, Errno> {
    fn context(self, what: &str, path: &[u8]) -> Result<T> {
        self.map_err(|errno| TreeError::io(what, errno.into()).at(path))
    }

    fn context_at(self, what: &str, path: &LayerPath) -> Result<T> {
        self.or_else(|error| Err(error).context(what, &path.to_bytes()))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: &str, path: &[u8]) -> Result<T> {
        self.map_err(|error| TreeError::io(what, error).at(path))
    }

    fn context_at(self, what: &str, path: &LayerPath) -> Result<T> {
        self.or_else(|error| Err(error).context(what, &path.to_bytes()))
    }
}

/// The progress of an operation on a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The number of completed entries.
    pub entries: u64,
    /// The number of completed bytes of content, holes included.
    pub bytes: u64,
    /// The estimated total number of bytes, if known.
    pub total: Option<u64>,
}

/// A callback that receives the progress now and then, and at the end.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

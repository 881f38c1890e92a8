//! What can go wrong while a tree is read, compared, merged or made, and how progress is told.
//!
//! Every error says what was tried, on which path, and keeps its cause. Nothing here prints, and
//! nothing here knows the command line: the hint of what to do next is the caller's to add.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use cowl_layers::error::Errno;
use cowl_layers::view::LayerPath;

/// A result of this crate's work on trees.
pub type Result<T, E = TreeError> = std::result::Result<T, E>;

/// The kind of a failure, for exit codes and hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A system call failed.
    Io,
    /// The caller may not do this: mostly, not root.
    NotPermitted,
    /// Something that was named is not there.
    NotFound,
    /// The disk or the quota is full.
    NoSpace,
    /// The input is no archive of a kind that is known here.
    NotAnArchive,
    /// The input holds nothing.
    Empty,
    /// The input ends too early.
    Truncated,
    /// The input, or a layer, is damaged.
    Damaged,
    /// The input is well formed and asks for what is not done: it points outside, or holds marks.
    Refused,
    /// The input asks for more memory than is given to any input.
    Limit,
    /// The input is a container image where a root file system is asked for.
    Image,
    /// The input is a whole container where a tree of files is asked for.
    WholeContainer,
    /// Source and target lie in one another.
    Overlap,
}

/// A failure on a tree.
#[derive(Debug)]
pub struct TreeError {
    kind: ErrorKind,
    what: String,
    path: Option<PathBuf>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl TreeError {
    /// A failure without a cause below it.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            path: None,
            source: None,
        }
    }

    /// A failure of an input or output; the errno decides the kind.
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

    /// The same failure, said of this path (bytes, as the tree or the archive has it).
    #[must_use]
    pub fn at(mut self, path: impl Into<Vec<u8>>) -> Self {
        self.path = Some(PathBuf::from(std::ffi::OsString::from_vec(path.into())));
        self
    }

    /// The same failure with another cause.
    #[must_use]
    pub fn because(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What was tried or what is wrong.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// What it was tried on: a path in the tree or in the archive (mostly relative).
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

/// Says of a low-level result what was tried and on what.
pub(crate) trait Context<T> {
    /// Turns the error into one with these words and this path.
    fn context(self, what: &str, path: &[u8]) -> Result<T>;

    /// The same with a path whose bytes are put together for an error alone.
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

/// How far a work on a tree has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Entries done: files, folders, links and the rest.
    pub entries: u64,
    /// Bytes of file content done (holes count, so that it adds up to the sizes).
    pub bytes: u64,
    /// About how many bytes there will be in all, where that is known.
    pub total: Option<u64>,
}

/// Is told of progress, now and then and at the end.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

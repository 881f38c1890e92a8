//! Errors and progress of operations on trees.
//!
//! Each error states the attempted operation and the path, and has its cause as source.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::error::Error;
use cowl_layers::error::Errno;
use cowl_layers::shown::Show as _;
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
    /// The file system has no space left, or the quota is exhausted.
    NoSpace,
    /// The file system, or a user with these privileges, cannot store an attribute or an object.
    Unsupported,
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
    message: String,
    path: Option<PathBuf>,
    hint: Option<&'static str>,
    source: Option<Box<dyn StdError + Send + Sync>>,
    /// An error of the manager that replaces this one where errors of trees are converted.
    whole: Option<Box<Error>>,
}

impl TreeError {
    /// Creates an error without a source.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            path: None,
            hint: None,
            source: None,
            whole: None,
        }
    }

    /// Wraps an error of the manager, which a callback of an operation on a tree has returned.
    pub(crate) fn from_error(error: Error) -> Self {
        let kind = match error.is_no_space() {
            true => ErrorKind::NoSpace,
            false => ErrorKind::Io,
        };
        Self {
            whole: Some(Box::new(error)),
            ..Self::new(kind, "")
        }
    }

    /// Returns the error of the manager that this one wraps.
    pub(crate) fn into_error(self) -> std::result::Result<Error, Self> {
        match self.whole {
            Some(error) => Ok(*error),
            None => Err(self),
        }
    }

    /// Creates an error from an I/O error, whose errno determines the kind.
    pub fn io(message: impl Into<String>, source: io::Error) -> Self {
        let kind = source.raw_os_error().map_or_else(
            || match source.kind() {
                io::ErrorKind::UnexpectedEof => ErrorKind::Truncated,
                _ => ErrorKind::Io,
            },
            |raw| kind_of(Errno::from_raw_os_error(raw)),
        );
        Self {
            source: Some(Box::new(source)),
            ..Self::new(kind, message)
        }
    }

    /// Creates an error from an error of a layer or a system call.
    pub(crate) fn from_layers(error: cowl_layers::Error, message: impl Into<String>) -> Self {
        let kind = match error {
            cowl_layers::Error::Errno(errno) => kind_of(errno),
            cowl_layers::Error::Damaged(_) => ErrorKind::Damaged,
        };
        Self::new(kind, message).because(error)
    }

    /// Returns the text without the source, and the source.
    pub(crate) fn into_parts(mut self) -> (String, Option<Box<dyn StdError + Send + Sync>>) {
        let source = self.source.take();
        (self.to_string(), source)
    }

    /// Sets the path, in bytes as in the tree or the archive.
    #[must_use]
    pub fn at(mut self, path: impl Into<Vec<u8>>) -> Self {
        self.path = Some(PathBuf::from(std::ffi::OsString::from_vec(path.into())));
        self
    }

    /// Replaces the kind, where the caller knows the cause better than the errno.
    #[must_use]
    pub(crate) fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Sets the hint, where the caller knows better than the kind of the failure what to do.
    #[must_use]
    pub(crate) fn hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
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

    /// Returns the hint of the caller that detected the failure, if any.
    pub(crate) fn own_hint(&self) -> Option<&'static str> {
        self.hint
    }

    /// Returns the message.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the path in the tree or the archive, which is relative in most cases.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

/// Returns the kind of failure that an errno indicates.
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
        if let Some(error) = &self.whole {
            return error.fmt(f);
        }
        f.write_str(&self.message)?;
        if let Some(path) = &self.path {
            // The root of a tree has an empty relative path, which a reader could not see.
            match path.as_os_str().is_empty() {
                true => f.write_str(": .")?,
                false => write!(f, ": {}", path.shown())?,
            }
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

/// Adds a message and a path to the errors of lower-level operations.
pub(crate) trait Context<T> {
    /// Adds a message and a path.
    fn context(self, message: &str, path: &[u8]) -> Result<T>;

    /// Adds a message and a path whose bytes are assembled only if there is an error.
    fn context_at(self, message: &str, path: &LayerPath) -> Result<T>;
}

impl<T> Context<T> for cowl_layers::error::Result<T> {
    fn context(self, message: &str, path: &[u8]) -> Result<T> {
        self.map_err(|error| TreeError::from_layers(error, message).at(path))
    }

    fn context_at(self, message: &str, path: &LayerPath) -> Result<T> {
        self.or_else(|error| Err(error).context(message, &path.to_bytes()))
    }
}

impl<T> Context<T> for std::result::Result<T, Errno> {
    fn context(self, message: &str, path: &[u8]) -> Result<T> {
        self.map_err(|errno| TreeError::io(message, errno.into()).at(path))
    }

    fn context_at(self, message: &str, path: &LayerPath) -> Result<T> {
        self.or_else(|error| Err(error).context(message, &path.to_bytes()))
    }
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, message: &str, path: &[u8]) -> Result<T> {
        self.map_err(|error| TreeError::io(message, error).at(path))
    }

    fn context_at(self, message: &str, path: &LayerPath) -> Result<T> {
        self.or_else(|error| Err(error).context(message, &path.to_bytes()))
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

impl Progress {
    /// Adds what was completed before this operation. The total is unknown.
    pub fn after(self, before: Self) -> Self {
        Self {
            entries: before.entries + self.entries,
            bytes: before.bytes + self.bytes,
            total: None,
        }
    }
}

/// A callback that receives the progress repeatedly, and at the end.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_knows_that_the_disk_is_full() {
        for errno in [Errno::NOSPC, Errno::DQUOT] {
            let error = TreeError::io("cannot write", errno.into()).at(*b"etc/passwd");
            let text = error.to_string();
            let whole = Error::from(error);
            assert!(whole.is_no_space(), "{text}");
            assert_eq!(whole.to_string(), text);
        }
        let other = TreeError::from_layers(cowl_layers::Error::Errno(Errno::IO), "cannot read");
        let text = other.to_string();
        let whole = Error::from(other);
        assert!(!whole.is_no_space());
        assert_eq!(whole.to_string(), text);
    }

    #[test]
    fn messages_show_the_path_on_one_line() {
        let at = |path: &[u8]| {
            TreeError::new(ErrorKind::Io, "cannot read")
                .at(path)
                .to_string()
        };
        assert_eq!(at(b"etc/passwd"), "cannot read: etc/passwd");
        assert_eq!(at(b"a\n\x1bb"), "cannot read: a\\n\\x1bb");
        assert_eq!(at(b""), "cannot read: .");
    }
}

//! The error type of this crate: a kind, which determines the exit code; a message; a hint; and the cause.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::setup::{SetupError, SetupKind};

use cowl_layers::shown::Show as _;

/// A result of the manager.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of an error. Each has one exit code, on which scripts may rely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A failure of no other kind.
    Failed,
    /// An invalid command line, or an unsuitable file on it.
    Usage,
    /// A container, snapshot, store or image that does not exist.
    NotFound,
    /// An object that a process uses or has locked.
    Busy,
    /// A store whose content differs from what was written to it.
    Damaged,
}

impl Kind {
    /// Returns the kind that `--json` prints as `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [
            Self::Failed,
            Self::Usage,
            Self::NotFound,
            Self::Busy,
            Self::Damaged,
        ]
        .into_iter()
        .find(|kind| kind.name() == name)
    }

    /// Returns the exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Busy => 4,
            Self::Damaged => 5,
        }
    }

    /// Returns the name that `--json` prints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::Busy => "busy",
            Self::Damaged => "damaged",
        }
    }
}

/// An error of the manager.
#[derive(Debug)]
pub struct Error {
    /// The kind.
    pub kind: Kind,
    /// The message: the failed operation, and the object that it failed on.
    pub what: String,
    /// The remedy, as an imperative sentence or a command.
    pub hint: Option<String>,
    /// The underlying error.
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Creates an error without a hint and without a cause.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            hint: None,
            source: None,
        }
    }

    /// Creates an error of kind [`Kind::Failed`].
    pub fn failed(what: impl Into<String>) -> Self {
        Self::new(Kind::Failed, what)
    }

    /// Creates an error of kind [`Kind::Usage`].
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what)
    }

    /// Creates an error of kind [`Kind::NotFound`].
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, what)
    }

    /// Creates an error of kind [`Kind::Busy`].
    pub fn busy(what: impl Into<String>) -> Self {
        Self::new(Kind::Busy, what)
    }

    /// Creates an error of kind [`Kind::Damaged`].
    pub fn damaged(what: impl Into<String>) -> Self {
        Self::new(Kind::Damaged, what)
    }

    /// Creates an error for a failed system call on `path`: "cannot read /x/y".
    pub fn at(verb: &str, path: &Path, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::failed(format!("cannot {verb} {}", path.shown())).because(source)
    }

    /// Returns whether the cause is a full disk or an exhausted quota.
    pub fn is_no_space(&self) -> bool {
        let full = |errno: Errno| matches!(errno, Errno::NOSPC | Errno::DQUOT);
        let mut cause: Option<&(dyn StdError + 'static)> = match &self.source {
            Some(source) => Some(source.as_ref()),
            None => None,
        };
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<std::io::Error>() {
                let raw = error.raw_os_error().map(Errno::from_raw_os_error);
                return raw.is_some_and(full);
            }
            if let Some(error) = error.downcast_ref::<Errno>() {
                return full(*error);
            }
            if let Some(cowl_layers::Error::Errno(errno)) =
                error.downcast_ref::<cowl_layers::Error>()
            {
                return full(*errno);
            }
            if let Some(error) = error.downcast_ref::<Self>()
                && error.is_no_space()
            {
                return true;
            }
            cause = error.source();
        }
        false
    }

    /// Replaces the hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Replaces the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        let mut cause: Option<&dyn StdError> = self.source.as_deref().map(|s| s as &dyn StdError);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl StdError for Error {}

impl From<SetupError> for Error {
    fn from(error: SetupError) -> Self {
        let kind = match error.kind {
            SetupKind::Usage => Kind::Usage,
            SetupKind::Busy => Kind::Busy,
            SetupKind::Host => Kind::Failed,
            SetupKind::Damaged => Kind::Damaged,
        };
        let mut new = Self::new(kind, error.message);
        if !error.hint.is_empty() {
            new = new.hint(error.hint);
        }
        match error.source {
            Some(source) => new.because(source),
            None => new,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_chain_of_causes_is_displayed() {
        let io = std::io::Error::other("the disk is full");
        let error = Error::at("write", Path::new("/x"), io).hint("free some space");
        assert_eq!(error.to_string(), "cannot write /x: the disk is full");
        assert_eq!(error.kind.code(), 1);
    }
}

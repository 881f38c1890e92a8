//! What goes wrong, for people and for scripts: a kind (which is the exit code), what happened, what to
//! do next, and the error below. Every room of this crate answers with it.

use std::error::Error as StdError;
use std::fmt;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::setup::{SetupError, SetupKind};

use cowl_layers::shown::Show as _;

/// A result of the manager.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is. Each has one exit code, and scripts may rely on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Something failed that no other kind names.
    Failed,
    /// The command line, or a file that it names, can't be used like this.
    Usage,
    /// There is no such container, snapshot or store.
    NotFound,
    /// Somebody uses it, or holds its lock.
    Busy,
    /// What the store holds is not what was written there.
    Damaged,
}

impl Kind {
    /// The kind of this name.
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

    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Busy => 4,
            Self::Damaged => 5,
        }
    }

    /// The name that `--json` prints.
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

/// A failure.
#[derive(Debug)]
pub struct Error {
    /// The sort.
    pub kind: Kind,
    /// What happened, naming the thing it happened to.
    pub what: String,
    /// What to do next.
    pub hint: Option<String>,
    /// Why, where another error is the cause.
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A failure of this kind.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            hint: None,
            source: None,
        }
    }

    /// A plain failure.
    pub fn failed(what: impl Into<String>) -> Self {
        Self::new(Kind::Failed, what)
    }

    /// A wrong use.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what)
    }

    /// Something that is not there.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, what)
    }

    /// Something in use.
    pub fn busy(what: impl Into<String>) -> Self {
        Self::new(Kind::Busy, what)
    }

    /// Something damaged.
    pub fn damaged(what: impl Into<String>) -> Self {
        Self::new(Kind::Damaged, what)
    }

    /// A call on `path` that failed: "cannot read /x/y".
    pub fn at(verb: &str, path: &Path, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::failed(format!("cannot {verb} {}", path.shown())).because(source)
    }

    /// Whether the disk, or somebody's part of it, is full.
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

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with a cause.
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
    fn the_whole_chain_of_causes_is_told() {
        let io = std::io::Error::other("the disk is full");
        let error = Error::at("write", Path::new("/x"), io).hint("make room");
        assert_eq!(error.to_string(), "cannot write /x: the disk is full");
        assert_eq!(error.kind.code(), 1);
    }
}

//! Why a mount could not be made: for people, with what, which path, and what to do.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::shown::Show as _;

/// What kind of trouble it is; the manager maps it to its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetupKind {
    /// A wrong option or a path that can't serve.
    Usage,
    /// Somebody else uses a layer.
    Busy,
    /// The machine lacks something, or a right is missing.
    Host,
    /// The layers hold what they must not.
    Damaged,
}

/// Why a mount could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{what}{}{}", .source.map(|e| format!(": {e}")).unwrap_or_default(), if .hint.is_empty() { String::new() } else { format!(" ({})", .hint) })]
pub struct SetupError {
    /// The kind.
    pub kind: SetupKind,
    /// What went wrong, with the path.
    pub what: String,
    /// What to do next; may be empty.
    pub hint: String,
    /// The error below, where there is one.
    #[source]
    pub source: Option<Error>,
}

impl SetupError {
    /// An error without a cause below.
    pub fn new(kind: SetupKind, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            hint: hint.into(),
            source: None,
        }
    }

    /// An error of a call on `path`.
    pub fn at(what: &str, path: &Path, source: impl Into<Error>) -> Self {
        let source = source.into();
        let kind = match source {
            Error::Damaged(_) => SetupKind::Damaged,
            Error::Errno(_) => SetupKind::Host,
        };
        Self {
            kind,
            what: format!("{what} {}", path.shown()),
            hint: String::new(),
            source: Some(source),
        }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The same with another kind.
    #[must_use]
    pub fn kind(mut self, kind: SetupKind) -> Self {
        self.kind = kind;
        self
    }
}

/// A path for a message.
pub fn shown(path: &Path) -> String {
    PathBuf::from(path).shown().to_string()
}

//! Errors of mounting, for display: the failed step, the path, the cause and a hint.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::shown::Show as _;

/// The category of a [`SetupError`]; `cowl` maps it to an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetupKind {
    /// An invalid option or an unsuitable path.
    Usage,
    /// Another mount uses a layer.
    Busy,
    /// The host lacks a feature, or this process lacks a privilege.
    Host,
    /// A layer violates the on-disk format.
    Damaged,
}

/// An error that prevented a mount.
#[derive(Debug, thiserror::Error)]
#[error(
    "{message}{}{}",
    .source.map(|e| format!(": {e}")).unwrap_or_default(),
    if .hint.is_empty() { String::new() } else { format!(" ({})", .hint) }
)]
pub struct SetupError {
    /// The category.
    pub kind: SetupKind,
    /// The failed step, with the path.
    pub message: String,
    /// The remedy, as an imperative sentence; may be empty.
    pub hint: String,
    /// The underlying error, if any.
    #[source]
    pub source: Option<Error>,
}

impl SetupError {
    /// Creates an error without an underlying one.
    pub fn new(kind: SetupKind, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: hint.into(),
            source: None,
        }
    }

    /// Creates an error from a failed system call: `step` (such as "cannot open"), and the `path` that it failed on.
    pub fn at(step: &str, path: &Path, source: impl Into<Error>) -> Self {
        let source = source.into();
        let kind = match source {
            Error::Damaged(_) => SetupKind::Damaged,
            Error::Errno(_) => SetupKind::Host,
        };
        Self {
            kind,
            message: format!("{step} {}", path.shown()),
            hint: String::new(),
            source: Some(source),
        }
    }

    /// Replaces the hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Replaces the category.
    #[must_use]
    pub fn kind(mut self, kind: SetupKind) -> Self {
        self.kind = kind;
        self
    }
}

/// Returns a path in its displayable form.
pub fn shown(path: &Path) -> String {
    PathBuf::from(path).shown().to_string()
}

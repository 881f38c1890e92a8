//! Errors of requests, and the status codes that containerd maps them to.

use cowl::Kind;
use cowl_layers::shown::Show as _;
use tonic::{Code, Status};

/// A result of a request.
pub(crate) type Result<T, E = RequestError> = std::result::Result<T, E>;

/// An error of a request. containerd's `errdefs` distinguishes these kinds.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// The snapshot does not exist.
    #[error("the snapshot {} does not exist", .0.shown())]
    NotFound(String),
    /// A snapshot with this key exists.
    #[error("the snapshot {} already exists", .0.shown())]
    AlreadyExists(String),
    /// The state of a snapshot does not permit the operation.
    #[error("{0}")]
    Precondition(String),
    /// The request is not valid.
    #[error("{0}")]
    Invalid(String),
    /// Another request has to finish first.
    #[error("{0}")]
    Unavailable(String),
    /// The result of an earlier request on this key is unknown.
    #[error("the state of the snapshot {} is unknown: restart cowl-snapshotter when the store can be read", .0.shown())]
    Unknown(String),
    /// An operation on the store failed.
    #[error("{}", with_hint(.0))]
    Store(#[from] cowl::Error),
}

fn with_hint(error: &cowl::Error) -> String {
    match &error.hint {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

impl RequestError {
    /// Returns the error for a snapshot that is in use: containerd keeps what cannot be removed, and retries later.
    pub(crate) fn in_use(error: cowl::Error) -> Self {
        match error.kind {
            Kind::Busy => Self::Precondition(with_hint(&error)),
            _ => Self::Store(error),
        }
    }

    /// Returns the error for a snapshot that remains although its removal was requested, for whatever reason.
    ///
    /// After any other code, containerd ends its garbage collection, so that one snapshot would retain the space of all.
    pub(crate) fn not_removed(error: &cowl::Error) -> Self {
        Self::Precondition(with_hint(error))
    }

    /// Returns the error for a request that has waited too long for another one on the key.
    pub(crate) fn still_running(key: &str) -> Self {
        Self::Unavailable(format!(
            "another request on the snapshot {} is still running",
            key.shown()
        ))
    }

    /// Returns the error for a removal that could not begin, with the same code if it may succeed later.
    pub(crate) fn removal_not_begun(self) -> Self {
        match self {
            Self::Unavailable(_) | Self::Unknown(_) => Self::Precondition(self.to_string()),
            other => other,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::Precondition(_) => Code::FailedPrecondition,
            Self::Invalid(_) => Code::InvalidArgument,
            // Not NOT_FOUND: containerd would create the snapshot again.
            Self::Unavailable(_) | Self::Unknown(_) => Code::Unavailable,
            Self::Store(error) => match error.kind {
                Kind::NotFound => Code::NotFound,
                Kind::Usage => Code::InvalidArgument,
                Kind::Busy => Code::Unavailable,
                Kind::Damaged => Code::DataLoss,
                Kind::Failed if error.is_no_space() => Code::ResourceExhausted,
                Kind::Failed => Code::Unknown,
            },
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_store_have_the_codes_that_containerd_expects() {
        let status = |error: RequestError| Status::from(error);
        for (kind, code) in [
            (Kind::NotFound, Code::NotFound),
            (Kind::Busy, Code::Unavailable),
            (Kind::Usage, Code::InvalidArgument),
            (Kind::Failed, Code::Unknown),
        ] {
            let error = cowl::Error::new(kind, "x").hint("do y");
            let status = status(error.into());
            assert_eq!((status.code(), status.message()), (code, "x; do y"));
        }
        let busy = RequestError::in_use(cowl::Error::busy("x"));
        assert_eq!(status(busy).code(), Code::FailedPrecondition);
        let damaged = RequestError::not_removed(&cowl::Error::damaged("x").hint("do y"));
        let damaged = status(damaged);
        assert_eq!(
            (damaged.code(), damaged.message()),
            (Code::FailedPrecondition, "x; do y")
        );
        let unknown = || RequestError::Unknown("x".to_owned());
        assert_eq!(status(unknown()).code(), Code::Unavailable);
        let unknown = status(unknown().removal_not_begun());
        assert_eq!(unknown.code(), Code::FailedPrecondition);
        assert!(unknown.message().contains("restart cowl-snapshotter"));
        let odd = status(RequestError::NotFound("a\n\u{1b}[31m".to_owned()));
        assert!(!odd.message().contains(['\n', '\u{1b}']), "{odd}");
    }
}

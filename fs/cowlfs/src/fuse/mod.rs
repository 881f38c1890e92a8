//! The FUSE protocol: the only module that uses the crate `fuser`.
//!
//! Imports run one way: `session` starts `adapter`, which turns requests into calls of the overlay and results into
//! replies. For each open it asks `passthrough` whether the kernel reads and writes the file without the daemon, and
//! it reports each request to `workers`, which decides how many threads wait for requests. `settings` has the settings
//! of a session. `handover` records a running session for another process, in which `session` continues it.

mod adapter;
mod handover;
mod passthrough;
mod session;
mod settings;
mod workers;

pub(crate) use adapter::{Negotiated, RecoveredValues};
pub(crate) use handover::{PassthroughFiles, SessionRecord, SessionSource};
pub(crate) use passthrough::PassthroughRefusal;
pub(crate) use session::{
    Attached, Predecessor, SessionError, WORKER_NAME, begin, open_device, prepare, resume,
};
pub(crate) use settings::{SessionSettings, StackMode};
pub(crate) use workers::ClosedGate;

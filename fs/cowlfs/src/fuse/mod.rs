//! The FUSE protocol: the only module that knows the crate `fuser`.
//!
//! Imports run one way: `session` starts `adapter`, which turns requests into calls of the overlay and results into
//! replies; it asks `passthrough` which files the kernel handles by itself, and reports each request to `workers`,
//! which decides how many threads wait for requests. `serving` has the settings of a session.

mod adapter;
mod passthrough;
mod serving;
mod session;
mod workers;

pub(crate) use serving::Serving;
pub(crate) use session::{SessionError, open_device, prepare};

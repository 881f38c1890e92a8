//! The FUSE protocol: the only room that knows the crate `fuser`. A handler turns a request into one
//! call of the overlay and its result into one reply; nothing is decided here.

mod adapter;
mod attributes;
mod convert;
mod crew;
mod handles;
mod listing;
mod opening;
mod passthrough;
mod policy;
mod reply;
mod session;
mod turn;
mod watch;

pub(crate) use session::{Serving, SessionError, open_device, prepare};

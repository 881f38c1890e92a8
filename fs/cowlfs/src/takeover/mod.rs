//! Replacing a daemon by another process while its mount is in use (docs/decisions/0034).
//!
//! The running daemon is the predecessor. It starts the successor, a process of the installed program, as its child with
//! a socket as standard input, stops all requests, and sends a [`Bundle`]: its state and its descriptors. When the
//! successor has rebuilt everything, it reports that it is ready, and the predecessor exits at once. Until then the
//! predecessor can continue, and does so after any error.
//!
//! `bundle` is the state and its encoding, `transfer` the messages, `predecessor` the side of the running daemon; the
//! other side is in [`crate::serve`].

mod bundle;
mod config;
mod predecessor;
mod transfer;

pub(crate) use bundle::{Arbiter, Bundle, DescriptorCounts, Origin};
pub(crate) use config::ConfigRecord;
pub(crate) use predecessor::Predecessor;
pub(crate) use transfer::{Answer, receive_bundle, send_answer, send_hello};

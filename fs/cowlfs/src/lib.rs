//! cowlfs: the daemon that serves an overlay through FUSE.
//!
//! The modules, from the bottom up; imports go down only:
//!
//! - [`choices`], [`config`], [`requests`], [`logging`]: options of a mount, request counters, and the log.
//! - `fuse`: the protocol.
//! - [`control`]: the control socket.
//! - `takeover`: replacing the daemon by another process.
//! - [`serve()`]: a mount from its options to its end.
//! - [`cli`]: the command line.

pub mod choices;
pub mod cli;
pub mod config;
pub mod control;
mod fuse;
mod keeper;
mod limits;
pub mod logging;
pub mod requests;
mod serve;
mod start;
mod takeover;

pub use keeper::GiveUp;
pub use serve::{PassedMount, Takeover, remount, serve, serve_passed};
pub use start::Event;

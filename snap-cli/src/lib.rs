//! cowl: snapshots for containers that are stacks of layers on cowlfs.
//!
//! One idea carries it: only the topmost layer of a stack is ever written, and every change of a stack is
//! one atomic rename of one small file. So a snapshot costs a few folders, a restore moves no data, and
//! what was there before is not touched until nothing names it.
//!
//! The rooms; imports run from the top down only:
//!
//! - [`cli`]: verbs, output, exit codes. A few lines each over the library.
//! - [`container`], [`snapshot`]: what can be done.
//! - [`check`]: whether all that is there holds together.
//! - [`lxc`]: LXC's containers, their config files, and the snapshots that LXC's tools made.
//! - [`archive`]: trees in and out.
//! - [`delta`]: differences between states: comparing, patches, merging, restoring.
//! - [`tree`]: the toolkit for trees: walking, reading, creating, hashing.
//! - [`host`]: the machine outside: mounts, processes, scripts of the machine's owner.
//! - [`config`]: what was set once for all commands.
//! - [`store`]: where things lie, what the files say, locks, cleaning up.
//! - [`shell`]: quoting of words.
//! - [`error`]: kinds and exit codes.

pub mod archive;
pub mod check;
pub mod cli;
pub mod config;
pub mod container;
pub mod delta;
pub mod error;
pub mod host;
pub mod lxc;
pub mod shell;
pub mod snapshot;
pub mod store;
pub mod tree;

pub use error::{Error, Kind, Result};

//! cowl: snapshots for containers that are stacks of layers on cowlfs.
//!
//! One idea carries it: only the topmost layer of a stack is ever written, and every change of a stack is
//! one atomic rename of one small file. So a snapshot costs a few folders, a restore moves no data, and
//! what was there before is not touched until nothing names it.
//!
//! The modules, from top to bottom; each imports only from those below it:
//!
//! - [`cli`]: commands, output, exit codes. A few lines each over the library.
//! - [`check`]: verification and repair of a store.
//! - [`lifecycle`]: creating, cloning, adopting, exporting, serving: what opens containers by name.
//! - [`recover`]: opening a container; completion or rollback of what was interrupted.
//! - [`snapshot`]: taking, restoring, pruning, comparing and merging the states of an open container.
//! - [`container`]: one container: its lock, its manifest and commits, its mount, its durability.
//! - [`lxc`]: LXC's containers, their config files, and the snapshots that LXC's tools made.
//! - [`config`]: settings for all commands.
//! - [`store`]: paths, manifests, locks, garbage collection.
//! - [`archive`]: trees in and out.
//! - [`delta`]: differences between states: comparing, patches, merging, restoring.
//! - [`tree`]: the toolkit for trees: walking, reading, creating, hashing.
//! - [`host`]: the machine outside: mounts, processes, scripts of the machine's owner.
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
pub mod lifecycle;
pub mod lxc;
pub mod recover;
pub mod shell;
pub mod snapshot;
pub mod store;
pub mod tree;

pub use error::{Error, Kind, Result};

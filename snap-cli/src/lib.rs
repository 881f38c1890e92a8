//! cowl: snapshots for containers that are stacks of layers on cowlfs.
//!
//! Only the top layer of a stack is ever written, and every change of a stack is one atomic rename of one small file.
//! So a snapshot costs a few directories, a restore moves no data, and the previous state is not modified until no
//! manifest refers to it.
//!
//! The modules, from top to bottom; each imports only from those below it:
//!
//! - [`cli`]: commands, output, exit codes. Each command is a few lines over the library.
//! - [`check`]: verification and repair of a store.
//! - [`lifecycle`]: operations that open containers by name: creating, cloning, adopting, exporting, serving.
//! - [`recover`]: opening a container; completion or rollback of interrupted operations.
//! - [`snapshot`]: taking, restoring, pruning, comparing and merging the states of an open container.
//! - [`container`]: one container: its lock, its manifest and commits, its mount, its durability.
//! - [`lxc`]: LXC's containers, their config files, and the snapshots that LXC's tools took.
//! - [`config`]: settings for all commands.
//! - [`registry`]: registries of container images.
//! - [`store`]: paths, manifests, locks, garbage collection.
//! - [`archive`]: import and export of trees.
//! - [`delta`]: differences between states: comparing, patches, merging, restoring.
//! - [`tree`]: a toolkit for trees: walking, reading, creating, hashing.
//! - [`host`]: the machine: mounts, processes, the administrator's hooks.
//! - [`shell`]: quoting of words.
//! - [`error`]: kinds of errors and their exit codes.
//! - `wait`: waiting by polling.

pub mod archive;
pub mod check;
pub mod cli;
pub mod config;
pub mod container;
pub mod delta;
pub mod doctor;
pub mod error;
pub mod host;
pub mod lifecycle;
pub mod lxc;
pub mod recover;
pub mod registry;
pub mod shell;
pub mod snapshot;
pub mod store;
pub mod tree;
mod wait;

pub use error::{Error, Kind, Result};

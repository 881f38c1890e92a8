//! cowlfs: a copy-on-write overlay file system in kernel overlayfs's on-disk format.
//!
//! The rooms, from the bottom up; imports run upwards only:
//!
//! - [`name`], [`error`], [`setup`], [`idmap`], [`shown`]: what everybody speaks of.
//! - [`sys`]: calls to the kernel, nothing about layers. The only room with `unsafe`.
//! - [`format`]: what the marks look like on disk. Pure.
//! - [`layer`]: one tree, no merging.
//! - [`view`]: what a stack of trees shows, read-only, without a mount.
//! - [`inode`]: what is kept of the objects that somebody looked up.
//! - [`overlay`]: what every operation means, in process.
//! - `fuse`: the protocol.
//! - [`config`], [`cli`], [`control`], [`requests`], [`serve()`]: the daemon around it.

pub mod cli;
pub mod config;
pub mod control;
pub mod error;
pub mod format;
mod fuse;
pub mod idmap;
pub mod inode;
pub mod layer;
pub mod logging;
pub mod name;
pub mod overlay;
pub mod requests;
mod serve;
pub mod setup;
pub mod shown;
pub mod sys;
pub mod view;

pub use error::{Error, Result};
pub use name::Name;
pub use serve::{remount, serve};

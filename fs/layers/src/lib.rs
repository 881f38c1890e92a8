//! Layer directories in kernel overlayfs's on-disk format, without FUSE and without policy.
//!
//! The modules, from the bottom up; imports go down only:
//!
//! - [`name`], [`error`], [`shown`], [`setup`]: names, errors, and text for a terminal.
//! - [`sys`]: system calls that know nothing of layers. The only module with `unsafe`.
//! - [`format`]: the marks as they are on disk. Pure.
//! - [`layer`]: one layer, no merging.
//! - [`view`]: the merged content of several layers, read-only, without a mount.

pub mod error;
pub mod format;
pub mod layer;
pub mod name;
pub mod setup;
pub mod shown;
pub mod sys;
pub mod view;

pub use error::{Error, Result};
pub use name::Name;

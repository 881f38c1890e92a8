//! Layer directories in kernel overlayfs's on-disk format, without FUSE and without policy.
//!
//! The modules, from the bottom up. A module imports only from those above it in this list:
//!
//! - [`name`], [`error`], [`shown`], [`setup`]: names, errors, and their escaping for display.
//! - [`panics`], [`locks`]: the end of a request or of the process after a panic.
//! - [`points`]: named points at which a test ends the process.
//! - [`sys`]: system calls, without any knowledge of layers. The only module with `unsafe`.
//! - [`format`]: the on-disk encoding of markers. Pure functions, no I/O.
//! - [`layer`]: a single layer, without merging.
//! - [`view`]: the merged content of several layers, read-only, without a mount.

pub mod error;
pub mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod layer;
pub mod locks;
pub mod name;
pub mod panics;
pub mod points;
pub mod setup;
pub mod shown;
pub mod sys;
pub mod view;

pub use error::{Error, Result};
pub use name::Name;

//! The record of state: what another process needs in order to continue to serve a mount (docs/format.md,
//! docs/decisions/0030).
//!
//! It is taken on demand, while no operation runs, and consists of bytes and of descriptors: those of the layers, and of
//! objects that have no name. Each module describes its own part of the state (`record.rs`, `to_record`), takes its
//! structures apart completely, and so decides about every field.
//!
//! Not recorded are caches: facts about objects, cached listings and names, descriptors of directories and of open
//! files' content, and counted links. Without them the same answers take longer.

mod capture;
mod descriptors;
mod format;
mod parts;
mod rebuild;
mod recover;
mod search;
mod sorted;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use recover::{Estate, Inheritance, Recovered};

pub use self::parts::HandoverRecord;
use cowl_layers::error::Error;
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::layer::{Layer, Upper};

use crate::content::FileHandle;
use crate::overlay::Overlay;
use crate::reach::OverlayOptions;

/// The state of an overlay, from which [`Overlay::rebuild`] creates an equal one.
#[derive(Debug)]
pub struct Handover {
    /// The encoded record.
    pub record: Vec<u8>,
    /// The descriptors of objects without a name, by the indices in the record.
    pub descriptors: Vec<Arc<OwnedFd>>,
    /// The layers in the order of the record: the stack, topmost first; the data-only layers; those that are in use
    /// although they are not in the stack any more.
    pub layers: Vec<Arc<Layer>>,
    /// The upper layer, whose [`Upper::layer`] is the first of `layers`.
    pub upper: Option<Arc<Upper>>,
    /// The locks of the layers in the stack.
    pub locks: Vec<Arc<LayerLock>>,
    /// The layers that are in use although they are not in the stack any more, with their locks.
    pub retained: Vec<(Arc<Layer>, Arc<LayerLock>)>,
    /// The options of the mount.
    pub options: OverlayOptions,
}

/// An overlay that was created from a record.
#[derive(Debug)]
pub struct Rebuilt {
    /// The overlay.
    pub overlay: Overlay,
    /// The open files, by the numbers that [`Overlay::record`] got.
    pub files: HashMap<u64, Arc<FileHandle>>,
}

/// The reason why a record could not be taken or used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Running operations did not end before the timeout.
    #[error("operations were running for ten seconds without a pause")]
    TooBusy,
    /// The bytes are not a record.
    #[error("the record of state is damaged: {0}")]
    Damaged(&'static str),
    /// The record has another version.
    #[error("the record of state has version {found}; this program reads version {known}")]
    Version {
        /// The version of the record.
        found: u32,
        /// The version that this program reads.
        known: u32,
    },
    /// The layers are not those of the record.
    #[error("the layers are not those of the record of state")]
    Layers,
    /// An object is not where the record says.
    #[error("inode {ino} is not in the layers as recorded: {error}")]
    Inode {
        /// The inode number.
        ino: u64,
        /// The error.
        error: Error,
    },
    /// A descriptor that was handed over refers to another object than the recorded one.
    #[error("descriptor {index} is not the recorded object of inode {ino}")]
    Descriptor {
        /// The inode number.
        ino: u64,
        /// The index in [`Handover::descriptors`].
        index: usize,
    },
    /// A layer cannot be read.
    #[error("cannot read the layers: {0}")]
    Io(#[from] Error),
}

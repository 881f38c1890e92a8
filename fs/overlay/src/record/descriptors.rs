//! Verification of the descriptors that were handed over.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowl_layers::error::Error;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;

use super::RecordError;
use super::format::Record;
use crate::inode::{DirPlace, Identity, Place};

/// Verifies that each descriptor refers to the recorded object: device, inode number and type.
///
/// Such an object has no name by which it could be verified later, so operations on its inode would change another
/// object.
pub(super) fn verify_descriptors(
    record: &Record,
    descriptors: &[Arc<OwnedFd>],
) -> Result<(), RecordError> {
    for (inode, place) in record.inodes.iter().zip(&record.places) {
        let ino = inode.ino;
        let verify = |index: usize, object: Identity, kind: FileKind| {
            let missing = Error::Damaged("a descriptor that was not handed over");
            let found = descriptors
                .get(index)
                .ok_or(missing)
                .and_then(|fd| sys::stat::stat_fd(&**fd))
                .map_err(|error| RecordError::Inode { ino, error })?;
            match Identity::from_stat(&found) == object && found.kind() == kind {
                true => Ok(()),
                false => Err(RecordError::Descriptor { ino, index }),
            }
        };
        match place {
            Place::Nameless(file) => {
                if let Some(index) = file.descriptor {
                    verify(index, inode.identity, inode.kind)?;
                }
            }
            Place::RemovedDir { locations, .. } => {
                for location in locations {
                    if let DirPlace::Removed(_, object, index) = location {
                        verify(*index, *object, FileKind::Directory)?;
                    }
                }
            }
            Place::Root | Place::Dir(_) | Place::File(_) => {}
        }
    }
    Ok(())
}

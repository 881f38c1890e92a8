//! The state of passthrough, for a process that continues the session.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cowl_layers::locks::Mutex;
use lru::LruCache;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::backing::{Backing, BackingDevice};
use super::policy::Policy;
use super::{BackingFiles, FileState, RegisteredFile, Table};

/// The state of [`BackingFiles`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::fuse) struct BackingRecord {
    is_unsupported: bool,
    files: Vec<(u64, FileRecord)>,
    /// The files that are not open and have a backing file, the least recently used first.
    idle: Vec<u64>,
    refused_devices: Vec<u64>,
}

/// The state of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    opens: u32,
    is_passthrough: bool,
    /// The id of the registration, and the version of its content.
    backing: Option<(u32, u32)>,
    has_writer: bool,
    has_stale_pages: bool,
    has_volatile_attr: bool,
}

impl BackingFiles {
    /// Records the state. No request may be running.
    pub(in crate::fuse) fn record(&self) -> BackingRecord {
        let Self {
            // They follow from the options of the mount.
            policy: _,
            device: _,
            is_unsupported,
            // In the record of the overlay.
            writers: _,
            table,
        } = self;
        let table = table.lock();
        let Table {
            files,
            idle,
            refused_devices,
        } = &*table;
        BackingRecord {
            is_unsupported: is_unsupported.load(Ordering::Relaxed),
            files: files
                .iter()
                .map(|(ino, file)| (*ino, file.record()))
                .collect(),
            idle: idle.iter().rev().map(|(ino, ())| *ino).collect(),
            refused_devices: refused_devices.clone(),
        }
    }

    /// Continues from a record. `writers` must be the counter of an overlay from the same moment.
    pub(in crate::fuse) fn from_record(
        record: BackingRecord,
        policy: Policy,
        writers: Arc<AtomicU32>,
        device: BackingDevice,
    ) -> Self {
        let BackingRecord {
            is_unsupported,
            files,
            idle: order,
            refused_devices,
        } = record;
        let device = Arc::new(device);
        let files: FxHashMap<u64, FileState> = files
            .into_iter()
            .map(|(ino, file)| (ino, file.into_state(&device)))
            .collect();
        let mut idle = LruCache::unbounded();
        for ino in order {
            idle.put(ino, ());
        }
        Self {
            policy,
            device,
            is_unsupported: AtomicBool::new(is_unsupported),
            writers,
            table: Mutex::new(Table {
                files,
                idle,
                refused_devices,
            }),
        }
    }

    /// Makes the registrations those of this process, whose predecessor has ended.
    pub(in crate::fuse) fn assume(&self) {
        self.device.assume();
    }
}

impl FileState {
    fn record(&self) -> FileRecord {
        let Self {
            opens,
            // Only for the rare case that a file cannot be registered.
            uncounted: _,
            is_passthrough,
            backing,
            has_writer,
            has_stale_pages,
            has_volatile_attr,
        } = self;
        FileRecord {
            opens: *opens,
            is_passthrough: *is_passthrough,
            backing: backing.as_ref().map(|file| (file.id.id(), file.version)),
            has_writer: *has_writer,
            has_stale_pages: *has_stale_pages,
            has_volatile_attr: *has_volatile_attr,
        }
    }
}

impl FileRecord {
    fn into_state(self, device: &Arc<BackingDevice>) -> FileState {
        FileState {
            opens: self.opens,
            uncounted: 0,
            is_passthrough: self.is_passthrough,
            backing: self.backing.map(|(id, version)| RegisteredFile {
                id: Arc::new(Backing::registered(device, id)),
                version,
            }),
            has_writer: self.has_writer,
            has_stale_pages: self.has_stale_pages,
            has_volatile_attr: self.has_volatile_attr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_survives_and_registrations_stay_with_the_predecessor() {
        let record = BackingRecord {
            is_unsupported: false,
            files: vec![(
                7,
                FileRecord {
                    opens: 0,
                    is_passthrough: false,
                    backing: Some((3, 1)),
                    has_writer: true,
                    has_stale_pages: true,
                    has_volatile_attr: false,
                },
            )],
            idle: vec![7, 9, 8],
            refused_devices: vec![5],
        };
        let null = std::fs::File::open("/dev/null").unwrap().into();
        let device = BackingDevice::of_predecessor(null);
        let writers = Arc::new(AtomicU32::new(1));
        let files = BackingFiles::from_record(record.clone(), Policy::OFF, writers, device);
        assert_eq!(files.record(), record);
    }
}

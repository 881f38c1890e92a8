//! The part of the record of state about inodes (docs/format.md): everything that an inode is, except where its object
//! is on disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use cowl_layers::locks::{Mutex, RwLock};
use cowl_layers::sys::stat::{FileKind, Time};

use super::flags::{Facts, Flags};
use super::identity::Identity;
use super::object::{ByKind, Inode, InodeState, TimesOverride};

/// Seconds since 1970 and nanoseconds.
pub(super) type TimeRecord = (i64, u32);

/// An inode, without the location of its object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InodeRecord {
    /// The inode number.
    pub(crate) ino: u64,
    /// The object on disk.
    pub(crate) identity: Identity,
    /// The kernel's lookup count.
    pub(crate) lookups: u32,
    kind: KindRecord,
    flags: u8,
    times: Option<TimesRecord>,
    times_version: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum KindRecord {
    Directory {
        generation: u32,
        /// The time of the last removal of a name, in seconds since the machine started; 0 for never.
        last_removal: u32,
    },
    Regular {
        version: u32,
    },
    Symlink {
        version: u32,
    },
    Fifo {
        version: u32,
    },
    Socket {
        version: u32,
    },
    CharDevice {
        version: u32,
    },
    BlockDevice {
        version: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum TimesRecord {
    Always {
        ctime: TimeRecord,
        mtime: Option<TimeRecord>,
    },
    WhileCtime {
        real: TimeRecord,
        visible: TimeRecord,
    },
}

pub(super) fn time_record(time: Time) -> TimeRecord {
    (time.secs, time.nanos)
}

pub(super) fn recorded_time((secs, nanos): TimeRecord) -> Time {
    Time { secs, nanos }
}

impl Inode {
    /// Returns the record of the inode, which has this lookup count.
    ///
    /// The structure is taken apart completely, so that a new field does not compile until it is recorded or its loss
    /// is justified.
    pub(crate) fn record(&self, lookups: u32) -> InodeRecord {
        let Self {
            ino,
            // The location is recorded by the caller, from the state.
            state: _,
            by_kind,
            // Only a cache.
            facts: _,
            times,
            times_version,
        } = self;
        let (kind, flags) = match by_kind {
            ByKind::Dir {
                // No operation runs, so no lock is held.
                copying: _,
                flags,
                names: _,
                generation,
                last_removal,
            } => {
                let kind = KindRecord::Directory {
                    generation: generation.load(Ordering::Acquire),
                    last_removal: last_removal.load(Ordering::Relaxed),
                };
                (kind, flags)
            }
            ByKind::File {
                copying: _,
                flags,
                kind,
                version,
                // The open files of the record determine them.
                writers: _,
                execs: _,
            } => {
                let version = version.load(Ordering::Acquire);
                (KindRecord::of_file(*kind, version), flags)
            }
        };
        let times = times.lock().as_deref().map(|times| match *times {
            TimesOverride::Always { ctime, mtime } => TimesRecord::Always {
                ctime: time_record(ctime),
                mtime: mtime.map(time_record),
            },
            TimesOverride::WhileCtime { real, visible } => TimesRecord::WhileCtime {
                real: time_record(real),
                visible: time_record(visible),
            },
        });
        InodeRecord {
            ino: *ino,
            identity: self.identity(),
            lookups,
            kind,
            flags: flags.bits(),
            times,
            times_version: times_version.load(Ordering::Acquire),
        }
    }

    /// Creates the inode of a record, whose object is at the location in `state`.
    pub(crate) fn from_record(record: &InodeRecord, state: InodeState) -> Arc<Self> {
        let (copying, flags) = (Mutex::new(()), Flags::from_bits(record.flags));
        let by_kind = match record.kind {
            KindRecord::Directory {
                generation,
                last_removal,
            } => ByKind::Dir {
                copying,
                flags,
                names: Mutex::new(()),
                generation: AtomicU32::new(generation),
                last_removal: AtomicU32::new(last_removal),
            },
            file => ByKind::File {
                copying,
                flags,
                kind: file.kind(),
                version: AtomicU32::new(file.version()),
                writers: AtomicU32::new(0),
                execs: AtomicU32::new(0),
            },
        };
        let times = record.times.map(|times| match times {
            TimesRecord::Always { ctime, mtime } => TimesOverride::Always {
                ctime: recorded_time(ctime),
                mtime: mtime.map(recorded_time),
            },
            TimesRecord::WhileCtime { real, visible } => TimesOverride::WhileCtime {
                real: recorded_time(real),
                visible: recorded_time(visible),
            },
        });
        Arc::new(Self {
            ino: record.ino,
            state: RwLock::new(state),
            by_kind,
            facts: Facts::default(),
            times: Mutex::new(times.map(Box::new)),
            times_version: AtomicU32::new(record.times_version),
        })
    }
}

impl InodeRecord {
    /// Returns the type of the object.
    pub(crate) fn kind(&self) -> FileKind {
        self.kind.kind()
    }
}

impl KindRecord {
    fn of_file(kind: FileKind, version: u32) -> Self {
        match kind {
            FileKind::Directory | FileKind::Regular => Self::Regular { version },
            FileKind::Symlink => Self::Symlink { version },
            FileKind::Fifo => Self::Fifo { version },
            FileKind::Socket => Self::Socket { version },
            FileKind::CharDevice => Self::CharDevice { version },
            FileKind::BlockDevice => Self::BlockDevice { version },
        }
    }

    fn kind(self) -> FileKind {
        match self {
            Self::Directory { .. } => FileKind::Directory,
            Self::Regular { .. } => FileKind::Regular,
            Self::Symlink { .. } => FileKind::Symlink,
            Self::Fifo { .. } => FileKind::Fifo,
            Self::Socket { .. } => FileKind::Socket,
            Self::CharDevice { .. } => FileKind::CharDevice,
            Self::BlockDevice { .. } => FileKind::BlockDevice,
        }
    }

    fn version(self) -> u32 {
        match self {
            Self::Directory { generation, .. } => generation,
            Self::Regular { version }
            | Self::Symlink { version }
            | Self::Fifo { version }
            | Self::Socket { version }
            | Self::CharDevice { version }
            | Self::BlockDevice { version } => version,
        }
    }
}

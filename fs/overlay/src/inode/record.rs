//! The part of the record of state about inodes (docs/format.md): everything that an inode is, except where its object
//! is on disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use cowl_layers::locks::{Mutex, RwLock};
use cowl_layers::sys::process::uptime_seconds;
use cowl_layers::sys::stat::{FileKind, Time};

use super::flags::{Facts, Flags};
use super::identity::Identity;
use super::object::{ByKind, Inode, InodeState, TimesOverride};

/// An inode, without the location of its object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InodeRecord {
    /// The inode number.
    pub(crate) ino: u64,
    /// The object on disk.
    pub(crate) identity: Identity,
    /// The kernel's lookup count.
    pub(crate) lookups: u32,
    /// The type of the object.
    pub(crate) kind: FileKind,
    /// The version of the content; the generation of a directory.
    version: u32,
    /// The time of the last removal of a name, in seconds since the machine started; 0 for never.
    last_removal: u32,
    flags: u8,
    times: Option<TimesOverride>,
    times_version: u32,
}

impl InodeRecord {
    /// Creates the record of an inode of a process that was killed. What is not known is assumed as it causes more
    /// work, but no other answers.
    ///
    /// `held` are the ctime on disk and the one that is visible while it is unchanged.
    pub(crate) fn recovered(
        (ino, identity, kind): (u64, Identity, FileKind),
        lookups: u32,
        version: u32,
        held: Option<(Time, Time)>,
    ) -> Self {
        Self {
            ino,
            identity,
            lookups,
            kind,
            version,
            last_removal: uptime_seconds().max(1),
            flags: Flags::unknown().bits(),
            times: held.map(|(real, visible)| TimesOverride::WhileCtime { real, visible }),
            times_version: u32::from(held.is_some()),
        }
    }
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
        let (kind, version, last_removal, flags) = match by_kind {
            ByKind::Dir {
                // No operation runs, so no lock is held.
                copying: _,
                flags,
                names: _,
                generation,
                last_removal,
            } => (
                FileKind::Directory,
                generation,
                last_removal.load(Ordering::Relaxed),
                flags,
            ),
            ByKind::File {
                copying: _,
                flags,
                kind,
                version,
                // The open files of the record determine them.
                writers: _,
                execs: _,
            } => (*kind, version, 0, flags),
        };
        InodeRecord {
            ino: *ino,
            identity: self.identity(),
            lookups,
            kind,
            version: version.load(Ordering::Acquire),
            last_removal,
            flags: flags.bits(),
            times: times.lock().as_deref().copied(),
            times_version: times_version.load(Ordering::Acquire),
        }
    }

    /// Creates the inode of a record, whose object is at the location in `state`.
    pub(crate) fn from_record(record: &InodeRecord, state: InodeState) -> Arc<Self> {
        let (copying, flags) = (Mutex::new(()), Flags::from_bits(record.flags));
        let version = AtomicU32::new(record.version);
        let by_kind = match record.kind {
            FileKind::Directory => ByKind::Dir {
                copying,
                flags,
                names: Mutex::new(()),
                generation: version,
                last_removal: AtomicU32::new(record.last_removal),
            },
            kind => ByKind::File {
                copying,
                flags,
                kind,
                version,
                writers: AtomicU32::new(0),
                execs: AtomicU32::new(0),
            },
        };
        Arc::new(Self {
            ino: record.ino,
            state: RwLock::new(state),
            by_kind,
            facts: Facts::default(),
            times: Mutex::new(record.times.map(Box::new)),
            times_version: AtomicU32::new(record.times_version),
        })
    }
}

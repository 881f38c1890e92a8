//! Passthrough: files that the kernel reads and writes without the daemon, on a registered backing file.
//!
//! For each inode (by its FUSE inode number) this module records the mode of its open descriptors, and its
//! backing file. The registration costs two system calls, so it is retained for a while after the last close.
//!
//! The kernel counts an open until it sends RELEASE. Here an open counts from the decision until RELEASE has arrived,
//! which covers that whole period. So the kernel never refuses a mode that was chosen from this count.

mod backing;
mod before_push;
mod policy;
mod record;

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cowl_layers::locks::Mutex;
use fuser::FopenFlags;
use lru::LruCache;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

pub(super) use backing::{Backing, BackingDevice};
use cowl_layers::error::Errno;
use cowl_layers::sys;
use cowl_overlay::inode::Inode;
use cowl_overlay::{Kind, Ledger};
pub(super) use policy::{Contents, LARGE, LargeFiles, OpenTraits, Policy};
use policy::{InodeMode, Verdict, decide};
pub(super) use record::BackingRecord;

/// The number of backing files that remain registered although they are not open.
const MAX_IDLE: usize = 1024;

/// The backing files of a mount.
#[derive(Debug)]
pub(super) struct BackingFiles {
    policy: Policy,
    /// The device at which files are registered.
    device: Arc<BackingDevice>,
    /// Whether the kernel refused passthrough because it does not support or permit it.
    is_unsupported: AtomicBool,
    /// The number of files that the kernel may write to by passthrough.
    writers: Arc<AtomicU32>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    files: FxHashMap<u64, FileState>,
    /// Files that are not open and have a backing file, the most recently used last.
    idle: LruCache<u64, ()>,
    /// Devices whose files the kernel refuses, because their file systems are stacked on other file systems.
    refused_devices: Vec<u64>,
}

#[derive(Debug, Default)]
struct FileState {
    opens: u32,
    /// The number of opens of [`OpenMode::Uncounted`], which is not in the ledger.
    uncounted: u32,
    /// Whether the open descriptors use passthrough.
    is_passthrough: bool,
    backing: Option<RegisteredFile>,
    /// Whether the kernel may write to the backing file. Counted in [`BackingFiles::writers`].
    has_writer: bool,
    /// Whether the kernel may have written to the backing file, which makes the page cache of the FUSE file stale.
    has_stale_pages: bool,
    /// Whether size and times may change without a request, through a mapping of the backing file.
    has_volatile_attr: bool,
}

/// A registration of a backing file.
#[derive(Debug)]
struct RegisteredFile {
    id: Arc<Backing>,
    /// The version of its content ([`Inode::content_version`]).
    version: u32,
}

/// The state of a file in the ledger.
#[derive(Debug, Serialize, Deserialize)]
struct BackingValue {
    /// The number of the backing file, and the version of its content.
    backing: Option<(u32, u32)>,
    is_passthrough: bool,
    has_writer: bool,
    has_stale_pages: bool,
    has_volatile_attr: bool,
}

/// The parameters of an open.
pub(super) struct OpenParams<'a> {
    pub(super) ino: u64,
    pub(super) traits: OpenTraits,
    /// Whether the descriptor permits a shared writable mapping.
    pub(super) can_map_writable: bool,
    /// The inode, for the current version of its content ([`Inode::content_version`]).
    pub(super) inode: &'a Inode,
    /// The device of the content, if known.
    pub(super) dev: Option<u64>,
    /// The content and its version, if it was opened.
    pub(super) content: Option<(BorrowedFd<'a>, u32)>,
}

/// The reason why the kernel uses no passthrough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PassthroughRefusal {
    /// The kernel does not offer it, or not to this process.
    Absent,
    /// It refused to register a file.
    Unsupported,
    /// The file system of the upper layer is stacked on another one.
    Stacked,
}

/// The validity of attributes that the kernel cached before a passthrough open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CachedAttr {
    /// They remain valid.
    Valid,
    /// They may change from now on without a request.
    Volatile,
}

/// Whether a file's mode has setuid or setgid bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SetidBits {
    Set,
    Clear,
}

/// The mode of an open, for the reply.
#[derive(Debug)]
pub(super) enum OpenMode {
    /// The daemon reads and writes. The open is counted.
    Daemon(FopenFlags),
    /// The daemon writes, as [`Verdict::DirectNew`] describes. The open is not counted.
    Uncounted(FopenFlags),
    /// The kernel reads and writes the backing file. The open is counted.
    Passthrough(FopenFlags, Arc<Backing>, CachedAttr),
    /// The open fails with ESTALE, and is not counted. The inode needs a new number.
    Renew,
}

impl FileState {
    /// Whether the state must be retained while the file is not open.
    fn must_be_retained(&self) -> bool {
        self.backing.is_some()
            || self.has_writer
            || self.has_stale_pages
            || self.has_volatile_attr
            || self.uncounted > 0
    }

    /// Returns how the kernel accesses the inode now.
    fn mode(&self, version: u32) -> InodeMode {
        match (self.opens, self.is_passthrough) {
            (0, _) => InodeMode::Closed,
            (_, false) => InodeMode::Daemon,
            (_, true) => InodeMode::Passthrough {
                is_current: self.has_version(version),
            },
        }
    }

    /// Returns whether the attributes that the kernel has cached become volatile by a passthrough open.
    ///
    /// If they were volatile before, the kernel has not cached them.
    fn cached_attr(&self, params: &OpenParams<'_>) -> CachedAttr {
        match params.can_map_writable && !self.has_volatile_attr {
            true => CachedAttr::Volatile,
            false => CachedAttr::Valid,
        }
    }

    /// Whether the backing file has this version of the content.
    fn has_version(&self, version: u32) -> bool {
        let backing = self.backing.as_ref();
        backing.is_some_and(|backing| backing.version == version)
    }
}

impl BackingFiles {
    pub(super) fn new(policy: Policy, writers: Arc<AtomicU32>, device: BackingDevice) -> Self {
        Self {
            policy,
            device: Arc::new(device),
            is_unsupported: AtomicBool::new(false),
            writers,
            table: Mutex::new(Table {
                files: FxHashMap::default(),
                idle: LruCache::unbounded(),
                refused_devices: Vec::new(),
            }),
        }
    }

    /// Returns why the kernel registers no file on this device, if it has refused one.
    pub(super) fn refusal(&self, dev: Option<u64>) -> Option<PassthroughRefusal> {
        if self.is_unsupported.load(Ordering::Relaxed) {
            return Some(PassthroughRefusal::Unsupported);
        }
        let table = self.table.lock();
        let is_refused = dev.is_some_and(|dev| table.refused_devices.contains(&dev));
        is_refused.then_some(PassthroughRefusal::Stacked)
    }

    /// Returns the policy of the mount.
    pub(super) fn policy(&self) -> Policy {
        if self.is_unsupported.load(Ordering::Relaxed) {
            Policy::OFF
        } else {
            self.policy
        }
    }

    /// Whether this version of a file's content is registered, so that an open for reading need not open the content.
    pub(super) fn is_registered(&self, ino: u64, version: u32) -> bool {
        if !self.policy.allows_any() {
            return false;
        }
        let table = self.table.lock();
        table.files.get(&ino).is_some_and(|file| {
            file.has_version(version) && (file.is_passthrough || file.opens == 0)
        })
    }

    /// Chooses the mode of an open, and counts the open.
    pub(super) fn open(&self, params: &OpenParams<'_>, ledger: Option<&Arc<Ledger>>) -> OpenMode {
        if !self.policy.allows_any() {
            let cache = if params.traits.direct {
                FopenFlags::FOPEN_DIRECT_IO
            } else {
                FopenFlags::FOPEN_KEEP_CACHE
            };
            return OpenMode::Daemon(cache | FopenFlags::FOPEN_NOFLUSH);
        }
        // Unregistering is a system call, so it happens after the lock is released.
        let mut dropped = Vec::new();
        let mut table = self.table.lock();
        let mode = self.open_locked(&mut table, params, &mut dropped);
        if !matches!(mode, OpenMode::Uncounted(_)) {
            Self::note(&table, params.ino, ledger);
        }
        drop(table);
        mode
    }

    fn open_locked(
        &self,
        table: &mut Table,
        params: &OpenParams<'_>,
        dropped: &mut Vec<RegisteredFile>,
    ) -> OpenMode {
        let ino = params.ino;
        // Race: the version must be read under the table's lock. If it were read before, a concurrent open could be
        // counted with newer content in between, and would be mistaken for one of the older content.
        let version = params.inode.content_version();
        let file = table.files.entry(ino).or_default();
        let current = file.mode(version);
        let mut verdict = decide(self.policy(), params.traits, current);
        if matches!(verdict, Verdict::Passthrough | Verdict::PassthroughMappings)
            && current == InodeMode::Closed
        {
            table.idle.pop(&ino);
            if !file.has_version(version) {
                dropped.extend(file.backing.take());
                file.backing = params
                    .content
                    // Content that was copied up since it was opened must not be registered as the current version.
                    .filter(|(_, opened)| *opened == version)
                    .map(|(fd, _)| fd)
                    .and_then(|fd| self.register(fd, params, &mut table.refused_devices))
                    .map(|id| RegisteredFile { id, version });
            }
            if file.backing.is_none() {
                verdict = decide(Policy::OFF, params.traits, current);
            }
        }
        let flags = FopenFlags::FOPEN_NOFLUSH;
        if verdict == Verdict::DirectNew {
            file.uncounted += 1;
            return OpenMode::Uncounted(flags | FopenFlags::FOPEN_DIRECT_IO);
        }
        let cached = file.cached_attr(params);
        let (mode, is_passthrough) = match (verdict, &file.backing) {
            (Verdict::Renew, _) => {
                // Descriptors under the old number show the old content from here on.
                file.has_stale_pages = true;
                file.has_volatile_attr = true;
                return OpenMode::Renew;
            }
            (Verdict::Passthrough, Some(backing)) => {
                let id = backing.id.clone();
                (OpenMode::Passthrough(flags, id, cached), true)
            }
            (Verdict::PassthroughMappings, Some(backing)) => {
                let flags = flags | FopenFlags::FOPEN_DIRECT_IO;
                let id = backing.id.clone();
                (OpenMode::Passthrough(flags, id, cached), true)
            }
            (Verdict::Direct | Verdict::DirectNew, _) => {
                let flags = flags | FopenFlags::FOPEN_DIRECT_IO;
                (OpenMode::Daemon(flags), false)
            }
            (Verdict::Cached | Verdict::Passthrough | Verdict::PassthroughMappings, _) => {
                let flags = match (file.uncounted, file.has_stale_pages) {
                    // A file that could not be registered. A dirty page would overwrite what the daemon writes.
                    (1.., _) => flags | FopenFlags::FOPEN_DIRECT_IO,
                    (0, true) => flags,
                    (0, false) => flags | FopenFlags::FOPEN_KEEP_CACHE,
                };
                (OpenMode::Daemon(flags), false)
            }
        };
        file.opens += 1;
        file.is_passthrough = is_passthrough;
        if !is_passthrough {
            if let Some(backing) = file.backing.take() {
                table.idle.pop(&ino);
                dropped.push(backing);
            }
            return mode;
        }
        file.has_volatile_attr |= params.can_map_writable;
        if params.traits.write {
            file.has_stale_pages = true;
            if !std::mem::replace(&mut file.has_writer, true) {
                self.writers.fetch_add(1, Ordering::AcqRel);
            }
        }
        mode
    }

    /// Registers a file, unless the kernel has refused another file of its device.
    fn register(
        &self,
        content: BorrowedFd<'_>,
        params: &OpenParams<'_>,
        refused_devices: &mut Vec<u64>,
    ) -> Option<Arc<Backing>> {
        let dev = params
            .dev
            .map_or_else(|| sys::stat::stat_fd(content).map(|stat| stat.dev), Ok);
        let dev = match dev {
            Ok(dev) => dev,
            Err(error) => {
                log::warn!("no passthrough for inode {}: {error}", params.ino);
                return None;
            }
        };
        if refused_devices.contains(&dev) {
            return None;
        }
        // The kernel opens the backing file with the flags of the program's open. To prevent writes to a lower
        // file, its descriptor must be on a read-only mount.
        if !params.traits.upper && !sys::stat::is_read_only(content) {
            return None;
        }
        // The kernel writes with the credentials of the registering thread. Without CAP_FSETID in them, a write clears
        // setuid and setgid bits, as it must for a program without that capability.
        match sys::creds::without_setid(|| Ok(Backing::register(&self.device, content))) {
            Ok(Ok(id)) => Some(Arc::new(id)),
            Ok(Err(error)) => {
                match Errno::from_io_error(&error) {
                    Some(Errno::LOOP) => {
                        log::info!(
                            "no passthrough for device {dev}: its file system is stacked on another one"
                        );
                        refused_devices.push(dev);
                    }
                    Some(Errno::PERM | Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL) => {
                        log::info!("passthrough is unavailable: {error}");
                        self.is_unsupported.store(true, Ordering::Relaxed);
                    }
                    // A temporary failure, such as a lack of memory: the next file may be accepted.
                    _ => log::debug!("no passthrough for inode {}: {error}", params.ino),
                }
                None
            }
            Err(error) => {
                log::warn!("no passthrough for inode {}: {error}", params.ino);
                None
            }
        }
    }

    /// Counts the close of an open of [`OpenMode::Uncounted`].
    pub(super) fn release_uncounted(&self, ino: u64, ledger: Option<&Arc<Ledger>>) {
        let mut table = self.table.lock();
        let Some(file) = table.files.get_mut(&ino) else {
            return;
        };
        file.uncounted = file.uncounted.saturating_sub(1);
        if file.opens == 0 && !file.must_be_retained() {
            table.files.remove(&ino);
            Self::note(&table, ino, ledger);
        }
    }

    /// Handles a RELEASE request for one open.
    pub(super) fn release(&self, ino: u64, ledger: Option<&Arc<Ledger>>) {
        if !self.policy.allows_any() {
            return;
        }
        let mut dropped = None;
        let mut table = self.table.lock();
        let Table { files, idle, .. } = &mut *table;
        let Some(file) = files.get_mut(&ino) else {
            return;
        };
        let mut evicted = None;
        file.opens = file.opens.saturating_sub(1);
        if file.opens > 0 {
            return;
        }
        file.is_passthrough = false;
        // A writable mapping of the backing file outlives the descriptor.
        if file.has_writer && !file.has_volatile_attr {
            file.has_writer = false;
            self.writers.fetch_sub(1, Ordering::AcqRel);
        }
        if file.backing.is_some() {
            idle.put(ino, ());
        } else if !file.must_be_retained() {
            files.remove(&ino);
        }
        if idle.len() > MAX_IDLE
            && let Some((oldest, ())) = idle.pop_lru()
            && let Some(file) = files.get_mut(&oldest)
        {
            dropped = file.backing.take();
            evicted = Some(oldest);
            if !file.must_be_retained() {
                files.remove(&oldest);
            }
        }
        Self::note(&table, ino, ledger);
        if let Some(oldest) = evicted {
            Self::note(&table, oldest, ledger);
        }
        drop(table);
        drop(dropped);
    }

    /// Drops the state of an inode that the kernel has forgotten, which implies that no mapping of it exists.
    ///
    /// `is_forgotten` is evaluated under the lock, to prevent a race: otherwise the inode could be looked up, opened,
    /// mapped and closed after the evaluation, and the mapping would not be counted. Every open follows the lookup
    /// after which the inode is no longer forgotten.
    pub(super) fn forget(
        &self,
        ino: u64,
        ledger: Option<&Arc<Ledger>>,
        is_forgotten: impl FnOnce() -> bool,
    ) {
        if !self.policy.allows_any() {
            return;
        }
        let mut table = self.table.lock();
        let Some(file) = table.files.get(&ino) else {
            return;
        };
        // A created file is counted as open before it is counted as known to the kernel.
        if file.opens > 0 || !is_forgotten() {
            return;
        }
        table.idle.pop(&ino);
        let file = table.files.remove(&ino);
        Self::note(&table, ino, ledger);
        drop(table);
        // The backing file is unregistered here, after the lock was released.
        if file.is_some_and(|file| file.has_writer) {
            self.writers.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Writes the state of an inode to the ledger.
    fn note(table: &Table, ino: u64, ledger: Option<&Arc<Ledger>>) {
        let Some(ledger) = ledger else { return };
        match table.files.get(&ino) {
            Some(file) => {
                let backing = file.backing.as_ref();
                let value = BackingValue {
                    backing: backing.map(|backing| (backing.id.id(), backing.version)),
                    is_passthrough: file.is_passthrough,
                    has_writer: file.has_writer,
                    has_stale_pages: file.has_stale_pages,
                    has_volatile_attr: file.has_volatile_attr,
                };
                // These types can always be encoded.
                let value = postcard::to_stdvec(&value).unwrap_or_default();
                ledger.put(Kind::Backing, ino, &value);
            }
            None => ledger.delete(Kind::Backing, ino),
        }
    }

    /// Restores the states of a predecessor. `opens` are the numbers of open files by node id.
    pub(super) fn restore(
        &self,
        values: &[(u64, Vec<u8>)],
        opens: &HashMap<u64, u32>,
        ledger: &Arc<Ledger>,
    ) {
        let mut table = self.table.lock();
        let Table { files, idle, .. } = &mut *table;
        for (ino, opens) in opens {
            files.entry(*ino).or_default().opens = *opens;
        }
        for (ino, bytes) in values {
            let Ok(value) = postcard::from_bytes::<BackingValue>(bytes) else {
                log::error!("the state of inode {ino} for passthrough is damaged");
                ledger.delete(Kind::Backing, *ino);
                continue;
            };
            let file = files.entry(*ino).or_default();
            file.backing = value.backing.map(|(id, version)| RegisteredFile {
                id: Arc::new(Backing::registered(&self.device, id)),
                version,
            });
            file.is_passthrough = value.is_passthrough && file.opens > 0;
            file.has_stale_pages = value.has_stale_pages;
            file.has_volatile_attr = value.has_volatile_attr;
            file.has_writer = value.has_writer && (file.opens > 0 || file.has_volatile_attr);
            if file.has_writer {
                self.writers.fetch_add(1, Ordering::AcqRel);
            }
            if file.opens == 0 && file.backing.is_some() {
                idle.put(*ino, ());
            }
        }
        drop(table);
        self.note_all(ledger);
    }

    /// Writes the states of all inodes to a new ledger.
    pub(super) fn note_all(&self, ledger: &Arc<Ledger>) {
        let table = self.table.lock();
        for ino in table.files.keys() {
            Self::note(&table, *ino, Some(ledger));
        }
    }

    /// Whether attributes of an inode may become stale without a request.
    ///
    /// A passthrough write clears the mode's setuid and setgid bits, if there are any, and a store through a mapping
    /// changes the times.
    pub(super) fn has_volatile_attr(&self, ino: u64, setid: SetidBits) -> bool {
        if !self.policy.allows_any() {
            return false;
        }
        let table = self.table.lock();
        table.files.get(&ino).is_some_and(|file| {
            file.has_volatile_attr || setid == SetidBits::Set && file.has_writer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inode may be looked up, opened, mapped and closed again between the FORGET and its handling.
    #[test]
    fn a_mapping_counts_until_the_kernel_has_forgotten_the_inode() {
        let policy = Policy {
            upper: true,
            ..Policy::OFF
        };
        let writers = Arc::new(AtomicU32::new(1));
        let device = std::fs::File::open("/dev/null").unwrap().into();
        let backing = BackingFiles::new(policy, writers.clone(), BackingDevice::new(device));
        let mapped = FileState {
            has_writer: true,
            has_volatile_attr: true,
            ..FileState::default()
        };
        backing.table.lock().files.insert(7, mapped);
        backing.forget(7, None, || false);
        assert!(backing.has_volatile_attr(7, SetidBits::Clear));
        assert_eq!(writers.load(Ordering::Acquire), 1);
        backing.forget(7, None, || {
            assert!(
                backing.table.is_locked(),
                "otherwise the inode may be known again"
            );
            true
        });
        assert!(!backing.has_volatile_attr(7, SetidBits::Clear));
        assert_eq!(writers.load(Ordering::Acquire), 0);
    }
}

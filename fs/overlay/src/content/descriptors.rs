//! A bounded cache of open descriptors of files' contents, and the errors of their writeback.
//!
//! An open file does not own a descriptor, because a container may have more open files than the daemon may have
//! descriptors. All open files of an inode with the same access share one, which is reopened if it was evicted.
//!
//! On a mount without open requests (docs/decisions/0044), descriptors belong to inodes, and are closed when the kernel
//! forgets these.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use cowl_layers::locks::Mutex;
use lru::LruCache;
use rustc_hash::FxHashMap;
use rustix::fs::OFlags;

use super::handle::{FileHandle, Origin, VersionedDescriptor, open_flags};
use crate::inode::{Inode, OpenOptions};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::open::{DescriptorCache, register_cache};

/// All values that [`open_flags`] returns.
const ACCESS_FLAGS: [OFlags; 4] = [
    OFlags::RDONLY,
    OFlags::RDWR,
    OFlags::RDONLY.union(OFlags::NOATIME),
    OFlags::RDWR.union(OFlags::NOATIME),
];

/// The maximum number of cached descriptors, whatever the limit of the process.
const MAX_CAPACITY: u64 = 4096;

/// An inode: its address, which is unique while a handle, or an [`Entry`], refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct InodeKey(usize);

impl InodeKey {
    pub(crate) fn new(inode: &Arc<Inode>) -> Self {
        Self(Arc::as_ptr(inode).addr())
    }
}

/// The open files that share a descriptor: the inode, and the flags of open(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    inode: InodeKey,
    flags: u32,
}

impl Key {
    fn new(handle: &FileHandle) -> Self {
        Self {
            inode: InodeKey::new(&handle.inode),
            flags: open_flags(handle.options).bits(),
        }
    }
}

/// A cached descriptor.
#[derive(Debug)]
struct Entry {
    descriptor: VersionedDescriptor,
    /// The inode of a descriptor that no open file uses. The reference prevents another inode from getting its address.
    _unopened: Option<Weak<Inode>>,
}

impl Entry {
    fn opened(descriptor: VersionedDescriptor) -> Self {
        Self {
            descriptor,
            _unopened: None,
        }
    }
}

/// The last writeback error of an inode that a sync has returned.
#[derive(Clone, Copy, Debug)]
struct WritebackError {
    error: Error,
    /// The number of errors so far.
    count: u32,
}

#[derive(Debug)]
struct Table {
    open: LruCache<Key, Entry>,
    /// The number of open files for each key.
    users: FxHashMap<Key, u32>,
    /// The number of open files of each inode.
    inodes: FxHashMap<InodeKey, u32>,
    /// Inodes with an error since all of their files were last closed.
    errors: FxHashMap<InodeKey, WritebackError>,
}

/// The open descriptors of a mount.
#[derive(Debug)]
pub(crate) struct ContentDescriptors(Mutex<Table>);

impl ContentDescriptors {
    /// Creates a cache, which is evicted from if the process has no descriptors left.
    pub(crate) fn new() -> Arc<Self> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let capacity = (limit.unwrap_or(u64::MAX) / 4).clamp(16, MAX_CAPACITY);
        let cache = Arc::new(Self::with_capacity(usize::try_from(capacity).unwrap_or(16)));
        register_cache(&cache);
        cache
    }

    fn with_capacity(capacity: usize) -> Self {
        Self(Mutex::new(Table {
            open: LruCache::new(NonZeroUsize::new(capacity).unwrap_or(NonZeroUsize::MIN)),
            users: FxHashMap::default(),
            inodes: FxHashMap::default(),
            errors: FxHashMap::default(),
        }))
    }

    /// Adds an open file, with its descriptor if it has one.
    pub(super) fn add_user(&self, handle: &FileHandle, descriptor: Option<VersionedDescriptor>) {
        let key = Key::new(handle);
        // Bound to a variable, so that an evicted descriptor is closed after the table is unlocked.
        let mut evicted = None;
        let mut table = self.0.lock();
        *table.users.entry(key).or_default() += 1;
        *table.inodes.entry(key.inode).or_default() += 1;
        if let Some(error) = table.errors.get(&key.inode) {
            // As on a plain directory, an open file does not report an error that was reported before it was opened.
            handle.errors_seen.store(error.count, Ordering::Release);
        }
        if let Some(descriptor) = descriptor {
            evicted = table.open.push(key, Entry::opened(descriptor));
        }
        drop(table);
        drop(evicted);
    }

    /// Removes an open file. Closes the descriptor if no other open file shares it.
    pub(crate) fn remove_user(&self, handle: &FileHandle) {
        let key = Key::new(handle);
        let mut table = self.0.lock();
        if let Some(users) = table.inodes.get_mut(&key.inode) {
            *users -= 1;
            if *users == 0 {
                table.inodes.remove(&key.inode);
            }
        }
        if let Some(users) = table.users.get_mut(&key) {
            *users -= 1;
            if *users > 0 {
                return;
            }
        }
        table.users.remove(&key);
        let closed = table.open.pop(&key);
        if table.errors.contains_key(&key.inode) && !table.inodes.contains_key(&key.inode) {
            table.errors.remove(&key.inode);
        }
        drop(table);
        drop(closed);
    }

    /// Returns the last writeback error of an inode: the error number, and the number of errors so far.
    pub(crate) fn writeback_error(&self, inode: &Arc<Inode>) -> Option<(i32, u32)> {
        let table = self.0.lock();
        let known = table.errors.get(&InodeKey::new(inode))?;
        Some((known.error.errno().raw_os_error(), known.count))
    }

    /// Records the last writeback error of an inode that has open files.
    pub(crate) fn restore_writeback_error(&self, inode: &Arc<Inode>, (errno, count): (i32, u32)) {
        let error = Error::Errno(Errno::from_raw_os_error(errno));
        let error = WritebackError { error, count };
        self.0.lock().errors.insert(InodeKey::new(inode), error);
    }

    /// Returns the cached descriptor of an open file, if it refers to this version of the content.
    pub(super) fn get(&self, handle: &FileHandle, version: u32) -> Option<Arc<OwnedFd>> {
        let key = Key::new(handle);
        let mut table = self.0.lock();
        let mut find = |key| {
            let (fd, cached_version) = &table.open.get(&key)?.descriptor;
            (*cached_version == version).then(|| fd.clone())
        };
        let found = find(key);
        if handle.origin == Origin::Request && key.flags == OFlags::RDONLY.bits() {
            // The descriptor of a file that was just written can be read as well.
            let flags = OFlags::RDWR.bits();
            return found.or_else(|| find(Key { flags, ..key }));
        }
        found
    }

    /// Caches the descriptor of an open file, or of an inode on a mount without open requests.
    pub(super) fn put(&self, handle: &FileHandle, descriptor: VersionedDescriptor) {
        let key = Key::new(handle);
        let mut table = self.0.lock();
        let entry = match handle.origin {
            Origin::Open => (table.users.contains_key(&key)).then(|| Entry::opened(descriptor)),
            Origin::Request => Some(Entry {
                descriptor,
                _unopened: Some(Arc::downgrade(&handle.inode)),
            }),
        };
        let evicted = entry.and_then(|entry| table.open.push(key, entry));
        drop(table);
        drop(evicted);
    }

    /// Caches the descriptor of a file that was created, on a mount without open requests.
    pub(crate) fn keep_created(&self, handle: &FileHandle, descriptor: VersionedDescriptor) {
        let handle = FileHandle::for_request(&handle.inode, OpenOptions::WRITE);
        self.put(&handle, descriptor);
    }

    /// Closes the descriptors of an inode that the kernel has forgotten, on a mount without open requests.
    pub(crate) fn close_unopened(&self, inode: InodeKey) {
        let mut table = self.0.lock();
        if table.open.is_empty() {
            return;
        }
        let closed = ACCESS_FLAGS.map(|flags| {
            let flags = flags.bits();
            table.open.pop(&Key { inode, flags })
        });
        drop(table);
        drop(closed);
    }

    /// Completes a sync of an open file: returns its error, or else an error that the sync of another open file of the
    /// inode has returned and that this one has not returned yet.
    ///
    /// The kernel reports a writeback error once to each open file description (errseq_t), and here several open
    /// files share one.
    pub(super) fn report_sync(&self, handle: &FileHandle, synced: Result<()>) -> Result<()> {
        if handle.origin == Origin::Request {
            // It is unknown which open files have returned an error.
            return synced;
        }
        let inode = InodeKey::new(&handle.inode);
        let mut table = self.0.lock();
        let known = table.errors.get(&inode).copied();
        let count = known.map_or(0, |known| known.count);
        let is_news = handle.errors_seen.swap(count, Ordering::AcqRel) != count;
        match (synced, known) {
            (Ok(()), Some(known)) if is_news => Err(known.error),
            // The shared descriptor, or one with other flags, reports the error that `known` describes.
            (Err(error), _) if is_writeback_error(error) && !is_news => {
                let count = count.wrapping_add(1);
                table.errors.insert(inode, WritebackError { error, count });
                handle.errors_seen.store(count, Ordering::Release);
                Err(error)
            }
            (synced, _) => synced,
        }
    }
}

impl DescriptorCache for ContentDescriptors {
    /// A request still uses its descriptor after it was evicted; it is closed when the request ends.
    fn evict_half(&self) -> usize {
        let mut table = self.0.lock();
        let count = table.open.len().div_ceil(2);
        let evicted: Vec<_> = (0..count).filter_map(|_| table.open.pop_lru()).collect();
        drop(table);
        evicted.len()
    }
}

/// Whether fsync(2) returns the error once for each open file description.
fn is_writeback_error(error: Error) -> bool {
    matches!(error.errno(), Errno::IO | Errno::NOSPC | Errno::DQUOT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::OpenCounts;
    use crate::inode::{Identity, fixture};

    const READ: OpenOptions = OpenOptions::READ;
    const WRITE: OpenOptions = OpenOptions::WRITE;
    const IO: Error = Error::Errno(Errno::IO);

    struct Fixture {
        layer: tempfile::TempDir,
        opens: OpenCounts,
        descriptors: ContentDescriptors,
    }

    impl Fixture {
        fn new(capacity: usize) -> Self {
            Self {
                layer: tempfile::tempdir().unwrap(),
                opens: OpenCounts::default(),
                descriptors: ContentDescriptors::with_capacity(capacity),
            }
        }

        fn inode(&self, ino: u64) -> Arc<Inode> {
            fixture::metacopy(ino, self.layer.path(), Identity { dev: 1, ino })
        }

        fn open(&self, inode: &Arc<Inode>, options: OpenOptions) -> Arc<FileHandle> {
            let handle = self.opens.count_open(inode, options);
            let fd = std::fs::File::open(self.layer.path()).unwrap();
            let descriptor = (Arc::new(OwnedFd::from(fd)), 0);
            self.descriptors.add_user(&handle, Some(descriptor));
            handle
        }

        fn cached(&self) -> usize {
            self.descriptors.0.lock().open.len()
        }
    }

    #[test]
    fn open_files_share_descriptors_until_the_last_is_closed() {
        let fixture = Fixture::new(8);
        let inode = fixture.inode(1);
        let readers = [fixture.open(&inode, READ), fixture.open(&inode, READ)];
        let writer = fixture.open(&inode, WRITE);
        assert_eq!(fixture.cached(), 2);
        fixture.descriptors.remove_user(&readers[0]);
        assert!(fixture.descriptors.get(&readers[1], 0).is_some());
        assert!(
            fixture.descriptors.get(&readers[1], 1).is_none(),
            "it refers to the content before a copy-up"
        );
        fixture.descriptors.remove_user(&readers[1]);
        fixture.descriptors.remove_user(&writer);
        assert_eq!(fixture.cached(), 0);
        assert!(fixture.descriptors.0.lock().users.is_empty());
    }

    #[test]
    fn descriptors_are_bounded_and_a_closed_file_gets_none() {
        let fixture = Fixture::new(4);
        let inodes: Vec<_> = (1..=10).map(|ino| fixture.inode(ino)).collect();
        let handles: Vec<_> = inodes.iter().map(|i| fixture.open(i, READ)).collect();
        assert_eq!(fixture.cached(), 4);
        assert!(fixture.descriptors.get(&handles[0], 0).is_none());
        assert!(fixture.descriptors.get(&handles[9], 0).is_some());
        assert_eq!(fixture.descriptors.evict_half(), 2);
        let recent = fixture.descriptors.get(&handles[9], 0).unwrap();
        handles
            .iter()
            .for_each(|handle| fixture.descriptors.remove_user(handle));
        fixture.descriptors.put(&handles[9], (recent, 0));
        assert_eq!(fixture.cached(), 0);
        assert_eq!(fixture.descriptors.evict_half(), 0);
    }

    #[test]
    fn descriptors_of_a_forgotten_inode_are_closed() {
        let fixture = Fixture::new(4);
        let put = |inode: &Arc<Inode>, options| {
            let handle = FileHandle::for_request(inode, options);
            let fd = std::fs::File::open(fixture.layer.path()).unwrap();
            fixture.descriptors.put(&handle, (Arc::new(fd.into()), 0));
            handle
        };
        let quiet = |options| OpenOptions {
            keep_atime: true,
            ..options
        };
        let (inode, other) = (fixture.inode(1), fixture.inode(2));
        for options in [READ, WRITE, quiet(READ), quiet(WRITE)] {
            let handle = put(&inode, options);
            assert!(fixture.descriptors.get(&handle, 0).is_some());
        }
        put(&other, READ);
        assert_eq!(fixture.cached(), 4, "the capacity");
        let key = InodeKey::new(&inode);
        drop(inode);
        // Until then, no other inode gets the address.
        let others: Vec<_> = (3..100).map(|ino| fixture.inode(ino)).collect();
        assert!(others.iter().all(|inode| InodeKey::new(inode) != key));
        fixture.descriptors.close_unopened(key);
        assert_eq!(fixture.cached(), 1);
        fixture.descriptors.close_unopened(InodeKey::new(&other));
        assert_eq!(fixture.cached(), 0);
    }

    #[test]
    fn each_open_file_reports_a_writeback_error_once() {
        let fixture = Fixture::new(4);
        let inode = fixture.inode(1);
        let (first, second) = (fixture.open(&inode, WRITE), fixture.open(&inode, WRITE));
        let sync = |handle: &FileHandle, synced| fixture.descriptors.report_sync(handle, synced);
        assert_eq!(sync(&first, Ok(())), Ok(()));
        assert_eq!(sync(&first, Err(IO)), Err(IO));
        assert_eq!(sync(&first, Ok(())), Ok(()));
        let late = fixture.open(&inode, WRITE);
        assert_eq!(sync(&late, Ok(())), Ok(()), "reported before it was opened");
        assert_eq!(sync(&second, Ok(())), Err(IO));
        assert_eq!(sync(&second, Ok(())), Ok(()));
        assert_eq!(sync(&second, Err(IO)), Err(IO), "another error");
        assert_eq!(sync(&first, Err(IO)), Err(IO), "through another descriptor");
        assert_eq!(sync(&first, Ok(())), Ok(()));
        for handle in [&first, &second, &late] {
            fixture.descriptors.remove_user(handle);
        }
        assert!(fixture.descriptors.0.lock().errors.is_empty());
        let invalid = Err(Error::Errno(Errno::INVAL));
        assert_eq!(sync(&fixture.open(&inode, WRITE), invalid), invalid);
    }
}

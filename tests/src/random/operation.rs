//! Operations on a tree, as plain values.

use rustix::fs::{FallocateFlags, OFlags, RenameFlags};

/// A path relative to the tree's root.
pub type RelPath = Vec<u8>;

/// An operation. Descriptors are identified by slot; `Hold` fills a slot.
#[derive(Debug, Clone, PartialEq)]
#[allow(
    missing_docs,
    reason = "each is the system call of its name, each field its argument"
)]
pub enum Op {
    Create {
        path: RelPath,
        flags: OFlags,
        mode: u32,
        data: (u64, usize),
    },
    Hold {
        slot: usize,
        path: RelPath,
        flags: OFlags,
    },
    Close {
        slot: usize,
    },
    FdRead {
        slot: usize,
        offset: u64,
        len: usize,
    },
    FdWrite {
        slot: usize,
        offset: u64,
        data: (u64, usize),
    },
    FdAppend {
        slot: usize,
        data: (u64, usize),
    },
    FdTruncate {
        slot: usize,
        len: u64,
    },
    FdStat {
        slot: usize,
    },
    FdChmod {
        slot: usize,
        mode: u32,
    },
    FdSetxattr {
        slot: usize,
        name: &'static str,
        value: Vec<u8>,
    },
    FdXattrs {
        slot: usize,
    },
    FdAllocate {
        slot: usize,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    },
    FdSync {
        slot: usize,
    },
    FdList {
        slot: usize,
    },
    FdUtimens {
        slot: usize,
        seconds: i64,
    },
    FdCopy {
        from: usize,
        to: usize,
        from_offset: u64,
        to_offset: u64,
        len: usize,
    },
    /// Drops the clean pages of the file from the page cache.
    FdDropPages {
        slot: usize,
    },
    FdSeek {
        slot: usize,
        offset: u64,
        hole: bool,
    },
    FdChown {
        slot: usize,
        uid: Option<u32>,
        gid: Option<u32>,
    },
    FdRemovexattr {
        slot: usize,
        name: &'static str,
    },
    /// Reopens a descriptor's file through /proc, which works for unlinked files too.
    FdReopen {
        slot: usize,
        to: usize,
        flags: OFlags,
    },
    /// Creates a hard link to a descriptor's file.
    FdLink {
        slot: usize,
        path: RelPath,
    },
    /// Creates a shared mapping of a descriptor's file. It outlives the descriptor.
    Map {
        slot: usize,
        map: usize,
        write: bool,
    },
    Unmap {
        map: usize,
    },
    MapRead {
        map: usize,
        offset: u64,
        len: usize,
    },
    MapWrite {
        map: usize,
        offset: u64,
        data: (u64, usize),
    },
    MapSync {
        map: usize,
    },
    /// truncate(2), by path.
    Cut {
        path: RelPath,
        len: u64,
    },
    /// Reads the first half of a directory, performs an operation, and reads the rest. Entries that exist all the time
    /// must be listed exactly once.
    ListWhile {
        path: RelPath,
        inner: Box<Op>,
    },
    Mkdir {
        path: RelPath,
        mode: u32,
    },
    Rmdir {
        path: RelPath,
    },
    /// Removes a tree, as `rm -r` does.
    RemoveTree {
        path: RelPath,
    },
    Unlink {
        path: RelPath,
    },
    Rename {
        from: RelPath,
        to: RelPath,
        flags: RenameFlags,
    },
    Link {
        from: RelPath,
        to: RelPath,
    },
    Symlink {
        target: Vec<u8>,
        path: RelPath,
    },
    Mkfifo {
        path: RelPath,
        mode: u32,
    },
    Mknod {
        path: RelPath,
        mode: u32,
        device: (u32, u32),
    },
    Chmod {
        path: RelPath,
        mode: u32,
    },
    Chown {
        path: RelPath,
        uid: Option<u32>,
        gid: Option<u32>,
        follow: bool,
    },
    Utimens {
        path: RelPath,
        seconds: Option<i64>,
        follow: bool,
    },
    Setxattr {
        path: RelPath,
        name: &'static str,
        value: Vec<u8>,
        flags: u32,
    },
    Getxattr {
        path: RelPath,
        name: &'static str,
    },
    Removexattr {
        path: RelPath,
        name: &'static str,
    },
    Xattrs {
        path: RelPath,
    },
    Truncate {
        path: RelPath,
        len: u64,
    },
    Read {
        path: RelPath,
    },
    Readlink {
        path: RelPath,
    },
    Stat {
        path: RelPath,
        follow: bool,
    },
    Access {
        path: RelPath,
        mode: u32,
    },
    List {
        path: RelPath,
    },
    /// Makes the kernel drop unused dentries and inodes, on the whole machine.
    DropCaches,
}

/// Maximum number of held descriptors.
pub const SLOTS: usize = 8;
/// Maximum number of mappings.
pub const MAPS: usize = 4;

/// Credentials and umask of an operation. The primary group has the number of the user; users other than 0 have no
/// capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User and group.
    pub id: u32,
    /// Supplementary groups.
    pub groups: &'static [u32],
    /// The file mode creation mask.
    pub umask: u32,
}

impl Caller {
    /// Root with the usual umask.
    pub const ROOT: Caller = Caller {
        id: 0,
        groups: &[],
        umask: 0o022,
    };

    /// Returns a user without supplementary groups.
    #[must_use]
    pub fn user(id: u32) -> Caller {
        Caller { id, ..Caller::ROOT }
    }
}

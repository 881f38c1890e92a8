//! What can be done to a tree, as plain values.

use rustix::fs::{FallocateFlags, OFlags, RenameFlags};

/// A path relative to the tree's root.
pub type RelPath = Vec<u8>;

/// One operation. Descriptors are named by slot; `Hold` puts one there.
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
    /// The kernel's cached pages of the file go, as far as they are clean.
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
    /// Opens what a descriptor holds once more, through /proc: works without a name too.
    FdReopen {
        slot: usize,
        to: usize,
        flags: OFlags,
    },
    /// Gives what a descriptor holds another name.
    FdLink {
        slot: usize,
        path: RelPath,
    },
    /// Maps what a descriptor holds, shared. The mapping lives on when the descriptor is closed.
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
    /// truncate(2): by its name, with no descriptor.
    Cut {
        path: RelPath,
        len: u64,
    },
    /// Reads the first half of a folder, does something, reads the other half: what was there all
    /// the time comes exactly once.
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
    /// As `rm -r` does.
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
    /// Makes the kernel forget names and inodes that nobody uses, on the whole machine.
    DropCaches,
}

/// How many descriptors are held at most.
pub const SLOTS: usize = 8;
/// How many mappings.
pub const MAPS: usize = 4;

/// Who does something, with which umask. The group has the user's number; anybody but user 0 has no
/// privilege.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Who {
    /// User and group.
    pub id: u32,
    /// Supplementary groups.
    pub groups: &'static [u32],
    /// The file mode creation mask.
    pub umask: u32,
}

impl Who {
    /// Root, as a shell has it.
    pub const ROOT: Who = Who {
        id: 0,
        groups: &[],
        umask: 0o022,
    };

    /// A user in no other group than his own.
    #[must_use]
    pub fn user(id: u32) -> Who {
        Who { id, ..Who::ROOT }
    }
}

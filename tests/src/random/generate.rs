//! Generates random operations from a seed. Prefers existing names, few names (so that operations affect the same
//! objects), and cases that are error-prone in overlays.

use std::collections::VecDeque;

use rustix::fs::{FallocateFlags, OFlags, RenameFlags};

use super::Rng;
use super::operation::{Caller, MAPS, Op, RelPath, SLOTS};
use super::values::{acl, capability, is_portable};
use crate::tree::Paths;

const NAMES: [&[u8]; 15] = [
    &[b'o'; 255],
    b"alias0",
    b"\x01\x80 %s",
    b"a",
    b"b",
    b"c",
    b"d",
    b"e",
    b"f",
    b"dir",
    b"file",
    b"link",
    b"x y:,\\z",
    b"\xff\xfe\n",
    b"g",
];
/// Maximum number of removed or renamed paths that are remembered.
const GONE: usize = 12;
const MODES: [u32; 10] = [
    0o644, 0o600, 0o755, 0o700, 0o777, 0o000, 0o4755, 0o2755, 0o2775, 0o1777,
];
const XATTRS: [&str; 7] = [
    "trusted.overlay.opaque",
    "system.posix_acl_access",
    "user.one",
    "user.two",
    "trusted.three",
    "security.capability",
    "user.long-name.with.dots",
];

/// A generator of operations for one run.
#[derive(Debug)]
pub struct Generator {
    rng: Rng,
    whiteouts: bool,
    portable: bool,
    /// Recently removed or renamed paths. Reusing one tests whether stale state of the layers shows through.
    gone: Vec<RelPath>,
    /// Remaining operations of the current story.
    next: VecDeque<Op>,
}

impl Generator {
    /// Creates a generator with `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Generator {
        Generator {
            rng: Rng::new(seed),
            whiteouts: false,
            portable: false,
            gone: Vec::new(),
            next: VecDeque::new(),
        }
    }

    /// Adds the operations of an overlay on top of the tree: devices 0:0, and RENAME_WHITEOUT.
    #[must_use]
    pub fn with_whiteouts(mut self) -> Generator {
        self.whiteouts = true;
        self
    }

    /// Omits operations whose results differ between file systems, or on an overlay above another overlay.
    #[must_use]
    pub fn portable(mut self) -> Generator {
        self.portable = true;
        self
    }

    /// Returns the random numbers, for other decisions of the test.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// Returns the next operation, for a tree in which the paths `known` exist.
    pub fn next(&mut self, known: &Paths) -> Op {
        loop {
            let op = self.random_op(known);
            if !self.portable || is_portable(&op) {
                return op;
            }
        }
    }

    fn random_op(&mut self, known: &Paths) -> Op {
        if self.next.is_empty() && self.rng.chance(8) {
            self.next = self.story(known).into();
        }
        if self.rng.chance(75)
            && let Some(op) = self.next.pop_front()
        {
            return op;
        }
        match self.rng.below(100) {
            0..24 => self.descriptor(known),
            24..31 => self.mapping(),
            31..62 => self.name(known),
            62..82 => self.attribute_change(known),
            82..85 => {
                // Only operations on names: those on descriptors do not affect a listing.
                let inner = Box::new(self.name(known));
                let path = match &*inner {
                    Op::Unlink { path } | Op::Rename { from: path, .. } => parent(path),
                    _ => self.existing_dir(known),
                };
                Op::ListWhile { path, inner }
            }
            _ if self.rng.chance(2) => Op::DropCaches,
            _ => self.inspection(known),
        }
    }

    /// Returns the user, groups and umask for the next operation. The user is not root in `others` percent of cases.
    pub fn caller(&mut self, others: u64) -> Caller {
        let umask = self.rng.pick(&[0o022, 0o022, 0o022, 0, 0o077, 0o027]);
        let id = if self.rng.chance(others) {
            self.rng.pick(&[1000, 1000, 1001])
        } else {
            0
        };
        let groups: &[u32] = if id != 0 && self.rng.chance(30) {
            &[1001, 4_000_000]
        } else {
            &[]
        };
        Caller { id, groups, umask }
    }

    pub(super) fn map(&mut self) -> usize {
        usize::try_from(self.rng.below(MAPS as u64)).unwrap_or_default()
    }

    fn mapping(&mut self) -> Op {
        let map = self.map();
        match self.rng.below(14) {
            0..4 => Op::Map {
                slot: self.slot(),
                map,
                write: self.rng.chance(60),
            },
            4 => Op::Unmap { map },
            5..9 => Op::MapRead {
                map,
                offset: self.offset(),
                len: 4096,
            },
            9..13 => {
                let (seed, len) = self.data();
                Op::MapWrite {
                    map,
                    offset: self.offset(),
                    data: (seed, len.min(4096)),
                }
            }
            _ => Op::MapSync { map },
        }
    }

    /// Returns a path that exists, in most cases.
    pub(super) fn old(&mut self, known: &Paths) -> RelPath {
        if !known.all.is_empty() && self.rng.chance(88) {
            return self.rng.pick(&known.all);
        }
        self.new_path(known)
    }

    /// Returns a directory that exists, in most cases.
    pub(super) fn existing_dir(&mut self, known: &Paths) -> RelPath {
        if !known.dirs.is_empty() && self.rng.chance(88) {
            return self.rng.pick(&known.dirs);
        }
        self.old(known)
    }

    /// Returns an existing path that the next operation removes or renames, and remembers it. It is a directory in
    /// `directories` percent of cases.
    fn departing(&mut self, known: &Paths, directories: u64) -> RelPath {
        let path = if self.rng.chance(directories) {
            self.existing_dir(known)
        } else {
            self.old(known)
        };
        if self.gone.len() == GONE {
            self.gone.remove(0);
        }
        self.gone.push(path.clone());
        path
    }

    /// Returns a path whose parent directory exists, in most cases. The path itself may exist.
    pub(super) fn new_path(&mut self, known: &Paths) -> RelPath {
        if !self.gone.is_empty() && self.rng.chance(35) {
            return self.rng.pick(&self.gone);
        }
        let name = match self.rng.below(60) {
            0 => vec![b'n'; 255],
            1 => vec![b'n'; 256],
            _ => self.rng.pick(&NAMES).to_vec(),
        };
        if known.dirs.is_empty() || self.rng.chance(15) {
            return name;
        }
        let mut path = if self.rng.chance(92) {
            self.rng.pick(&known.dirs)
        } else {
            self.rng.pick(&known.all)
        };
        path.push(b'/');
        path.extend_from_slice(&name);
        path
    }

    pub(super) fn slot(&mut self) -> usize {
        usize::try_from(self.rng.below(SLOTS as u64)).unwrap_or_default()
    }

    fn offset(&mut self) -> u64 {
        match self.rng.below(4) {
            0 => 0,
            1 => self.rng.below(100),
            2 => self.rng.below(20_000),
            _ => self.rng.below(40) * 4096,
        }
    }

    fn data(&mut self) -> (u64, usize) {
        let len = match self.rng.below(6) {
            0 => 0,
            1..4 => self.rng.below(100),
            4 => self.rng.below(5000),
            _ => self.rng.below(140_000),
        };
        (self.rng.number(), usize::try_from(len).unwrap_or_default())
    }

    fn mode(&mut self) -> u32 {
        if self.rng.chance(60) {
            0o644
        } else {
            self.rng.pick(&MODES)
        }
    }

    /// Returns a time in the past, so that the exact value can be compared.
    fn seconds(&mut self) -> i64 {
        i64::try_from(self.rng.below(1_600_000_000)).unwrap_or_default()
    }

    fn flags(&mut self) -> OFlags {
        let mut flags =
            self.rng
                .pick(&[OFlags::RDONLY, OFlags::RDWR, OFlags::WRONLY, OFlags::RDWR]);
        if flags != OFlags::RDONLY && self.rng.chance(20) {
            flags |= OFlags::TRUNC;
        }
        if self.rng.chance(20) {
            flags |= OFlags::APPEND;
        }
        if self.rng.chance(10) {
            flags |= OFlags::NOFOLLOW;
        }
        flags
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    fn descriptor(&mut self, known: &Paths) -> Op {
        let slot = self.slot();
        match self.rng.below(36) {
            27 | 34 => Op::FdDropPages { slot },
            35 => Op::FdCopy {
                from: slot,
                to: self.slot(),
                from_offset: self.offset(),
                to_offset: self.offset(),
                len: 10_000,
            },
            28 => Op::FdSeek {
                slot,
                offset: self.offset(),
                hole: self.rng.chance(50),
            },
            29 => Op::FdChown {
                slot,
                uid: Some(self.rng.pick(&[0, 1000])),
                gid: self.rng.chance(50).then_some(1001),
            },
            30 => Op::FdRemovexattr {
                slot,
                name: self.rng.pick(&XATTRS),
            },
            31..33 => Op::FdReopen {
                slot,
                to: self.slot(),
                flags: self.flags() - OFlags::NOFOLLOW,
            },
            33 => Op::FdLink {
                slot,
                path: self.new_path(known),
            },
            0..7 => {
                let path = self.old(known);
                let mut flags = self.flags();
                if self.rng.chance(15) {
                    flags = OFlags::RDONLY | OFlags::DIRECTORY;
                }
                Op::Hold { slot, path, flags }
            }
            7..9 => Op::Close { slot },
            9..12 => Op::FdRead {
                slot,
                offset: self.offset(),
                len: 8192,
            },
            12..15 => Op::FdWrite {
                slot,
                offset: self.offset(),
                data: self.data(),
            },
            15 => Op::FdAppend {
                slot,
                data: self.data(),
            },
            16 => Op::FdTruncate {
                slot,
                len: self.offset(),
            },
            17..19 => Op::FdStat { slot },
            19 => Op::FdChmod {
                slot,
                mode: self.mode(),
            },
            20 => {
                let (name, value) = self.xattr();
                Op::FdSetxattr { slot, name, value }
            }
            21 => Op::FdXattrs { slot },
            22..24 => {
                let mode = self.rng.pick(&[
                    FallocateFlags::empty(),
                    FallocateFlags::KEEP_SIZE,
                    FallocateFlags::KEEP_SIZE.union(FallocateFlags::PUNCH_HOLE),
                    FallocateFlags::ZERO_RANGE,
                    FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE),
                ]);
                Op::FdAllocate {
                    slot,
                    mode,
                    offset: self.offset(),
                    len: self.offset(),
                }
            }
            24 => Op::FdSync { slot },
            25 => Op::FdList { slot },
            26 => Op::FdUtimens {
                slot,
                seconds: self.seconds(),
            },
            _ => Op::Close { slot },
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    fn name(&mut self, known: &Paths) -> Op {
        match self.rng.below(if self.whiteouts { 36 } else { 34 }) {
            0..6 => {
                let mut flags = OFlags::CREATE | self.flags();
                if self.rng.chance(40) {
                    flags |= OFlags::EXCL;
                }
                let path = self.new_path(known);
                Op::Create {
                    path,
                    flags,
                    mode: self.mode(),
                    data: self.data(),
                }
            }
            6..10 => {
                let mode = if self.rng.chance(70) {
                    0o755
                } else {
                    self.mode()
                };
                Op::Mkdir {
                    path: self.new_path(known),
                    mode,
                }
            }
            10..12 => Op::Rmdir {
                path: self.departing(known, 85),
            },
            12 => Op::RemoveTree {
                path: self.departing(known, 85),
            },
            13..17 => Op::Unlink {
                path: self.departing(known, 0),
            },
            17..26 => {
                let mut flags = self.rng.pick(&[
                    RenameFlags::empty(),
                    RenameFlags::empty(),
                    RenameFlags::NOREPLACE,
                    RenameFlags::EXCHANGE,
                ]);
                if self.whiteouts && self.rng.chance(30) {
                    flags |= RenameFlags::WHITEOUT;
                }
                let from = self.departing(known, 45);
                let to = if self.rng.chance(45) {
                    self.old(known)
                } else {
                    self.new_path(known)
                };
                Op::Rename { from, to, flags }
            }
            26..30 => Op::Link {
                from: self.old(known),
                to: self.new_path(known),
            },
            30..32 => {
                let target = match self.rng.below(5) {
                    0 => vec![b't'; 300],
                    1 => b"nowhere".to_vec(),
                    2 => self.old(known),
                    _ => self.rng.pick(&NAMES).to_vec(),
                };
                Op::Symlink {
                    target,
                    path: self.new_path(known),
                }
            }
            32 => Op::Mkfifo {
                path: self.new_path(known),
                mode: self.mode(),
            },
            _ => {
                let device = match self.rng.below(3) {
                    0 if self.whiteouts => (0, 0),
                    0 | 1 => (1, 3),
                    _ => (1, 5),
                };
                Op::Mknod {
                    path: self.new_path(known),
                    mode: self.mode(),
                    device,
                }
            }
        }
    }

    fn attribute_change(&mut self, known: &Paths) -> Op {
        let path = self.old(known);
        match self.rng.below(20) {
            0..5 => Op::Chmod {
                path,
                mode: self.mode(),
            },
            5..9 => {
                let id = |rng: &mut Rng| {
                    let id = rng.pick(&[0, 1000, 1001, 4_000_000]);
                    rng.chance(70).then_some(id)
                };
                let (uid, gid) = (id(&mut self.rng), id(&mut self.rng));
                Op::Chown {
                    path,
                    uid,
                    gid,
                    follow: self.rng.chance(50),
                }
            }
            9..12 => Op::Utimens {
                path,
                seconds: self.rng.chance(80).then(|| self.seconds()),
                follow: self.rng.chance(50),
            },
            12..15 => {
                let (name, value) = self.xattr();
                let flags = u32::try_from([0, 0, 1, 2][self.slot() % 4]).unwrap_or_default();
                Op::Setxattr {
                    path,
                    name,
                    value,
                    flags,
                }
            }
            15..17 => Op::Removexattr {
                path,
                name: self.rng.pick(&XATTRS),
            },
            17 => Op::Cut {
                path,
                len: self.offset(),
            },
            _ => Op::Truncate {
                path,
                len: self.offset(),
            },
        }
    }

    fn inspection(&mut self, known: &Paths) -> Op {
        let path = self.old(known);
        match self.rng.below(20) {
            0..5 => Op::Read { path },
            5..7 => Op::Readlink { path },
            7..11 => Op::Stat {
                path,
                follow: self.rng.chance(30),
            },
            11..13 => Op::Access {
                path,
                mode: u32::try_from(self.rng.below(8)).unwrap_or_default(),
            },
            13..17 => Op::List {
                path: self.existing_dir(known),
            },
            17 => Op::Getxattr {
                path,
                name: self.rng.pick(&XATTRS),
            },
            _ => Op::Xattrs { path },
        }
    }

    fn xattr(&mut self) -> (&'static str, Vec<u8>) {
        match self.rng.below(12) {
            0..2 => ("security.capability", capability()),
            2..4 => ("system.posix_acl_access", acl(self.rng.below(8))),
            4 => ("system.posix_acl_default", acl(self.rng.below(8))),
            5 => ("user.long-name.with.dots", vec![b'v'; 1500]),
            // An overlay on top of this one sets this name; cowlfs must store it escaped.
            9 => ("trusted.overlay.opaque", b"y".to_vec()),
            6..8 => (
                "trusted.three",
                self.rng.below(1000).to_string().into_bytes(),
            ),
            8 => ("user.two", Vec::new()),
            _ => ("user.one", self.rng.below(1000).to_string().into_bytes()),
        }
    }
}

fn parent(path: &[u8]) -> RelPath {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    match path.get(..end) {
        Some(b"") | None => b".".to_vec(),
        Some(parent) => parent.to_vec(),
    }
}

//! Counters of the kernel's requests by kind. Unlike times, they show the cost of an operation on a noisy machine, too.
//!
//! The keeper and all its daemons share them, so they continue after a daemon was killed (docs/decisions/0035).

use std::sync::atomic::{AtomicU64, Ordering};

use cowl_layers::error::Result;
use cowl_layers::panics;
use cowl_layers::sys::crash::CrashRecord;
use cowl_layers::sys::shared;

/// The name under which the number of refused requests is handed over to another process.
const REFUSED: &str = "refused";

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// The kinds of requests, named as in the protocol.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum Opcode {
            $($(#[$doc])* $name,)*
        }

        impl Opcode {
            /// All kinds.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Returns the name in lower case.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

opcodes! {
    Lookup = "lookup",
    Forget = "forget",
    Getattr = "getattr",
    Setattr = "setattr",
    Readlink = "readlink",
    Mknod = "mknod",
    Mkdir = "mkdir",
    Symlink = "symlink",
    Link = "link",
    Unlink = "unlink",
    Rmdir = "rmdir",
    Rename = "rename",
    Open = "open",
    Create = "create",
    Read = "read",
    Write = "write",
    Flush = "flush",
    Release = "release",
    Fsync = "fsync",
    Opendir = "opendir",
    Readdir = "readdir",
    Readdirplus = "readdirplus",
    Releasedir = "releasedir",
    Fsyncdir = "fsyncdir",
    Statfs = "statfs",
    Setxattr = "setxattr",
    Getxattr = "getxattr",
    Listxattr = "listxattr",
    Removexattr = "removexattr",
    Ioctl = "ioctl",
    Fallocate = "fallocate",
    Lseek = "lseek",
    CopyFileRange = "copy_file_range",
}

/// The number of requests of each kind, and those that ended a daemon.
#[derive(Debug)]
pub struct Requests {
    /// One for each kind.
    counts: &'static [AtomicU64],
    /// The number of requests that were refused because they have ended two daemons.
    refused: &'static AtomicU64,
    crashes: CrashRecord,
}

impl Requests {
    /// Creates counters that are zero, in memory that this process shares with those that it forks. Panics are counted
    /// there, too, from now on.
    pub fn create() -> Result<Self> {
        let words = shared::inherited(Opcode::ALL.len() + 2)?;
        let (counts, rest) = words.split_at(Opcode::ALL.len());
        let [refused, panicked] = rest else {
            return Err(cowl_layers::error::Errno::NOMEM.into());
        };
        panics::count_in(panicked);
        Ok(Self {
            counts,
            refused,
            crashes: CrashRecord::create()?,
        })
    }

    /// Counts a request.
    pub(crate) fn count(&self, opcode: Opcode) {
        if let Some(count) = self.counts.get(opcode as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a request that was refused because it has ended two daemons.
    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the number of requests that were refused because they have ended two daemons.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Returns the requests that have ended a daemon.
    pub(crate) fn crashes(&self) -> CrashRecord {
        self.crashes
    }

    /// Returns all numbers by their names, for [`Self::add`] in another process.
    pub(crate) fn to_record(&self) -> Vec<(String, u64)> {
        let counts = self.counts().into_iter();
        let mut record: Vec<_> = counts
            .map(|(kind, count)| (kind.name().to_owned(), count))
            .collect();
        record.push((REFUSED.to_owned(), self.refused()));
        record
    }

    /// Adds the numbers of a predecessor. Names that this version does not know are ignored.
    pub(crate) fn add(&self, record: &[(String, u64)]) {
        let before = |name: &str| {
            let found = record.iter().find(|(of, _)| of == name);
            found.map_or(0, |(_, before)| *before)
        };
        for (opcode, count) in Opcode::ALL.iter().zip(self.counts) {
            count.fetch_add(before(opcode.name()), Ordering::Relaxed);
        }
        self.refused.fetch_add(before(REFUSED), Ordering::Relaxed);
    }

    /// Returns the number of requests of each kind of which there were any.
    pub fn counts(&self) -> Vec<(Opcode, u64)> {
        Opcode::ALL
            .iter()
            .zip(self.counts)
            .map(|(opcode, count)| (*opcode, count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_own_counter() {
        let requests = Requests::create().unwrap();
        for (times, opcode) in Opcode::ALL.iter().enumerate() {
            for _ in 0..times {
                requests.count(*opcode);
            }
        }
        let counted: Vec<_> = requests.counts();
        assert_eq!(counted.len(), Opcode::ALL.len() - 1);
        for (opcode, count) in counted {
            assert_eq!(count, opcode as u64);
        }
    }

    #[test]
    fn another_process_continues_all_numbers() {
        let (one, two) = (Requests::create().unwrap(), Requests::create().unwrap());
        one.count(Opcode::Mkdir);
        one.count_refused();
        two.count(Opcode::Mkdir);
        two.add(&one.to_record());
        assert_eq!(two.counts(), [(Opcode::Mkdir, 2)]);
        assert_eq!(two.refused(), 1);
    }
}

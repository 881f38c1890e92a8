//! Counters of the kernel's requests by kind. Unlike times, they show the cost of an operation on a noisy machine, too.

use std::sync::atomic::{AtomicU64, Ordering};

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

/// The number of requests of each kind.
#[derive(Debug)]
pub struct Requests(Vec<AtomicU64>);

impl Default for Requests {
    fn default() -> Self {
        Self(Opcode::ALL.iter().map(|_| AtomicU64::new(0)).collect())
    }
}

impl Requests {
    /// Counts a request.
    pub(crate) fn count(&self, opcode: Opcode) {
        if let Some(count) = self.0.get(opcode as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds the numbers of a predecessor, by the names of the kinds. Kinds that this version does not know are ignored.
    pub(crate) fn add(&self, counts: &[(String, u64)]) {
        for (opcode, count) in Opcode::ALL.iter().zip(&self.0) {
            let before = counts.iter().find(|(name, _)| name == opcode.name());
            count.fetch_add(before.map_or(0, |(_, before)| *before), Ordering::Relaxed);
        }
    }

    /// Returns the number of requests of each kind of which there were any.
    pub fn counts(&self) -> Vec<(Opcode, u64)> {
        Opcode::ALL
            .iter()
            .zip(&self.0)
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
        let requests = Requests::default();
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
}

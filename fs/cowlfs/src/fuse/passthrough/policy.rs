//! Decides how an open file is read and written: one pure function.
//!
//! The rules are the kernel's (fs/fuse/iomode.c, fs/fuse/passthrough.c, verified on Linux 6.18): while one open of an
//! inode uses passthrough, all others must use it, with the same backing file; while one does not, none can.

use crate::choices::{Coherence, Passthrough};
use crate::fuse::settings::StackMode;

/// Whether the content of a mount can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) enum Contents {
    /// There is an upper layer.
    Writable,
    /// There is none.
    ReadOnly,
}

/// The files of at least [`LARGE`] for which passthrough is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) enum LargeFiles {
    /// No file because of its size.
    None,
    /// Those that programs replace: by their format, those in the trees of package managers, and those without write
    /// permission.
    Replaced,
    /// All of them.
    All,
}

/// The size in bytes from which passthrough saves more than its registration costs.
///
/// A smaller file is one request, after which the kernel has it in its cache. After a read by passthrough, each stat(2)
/// is a request.
pub(in crate::fuse) const LARGE: u64 = 256 << 10;

/// The files of a mount for which passthrough is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) struct Policy {
    /// Files in the upper layer, for reading and writing.
    pub(in crate::fuse) upper: bool,
    /// Programs and libraries in lower layers, for reading.
    pub(in crate::fuse) programs: bool,
    /// Large files in lower layers, for reading.
    pub(in crate::fuse) large: LargeFiles,
    /// All files in lower layers, for reading.
    pub(in crate::fuse) lowers: bool,
    /// The daemon writes new files that are expected to be small, whose registration would take longer. Then the other
    /// opens of these files must use passthrough, so the upper layer must remain the upper layer.
    pub(in crate::fuse) small_by_daemon: bool,
}

impl Policy {
    /// No passthrough.
    pub(in crate::fuse) const OFF: Self = Self {
        upper: false,
        programs: false,
        large: LargeFiles::None,
        lowers: false,
        small_by_daemon: false,
    };

    /// Returns the policy for the options of a mount.
    ///
    /// By default, the upper layer is excluded if layers can be pushed: the daemon cannot pause a program that writes
    /// by passthrough. Without an upper layer, an old descriptor of a lower file and a new one never differ.
    pub(in crate::fuse) fn new(
        option: Passthrough,
        coherence: Coherence,
        (stack, contents): (StackMode, Contents),
    ) -> Self {
        let upper = match option {
            Passthrough::Off => return Self::OFF,
            Passthrough::Read => false,
            Passthrough::All => true,
            Passthrough::Auto => stack == StackMode::Fixed,
        };
        Self {
            upper,
            programs: true,
            large: match (contents, coherence) {
                (Contents::ReadOnly, _) => LargeFiles::All,
                (Contents::Writable, Coherence::Posix) => LargeFiles::None,
                (Contents::Writable, _) => LargeFiles::Replaced,
            },
            lowers: coherence == Coherence::Overlay,
            small_by_daemon: upper && stack == StackMode::Fixed,
        }
    }

    /// Whether passthrough is used for files that are replaced rather than written in place.
    fn has_replaced(self) -> bool {
        self.programs || self.large != LargeFiles::None
    }

    /// Whether passthrough is used for any file.
    pub(in crate::fuse) fn allows_any(self) -> bool {
        self != Self::OFF
    }
}

/// The properties of an open on which the decision depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) struct OpenTraits {
    /// The content is in the upper layer.
    pub(in crate::fuse) upper: bool,
    /// It is for writing.
    pub(in crate::fuse) write: bool,
    /// The file is usually replaced, not written in place: it is one of those in [`Policy::programs`] or
    /// [`Policy::large`].
    pub(in crate::fuse) replaced: bool,
    /// The file has setuid, setgid or capabilities. Whether a write clears them depends on the writing process, which
    /// the file system below cannot determine.
    pub(in crate::fuse) privileged: bool,
    /// The flags include O_DIRECT.
    pub(in crate::fuse) direct: bool,
    /// It creates a file that it cannot read or map, and to which it is expected to write little.
    pub(in crate::fuse) creates_small: bool,
}

/// The mode of the current opens of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) enum InodeMode {
    /// The inode is not open.
    Closed,
    /// The daemon reads and writes.
    Daemon,
    /// Passthrough to a backing file. It has the current content, or the one from before a copy-up.
    Passthrough { is_current: bool },
}

/// The decision on an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) enum Verdict {
    /// The kernel reads and writes the backing file.
    Passthrough,
    /// The daemon reads and writes; the kernel maps the backing file.
    PassthroughMappings,
    /// The daemon reads and writes, through the kernel's page cache.
    Cached,
    /// The daemon reads and writes, without a cache.
    Direct,
    /// The daemon writes to a new file, without a cache. The kernel counts such an open for no mode of the inode, so
    /// other opens can use passthrough, and must: then all data is in the page cache of the file system below.
    DirectNew,
    /// The open is refused with ESTALE, on which the kernel looks the name up again and gets a new inode number.
    Renew,
}

/// Decides on an open of an inode whose other opens have the mode `current`.
pub(in crate::fuse) fn decide(policy: Policy, open: OpenTraits, current: InodeMode) -> Verdict {
    let by_daemon = if open.direct {
        Verdict::Direct
    } else {
        Verdict::Cached
    };
    // A file in the upper layer can be opened for writing at any time, without a copy-up. If its readers used
    // passthrough, every such open would have to renew the inode number.
    let reads_lower =
        !open.write && !open.upper && (policy.lowers || policy.has_replaced() && open.replaced);
    let preferred = if policy.upper && open.upper {
        if open.direct || (open.write && open.privileged) {
            // The daemon accepts O_DIRECT at any offset, but the file system below may require alignment.
            Verdict::PassthroughMappings
        } else if open.creates_small && policy.small_by_daemon {
            Verdict::DirectNew
        } else {
            Verdict::Passthrough
        }
    } else if reads_lower {
        if open.direct {
            Verdict::PassthroughMappings
        } else {
            Verdict::Passthrough
        }
    } else {
        by_daemon
    };
    match current {
        InodeMode::Closed => preferred,
        InodeMode::Daemon => by_daemon,
        InodeMode::Passthrough { is_current: false } => Verdict::Renew,
        InodeMode::Passthrough { is_current: true } => match preferred {
            Verdict::Cached | Verdict::Direct if open.write => Verdict::Renew,
            // It must read the same backing file as the other opens.
            Verdict::Cached | Verdict::Direct | Verdict::DirectNew => Verdict::Passthrough,
            preferred => preferred,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: OpenTraits = OpenTraits {
        upper: false,
        write: false,
        replaced: false,
        privileged: false,
        direct: false,
        creates_small: false,
    };

    #[test]
    fn the_policy_selects_the_files_for_passthrough() {
        use Verdict::{Cached, Direct, Passthrough as Pass, PassthroughMappings as PassMappings};
        let lower = READ;
        let program = OpenTraits {
            replaced: true,
            ..READ
        };
        let upper = OpenTraits {
            upper: true,
            ..READ
        };
        let write = OpenTraits {
            write: true,
            ..upper
        };
        let setuid = OpenTraits {
            privileged: true,
            ..write
        };
        let direct = OpenTraits {
            direct: true,
            ..READ
        };
        let upper_program = OpenTraits {
            upper: true,
            ..program
        };
        let opens = [lower, program, upper, write, setuid, direct, upper_program];
        use Coherence::{Overlay, Posix};
        use Contents::Writable;
        use Passthrough::{All, Auto, Off, Read};
        use StackMode::{Fixed, Pushable};
        for (option, coherence, (stack, contents), verdicts) in [
            (
                Auto,
                Posix,
                (Fixed, Writable),
                [Cached, Pass, Pass, Pass, PassMappings, Direct, Pass],
            ),
            (
                Auto,
                Posix,
                (Pushable, Writable),
                [Cached, Pass, Cached, Cached, Cached, Direct, Cached],
            ),
            (
                Auto,
                Overlay,
                (Pushable, Writable),
                [Pass, Pass, Cached, Cached, Cached, PassMappings, Cached],
            ),
            (
                Read,
                Posix,
                (Fixed, Writable),
                [Cached, Pass, Cached, Cached, Cached, Direct, Cached],
            ),
            (
                All,
                Overlay,
                (Pushable, Writable),
                [Pass, Pass, Pass, Pass, PassMappings, PassMappings, Pass],
            ),
            (
                Off,
                Overlay,
                (Fixed, Writable),
                [Cached, Cached, Cached, Cached, Cached, Direct, Cached],
            ),
        ] {
            let policy = Policy::new(option, coherence, (stack, contents));
            let got = opens.map(|open| decide(policy, open, InodeMode::Closed));
            assert_eq!(got, verdicts, "{option:?} {coherence:?} {stack:?}");
        }
    }

    #[test]
    fn the_daemon_writes_small_new_files_if_other_opens_of_them_use_passthrough() {
        use Coherence::Packages;
        use Contents::Writable;
        use Passthrough::{All, Auto, Off, Read};
        use StackMode::{Fixed, Pushable};
        use Verdict::{Cached, Direct, DirectNew, Passthrough as Pass};
        let new = OpenTraits {
            upper: true,
            write: true,
            creates_small: true,
            ..READ
        };
        for (option, stack, verdict) in [
            (Auto, Fixed, DirectNew),
            (All, Fixed, DirectNew),
            (Auto, Pushable, Cached),
            (All, Pushable, Pass),
            (Read, Fixed, Cached),
            (Off, Fixed, Cached),
        ] {
            let policy = Policy::new(option, Packages, (stack, Writable));
            let got = decide(policy, new, InodeMode::Closed);
            assert_eq!(got, verdict, "{option:?} {stack:?}");
        }
        let policy = Policy::new(Auto, Packages, (Fixed, Writable));
        let by_caller = OpenTraits {
            direct: true,
            ..new
        };
        let got = decide(policy, by_caller, InodeMode::Closed);
        assert_eq!(got, Verdict::PassthroughMappings);
        assert_eq!(decide(Policy::OFF, by_caller, InodeMode::Closed), Direct);
    }

    #[test]
    fn large_files_are_selected_where_their_content_is_not_written_in_place() {
        use Coherence::{Overlay, Packages, Posix};
        use Contents::{ReadOnly, Writable};
        for (coherence, contents, large) in [
            (Packages, Writable, LargeFiles::Replaced),
            (Posix, Writable, LargeFiles::None),
            (Overlay, Writable, LargeFiles::Replaced),
            (Packages, ReadOnly, LargeFiles::All),
            (Posix, ReadOnly, LargeFiles::All),
            (Overlay, ReadOnly, LargeFiles::All),
        ] {
            let stack = (StackMode::Pushable, contents);
            let policy = Policy::new(Passthrough::Auto, coherence, stack);
            assert_eq!(policy.large, large, "{coherence:?} {contents:?}");
            assert!(policy.programs);
        }
        let fixed = (StackMode::Fixed, Writable);
        let off = Policy::new(Passthrough::Off, Packages, fixed);
        assert_eq!(off, Policy::OFF);
    }

    /// The kernel refuses a mode that conflicts with the other opens of the inode.
    #[test]
    fn the_verdict_never_conflicts_with_other_opens() {
        let all = (0..64).map(|bits: u8| OpenTraits {
            upper: bits & 1 != 0,
            write: bits & 2 != 0,
            replaced: bits & 4 != 0,
            privileged: bits & 8 != 0,
            direct: bits & 16 != 0,
            creates_small: bits & 32 != 0,
        });
        for open in all {
            for policy in [
                Policy::new(
                    Passthrough::Auto,
                    Coherence::Posix,
                    (StackMode::Fixed, Contents::Writable),
                ),
                Policy::new(
                    Passthrough::Auto,
                    Coherence::Overlay,
                    (StackMode::Pushable, Contents::Writable),
                ),
                Policy::new(
                    Passthrough::All,
                    Coherence::Overlay,
                    (StackMode::Fixed, Contents::Writable),
                ),
            ] {
                let by_daemon = decide(policy, open, InodeMode::Daemon);
                assert!(matches!(by_daemon, Verdict::Cached | Verdict::Direct));
                let outdated = decide(policy, open, InodeMode::Passthrough { is_current: false });
                assert_eq!(outdated, Verdict::Renew);
                let current = decide(policy, open, InodeMode::Passthrough { is_current: true });
                assert!(!matches!(
                    current,
                    Verdict::Cached | Verdict::Direct | Verdict::DirectNew
                ));
                // A lower file is never a backing file for a writer.
                if open.write && !open.upper {
                    assert_eq!(current, Verdict::Renew);
                    let first = decide(policy, open, InodeMode::Closed);
                    assert!(matches!(first, Verdict::Cached | Verdict::Direct));
                }
            }
        }
    }
}

//! How an open file's reads and writes go: one pure function. The rules are the kernel's (fs/fuse/iomode.c,
//! fs/fuse/passthrough.c, tried on Linux 6.18): while any open of an inode is passed through, all others
//! must be too, with the same backing file; while any is not, none can be.

use crate::choices::{Coherence, Passthrough};

/// What a mount passes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) struct Policy {
    /// Files in the upper, for reading and for writing.
    pub(in crate::fuse) upper: bool,
    /// Programs and libraries in lowers, for reading.
    pub(in crate::fuse) programs: bool,
    /// All files of lowers, for reading.
    pub(in crate::fuse) lowers: bool,
}

impl Policy {
    /// Nothing.
    pub(in crate::fuse) const OFF: Self = Self {
        upper: false,
        programs: false,
        lowers: false,
    };

    /// What was asked for, on a mount whose stack somebody may or may not change while it lives. A program
    /// that writes through the kernel can't be stopped for that.
    pub(in crate::fuse) fn new(
        asked: Passthrough,
        coherence: Coherence,
        may_be_pushed: bool,
    ) -> Self {
        let upper = match asked {
            Passthrough::Off => return Self::OFF,
            Passthrough::Read => false,
            Passthrough::All => true,
            Passthrough::Auto => !may_be_pushed,
        };
        Self {
            upper,
            programs: true,
            lowers: coherence == Coherence::Overlay,
        }
    }

    /// Whether anything is passed through at all.
    pub(in crate::fuse) fn any(self) -> bool {
        self != Self::OFF
    }
}

/// An open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) struct Asked {
    /// The content lies in the layer that is written.
    pub(in crate::fuse) upper: bool,
    /// It may be written through.
    pub(in crate::fuse) write: bool,
    /// It is a program or a library.
    pub(in crate::fuse) program: bool,
    /// Whoever writes to it takes setuid, setgid or capabilities from it, or not: the layer can't tell who.
    pub(in crate::fuse) privileged: bool,
    /// The program asked for O_DIRECT.
    pub(in crate::fuse) direct: bool,
}

/// What the living opens of an inode are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) enum State {
    /// There are none.
    Idle,
    /// Their requests come here.
    Served,
    /// They are passed through to a backing file, which is the present content, or was before a copy-up.
    Passed { present: bool },
}

/// How an open is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::fuse) enum Verdict {
    /// The kernel reads and writes the backing file.
    Pass,
    /// Reads and writes come here, mappings are the backing file's.
    PassMappings,
    /// Reads and writes go through the kernel's page cache.
    Cached,
    /// Reads and writes come here.
    Direct,
    /// Not under this number: ESTALE makes the kernel look the name up again, which gives it another one.
    Renew,
}

/// How this open is answered.
pub(in crate::fuse) fn decide(policy: Policy, asked: Asked, state: State) -> Verdict {
    let served = if asked.direct {
        Verdict::Direct
    } else {
        Verdict::Cached
    };
    // What lies in the upper may be written at any time without a copy-up: its readers are to be no reason
    // for another number.
    let reads = !asked.write && !asked.upper && (policy.lowers || policy.programs && asked.program);
    let wanted = if policy.upper && asked.upper {
        if asked.direct || (asked.write && asked.privileged) {
            // A daemon takes O_DIRECT at any offset; the file system below may not.
            Verdict::PassMappings
        } else {
            Verdict::Pass
        }
    } else if reads {
        if asked.direct {
            Verdict::PassMappings
        } else {
            Verdict::Pass
        }
    } else {
        served
    };
    match state {
        State::Idle => wanted,
        State::Served => served,
        State::Passed { present: false } => Verdict::Renew,
        State::Passed { present: true } => match wanted {
            Verdict::Cached | Verdict::Direct if asked.write => Verdict::Renew,
            // It reads what the others do.
            Verdict::Cached | Verdict::Direct => Verdict::Pass,
            wanted => wanted,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Asked = Asked {
        upper: false,
        write: false,
        program: false,
        privileged: false,
        direct: false,
    };

    fn policy(asked: Passthrough, coherence: Coherence, may_be_pushed: bool) -> Policy {
        Policy::new(asked, coherence, may_be_pushed)
    }

    #[test]
    fn what_is_passed_through() {
        use Verdict::{Cached, Direct, Pass, PassMappings};
        let lower = READ;
        let program = Asked {
            program: true,
            ..READ
        };
        let upper = Asked {
            upper: true,
            ..READ
        };
        let write = Asked {
            write: true,
            ..upper
        };
        let setuid = Asked {
            privileged: true,
            ..write
        };
        let direct = Asked {
            direct: true,
            ..READ
        };
        let upper_program = Asked {
            upper: true,
            ..program
        };
        let opens = [lower, program, upper, write, setuid, direct, upper_program];
        use Coherence::{Overlay, Posix};
        use Passthrough::{All, Auto, Off, Read};
        for (asked, coherence, pushed, verdicts) in [
            (
                Auto,
                Posix,
                false,
                [Cached, Pass, Pass, Pass, PassMappings, Direct, Pass],
            ),
            (
                Auto,
                Posix,
                true,
                [Cached, Pass, Cached, Cached, Cached, Direct, Cached],
            ),
            (
                Auto,
                Overlay,
                true,
                [Pass, Pass, Cached, Cached, Cached, PassMappings, Cached],
            ),
            (
                Read,
                Posix,
                false,
                [Cached, Pass, Cached, Cached, Cached, Direct, Cached],
            ),
            (
                All,
                Overlay,
                true,
                [Pass, Pass, Pass, Pass, PassMappings, PassMappings, Pass],
            ),
            (
                Off,
                Overlay,
                false,
                [Cached, Cached, Cached, Cached, Cached, Direct, Cached],
            ),
        ] {
            let policy = policy(asked, coherence, pushed);
            let got = opens.map(|open| decide(policy, open, State::Idle));
            assert_eq!(got, verdicts, "{asked:?} {coherence:?} {pushed}");
        }
    }

    /// Whatever is asked for, the answer is one that the kernel takes.
    #[test]
    fn what_lives_decides() {
        let all = (0..32).map(|bits: u8| Asked {
            upper: bits & 1 != 0,
            write: bits & 2 != 0,
            program: bits & 4 != 0,
            privileged: bits & 8 != 0,
            direct: bits & 16 != 0,
        });
        for asked in all {
            for policy in [
                policy(Passthrough::Auto, Coherence::Posix, false),
                policy(Passthrough::Auto, Coherence::Overlay, true),
                policy(Passthrough::All, Coherence::Overlay, false),
            ] {
                let served = decide(policy, asked, State::Served);
                assert!(matches!(served, Verdict::Cached | Verdict::Direct));
                let moved = decide(policy, asked, State::Passed { present: false });
                assert_eq!(moved, Verdict::Renew);
                let passed = decide(policy, asked, State::Passed { present: true });
                assert!(!matches!(passed, Verdict::Cached | Verdict::Direct));
                // A lower is never handed to somebody who may write.
                if asked.write && !asked.upper {
                    assert_eq!(passed, Verdict::Renew);
                    let idle = decide(policy, asked, State::Idle);
                    assert!(matches!(idle, Verdict::Cached | Verdict::Direct));
                }
            }
        }
    }
}

//! Attributes that the kernel caches: for how long it may, when it has to drop them, and the rule that keeps
//! a program's setuid bits apart from those who write to it. docs/decisions/0015 has the reasons.
//!
//! The kernel runs a program by the mode in its cache. It asks again before an execve(2) where the cached
//! mode is invalidated or too old, but for the last time before it opens the file. So a program and its
//! writers must not overlap from there on either; see [`Adapter::admit`].

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use fuser::INodeNo;
use lru::LruCache;
use parking_lot::Mutex;

use super::adapter::Adapter;
use crate::error::{Errno, Error, Result};
use crate::inode::Inode;
use crate::overlay::{Attr, Op, OpenHow, SETID};
use crate::sys::stat::{FileKind, Time};

/// How many refused opens are remembered until they are repeated.
const REFUSED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// How the kernel takes the attributes of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// It drops them when it was told since the request that they are stale: replies to LOOKUP, GETATTR and
    /// READDIRPLUS.
    IfCurrent,
    /// It takes them as they are: replies to SETATTR, LINK, CREATE and whatever else makes a name.
    Always,
}

/// Opens that were refused with ESTALE, upon which the kernel looks the name up and opens it once more: the
/// inode and the thread, and the change time of the file then.
#[derive(Debug)]
pub(super) struct Refused(Mutex<LruCache<(u64, u32), Time>>);

impl Default for Refused {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(REFUSED)))
    }
}

impl Refused {
    /// Answers an open. The first time that it cannot be admitted it is refused with ESTALE, the second time with
    /// ETXTBSY; the kernel has the mode of the change time at which it was refused.
    fn answer(&self, open: (u64, u32), ctime: Time, admission: Admission) -> Result<()> {
        let mut refused = self.0.lock();
        match (refused.pop(&open), admission) {
            (_, Admission::Admitted) => Ok(()),
            (None, _) => {
                refused.put(open, ctime);
                Err(Error::Errno(Errno::STALE))
            }
            (Some(then), Admission::Outdated) if then == ctime => Ok(()),
            (Some(_), _) => Err(Error::Errno(Errno::TXTBSY)),
        }
    }
}

/// What an open means for a program with setuid or setgid bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    Admitted,
    /// The kernel's cached mode may have bits that are gone: it has to ask again, once.
    Outdated,
    /// A program and a writer would overlap.
    Busy,
}

/// Decides on an open of a file that the kernel may know with setuid or setgid bits. `has_bits`: on disk;
/// `is_written`, `is_run`: the file is open so, this open included.
fn admission(how: OpenHow, has_bits: bool, is_written: bool, is_run: bool) -> Admission {
    if how.exec && !has_bits {
        Admission::Outdated
    } else if (how.exec && is_written) || (how.write && is_run) {
        Admission::Busy
    } else {
        Admission::Admitted
    }
}

impl Adapter {
    /// Returns how long the kernel may cache `found`, the attributes of `inode`, which it knows as `number`.
    pub(super) fn keep_attr(
        &self,
        inode: &Inode,
        number: u64,
        found: &Attr,
        accepted: Accepted,
    ) -> Duration {
        let setid = shows_setid(inode, found);
        let outdated = setid && accepted == Accepted::Always;
        if outdated || self.passing.is_unsure(number, setid) {
            Duration::ZERO
        } else {
            self.keep
        }
    }

    /// Returns how long the kernel may cache `found`, the attributes of a file that is answered as created, and
    /// its name. It is empty: what makes it worth mapping has the kernel ask for size and times again.
    pub(super) fn keep_created(&self, inode: &Inode, found: &Attr) -> Duration {
        if shows_setid(inode, found) {
            Duration::ZERO
        } else {
            self.keep
        }
    }

    /// Has the kernel drop the cached attributes of objects that an operation lists. It must happen before the
    /// reply: the caller may rely on them directly after it.
    pub(super) fn invalidate_stale(&self, stale: &[Arc<Inode>]) {
        for inode in stale {
            let number = self.overlay.inodes().number(inode);
            self.invalidate_attr(number);
            if number != inode.ino() {
                self.invalidate_attr(inode.ino());
            }
        }
    }

    /// Has the kernel drop the cached attributes of what it knows by this number.
    ///
    /// Safe in a handler: with a negative offset this takes no page and no directory lock, and the inode is
    /// referenced by the request, so that dropping the last reference is none of ours.
    pub(super) fn invalidate_attr(&self, number: u64) {
        let Some(notifier) = self.notifier.get() else {
            return;
        };
        match notifier.inval_inode(INodeNo(number), -1, 0) {
            Ok(()) => {}
            // The kernel does not know it, and has cached nothing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => log::warn!("attributes of {number} may be out of date: {error}"),
        }
    }

    /// Keeps writers off programs that run with setuid or setgid, from the open for execve(2) on.
    ///
    /// Between its last look at the mode and the moment from which it refuses writers by itself (ETXTBSY)
    /// the kernel sends this open. A writer that comes and goes in between takes the bits off, which the kernel
    /// does not notice any more. So here the two exclude one another, and a program whose bits went since the
    /// kernel saw them is looked up again. The file is counted as open already: of two opens at once at
    /// least one sees the other.
    ///
    /// RELEASE comes late, so what is in the way may be closed already; the kernel's own repetition of the open
    /// gives it time. Only then the open fails with ETXTBSY.
    pub(super) fn admit(
        &self,
        op: &Op<'_>,
        inode: &Arc<Inode>,
        how: OpenHow,
        thread: u32,
    ) -> Result<()> {
        if !(how.exec || how.write) || !inode.was_shown_with_setid() {
            return Ok(());
        }
        let stat = op.stat_now(inode)?;
        let has_bits = stat.perm() & SETID != 0;
        let admission = admission(how, has_bits, inode.is_written(), inode.is_run());
        self.refused
            .answer((inode.ino(), thread), stat.ctime, admission)
    }
}

/// Whether attributes to be answered have setuid or setgid bits, which is noted.
fn shows_setid(inode: &Inode, found: &Attr) -> bool {
    let setid = found.stat.kind() == FileKind::Regular && found.stat.perm() & SETID != 0;
    if setid {
        inode.shown_with_setid();
    }
    setid
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXEC: OpenHow = OpenHow {
        write: false,
        truncate: false,
        exec: true,
        keep_atime: false,
    };
    const WRITE: OpenHow = OpenHow {
        write: true,
        exec: false,
        ..EXEC
    };
    const READ: OpenHow = OpenHow {
        exec: false,
        ..EXEC
    };

    #[test]
    fn a_program_with_bits_and_its_writers_exclude_one_another() {
        use Admission::{Admitted, Busy, Outdated};
        for (how, has_bits, is_written, is_run, wanted) in [
            (EXEC, true, false, true, Admitted),
            (EXEC, true, true, true, Busy),
            (WRITE, true, true, false, Admitted),
            (WRITE, true, true, true, Busy),
            // The bits go with a write that was admitted before; whoever runs it still runs it with them.
            (WRITE, false, true, true, Busy),
            (WRITE, false, true, false, Admitted),
            (EXEC, false, false, true, Outdated),
            (EXEC, false, true, true, Outdated),
            (READ, true, true, true, Admitted),
        ] {
            let got = admission(how, has_bits, is_written, is_run);
            assert_eq!(got, wanted, "{how:?} {has_bits} {is_written} {is_run}");
        }
    }

    #[test]
    fn an_open_is_refused_for_another_look_first() {
        use Admission::{Admitted, Busy, Outdated};
        const STALE: Result<()> = Err(Error::Errno(Errno::STALE));
        const BUSY: Result<()> = Err(Error::Errno(Errno::TXTBSY));
        let refused = Refused::default();
        let answer =
            |open, secs, admission| refused.answer(open, Time { secs, nanos: 0 }, admission);
        for (open, ctime, admission, wanted) in [
            ((1, 7), 1, Admitted, Ok(())),
            ((1, 7), 1, Busy, STALE),
            // Another thread and another file.
            ((1, 8), 1, Busy, STALE),
            ((2, 7), 1, Busy, STALE),
            ((1, 7), 1, Busy, BUSY),
            ((1, 8), 1, Admitted, Ok(())),
            ((1, 8), 1, Busy, STALE),
            ((1, 7), 2, Outdated, STALE),
            ((1, 7), 2, Outdated, Ok(())),
            ((1, 7), 2, Outdated, STALE),
            // The bits went after the second look.
            ((1, 7), 3, Outdated, BUSY),
        ] {
            assert_eq!(answer(open, ctime, admission), wanted, "{open:?} {ctime}");
        }
    }
}

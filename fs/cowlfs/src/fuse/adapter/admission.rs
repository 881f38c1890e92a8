//! Admission of opens: a program that runs with setuid or setgid, and writers of its file, exclude one another.
//! docs/decisions/0015 has the reasons.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_overlay::inode::Inode;
use cowl_overlay::{Op, OpenOptions, SETID};

/// How many refused opens are remembered until they are repeated.
const REFUSED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

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
    /// ETXTBSY. One that was only outdated is admitted then, unless the file has changed again: the kernel has
    /// refreshed the mode in between.
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

    /// Keeps writers off programs that run with setuid or setgid, from the open for execve(2) on.
    ///
    /// The kernel sends this open after it has checked the mode for the last time, and before it refuses writers
    /// by itself (ETXTBSY). It does not notice a writer that opens and closes the file in between and thereby
    /// clears the bits. So the two exclude one another here as well, and a program whose bits were cleared
    /// since the kernel cached them is looked up again. The caller has counted the file as open: of two opens at
    /// once at least one sees the other.
    ///
    /// RELEASE is asynchronous, so a conflicting descriptor may be closed already; the kernel's repetition of
    /// the open gives it time. Only then the open fails with ETXTBSY.
    pub(super) fn admit(
        &self,
        op: &Op<'_>,
        inode: &Arc<Inode>,
        how: OpenOptions,
        thread: u32,
    ) -> Result<()> {
        let shown = inode.flags().setid_shown();
        if !(how.exec || how.write) || shown == 0 {
            return Ok(());
        }
        let stat = op.stat_on_disk(inode)?;
        let on_disk = stat.perm() & SETID;
        let admission = admission(
            how,
            shown,
            on_disk,
            inode.has_writers(),
            inode.is_executing(),
        );
        self.answer((inode.ino(), thread), stat.ctime, admission)
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

/// Decides on an open of a file that the kernel was answered with the setuid and setgid bits `shown`, and that has
/// those `on_disk`. `is_written`, `is_run`: the file is open so, this open included.
fn admission(
    how: OpenOptions,
    shown: u32,
    on_disk: u32,
    is_written: bool,
    is_run: bool,
) -> Admission {
    if how.exec && shown & !on_disk != 0 {
        Admission::Outdated
    } else if (how.exec && is_written) || (how.write && is_run) {
        Admission::Busy
    } else {
        Admission::Admitted
    }
}

/// Admits a change of the mode of `inode` to `mode`; ETXTBSY where it is to gain setuid or setgid bits while it is
/// open for execve(2) and for writing at once.
///
/// [`Refused::admit`] asks nothing about a file that was never shown with such bits, so both opens may have been
/// admitted. The program about to start would run with the new bits, and with what the writer writes after they
/// were set, although that write takes them off. The bits are noted first: an open that counts from here on is
/// asked about.
pub(super) fn admit_mode(inode: &Inode, mode: Option<u32>) -> Result<()> {
    let bits = mode.unwrap_or(0) & SETID;
    if bits == 0 || inode.kind() != FileKind::Regular {
        return Ok(());
    }
    inode.flags().note_setid_shown(bits);
    if inode.is_executing() && inode.has_writers() {
        return Err(Error::Errno(Errno::TXTBSY));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowl_layers::format::XattrSpace;
    use cowl_layers::layer::Layer;
    use cowl_overlay::{Overlay, OverlayOptions};

    const EXEC: OpenOptions = OpenOptions {
        write: false,
        truncate: false,
        exec: true,
        keep_atime: false,
    };
    const WRITE: OpenOptions = OpenOptions {
        write: true,
        exec: false,
        ..EXEC
    };
    const READ: OpenOptions = OpenOptions {
        exec: false,
        ..EXEC
    };

    #[test]
    fn a_program_with_bits_and_its_writers_exclude_one_another() {
        use Admission::{Admitted, Busy, Outdated};
        for (how, on_disk, is_written, is_run, wanted) in [
            (EXEC, 0o6000, false, true, Admitted),
            (EXEC, 0o6000, true, true, Busy),
            (WRITE, 0o6000, true, false, Admitted),
            (WRITE, 0o6000, true, true, Busy),
            // Cleared by a write that was admitted before.
            (WRITE, 0, true, true, Busy),
            (WRITE, 0, true, false, Admitted),
            (EXEC, 0, false, true, Outdated),
            (EXEC, 0, true, true, Outdated),
            // A member of the group keeps setgid where it is no right to execute.
            (EXEC, 0o2000, false, true, Outdated),
            (READ, 0o6000, true, true, Admitted),
        ] {
            let got = admission(how, 0o6000, on_disk, is_written, is_run);
            assert_eq!(got, wanted, "{how:?} {on_disk:o} {is_written} {is_run}");
        }
        assert_eq!(admission(EXEC, 0o2000, 0o6000, false, true), Admitted);
    }

    /// Neither open was asked about, because the file had never been shown with such bits.
    #[test]
    fn no_bits_are_set_between_a_writer_and_the_start_of_a_program() {
        const BUSY: Result<()> = Err(Error::Errno(Errno::TXTBSY));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("program"), "text").unwrap();
        let layer = Layer::open(dir.path(), XattrSpace::detect()).unwrap();
        let overlay = Overlay::new(None, vec![layer], OverlayOptions::default()).unwrap();
        let inode = overlay.begin().lookup_path(b"program").unwrap();
        for how in [WRITE, EXEC] {
            inode.count_open(how);
            assert_eq!(admit_mode(&inode, Some(0o755)), Ok(()));
            assert_eq!(admit_mode(&inode, None), Ok(()));
            assert_eq!(inode.flags().setid_shown(), 0);
            inode.count_close(how);
        }
        inode.count_open(OpenOptions {
            write: true,
            ..EXEC
        });
        assert_eq!(admit_mode(&inode, Some(0o755)), Ok(()));
        assert_eq!(admit_mode(&inode, Some(0o2755)), BUSY);
        assert_eq!(inode.flags().setid_shown(), 0o2000);
        assert_eq!(admit_mode(&inode, Some(0o4755)), BUSY);
        inode.count_close(WRITE);
        assert_eq!(admit_mode(&inode, Some(0o6755)), Ok(()));
        assert_eq!(inode.flags().setid_shown(), 0o6000);
        assert_eq!(admit_mode(overlay.root(), Some(0o2755)), Ok(()));
        inode.count_close(EXEC);
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

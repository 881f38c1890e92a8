//! Admission of opens: a program that runs with setuid or setgid excludes writers of its file, and they exclude it.
//! docs/decisions/0015 has the reasons.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use cowl_layers::locks::Mutex;
use lru::LruCache;

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_overlay::inode::Inode;
use cowl_overlay::{Op, OpenOptions, SETID};

/// The number of refused opens that are remembered until the kernel repeats them.
const MAX_REFUSED: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// The number of times that a repeated open checks whether the conflicting descriptor was closed, and the delay between
/// the checks.
const CHECKS: u32 = 50;
const CHECK_DELAY: Duration = Duration::from_millis(1);

/// Opens that were refused with ESTALE, by inode number and thread, with the change time of the file at that time.
///
/// On ESTALE the kernel looks the name up again and repeats the open once.
#[derive(Debug)]
pub(super) struct RefusedOpens(Mutex<LruCache<(u64, u32), Time>>);

impl Default for RefusedOpens {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MAX_REFUSED)))
    }
}

impl RefusedOpens {
    /// Returns the refused opens, the oldest first.
    pub(super) fn record(&self) -> Vec<((u64, u32), Time)> {
        let refused = self.0.lock();
        let recorded = refused.iter().rev();
        recorded.map(|(open, ctime)| (*open, *ctime)).collect()
    }

    /// Continues with the refused opens of another process.
    pub(super) fn from_record(record: Vec<((u64, u32), Time)>) -> Self {
        let refused = Self::default();
        for (open, ctime) in record {
            refused.0.lock().put(open, ctime);
        }
        refused
    }

    /// Returns the error for an open, and remembers a refusal.
    ///
    /// An open that cannot be admitted is refused with ESTALE the first time, and with ETXTBSY the second time. If only
    /// the kernel's cached mode was outdated, the second open is admitted, unless the file has changed again: the
    /// kernel has refreshed the mode in between.
    fn check(&self, open: (u64, u32), ctime: Time, admission: Admission) -> Result<()> {
        let mut refused = self.0.lock();
        match (refused.pop(&open), admission) {
            (_, Admission::Admitted) => Ok(()),
            (None, _) => {
                refused.put(open, ctime);
                Err(Error::Errno(Errno::STALE))
            }
            (Some(before), Admission::Outdated) if before == ctime => Ok(()),
            (Some(_), _) => Err(Error::Errno(Errno::TXTBSY)),
        }
    }

    /// Admits an open, or refuses it if a program with setuid or setgid bits and a writer of its file would overlap.
    ///
    /// It prevents a race: for execve(2) the kernel sends this open after it has checked the mode for the last time,
    /// and before it excludes writers itself (ETXTBSY). It does not notice a writer that opens and closes the file in
    /// between and thereby clears the bits. So programs and writers exclude each other here as well, and the kernel
    /// must look up again a program whose bits were cleared since it cached them. The caller must have counted the
    /// file as open, so that at least one of two concurrent opens sees the other.
    ///
    /// RELEASE is asynchronous, so a conflicting descriptor may be closed already; the kernel's retry of the open
    /// waits for a short time for the RELEASE to arrive. The open fails with ETXTBSY only if it conflicts after that as
    /// well.
    pub(super) fn admit(
        &self,
        op: &Op<'_>,
        inode: &Arc<Inode>,
        options: OpenOptions,
        thread: u32,
    ) -> Result<()> {
        let is_relevant = options.exec || options.write;
        if !is_relevant || inode.flags().setid_shown() == 0 {
            return Ok(());
        }
        let open = (inode.ino(), thread);
        // The mode is read again each time, and after the descriptors: one that was closed in between may have cleared the
        // bits by a write, and a later one is refused, because this open is counted already.
        let decide_now = || -> Result<(Time, Admission)> {
            let (written, run) = (inode.has_writers(), inode.is_executing());
            let stat = op.stat_on_disk(inode)?;
            let (shown, on_disk) = (inode.flags().setid_shown(), stat.perm() & SETID);
            Ok((stat.ctime, decide(options, shown, on_disk, written, run)))
        };
        let (mut ctime, mut admission) = decide_now()?;
        for _ in 0..CHECKS {
            if admission != Admission::Busy || !self.0.lock().contains(&open) {
                break;
            }
            std::thread::sleep(CHECK_DELAY);
            (ctime, admission) = decide_now()?;
        }
        self.check(open, ctime, admission)
    }
}

/// The decision on one open of a program with setuid or setgid bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    Admitted,
    /// The mode in the kernel's cache may have bits that were cleared: it must request the mode again, once.
    Outdated,
    /// A program and a writer would overlap.
    Busy,
}

/// Decides on an open of a file whose setuid and setgid bits `shown` were sent to the kernel, and that has the bits
/// `on_disk`.
///
/// `is_written` and `is_run` report its open descriptors for writing and for execve(2), including this one.
fn decide(
    options: OpenOptions,
    shown: u32,
    on_disk: u32,
    is_written: bool,
    is_run: bool,
) -> Admission {
    if options.exec && shown & !on_disk != 0 {
        Admission::Outdated
    } else if (options.exec && is_written) || (options.write && is_run) {
        Admission::Busy
    } else {
        Admission::Admitted
    }
}

/// Admits a change of the mode of `inode` to `mode`. Returns ETXTBSY if the file would gain setuid or setgid bits while
/// it is open both for execve(2) and for writing.
///
/// [`RefusedOpens::admit`] does not check a file that was never shown with such bits, so both opens may have been
/// admitted. The program that is about to start would run with the new bits and with data that the writer writes
/// after they were set, although that write clears them. The bits are noted before the check, so that every open that
/// is counted after it is checked.
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
    const WRITE: OpenOptions = OpenOptions::WRITE;
    const READ: OpenOptions = OpenOptions::READ;

    #[test]
    fn a_setid_program_and_its_writers_exclude_each_other() {
        use Admission::{Admitted, Busy, Outdated};
        for (options, on_disk, is_written, is_run, wanted) in [
            (EXEC, 0o6000, false, true, Admitted),
            (EXEC, 0o6000, true, true, Busy),
            (WRITE, 0o6000, true, false, Admitted),
            (WRITE, 0o6000, true, true, Busy),
            // A write that was admitted before has cleared the bits.
            (WRITE, 0, true, true, Busy),
            (WRITE, 0, true, false, Admitted),
            (EXEC, 0, false, true, Outdated),
            (EXEC, 0, true, true, Outdated),
            // A write by a member of the group does not clear setgid on a file without group execute permission.
            (EXEC, 0o2000, false, true, Outdated),
            (READ, 0o6000, true, true, Admitted),
        ] {
            let got = decide(options, 0o6000, on_disk, is_written, is_run);
            assert_eq!(got, wanted, "{options:?} {on_disk:o} {is_written} {is_run}");
        }
        assert_eq!(decide(EXEC, 0o2000, 0o6000, false, true), Admitted);
    }

    /// Neither open is checked, because the file was never shown with such bits.
    #[test]
    fn setid_bits_cannot_be_set_during_a_write_and_an_exec() {
        const BUSY: Result<()> = Err(Error::Errno(Errno::TXTBSY));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("program"), "text").unwrap();
        let layer = Layer::open(dir.path(), XattrSpace::detect()).unwrap();
        let overlay = Overlay::new(None, vec![layer], OverlayOptions::default()).unwrap();
        let inode = overlay.begin().lookup_path(b"program").unwrap();
        for options in [WRITE, EXEC] {
            inode.count_open(options);
            assert_eq!(admit_mode(&inode, Some(0o755)), Ok(()));
            assert_eq!(admit_mode(&inode, None), Ok(()));
            assert_eq!(inode.flags().setid_shown(), 0);
            inode.count_close(options);
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
    fn an_open_is_refused_with_estale_first() {
        use Admission::{Admitted, Busy, Outdated};
        const STALE: Result<()> = Err(Error::Errno(Errno::STALE));
        const BUSY: Result<()> = Err(Error::Errno(Errno::TXTBSY));
        let refused = RefusedOpens::default();
        let check = |open, secs, admission| refused.check(open, Time { secs, nanos: 0 }, admission);
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
            // The bits were cleared after the second lookup.
            ((1, 7), 3, Outdated, BUSY),
        ] {
            assert_eq!(check(open, ctime, admission), wanted, "{open:?} {ctime}");
        }
    }
}

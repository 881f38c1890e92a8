//! Overrides of the visible times of an inode.
//!
//! A copy-up changes times on disk, but is not a change that a process may observe. So the times from before are
//! reported instead.

use std::cell::RefCell;
use std::sync::atomic::Ordering;

use super::object::{Inode, TimesOverride};
use cowl_layers::sys::stat::Time;

thread_local! {
    /// The inodes whose override [`Inode::note_change`] ended in the operation of this thread.
    static ENDED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Takes the inodes whose overrides the operation of this thread has ended.
pub(crate) fn take_ended_overrides() -> Vec<u64> {
    ENDED.take()
}

/// Returns the ctime on disk and the one that is visible while it is unchanged, if they differ.
pub(crate) fn held_ctime(inode: &Inode) -> Option<(Time, Time)> {
    match inode.times.lock().as_deref().copied() {
        Some(TimesOverride::WhileCtime { real, visible }) => Some((real, visible)),
        _ => None,
    }
}

impl Inode {
    /// Returns the visible ctime of the object, whose ctime on disk is `on_disk`.
    pub(crate) fn visible_ctime(&self, on_disk: Time) -> Time {
        match self.times.lock().as_deref().copied() {
            Some(TimesOverride::Always { ctime, .. }) => ctime,
            Some(TimesOverride::WhileCtime { real, visible }) if real == on_disk => visible,
            _ => on_disk,
        }
    }

    /// Returns the visible mtime of the object, whose mtime on disk is `on_disk`.
    pub(crate) fn visible_mtime(&self, on_disk: Time) -> Time {
        match self.times.lock().as_deref().copied() {
            Some(TimesOverride::Always {
                mtime: Some(mtime), ..
            }) => mtime,
            _ => on_disk,
        }
    }

    /// Returns the version of the override, which changes when a copy-up begins or ends.
    ///
    /// If it changes while a thread reads the times on disk, the thread must read them again.
    pub(crate) fn times_version(&self) -> u32 {
        self.times_version.load(Ordering::Acquire)
    }

    /// Whether the visible times are, or ever were, different from those on disk.
    pub(crate) fn had_times_override(&self) -> bool {
        self.times_version() > 0 || self.has_times_override()
    }

    /// Makes these times visible, whatever the times on disk are, until [`Self::end_times_override`] or
    /// [`Self::note_change`].
    ///
    /// Returns the previous override for [`Self::end_times_override`]; `None` if it was that of another copy-up, which
    /// ends by itself.
    pub(crate) fn override_times(&self, ctime: Time, mtime: Option<Time>) -> Option<TimesOverride> {
        let mut current = self.times.lock();
        self.times_version.fetch_add(1, Ordering::AcqRel);
        let previous = current.replace(Box::new(TimesOverride::Always { ctime, mtime }));
        let previous = previous.map(|previous| *previous);
        previous.filter(|previous| !matches!(previous, TimesOverride::Always { .. }))
    }

    /// Ends [`Self::override_times`] and sets the override `next`; returns whether it did. Has no effect if
    /// [`Self::note_change`] ended the override before.
    pub(crate) fn end_times_override(&self, next: Option<TimesOverride>) -> bool {
        let mut current = self.times.lock();
        let is_active = matches!(current.as_deref(), Some(TimesOverride::Always { .. }));
        if is_active {
            *current = next.map(Box::new);
            self.times_version.fetch_add(1, Ordering::AcqRel);
        }
        is_active
    }

    /// Makes the ctime `visible` visible as long as the ctime on disk is `real`.
    pub(crate) fn override_ctime(&self, real: Time, visible: Time) {
        *self.times.lock() = Some(Box::new(TimesOverride::WhileCtime { real, visible }));
    }

    /// Whether the visible times can be different from those on disk.
    pub(crate) fn has_times_override(&self) -> bool {
        self.times.lock().is_some()
    }

    /// Records a change of the object that processes may observe: the times on disk become visible.
    ///
    /// The ctime on disk does not suffice to detect the change, because the clock may not have advanced since the
    /// copy-up.
    pub(crate) fn note_change(&self) {
        if self.times.lock().take().is_some() {
            ENDED.with_borrow_mut(|ended| ended.push(self.ino()));
        }
    }
}

//! Times that are shown instead of the layer's, because a copy-up changed those, which is not a change to any
//! process.

use std::sync::atomic::Ordering;

use super::object::{Inode, TimesOverride};
use cowl_layers::sys::stat::Time;

impl Inode {
    /// Returns the change time to show if the layer has `real`.
    pub(crate) fn shown_ctime(&self, real: Time) -> Time {
        match self.times.lock().as_deref().copied() {
            Some(TimesOverride::Always { ctime, .. }) => ctime,
            Some(TimesOverride::For { real: held, shown }) if held == real => shown,
            _ => real,
        }
    }

    /// Returns the modification time to show if the layer has `real`.
    pub(crate) fn shown_mtime(&self, real: Time) -> Time {
        match self.times.lock().as_deref().copied() {
            Some(TimesOverride::Always {
                mtime: Some(mtime), ..
            }) => mtime,
            _ => real,
        }
    }

    /// Returns the number of copy-ups that began or ended, so that a thread that read the layer's times before
    /// notices one.
    pub(crate) fn times_version(&self) -> u32 {
        self.times_version.load(Ordering::Acquire)
    }

    /// Whether other times than the layer's are or were shown.
    pub(crate) fn had_times_override(&self) -> bool {
        self.times_version() > 0 || self.has_times_override()
    }

    /// Shows these times from here on, whatever the layer has. Returns the times that were shown before.
    pub(crate) fn override_times(&self, ctime: Time, mtime: Option<Time>) -> Option<TimesOverride> {
        let mut now = self.times.lock();
        self.times_version.fetch_add(1, Ordering::AcqRel);
        let before = now.replace(Box::new(TimesOverride::Always { ctime, mtime }));
        // Times that end with another copy-up must not be restored.
        let before = before.map(|held| *held);
        before.filter(|held| !matches!(held, TimesOverride::Always { .. }))
    }

    /// Ends [`Self::override_times`], unless a real change ended it before.
    pub(crate) fn end_times_override(&self, held: Option<TimesOverride>) -> bool {
        let mut now = self.times.lock();
        let still = matches!(now.as_deref(), Some(TimesOverride::Always { .. }));
        if still {
            *now = held.map(Box::new);
            self.times_version.fetch_add(1, Ordering::AcqRel);
        }
        still
    }

    /// Shows `shown` from here on while the layer has `real`.
    pub(crate) fn override_ctime(&self, real: Time, shown: Time) {
        *self.times.lock() = Some(Box::new(TimesOverride::For { real, shown }));
    }

    /// Whether another change time than the layer's is shown.
    pub(crate) fn has_times_override(&self) -> bool {
        self.times.lock().is_some()
    }

    /// Records a real change: the layer's change time is shown again. (With a clock that did not advance between
    /// a copy-up and the change, the two could not be distinguished.)
    pub(crate) fn note_change(&self) {
        *self.times.lock() = None;
    }
}

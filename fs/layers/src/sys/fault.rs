//! Fault injection: in tests, the k-th changing system call of a thread fails.
//!
//! In a shipped binary every call here is empty and vanishes.

use crate::error::Errno;

#[cfg(any(test, feature = "fault-injection"))]
mod armed {
    use std::cell::Cell;

    use crate::error::Errno;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
        static SEEN: Cell<u64> = const { Cell::new(0) };
        static ONCE: Cell<bool> = const { Cell::new(false) };
        static NO_DEVICES: Cell<bool> = const { Cell::new(false) };
    }

    /// Lets `good` changing calls of this thread pass; every later one fails with EIO.
    pub fn arm(good: u64) {
        LEFT.set(Some(good));
        ONCE.set(false);
    }

    /// Lets `good` changing calls of this thread pass; the next one fails with EIO, and no other.
    pub fn arm_once(good: u64) {
        LEFT.set(Some(good));
        ONCE.set(true);
    }

    /// Ends the injection and returns how many changing calls were seen since the last time.
    pub fn disarm() -> u64 {
        LEFT.set(None);
        SEEN.replace(0)
    }

    /// Whether this thread's file systems refuse to make devices, as some do.
    pub fn refuse_devices(refuse: bool) {
        NO_DEVICES.set(refuse);
    }

    pub(crate) fn device() -> Result<(), Errno> {
        if NO_DEVICES.get() {
            return Err(Errno::PERM);
        }
        Ok(())
    }

    pub(crate) fn hit() -> Result<(), Errno> {
        SEEN.set(SEEN.get() + 1);
        match LEFT.get() {
            None => Ok(()),
            Some(0) => {
                if ONCE.get() {
                    LEFT.set(None);
                }
                Err(Errno::IO)
            }
            Some(left) => {
                LEFT.set(Some(left - 1));
                Ok(())
            }
        }
    }
}

#[cfg(any(test, feature = "fault-injection"))]
pub use armed::{arm, arm_once, disarm, refuse_devices};

/// Asked before every changing system call.
#[cfg(any(test, feature = "fault-injection"))]
pub(crate) fn hit() -> Result<(), Errno> {
    armed::hit()
}

/// Asked before every changing system call.
#[cfg(not(any(test, feature = "fault-injection")))]
#[inline(always)]
pub(crate) fn hit() -> Result<(), Errno> {
    Ok(())
}

/// Asked before a device is made.
#[cfg(any(test, feature = "fault-injection"))]
pub(crate) fn device() -> Result<(), Errno> {
    armed::device()
}

/// Asked before a device is made.
#[cfg(not(any(test, feature = "fault-injection")))]
#[inline(always)]
pub(crate) fn device() -> Result<(), Errno> {
    Ok(())
}

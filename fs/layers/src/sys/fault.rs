//! Fault injection: in tests, the k-th system call of a thread that changes a file system fails.
//!
//! Without the feature `fault-injection`, every function here is empty and inlined.

use crate::error::Errno;
use crate::points::{Changing, changing};

#[cfg(any(test, feature = "fault-injection"))]
mod armed {
    use std::cell::Cell;

    use crate::error::Errno;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
        static SEEN: Cell<u64> = const { Cell::new(0) };
        static ONCE: Cell<bool> = const { Cell::new(false) };
        static PANIC: Cell<bool> = const { Cell::new(false) };
        static NO_DEVICES: Cell<bool> = const { Cell::new(false) };
    }

    /// Lets `good` changes by this thread succeed, and all later ones fail with EIO.
    pub fn arm(good: u64) {
        LEFT.set(Some(good));
        ONCE.set(false);
    }

    /// Lets `good` changes by this thread succeed, the next one fail with EIO, and all later ones succeed.
    pub fn arm_once(good: u64) {
        LEFT.set(Some(good));
        ONCE.set(true);
    }

    /// Lets `good` changes by this thread succeed, the next one panic, and all later ones succeed.
    pub fn arm_panic(good: u64) {
        arm_once(good);
        PANIC.set(true);
    }

    /// Ends the injection, and returns the number of changes since the last call.
    pub fn disarm() -> u64 {
        LEFT.set(None);
        PANIC.set(false);
        SEEN.replace(0)
    }

    /// Sets whether the creation of devices by this thread fails with EPERM, as on some file systems.
    pub fn refuse_devices(refuse: bool) {
        NO_DEVICES.set(refuse);
    }

    /// The injection of a thread.
    #[derive(Debug)]
    pub struct Injection {
        left: Option<u64>,
        seen: u64,
        once: bool,
        panic: bool,
    }

    /// Takes the injection of this thread, for another one that continues its work.
    pub fn take() -> Injection {
        Injection {
            left: LEFT.take(),
            seen: SEEN.take(),
            once: ONCE.get(),
            panic: PANIC.take(),
        }
    }

    /// Sets the injection of this thread.
    pub fn give(injection: Injection) {
        LEFT.set(injection.left);
        SEEN.set(injection.seen);
        ONCE.set(injection.once);
        PANIC.set(injection.panic);
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
                assert!(!PANIC.replace(false), "injected panic");
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
pub use armed::{Injection, arm, arm_once, arm_panic, disarm, give, refuse_devices, take};

/// The injection of a thread.
#[cfg(not(any(test, feature = "fault-injection")))]
#[derive(Debug)]
pub struct Injection;

/// Takes the injection of this thread, for another one that continues its work.
#[cfg(not(any(test, feature = "fault-injection")))]
#[inline(always)]
pub fn take() -> Injection {
    Injection
}

/// Sets the injection of this thread.
#[cfg(not(any(test, feature = "fault-injection")))]
#[inline(always)]
pub fn give(_injection: Injection) {}

/// Returns an injected error, if one is due. To be called before every system call that changes a file system; the
/// result is to be dropped after it.
#[inline(always)]
pub(crate) fn begin() -> Result<Changing, Errno> {
    #[cfg(any(test, feature = "fault-injection"))]
    armed::hit()?;
    Ok(changing())
}

/// Returns an injected error, if one is due. To be called before a device is created.
#[cfg(any(test, feature = "fault-injection"))]
pub(crate) fn device() -> Result<(), Errno> {
    armed::device()
}

/// Returns an injected error, if one is due. To be called before a device is created.
#[cfg(not(any(test, feature = "fault-injection")))]
#[inline(always)]
pub(crate) fn device() -> Result<(), Errno> {
    Ok(())
}

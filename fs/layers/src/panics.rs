//! Panics: a report in the log, and the end of the process or only of a request.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Errno, Error, Result};
use crate::shown::{Allowed, plain};

/// The number of requests that a panic has ended.
static CAUGHT: AtomicU64 = AtomicU64::new(0);
/// The counter that is used instead of it, if there is one.
static SHARED: OnceLock<&'static AtomicU64> = OnceLock::new();

thread_local! {
    /// Whether the thread executes a request whose panic is caught.
    static IN_REQUEST: Cell<bool> = const { Cell::new(false) };
}

/// Reports panics with a backtrace on standard error, and ends the process with SIGABRT, except in [`request`].
///
/// A process that ends at once leaves the same states as one that is killed, which commands recover from. Destructors
/// that run during the unwinding could leave others.
pub fn install() {
    std::panic::set_hook(Box::new(|info| {
        let lines = Allowed {
            lines: true,
            colors: false,
        };
        // The alternate form has the addresses, from which `addr2line` finds the names in the separate symbols.
        let backtrace = std::backtrace::Backtrace::force_capture();
        let text = format!("{}\n{backtrace:#}", info);
        let text = format!("{}\n", plain(&text, lines));
        // If standard error fails, there is nowhere to report it.
        drop(std::io::Write::write_all(
            &mut std::io::stderr(),
            text.as_bytes(),
        ));
        if !IN_REQUEST.get() {
            std::process::abort();
        }
    }));
}

/// Executes a request. After a panic it fails with EIO, unless the panic may have left a state half-changed
/// ([`crate::locks`]): that ends the process.
pub fn request<T>(execute: impl FnOnce() -> Result<T>) -> Result<T> {
    let outer = IN_REQUEST.replace(true);
    // Unwind safety: a value that the closure has changed partly is behind a lock, whose guard ends the process.
    let done = catch_unwind(AssertUnwindSafe(execute));
    IN_REQUEST.set(outer);
    done.unwrap_or_else(|_| {
        counter().fetch_add(1, Ordering::Relaxed);
        Err(Error::Errno(Errno::IO))
    })
}

fn counter() -> &'static AtomicU64 {
    SHARED.get().copied().unwrap_or(&CAUGHT)
}

/// Counts in memory that this process shares with others from now on.
pub fn count_in(shared: &'static AtomicU64) {
    SHARED.get_or_init(|| shared);
}

/// Returns the number of requests that a panic has ended.
pub fn caught() -> u64 {
    counter().load(Ordering::Relaxed)
}

/// Continues the number of a predecessor of this process.
pub fn continue_from(caught: u64) {
    counter().fetch_add(caught, Ordering::Relaxed);
}

/// Ends the process, because the calling thread panics and holds a lock.
#[cfg(not(any(test, feature = "fault-injection")))]
#[cold]
pub(crate) fn end_locked() {
    log::error!("a panic has left a state half-changed: the process ends");
    std::process::abort();
}

/// Records that the process would end, for tests in one process.
#[cfg(any(test, feature = "fault-injection"))]
pub(crate) fn end_locked() {
    injected::HELD.set(true);
}

#[cfg(any(test, feature = "fault-injection"))]
mod injected {
    use std::cell::Cell;

    thread_local! {
        pub(super) static HELD: Cell<bool> = const { Cell::new(false) };
    }

    /// Returns whether a panic of this thread held a lock, so that the process would have ended, and resets it.
    pub fn take_ended() -> bool {
        HELD.replace(false)
    }
}

#[cfg(any(test, feature = "fault-injection"))]
pub use injected::take_ended;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::{Mutex, RwLock};

    #[test]
    fn request_that_panics_without_a_lock_fails_with_eio() {
        let before = caught();
        assert_eq!(request(|| Ok(1)), Ok(1));
        let failed: Result<()> = request(|| panic!("injected"));
        assert_eq!(failed, Err(Error::Errno(Errno::IO)));
        assert!(caught() > before && !take_ended());
    }

    #[test]
    fn panic_that_holds_a_lock_ends_the_process() {
        let (mutex, lock) = (Mutex::new(1), RwLock::new(1));
        for hold in [&|| drop_after_panic(mutex.lock()), &|| {
            drop_after_panic(lock.write())
        }] as [&dyn Fn() -> Result<()>; 2]
        {
            assert!(request(hold).is_err());
            assert!(take_ended());
        }
        assert!(request(|| drop_after_panic(lock.read())).is_err());
        assert!(!take_ended(), "a reader changes nothing");
        *mutex.lock() += 1;
        assert_eq!(*mutex.lock(), 2);
    }

    fn drop_after_panic<T>(_guard: T) -> Result<()> {
        panic!("injected")
    }
}

//! The request that a thread works on, so that one that ends the daemon by a fault is found (docs/decisions/0035).

use std::cell::Cell;

use cowl_layers::sys::crash::{CrashRecord, RequestMark};
use cowl_overlay::RESENT;

/// The number of daemons after whose end a request is refused.
const MAX_CRASHES: u64 = 2;

/// The number of a request that does not exist, for the work between two requests.
const IDLE: u64 = (1 << 62) - 1;

thread_local! {
    /// Whether the request of this thread must not be executed.
    static REFUSED: Cell<bool> = const { Cell::new(false) };
}

/// A request of this thread, until it is dropped.
pub(super) struct Blame {
    _mark: RequestMark,
}

impl Blame {
    /// Notes the request that this thread works on from now on.
    pub(super) fn begin(unique: u64, crashes: CrashRecord) -> Self {
        let id = unique & !RESENT;
        if unique & RESENT != 0 {
            REFUSED.set(crashes.count(id) >= MAX_CRASHES);
        }
        Self {
            _mark: RequestMark::begin(id),
        }
    }

    /// Notes that this thread works between two requests from now on; `None` if that work has ended a daemon.
    pub(super) fn begin_idle(crashes: CrashRecord) -> Option<Self> {
        if crashes.count(IDLE) > 0 {
            return None;
        }
        Some(Self {
            _mark: RequestMark::begin(IDLE),
        })
    }
}

impl Drop for Blame {
    fn drop(&mut self) {
        REFUSED.set(false);
    }
}

/// Whether the request of this thread has ended two daemons, so that it must not be executed.
pub(super) fn is_refused() -> bool {
    REFUSED.get()
}

/// Faults that tests inject. Programs for users, which are built without debug assertions, do not contain it.
#[cfg(debug_assertions)]
pub(super) mod injected {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    use std::sync::OnceLock;
    use std::time::Duration;

    use cowl_layers::sys::crash::injected;

    /// The variable with an action, the kind of the requests and optionally their name, separated by spaces.
    const VARIABLE: &str = "COWL_TEST_FAULT";
    /// The duration of the action `slow`.
    const SLOW: Duration = Duration::from_millis(1500);

    /// Executes the action of the environment variable, if it names this request.
    pub(in super::super) fn end_at(request: &str, name: Option<&OsStr>) {
        static FAULT: OnceLock<Option<OsString>> = OnceLock::new();
        let Some(fault) = FAULT.get_or_init(|| std::env::var_os(VARIABLE)) else {
            return;
        };
        let mut words = fault.as_bytes().split(|byte| *byte == b' ');
        let action = words.next().unwrap_or_default();
        let is_named = |wanted: &[u8]| name.is_some_and(|name| name.as_bytes() == wanted);
        if words.next() != Some(request.as_bytes()) || !words.next().is_none_or(is_named) {
            return;
        }
        match action {
            b"segv" => injected::segmentation_fault(),
            b"overflow" => {
                let depth = injected::stack_overflow();
                log::error!("the stack is endless: {depth}");
            }
            b"bus" => injected::raise(libc::SIGBUS),
            b"ill" => injected::raise(libc::SIGILL),
            b"abort" => std::process::abort(),
            b"slow" => std::thread::sleep(SLOW),
            _ => log::error!("unknown action in {VARIABLE}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_that_are_sent_again_can_be_refused() {
        let crashes = CrashRecord::create().unwrap();
        for unique in [6, 6 | RESENT] {
            let blame = Blame::begin(unique, crashes);
            assert!(!is_refused());
            drop(blame);
        }
    }
}

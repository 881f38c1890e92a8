//! The gate that each request passes before it has an effect.
//!
//! While the gate is closed, no request is between its effect and its reply. A request that was read and waits at the
//! gate has had no effect, so another process can answer it.

use std::time::{Duration, Instant};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The duration of one attempt to close the gate, during which new requests wait.
const ATTEMPT: Duration = Duration::from_millis(20);

/// The gate of a session.
#[derive(Debug, Default)]
pub(in crate::fuse) struct Gate(RwLock<()>);

/// The guard of a request that has passed the gate.
pub(in crate::fuse) struct Passage<'a> {
    _guard: RwLockReadGuard<'a, ()>,
}

/// A closed gate. Dropping it opens the gate.
#[must_use]
pub(crate) struct ClosedGate<'a> {
    _guard: RwLockWriteGuard<'a, ()>,
}

impl Gate {
    /// Waits while the gate is closed. The guard must be held until after the reply.
    pub(in crate::fuse) fn pass(&self) -> Passage<'_> {
        Passage {
            _guard: self.0.read(),
        }
    }

    /// Passes the gate, or returns `None` if it is closed.
    pub(in crate::fuse) fn try_pass(&self) -> Option<Passage<'_>> {
        let guard = self.0.try_read()?;
        Some(Passage { _guard: guard })
    }

    /// Closes the gate when all requests that have passed it are answered; `None` if that takes too long.
    ///
    /// Between attempts new requests pass, so that a long one delays no others for the whole time.
    pub(in crate::fuse) fn close(&self, timeout: Duration) -> Option<ClosedGate<'_>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(guard) = self.0.try_write_for(ATTEMPT) {
                return Some(ClosedGate { _guard: guard });
            }
            if Instant::now() > deadline {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_closes_after_the_last_reply() {
        let gate = Gate::default();
        let passage = gate.pass();
        assert!(gate.close(Duration::ZERO).is_none());
        drop(passage);
        let closed = gate.close(Duration::ZERO);
        assert!(closed.is_some());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| drop(gate.pass()));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            drop(closed);
        });
    }
}

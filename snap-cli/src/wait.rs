//! Polls for conditions that the kernel does not report as events.

use std::time::{Duration, Instant};

/// Calls `attempt` every `interval`, and at least once, until it returns a value. Returns `None` if it has returned
/// none by `deadline`.
pub(crate) fn poll_until<T, E>(
    deadline: Instant,
    interval: Duration,
    mut attempt: impl FnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    loop {
        if let Some(found) = attempt()? {
            return Ok(Some(found));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(interval);
    }
}

/// Waits until `condition` holds, which is checked every `interval`, and at least once. Returns whether it held by
/// `deadline`.
pub(crate) fn wait_until<E>(
    deadline: Instant,
    interval: Duration,
    mut condition: impl FnMut() -> Result<bool, E>,
) -> Result<bool, E> {
    let held = poll_until(deadline, interval, || Ok(condition()?.then_some(())))?;
    Ok(held.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_checked_at_least_once_and_until_it_holds() {
        let mut left = 3;
        let mut down = || {
            left -= 1;
            Ok::<_, ()>(left <= 0)
        };
        let (past, pause) = (Instant::now(), Duration::from_millis(1));
        assert_eq!(wait_until(past, pause, &mut down), Ok(false));
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(wait_until(later, pause, &mut down), Ok(true));
        assert_eq!(left, 0);
        assert_eq!(wait_until(later, pause, || Err(1)), Err(1));
    }
}

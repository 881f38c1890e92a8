//! Further attempts after errors that may pass, and the settings of the user for them.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::error::Error;

/// The waits before further attempts, in multiples of the first one: 60 in total.
const WAITS: [u32; 7] = [1, 2, 4, 8, 15, 15, 15];

/// The first wait, unless the user has set `COWL_RETRY_WAIT`.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// The minimum time after which a failure is final, if the attempts themselves take long.
const PATIENCE: Duration = Duration::from_secs(60);

/// The time over which the rate of a transfer is measured, unless the user has set `COWL_STALL_TIME`.
const STALL_TIME: Duration = Duration::from_secs(60);

/// The maximum value of a setting.
const MAX_SETTING: Duration = Duration::from_secs(3600);

/// The attempts of one operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    failures: usize,
    /// The time of the first failure.
    failing_since: Option<Instant>,
    first_wait: Duration,
}

impl Patience {
    /// Begins an operation.
    pub(super) fn new() -> Self {
        Self::with(first_wait())
    }

    fn with(first_wait: Duration) -> Self {
        Self {
            failures: 0,
            failing_since: None,
            first_wait,
        }
    }

    /// Begins again, because the last attempt was useful.
    pub(super) fn renew(&mut self) {
        *self = Self::with(self.first_wait);
    }

    /// Counts a failed attempt. Returns the time before the next one, or `None` if there is none. The time is at least the
    /// one that the server has requested.
    pub(super) fn next_wait(&mut self, requested: Option<Duration>) -> Option<Duration> {
        let factor = WAITS.get(self.failures)?;
        self.failures += 1;
        let since = self.failing_since.get_or_insert_with(Instant::now);
        let waits = self.first_wait.saturating_mul(WAITS.iter().sum());
        let is_over = since.elapsed() >= waits.max(PATIENCE);
        if is_over && requested.is_none() {
            return None;
        }
        // Random, so that several commands do not return at the same time.
        let random = u32::from(Uuid::new_v4().as_bytes()[0]);
        let usual = self.first_wait.saturating_mul(*factor);
        let wait = usual + usual.saturating_mul(random) / (4 * 256);
        Some(requested.map_or(wait, |requested| wait.max(requested)))
    }
}

/// Reports a failed attempt.
pub(super) fn report(error: &Error, wait: Duration) {
    log::warn!("{error}; trying again in {:.1} s", wait.as_secs_f64());
}

fn first_wait() -> Duration {
    static SETTING: OnceLock<Duration> = OnceLock::new();
    *SETTING.get_or_init(|| setting("COWL_RETRY_WAIT", FIRST_WAIT))
}

/// Returns the time over which the rate of a transfer is measured.
pub(super) fn stall_time() -> Duration {
    static SETTING: OnceLock<Duration> = OnceLock::new();
    *SETTING.get_or_init(|| setting("COWL_STALL_TIME", STALL_TIME))
}

/// Returns a time that a variable of the environment sets in milliseconds.
fn setting(name: &str, default: Duration) -> Duration {
    let Some(value) = std::env::var_os(name) else {
        return default;
    };
    let parsed = value.to_str().and_then(parse);
    parsed.unwrap_or_else(|| {
        log::warn!("{name} is ignored: it is not a number of milliseconds from 1 to 3600000");
        default
    })
}

fn parse(text: &str) -> Option<Duration> {
    let time = Duration::from_millis(text.parse().ok()?);
    (!time.is_zero() && time <= MAX_SETTING).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_fails_for_a_minute_is_waited_for() {
        let mut patience = Patience::with(FIRST_WAIT);
        let waits: Vec<_> = std::iter::from_fn(|| patience.next_wait(None)).collect();
        let total: Duration = waits.iter().sum();
        assert!(total >= Duration::from_secs(60), "{waits:?}");
        assert!(total <= Duration::from_secs(75), "{waits:?}");
        assert_eq!(patience.next_wait(None), None);
        patience.renew();
        assert!(patience.next_wait(None) < Some(Duration::from_secs(2)));
    }

    #[test]
    fn a_server_can_request_longer_waits() {
        let mut patience = Patience::with(Duration::from_millis(1));
        let long = Duration::from_secs(30);
        assert_eq!(patience.next_wait(Some(long)), Some(long));
        assert!(patience.next_wait(Some(Duration::ZERO)) >= Some(Duration::from_millis(2)));
        let waits = std::iter::from_fn(|| patience.next_wait(Some(Duration::ZERO)));
        assert_eq!(waits.count(), WAITS.len() - 2);
    }

    #[test]
    fn slow_attempts_are_given_up() {
        let mut patience = Patience::with(FIRST_WAIT);
        assert!(patience.next_wait(None).is_some());
        let since = patience.failing_since.unwrap();
        patience.failing_since = since.checked_sub(PATIENCE);
        assert_eq!(patience.next_wait(None), None);
        assert!(patience.next_wait(Some(Duration::ZERO)).is_some());
    }

    #[test]
    fn longer_waits_are_all_used() {
        let mut patience = Patience::with(30 * FIRST_WAIT);
        assert!(patience.next_wait(None).is_some());
        let since = patience.failing_since.unwrap();
        patience.failing_since = since.checked_sub(10 * PATIENCE);
        assert!(patience.next_wait(None).is_some());
        patience.failing_since = since.checked_sub(30 * PATIENCE);
        assert_eq!(patience.next_wait(None), None);
    }

    #[test]
    fn settings_are_limited() {
        assert_eq!(parse("250"), Some(Duration::from_millis(250)));
        for bad in ["", "0", "-1", "1s", "3600001", "99999999999999999999"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}

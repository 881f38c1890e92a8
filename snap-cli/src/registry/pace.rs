//! The minimum rate of transfers: a server that sends or reads a byte every minute must not hold a command for ever.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use super::patience::stall_time;

/// The minimum rate, in bytes per second.
const MIN_RATE: u64 = 1000;

/// Returns the time limit for the body of an answer with a blob of this size.
pub(super) fn longest(bytes: u64) -> Duration {
    // More than the rate permits, because the rate does not count the time that storing the data takes.
    10 * stall_time() + Duration::from_secs(bytes / MIN_RATE)
}

/// The rate of a transfer over a window of time.
#[derive(Debug)]
pub(super) struct Pace {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Begins to measure.
    pub(super) fn new() -> Self {
        Self::over(stall_time())
    }

    fn over(window: Duration) -> Self {
        Self {
            window,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// Counts bytes that were transferred, and the time for which the other side was waited for. Fails if there were too few
    /// bytes in the window.
    pub(super) fn count(&mut self, bytes: u64, waited: Duration) -> io::Result<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        self.waited += waited;
        if self.waited < self.window {
            return Ok(());
        }
        let milliseconds = u64::try_from(self.waited.as_millis()).unwrap_or(u64::MAX);
        let expected = MIN_RATE.saturating_mul(milliseconds) / 1000;
        if self.bytes < expected {
            let what = format!(
                "only {} bytes were transferred in {:.1} s",
                self.bytes,
                self.waited.as_secs_f64()
            );
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        *self = Self::over(self.window);
        Ok(())
    }
}

/// A reader that fails if the data arrives too slowly.
pub(super) struct PacedReader<R> {
    input: R,
    pace: Pace,
}

impl<R> PacedReader<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            pace: Pace::new(),
        }
    }
}

impl<R: Read> Read for PacedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let begin = Instant::now();
        let got = self.input.read(buffer)?;
        if got > 0 {
            self.pace.count(got as u64, begin.elapsed())?;
        }
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_transfers_fail() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::over(10 * second);
        for _ in 0..100 {
            pace.count(MIN_RATE, second).unwrap();
        }
        // A pause is permitted, but not a byte now and then.
        pace.count(10 * MIN_RATE, 9 * second).unwrap();
        pace.count(1, second).unwrap();
        pace.count(1, 9 * second).unwrap();
        let error = pace.count(1, 9 * second).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("only 2 bytes"), "{error}");
    }

    #[test]
    fn fast_readers_are_not_disturbed() {
        let data = vec![7; 100_000];
        let mut found = Vec::new();
        PacedReader::new(&data[..]).read_to_end(&mut found).unwrap();
        assert_eq!(found, data);
    }
}

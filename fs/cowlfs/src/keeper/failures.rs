//! The decision whether another daemon is started, after one has ended.

use std::fmt;
use std::time::Duration;

use cowl_layers::sys::crash::CrashRecord;
use cowl_overlay::LedgerError;

use libc::SIGKILL;

/// The number of daemons in a row that end before they have answered a request, after which the mount is given up.
const MAX_FAILURES: u32 = 5;
/// The limit for daemons that were killed by SIGKILL before they served: their recovery can be slower than the process
/// that kills them.
const MAX_KILLS: u32 = 30;
/// The limit for daemons that were ended by requests which are refused afterwards.
const MAX_BLAMED: usize = 2 * CrashRecord::CAPACITY;
/// The pause after the first failure; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_DOUBLINGS: u32 = 6;

/// The reason why no other daemon is started after one was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// This number of daemons in a row have ended before they answered a request.
    Failures(u32),
    /// The daemon could not record its state completely.
    Incomplete,
    /// The recorded state cannot be used.
    Unusable,
}

impl fmt::Display for GiveUp {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failures(count) => {
                write!(
                    out,
                    "{count} daemons in a row ended before they answered a request"
                )
            }
            Self::Incomplete => {
                write!(
                    out,
                    "the daemon was killed, and its state could not be recorded completely"
                )
            }
            Self::Unusable => {
                write!(
                    out,
                    "the daemon was killed, and another one could not use its recorded state"
                )
            }
        }
    }
}

/// The end of a daemon.
pub(super) struct End {
    /// Whether it had answered a request; `None` if it had not recorded its state yet.
    pub(super) has_answered: Option<Result<bool, LedgerError>>,
    /// Whether it had reported that it serves.
    pub(super) is_serving: bool,
    pub(super) signal: i32,
}

/// The daemons in a row that have failed.
pub(super) struct Failures {
    crashes: CrashRecord,
    failed: u32,
    killed: u32,
    /// The number of crashes whose request was recorded, and those of them since the last daemon that answered a request.
    seen: u64,
    blamed: u64,
}

impl Failures {
    pub(super) fn new(crashes: CrashRecord) -> Self {
        Self {
            crashes,
            failed: 0,
            killed: 0,
            seen: crashes.total(),
            blamed: 0,
        }
    }

    /// Notes the end of a daemon. Returns the pause before the next one.
    pub(super) fn note(&mut self, end: End) -> Result<Duration, GiveUp> {
        let total = self.crashes.total();
        let blamed = total.saturating_sub(self.seen);
        self.seen = total;
        let has_answered = match end.has_answered {
            None => false,
            Some(Ok(answered)) => answered,
            Some(Err(LedgerError::Incomplete)) => return Err(GiveUp::Incomplete),
            Some(Err(error)) => {
                log::error!("{error}");
                return Err(GiveUp::Unusable);
            }
        };
        if has_answered || end.signal == SIGKILL && end.is_serving {
            // A daemon that serves and gets no request has not failed.
            (self.failed, self.killed, self.blamed) = (0, 0, 0);
            return Ok(Duration::ZERO);
        }
        if blamed > 0 && self.blamed < MAX_BLAMED as u64 {
            // The request is refused after its second one, so there is progress.
            self.blamed += blamed;
            return Ok(Duration::ZERO);
        }
        let (count, limit) = match end.signal {
            SIGKILL => (&mut self.killed, MAX_KILLS),
            _ => (&mut self.failed, MAX_FAILURES),
        };
        *count += 1;
        if *count >= limit {
            return Err(GiveUp::Failures(*count));
        }
        Ok(FIRST_PAUSE * (1 << (*count).min(MAX_DOUBLINGS)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(has_answered: Option<bool>, is_serving: bool, signal: i32) -> End {
        End {
            has_answered: has_answered.map(Ok),
            is_serving,
            signal,
        }
    }

    #[test]
    fn five_daemons_without_an_answer_end_the_mount() {
        for recorded in [None, Some(false)] {
            let mut failures = Failures::new(CrashRecord::create().unwrap());
            for _ in 1..5 {
                assert!(
                    failures.note(end(recorded, false, libc::SIGABRT)).unwrap() > Duration::ZERO
                );
            }
            assert_eq!(
                failures.note(end(recorded, false, libc::SIGABRT)),
                Err(GiveUp::Failures(5))
            );
        }
    }

    #[test]
    fn a_daemon_that_answers_or_serves_begins_a_new_count() {
        for good in [
            end(Some(true), true, libc::SIGABRT),
            end(Some(false), true, SIGKILL),
        ] {
            let mut failures = Failures::new(CrashRecord::create().unwrap());
            for _ in 1..5 {
                failures
                    .note(end(Some(false), true, libc::SIGABRT))
                    .unwrap();
            }
            assert_eq!(failures.note(good), Ok(Duration::ZERO));
            failures
                .note(end(Some(false), true, libc::SIGABRT))
                .unwrap();
        }
    }

    #[test]
    fn kills_during_the_recovery_have_more_patience() {
        let mut failures = Failures::new(CrashRecord::create().unwrap());
        for _ in 1..30 {
            failures.note(end(None, false, SIGKILL)).unwrap();
        }
        let given_up = failures.note(end(None, false, SIGKILL)).unwrap_err();
        assert_eq!(given_up, GiveUp::Failures(30));
        assert!(given_up.to_string().starts_with("30 daemons in a row"));
    }

    #[test]
    fn an_incomplete_state_ends_the_mount() {
        let mut failures = Failures::new(CrashRecord::create().unwrap());
        let end = End {
            has_answered: Some(Err(LedgerError::Incomplete)),
            is_serving: true,
            signal: SIGKILL,
        };
        assert_eq!(failures.note(end), Err(GiveUp::Incomplete));
    }
}

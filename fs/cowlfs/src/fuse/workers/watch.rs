//! Looks after the threads of a mount, as long as requests come: whether one of them is held up, whether
//! more are of use, whether the CPUs are to stay awake. Without requests it sleeps.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::crew::{Crew, Tally};
use cowl_layers::sys;
use cowl_layers::sys::idle::Wish;

/// How often it looks.
const TICK: Duration = Duration::from_millis(2);
/// After so many ticks without a request it sleeps.
const QUIET: usize = 16;
/// The CPUs are kept awake as long as there were so many requests...
const BUSY: u64 = 4;
/// ...in the last so many ticks.
const SPAN: usize = 4;
/// A thread more is kept for at least so many ticks.
const PATIENCE: u32 = 32;

/// What is known of the last ticks.
#[derive(Debug)]
struct Watch {
    /// The tallies of the last ticks, the oldest first.
    past: [Tally; SPAN],
    quiet: usize,
    /// A request waited for a thread at the last tick.
    pending: bool,
    /// Ticks since a thread more was last found to be of use.
    since: u32,
    /// So many threads can have a CPU, besides the programs that wait for them.
    cpus: u32,
}

/// What is to be done after a tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Advice {
    /// A thread is held up, and nobody waits for requests.
    call: bool,
    /// So many threads are of use.
    want: u32,
    awake: bool,
    /// Nothing happens.
    sleep: bool,
}

/// What was seen at a tick.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    tally: Tally,
    /// No thread waits for a request.
    nobody_waits: bool,
    /// A request waits for a thread.
    pending: bool,
    wanted: u32,
    /// What the process did on CPUs since the last tick.
    worked: Duration,
}

impl Watch {
    fn new(cpus: u32) -> Self {
        Self {
            past: [Tally::default(); SPAN],
            quiet: 0,
            pending: false,
            since: 0,
            cpus,
        }
    }

    fn tick(&mut self, seen: Seen) -> Advice {
        let now = seen.tally;
        let [oldest, .., last] = self.past;
        let (turns, pressed) = (now.begun - last.begun, now.pressed - last.pressed);
        // Whoever waits may still be held up: by memory that its buffer needs, or between two parts of a request.
        let held_up = turns == 0 && seen.pending && (seen.nobody_waits || self.pending);
        self.pending = seen.pending;
        // Requests queue up, and those who answer them wait for something, or there are CPUs left.
        let queue = turns > 1 && pressed * 4 >= turns * 3;
        let idle = seen.worked < TICK * seen.wanted * 6 / 10;
        let more = held_up || queue && (idle || seen.wanted < self.cpus);
        self.since = if more {
            0
        } else {
            self.since.saturating_add(1)
        };
        let want = if more {
            seen.wanted + 1
        } else if self.since.is_multiple_of(PATIENCE) {
            seen.wanted.saturating_sub(1).max(1)
        } else {
            seen.wanted
        };
        let awake = now.begun - oldest.begun >= BUSY;
        self.quiet = if turns == 0 && !seen.nobody_waits && !seen.pending {
            self.quiet + 1
        } else {
            0
        };
        self.past.rotate_left(1);
        if let Some(newest) = self.past.last_mut() {
            *newest = now;
        }
        Advice {
            call: more,
            want,
            awake,
            sleep: self.quiet >= QUIET,
        }
    }

    /// After a sleep only what is new counts.
    fn woken(&mut self, tally: Tally) {
        self.past = [tally; SPAN];
        self.quiet = 0;
    }
}

/// Starts the watch over a crew that takes its requests from `device`.
pub(in crate::fuse) fn start(
    crew: &Arc<Crew>,
    device: OwnedFd,
    mut wish: Option<Wish>,
) -> std::io::Result<()> {
    let crew = crew.clone();
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get() / 2);
    let mut watch = Watch::new(u32::try_from(cpus).unwrap_or(u32::MAX));
    let run = move || {
        crew.watched_by(thread::current());
        let mut keep_awake = |on| {
            let done = wish.as_mut().map_or(Ok(()), |wish| wish.be(on));
            if let Err(error) = done {
                log::warn!("CPUs are not kept awake any more: {error}");
                wish = None;
            }
        };
        let mut worked = sys::process::cpu_time();
        while !crew.is_over() {
            let now = sys::process::cpu_time();
            let seen = Seen {
                tally: crew.tally(),
                nobody_waits: crew.nobody_waits(),
                pending: sys::process::is_readable(&device),
                wanted: crew.wanted(),
                worked: now.saturating_sub(worked),
            };
            worked = now;
            let advice = watch.tick(seen);
            crew.want(advice.want);
            if advice.call {
                crew.call();
            }
            keep_awake(advice.awake);
            if advice.sleep {
                keep_awake(false);
                crew.sleep_until_turn(seen.tally);
                watch.woken(seen.tally);
            }
            thread::sleep(TICK);
        }
    };
    thread::Builder::new()
        .name("watch".into())
        .spawn(run)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Seen = Seen {
        tally: Tally {
            begun: 0,
            pressed: 0,
        },
        nobody_waits: false,
        pending: false,
        wanted: 1,
        worked: Duration::ZERO,
    };

    fn seen(begun: u64, pressed: u64) -> Seen {
        Seen {
            tally: Tally { begun, pressed },
            ..IDLE
        }
    }

    #[test]
    fn a_thread_is_called_where_one_is_held_up() {
        let mut watch = Watch::new(1);
        assert!(!watch.tick(seen(1, 0)).call);
        let busy = Seen {
            nobody_waits: true,
            ..seen(1, 0)
        };
        // It takes long, but nobody asks for anything.
        assert_eq!(watch.tick(busy).want, 1);
        let waiting = Seen {
            pending: true,
            ..busy
        };
        let advice = watch.tick(waiting);
        assert!(advice.call);
        assert_eq!(advice.want, 2);
        // Somebody waits, and yet nothing is answered.
        let odd = Seen {
            nobody_waits: false,
            ..waiting
        };
        assert!(watch.tick(odd).call);
        // There was a turn since.
        let other = Seen {
            tally: seen(2, 0).tally,
            ..waiting
        };
        assert!(!watch.tick(other).call);
    }

    #[test]
    fn a_queue_wants_more_threads_where_cpus_are_left() {
        let (mut small, mut large) = (Watch::new(1), Watch::new(8));
        for tick in 1..4 {
            let busy = Seen {
                worked: TICK,
                ..seen(tick * 20, tick * 19)
            };
            assert_eq!(small.tick(busy).want, 1, "they work all the time");
            assert_eq!(large.tick(busy).want, 2);
        }
        assert_eq!(
            small.tick(seen(80, 79)).want,
            2,
            "they wait for a disk, say"
        );
        assert_eq!(small.tick(seen(100, 80)).want, 1, "no queue");
    }

    #[test]
    fn a_thread_more_is_given_up_after_a_while() {
        let mut watch = Watch::new(1);
        let two = Seen { wanted: 2, ..IDLE };
        let wanted: Vec<_> = (0..PATIENCE).map(|_| watch.tick(two).want).collect();
        let (last, before) = wanted.split_last().unwrap();
        assert!(before.iter().all(|want| *want == 2));
        assert_eq!(*last, 1);
    }

    #[test]
    fn cpus_are_awake_while_requests_come() {
        let mut watch = Watch::new(1);
        assert!(!watch.tick(seen(1, 0)).awake, "one now and then");
        assert!(watch.tick(seen(BUSY, 0)).awake);
        let after: Vec<_> = (0..SPAN).map(|_| watch.tick(seen(BUSY, 0)).awake).collect();
        assert!(after[0] && !after[SPAN - 1], "{after:?}");
        for _ in 0..QUIET {
            assert!(!watch.tick(seen(BUSY, 0)).awake);
        }
        assert!(watch.tick(seen(BUSY, 0)).sleep);
        watch.woken(seen(BUSY, 0).tally);
        assert!(!watch.tick(seen(BUSY, 0)).sleep);
    }

    #[test]
    fn no_sleep_while_a_request_is_answered() {
        let mut watch = Watch::new(1);
        let long = Seen {
            nobody_waits: true,
            ..seen(1, 0)
        };
        for _ in 0..2 * QUIET {
            assert!(!watch.tick(long).sleep);
        }
    }
}

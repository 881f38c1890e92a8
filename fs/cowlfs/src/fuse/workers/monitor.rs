//! The monitor: a thread that adjusts the number of waiting threads and the latency request while requests arrive.
//!
//! It checks periodically whether a thread is blocked while a request is pending, whether more threads would be
//! useful, and whether CPUs should stay awake. Without requests it sleeps.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::pool::{RequestCounts, WorkerPool};
use cowl_layers::sys;
use cowl_layers::sys::idle::LatencyRequest;

/// The interval between two checks.
const TICK: Duration = Duration::from_millis(2);
/// The number of ticks without a request after which the monitor sleeps.
const QUIET_TICKS: usize = 16;
/// A burst, during which CPUs are kept awake: at least this many requests...
const BURST: u64 = 4;
/// ...in this many ticks.
const BURST_TICKS: usize = 4;
/// The number of ticks for which an additional thread is retained at least.
const RETAIN_TICKS: u32 = 32;

/// The scaling policy, and the observations that it needs of earlier ticks.
#[derive(Debug)]
struct Scaler {
    /// The counts at the last ticks, the oldest first.
    history: [RequestCounts; BURST_TICKS],
    /// The number of ticks in a row without a request.
    quiet: usize,
    /// A request was pending at the last tick.
    was_pending: bool,
    /// The number of ticks since another thread was last found useful.
    since_increase: u32,
    /// The number of CPUs for worker threads; the others are left to the programs that wait for them.
    cpus: u32,
}

/// The actions to take after a tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Decision {
    /// Wake a parked thread.
    wake_worker: bool,
    /// The number of threads that should wait.
    target: u32,
    /// Keep CPUs awake.
    keep_awake: bool,
    /// Sleep until the next request.
    sleep: bool,
}

/// The observations of one tick.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    counts: RequestCounts,
    /// No thread waits for a request.
    is_saturated: bool,
    /// A thread that counts as waiting does other work.
    has_idle_work: bool,
    /// A request is pending.
    is_pending: bool,
    /// The number of threads that should wait.
    target: u32,
    /// The CPU time of the process since the last tick.
    cpu_time: Duration,
}

impl Scaler {
    fn new(cpus: u32) -> Self {
        Self {
            history: [RequestCounts::default(); BURST_TICKS],
            quiet: 0,
            was_pending: false,
            since_increase: 0,
            cpus,
        }
    }

    fn tick(&mut self, sample: Sample) -> Decision {
        let now = sample.counts;
        let [oldest, .., last] = self.history;
        let (begun, queued) = (now.begun - last.begun, now.queued - last.queued);
        // A thread that counts as waiting may be blocked as well: by the allocation of its buffer, or between two
        // parts of a request.
        let is_blocked =
            begun == 0 && sample.is_pending && (sample.is_saturated || self.was_pending);
        self.was_pending = sample.is_pending;
        // Another thread helps against a queue if the threads are blocked for most of the time, or if CPUs are left.
        let has_queue = begun > 1 && queued * 4 >= begun * 3;
        let is_idle = sample.cpu_time < TICK * sample.target * 6 / 10;
        let increase = is_blocked || has_queue && (is_idle || sample.target < self.cpus);
        self.since_increase = if increase {
            0
        } else {
            self.since_increase.saturating_add(1)
        };
        let target = if increase {
            sample.target + 1
        } else if self.since_increase.is_multiple_of(RETAIN_TICKS) {
            sample.target.saturating_sub(1).max(1)
        } else {
            sample.target
        };
        let keep_awake = now.begun - oldest.begun >= BURST;
        let is_busy = sample.is_saturated || sample.has_idle_work || sample.is_pending;
        self.quiet = if begun == 0 && !is_busy {
            self.quiet + 1
        } else {
            0
        };
        self.history.rotate_left(1);
        if let Some(newest) = self.history.last_mut() {
            *newest = now;
        }
        Decision {
            wake_worker: increase,
            target,
            keep_awake,
            sleep: self.quiet >= QUIET_TICKS,
        }
    }

    /// Forgets the observations from before a sleep, at whose start the counts were `counts`.
    fn reset(&mut self, counts: RequestCounts) {
        self.history = [counts; BURST_TICKS];
        self.quiet = 0;
    }
}

/// Starts the monitor of a pool that reads its requests from `device`.
pub(in crate::fuse) fn start(
    pool: &Arc<WorkerPool>,
    device: OwnedFd,
    mut latency: Option<LatencyRequest>,
) -> std::io::Result<()> {
    let pool = pool.clone();
    let cpus = thread::available_parallelism().map_or(1, |cpus| cpus.get() / 2);
    let mut scaler = Scaler::new(u32::try_from(cpus).unwrap_or(u32::MAX));
    let run = move || {
        pool.set_monitor(thread::current());
        let mut keep_awake = |on| {
            let done = latency.as_mut().map_or(Ok(()), |request| match on {
                true => request.activate(),
                false => request.deactivate(),
            });
            if let Err(error) = done {
                log::warn!("CPUs are no longer kept awake: /dev/cpu_dma_latency: {error}");
                latency = None;
            }
        };
        let mut last_cpu_time = sys::process::cpu_time();
        while !pool.has_ended() {
            let cpu_time = sys::process::cpu_time();
            let sample = Sample {
                counts: pool.counts(),
                is_saturated: pool.is_saturated(),
                has_idle_work: pool.has_idle_work(),
                is_pending: sys::process::is_readable(&device),
                target: pool.target(),
                cpu_time: cpu_time.saturating_sub(last_cpu_time),
            };
            last_cpu_time = cpu_time;
            let decision = scaler.tick(sample);
            pool.set_target(decision.target);
            if decision.wake_worker {
                pool.wake_worker();
            }
            keep_awake(decision.keep_awake);
            if decision.sleep {
                keep_awake(false);
                pool.sleep_until_request(sample.counts);
                scaler.reset(sample.counts);
            }
            thread::sleep(TICK);
        }
    };
    thread::Builder::new()
        .name("monitor".into())
        .spawn(run)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Sample = Sample {
        counts: RequestCounts {
            begun: 0,
            queued: 0,
        },
        is_saturated: false,
        has_idle_work: false,
        is_pending: false,
        target: 1,
        cpu_time: Duration::ZERO,
    };

    fn sample(begun: u64, queued: u64) -> Sample {
        Sample {
            counts: RequestCounts { begun, queued },
            ..IDLE
        }
    }

    #[test]
    fn a_thread_is_woken_if_another_one_is_blocked() {
        let mut scaler = Scaler::new(1);
        assert!(!scaler.tick(sample(1, 0)).wake_worker);
        let busy = Sample {
            is_saturated: true,
            ..sample(1, 0)
        };
        // It is slow, but no request is pending.
        assert_eq!(scaler.tick(busy).target, 1);
        let waiting = Sample {
            is_pending: true,
            ..busy
        };
        let decision = scaler.tick(waiting);
        assert!(decision.wake_worker);
        assert_eq!(decision.target, 2);
        // A thread counts as waiting, and yet the request stays pending.
        let unread = Sample {
            is_saturated: false,
            ..waiting
        };
        assert!(scaler.tick(unread).wake_worker);
        // A request was read since the last tick.
        let other = Sample {
            counts: sample(2, 0).counts,
            ..waiting
        };
        assert!(!scaler.tick(other).wake_worker);
    }

    #[test]
    fn a_queue_raises_the_target_if_cpus_are_left() {
        let (mut small, mut large) = (Scaler::new(1), Scaler::new(8));
        for tick in 1..4 {
            let busy = Sample {
                cpu_time: TICK,
                ..sample(tick * 20, tick * 19)
            };
            assert_eq!(small.tick(busy).target, 1, "the threads are never blocked");
            assert_eq!(large.tick(busy).target, 2);
        }
        assert_eq!(
            small.tick(sample(80, 79)).target,
            2,
            "the threads are blocked, for example by a disk"
        );
        assert_eq!(small.tick(sample(100, 80)).target, 1, "no queue");
    }

    #[test]
    fn an_additional_thread_is_parked_after_some_time() {
        let mut scaler = Scaler::new(1);
        let two = Sample { target: 2, ..IDLE };
        let targets: Vec<_> = (0..RETAIN_TICKS).map(|_| scaler.tick(two).target).collect();
        let (last, before) = targets.split_last().unwrap();
        assert!(before.iter().all(|target| *target == 2));
        assert_eq!(*last, 1);
    }

    #[test]
    fn cpus_are_awake_during_a_burst() {
        let mut scaler = Scaler::new(1);
        assert!(!scaler.tick(sample(1, 0)).keep_awake, "a single request");
        assert!(scaler.tick(sample(BURST, 0)).keep_awake);
        let after: Vec<_> = (0..BURST_TICKS)
            .map(|_| scaler.tick(sample(BURST, 0)).keep_awake)
            .collect();
        assert!(after[0] && !after[BURST_TICKS - 1], "{after:?}");
        for _ in 0..QUIET_TICKS {
            assert!(!scaler.tick(sample(BURST, 0)).keep_awake);
        }
        assert!(scaler.tick(sample(BURST, 0)).sleep);
        scaler.reset(sample(BURST, 0).counts);
        assert!(!scaler.tick(sample(BURST, 0)).sleep);
    }

    #[test]
    fn the_monitor_does_not_sleep_while_a_request_is_answered() {
        let mut scaler = Scaler::new(1);
        let long = Sample {
            is_saturated: true,
            ..sample(1, 0)
        };
        for _ in 0..2 * QUIET_TICKS {
            assert!(!scaler.tick(long).sleep);
        }
        let ahead = Sample {
            has_idle_work: true,
            ..sample(1, 0)
        };
        for _ in 0..2 * QUIET_TICKS {
            assert!(!scaler.tick(ahead).sleep, "it may be blocked");
        }
    }
}

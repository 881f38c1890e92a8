//! The pool of threads that answer requests: the number that wait for one in read(2), and the parked ones.
//!
//! The kernel distributes requests in turn to the waiting threads. If several wait, each request of a program that
//! sends one after the other wakes a sleeping thread, although the thread that has just answered is still running. So
//! only as many threads wait as are useful, mostly one, and the others are parked. A thread that is blocked, for
//! example by a disk, must not delay other programs: then the [monitor](super::monitor) wakes a parked one.
//!
//! A parked thread cannot detect that the mount has ended. A thread in read(2) can, and releases all others when it
//! exits. So a thread counts as waiting only after its first request, because only then does its exit release the
//! others.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::Thread;

use parking_lot::{Condvar, Mutex};

/// The worker threads of one mount.
#[derive(Debug)]
pub(in crate::fuse) struct WorkerPool {
    /// The number of threads.
    size: u32,
    /// The number of threads that have had a request and wait for the next one.
    waiting: AtomicU32,
    /// The number of threads that should wait.
    target: AtomicU32,
    /// See [`RequestCounts::begun`].
    begun: AtomicU64,
    /// See [`RequestCounts::queued`].
    queued: AtomicU64,
    /// The number of threads that count as waiting and do other work meanwhile.
    idle_work: AtomicU32,
    parking: Mutex<Parking>,
    wakeup: Condvar,
    /// The mount has ended.
    has_ended: AtomicBool,
    /// The thread of the monitor.
    monitor: OnceLock<Thread>,
    /// The monitor sleeps until there is a request.
    monitor_sleeps: AtomicBool,
}

/// The number of parked threads.
#[derive(Debug, Default)]
struct Parking {
    parked: u32,
    /// The number of parked threads that were woken and have not run yet. They count as waiting for a request.
    woken: u32,
}

/// The number of requests since the start of the mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::fuse) struct RequestCounts {
    /// Requests that a thread has read.
    pub(in crate::fuse) begun: u64,
    /// Requests that were pending when the previous one was answered.
    pub(in crate::fuse) queued: u64,
}

thread_local! {
    static MEMBERSHIP: OnceCell<Membership> = const { OnceCell::new() };
}

/// The membership of a thread that has had a request; its exit ends the pool.
struct Membership(Arc<WorkerPool>);

impl Drop for Membership {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

/// A guard during which the calling thread does not count as waiting; see [`WorkerPool::occupy`].
pub(in crate::fuse) struct Occupied<'a>(&'a WorkerPool);

impl Drop for Occupied<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_add(1, Ordering::SeqCst);
    }
}

/// A guard during which the calling thread does other work while it counts as waiting; see
/// [`WorkerPool::begin_idle_work`].
pub(in crate::fuse) struct IdleWorking<'a>(&'a WorkerPool);

impl Drop for IdleWorking<'_> {
    fn drop(&mut self) {
        self.0.idle_work.fetch_sub(1, Ordering::SeqCst);
    }
}

impl WorkerPool {
    /// Creates the state of a pool of `size` threads. It does not start them: they join with their first request.
    pub(in crate::fuse) fn new(size: usize) -> Self {
        Self {
            size: u32::try_from(size).unwrap_or(u32::MAX),
            waiting: AtomicU32::new(0),
            target: AtomicU32::new(1),
            begun: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            idle_work: AtomicU32::new(0),
            parking: Mutex::default(),
            wakeup: Condvar::new(),
            has_ended: AtomicBool::new(false),
            monitor: OnceLock::new(),
            monitor_sleeps: AtomicBool::new(false),
        }
    }

    /// Records that the calling thread has read a request.
    pub(in crate::fuse) fn begin_request(self: &Arc<Self>) {
        self.stop_waiting();
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.wake_monitor();
    }

    /// Records that the calling thread is busy, until the guard is dropped.
    ///
    /// For work that may be only a part of a request: the thread must not be parked after it.
    pub(in crate::fuse) fn occupy(self: &Arc<Self>) -> Occupied<'_> {
        self.stop_waiting();
        self.wake_monitor();
        Occupied(self)
    }

    /// Stops counting the calling thread as waiting. A thread that is not a member yet was not counted, and joins.
    fn stop_waiting(self: &Arc<Self>) {
        let is_new = MEMBERSHIP.with(|membership| {
            let is_new = membership.get().is_none();
            membership.get_or_init(|| Membership(self.clone()));
            is_new
        });
        if !is_new {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Records that the calling thread does other work while it counts as waiting, until the guard is dropped.
    ///
    /// The work can block, and the monitor must then wake another thread for a request, so it does not sleep
    /// meanwhile.
    pub(in crate::fuse) fn begin_idle_work(&self) -> IdleWorking<'_> {
        self.idle_work.fetch_add(1, Ordering::SeqCst);
        self.wake_monitor();
        IdleWorking(self)
    }

    /// Whether a thread that counts as waiting does other work.
    pub(in crate::fuse) fn has_idle_work(&self) -> bool {
        self.idle_work.load(Ordering::SeqCst) > 0
    }

    fn wake_monitor(&self) {
        if self.monitor_sleeps.load(Ordering::SeqCst)
            && self.monitor_sleeps.swap(false, Ordering::SeqCst)
            && let Some(monitor) = self.monitor.get()
        {
            monitor.unpark();
        }
    }

    /// Records that the calling thread has answered its request, and parks it if enough threads wait. Returns when
    /// the thread shall wait for a request.
    ///
    /// Returns false if the thread was parked: then it must not poll for requests before it waits.
    pub(in crate::fuse) fn end_request(&self) -> bool {
        if self.try_wait() {
            return true;
        }
        let mut parking = self.parking.lock();
        parking.parked += 1;
        while parking.woken == 0 && !self.has_ended() {
            self.wakeup.wait(&mut parking);
        }
        parking.parked -= 1;
        match parking.woken.checked_sub(1) {
            Some(left) => parking.woken = left,
            None => drop(self.waiting.fetch_add(1, Ordering::SeqCst)),
        }
        false
    }

    /// Counts the calling thread as waiting, unless enough threads wait.
    fn try_wait(&self) -> bool {
        let target = if self.has_ended() {
            u32::MAX
        } else {
            self.target.load(Ordering::SeqCst)
        };
        let increment = |waiting| (waiting < target).then_some(waiting + 1);
        self.waiting
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, increment)
            .is_ok()
    }

    /// Counts a request that was pending when the previous one was answered.
    pub(in crate::fuse) fn count_queued(&self) {
        self.queued.fetch_add(1, Ordering::Relaxed);
    }

    /// Wakes a parked thread, if there is one, to wait for requests.
    pub(in crate::fuse) fn wake_worker(&self) {
        let mut parking = self.parking.lock();
        if parking.woken < parking.parked {
            parking.woken += 1;
            self.waiting.fetch_add(1, Ordering::SeqCst);
            self.wakeup.notify_one();
        }
    }

    /// Returns the number of threads that should wait.
    pub(in crate::fuse) fn target(&self) -> u32 {
        self.target.load(Ordering::SeqCst)
    }

    /// Sets the number of threads that should wait, at least one and at most the size of the pool.
    pub(in crate::fuse) fn set_target(&self, threads: u32) {
        let threads = threads.clamp(1, self.size);
        self.target.store(threads, Ordering::SeqCst);
    }

    /// Whether no thread that has had a request waits for another one. Before the first request all threads wait.
    pub(in crate::fuse) fn is_saturated(&self) -> bool {
        self.begun.load(Ordering::SeqCst) > 0 && self.waiting.load(Ordering::SeqCst) == 0
    }

    /// Returns the number of requests so far.
    pub(in crate::fuse) fn counts(&self) -> RequestCounts {
        RequestCounts {
            begun: self.begun.load(Ordering::SeqCst),
            queued: self.queued.load(Ordering::Relaxed),
        }
    }

    /// Whether the mount has ended.
    pub(in crate::fuse) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    /// Sets the thread of the monitor, which a request wakes up.
    pub(in crate::fuse) fn set_monitor(&self, monitor: Thread) {
        self.monitor.get_or_init(|| monitor);
    }

    /// Blocks the calling thread, which is the monitor, until there is a request after those in `seen`.
    pub(in crate::fuse) fn sleep_until_request(&self, seen: RequestCounts) {
        self.monitor_sleeps.store(true, Ordering::SeqCst);
        while self.monitor_sleeps.load(Ordering::SeqCst)
            && self.begun.load(Ordering::SeqCst) == seen.begun
            && !self.has_idle_work()
            && !self.has_ended()
        {
            std::thread::park();
        }
        self.monitor_sleeps.store(false, Ordering::SeqCst);
    }

    /// Releases all parked threads and the monitor.
    fn shut_down(&self) {
        let parking = self.parking.lock();
        self.has_ended.store(true, Ordering::SeqCst);
        self.wakeup.notify_all();
        drop(parking);
        if let Some(monitor) = self.monitor.get() {
            monitor.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, mpsc};
    use std::thread;

    use super::*;

    type Request = Box<dyn FnOnce() + Send>;

    /// A pool whose threads read requests from a channel, as those of a session read them from the device.
    struct TestPool {
        pool: Arc<WorkerPool>,
        requests: mpsc::Sender<Request>,
        done: mpsc::Receiver<()>,
    }

    impl TestPool {
        /// Starts `threads` threads, and sends each of them a request.
        fn new(threads: usize, target: u32) -> Self {
            let pool = Arc::new(WorkerPool::new(threads));
            pool.set_target(target);
            let (requests, queue) = mpsc::channel::<Request>();
            let (finished, done) = mpsc::channel();
            let queue = Arc::new(Mutex::new(queue));
            for _ in 0..threads {
                let (pool, queue, finished) = (pool.clone(), queue.clone(), finished.clone());
                thread::spawn(move || {
                    loop {
                        let Ok(request) = queue.lock().recv() else {
                            return;
                        };
                        pool.begin_request();
                        request();
                        if finished.send(()).is_err() {
                            return;
                        }
                        pool.end_request();
                    }
                });
            }
            let test = Self {
                pool,
                requests,
                done,
            };
            let barrier = Arc::new(Barrier::new(threads));
            for _ in 0..threads {
                let barrier = barrier.clone();
                test.send(move || {
                    barrier.wait();
                });
            }
            (0..threads).for_each(|_| test.done.recv().unwrap());
            test
        }

        fn send(&self, request: impl FnOnce() + Send + 'static) {
            self.requests.send(Box::new(request)).unwrap();
        }

        /// Waits until `number` threads are parked.
        fn wait_for_parked(&self, number: u32) {
            while self.pool.parking.lock().parked != number {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn one_thread_waits_and_the_others_are_parked() {
        let test = TestPool::new(4, 1);
        for _ in 0..100 {
            test.send(|| {});
            test.done.recv().unwrap();
        }
        test.wait_for_parked(3);
        while test.pool.is_saturated() {
            thread::yield_now();
        }
        // A woken thread answers while another one is blocked.
        let (end, ended) = mpsc::channel::<()>();
        test.send(move || assert!(ended.recv().is_ok()));
        while !test.pool.is_saturated() {
            thread::yield_now();
        }
        test.pool.wake_worker();
        test.wait_for_parked(2);
        test.send(|| {});
        test.done.recv().unwrap();
        assert!(!test.pool.has_ended());
        end.send(()).unwrap();
        test.done.recv().unwrap();
        test.wait_for_parked(3);
    }

    #[test]
    fn a_thread_that_exits_releases_the_parked_ones() {
        let test = TestPool::new(3, 1);
        test.wait_for_parked(2);
        let TestPool {
            pool,
            requests,
            done,
        } = test;
        drop(requests);
        // The threads exit, and drop their senders.
        assert!(done.recv().is_err());
        assert!(pool.has_ended());
        assert_eq!(pool.parking.lock().parked, 0);
        assert!(pool.end_request(), "no thread is parked any more");
    }

    #[test]
    fn as_many_threads_wait_as_the_target() {
        let test = TestPool::new(4, 2);
        test.wait_for_parked(2);
        test.pool.wake_worker();
        test.wait_for_parked(1);
        assert_eq!(test.pool.counts().begun, 4);
        test.pool.set_target(9);
        assert_eq!(test.pool.target(), 4);
        test.pool.set_target(0);
        assert_eq!(test.pool.target(), 1);
    }

    #[test]
    fn a_busy_thread_does_not_count_as_waiting() {
        let pool = Arc::new(WorkerPool::new(2));
        assert!(
            !pool.is_saturated(),
            "all threads wait before the first request"
        );
        pool.begin_request();
        assert!(pool.is_saturated());
        assert!(pool.end_request());
        assert!(!pool.is_saturated());
        let guard = pool.occupy();
        assert!(pool.is_saturated());
        drop(guard);
        assert!(!pool.is_saturated());
        assert_eq!(pool.counts().begun, 1);
    }
}

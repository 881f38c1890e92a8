//! The threads that answer requests: how many of them wait for one in read(2), and where the others are.
//!
//! The kernel hands requests to waiting threads in turn. A program that asks one thing after the other would
//! wake up a thread that slept for each of them, though the thread that has just answered is still running.
//! So no more threads wait than are of use, mostly one, and the others are parked. A thread that takes long,
//! because a disk does, must not hold up other programs: then one that was parked is called in. Who decides
//! that is the [watch](super::watch); what is kept here is who does what.
//!
//! Whoever is parked depends on somebody who waits in read(2) and notices that the mount is gone: so only
//! threads that have had a turn count as waiting, and each of them, when it ends, sets all others free.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::Thread;

use parking_lot::{Condvar, Mutex};

/// The threads of one mount.
#[derive(Debug)]
pub(in crate::fuse) struct Crew {
    /// How many there are.
    size: u32,
    /// Threads that had a turn and wait for the next.
    waiting: AtomicU32,
    /// So many of them are of use.
    wanted: AtomicU32,
    /// Turns begun.
    begun: AtomicU64,
    /// Turns at whose end the next request was there already.
    pressed: AtomicU64,
    spare: Mutex<Spare>,
    called: Condvar,
    /// The mount is gone.
    over: AtomicBool,
    /// Who looks after them, and whether it sleeps until there is a turn.
    watch: OnceLock<Thread>,
    watch_sleeps: AtomicBool,
}

/// The threads that are parked.
#[derive(Debug, Default)]
struct Spare {
    parked: u32,
    /// How many of them are called in and have not noticed yet. They count as waiting for a request.
    called: u32,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::fuse) struct Tally {
    /// Turns begun.
    pub(in crate::fuse) begun: u64,
    /// Turns at whose end the next request was there already.
    pub(in crate::fuse) pressed: u64,
}

thread_local! {
    static MEMBER: OnceCell<Member> = const { OnceCell::new() };
}

/// A thread that has had a turn.
struct Member(Arc<Crew>);

impl Drop for Member {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// What [`Crew::busy`] returns.
pub(in crate::fuse) struct Busy<'a>(&'a Crew);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_add(1, Ordering::SeqCst);
    }
}

impl Crew {
    /// Of so many threads.
    pub(in crate::fuse) fn new(size: usize) -> Self {
        Self {
            size: u32::try_from(size).unwrap_or(u32::MAX),
            waiting: AtomicU32::new(0),
            wanted: AtomicU32::new(1),
            begun: AtomicU64::new(0),
            pressed: AtomicU64::new(0),
            spare: Mutex::default(),
            called: Condvar::new(),
            over: AtomicBool::new(false),
            watch: OnceLock::new(),
            watch_sleeps: AtomicBool::new(false),
        }
    }

    /// The calling thread has a request.
    pub(in crate::fuse) fn begin(self: &Arc<Self>) {
        self.take();
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.wake_watch();
    }

    /// The calling thread is busy with something that may not be all of its request, so that it can't be parked
    /// after it: it waits for requests again as soon as what this returns is dropped.
    pub(in crate::fuse) fn busy(self: &Arc<Self>) -> Busy<'_> {
        self.take();
        self.wake_watch();
        Busy(self)
    }

    /// The calling thread does not wait any more.
    fn take(self: &Arc<Self>) {
        let new = MEMBER.with(|member| {
            let new = member.get().is_none();
            member.get_or_init(|| Member(self.clone()));
            new
        });
        if !new {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn wake_watch(&self) {
        if self.watch_sleeps.load(Ordering::SeqCst)
            && self.watch_sleeps.swap(false, Ordering::SeqCst)
            && let Some(watch) = self.watch.get()
        {
            watch.unpark();
        }
    }

    /// The calling thread has answered. Says whether it may look out for the next request: it comes back when it
    /// is to wait for it.
    pub(in crate::fuse) fn finish(&self) -> bool {
        if self.stay() {
            return true;
        }
        let mut spare = self.spare.lock();
        spare.parked += 1;
        while spare.called == 0 && !self.is_over() {
            self.called.wait(&mut spare);
        }
        spare.parked -= 1;
        match spare.called.checked_sub(1) {
            Some(left) => spare.called = left,
            None => drop(self.waiting.fetch_add(1, Ordering::SeqCst)),
        }
        false
    }

    /// Counts the calling thread as waiting, if it is of use.
    fn stay(&self) -> bool {
        let wanted = if self.is_over() {
            u32::MAX
        } else {
            self.wanted.load(Ordering::SeqCst)
        };
        let more = |waiting| (waiting < wanted).then_some(waiting + 1);
        self.waiting
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more)
            .is_ok()
    }

    /// The next request was there when this one was answered.
    pub(in crate::fuse) fn was_pressed(&self) {
        self.pressed.fetch_add(1, Ordering::Relaxed);
    }

    /// Has one more thread wait for requests, if one is parked.
    pub(in crate::fuse) fn call(&self) {
        let mut spare = self.spare.lock();
        if spare.called < spare.parked {
            spare.called += 1;
            self.waiting.fetch_add(1, Ordering::SeqCst);
            self.called.notify_one();
        }
    }

    /// How many threads are of use.
    pub(in crate::fuse) fn wanted(&self) -> u32 {
        self.wanted.load(Ordering::SeqCst)
    }

    /// That many are, as far as there are so many.
    pub(in crate::fuse) fn want(&self, threads: u32) {
        let threads = threads.clamp(1, self.size);
        self.wanted.store(threads, Ordering::SeqCst);
    }

    /// Whether no thread waits for a request, as far as they had a turn. Before the first one all do.
    pub(in crate::fuse) fn nobody_waits(&self) -> bool {
        self.begun.load(Ordering::SeqCst) > 0 && self.waiting.load(Ordering::SeqCst) == 0
    }

    /// What has happened so far.
    pub(in crate::fuse) fn tally(&self) -> Tally {
        Tally {
            begun: self.begun.load(Ordering::SeqCst),
            pressed: self.pressed.load(Ordering::Relaxed),
        }
    }

    /// Whether the mount is gone.
    pub(in crate::fuse) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// The calling thread looks after the others from here on.
    pub(in crate::fuse) fn watched_by(&self, watch: Thread) {
        self.watch.get_or_init(|| watch);
    }

    /// Keeps the watch asleep until there is a turn after `seen`.
    pub(in crate::fuse) fn sleep_until_turn(&self, seen: Tally) {
        self.watch_sleeps.store(true, Ordering::SeqCst);
        while self.watch_sleeps.load(Ordering::SeqCst)
            && self.begun.load(Ordering::SeqCst) == seen.begun
            && !self.is_over()
        {
            std::thread::park();
        }
        self.watch_sleeps.store(false, Ordering::SeqCst);
    }

    /// Sets everybody free.
    fn end(&self) {
        let spare = self.spare.lock();
        self.over.store(true, Ordering::SeqCst);
        self.called.notify_all();
        drop(spare);
        if let Some(watch) = self.watch.get() {
            watch.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, mpsc};
    use std::thread;

    use super::*;

    type Request = Box<dyn FnOnce() + Send>;

    /// Threads that take requests from a channel, as those of a session do from the device.
    struct Served {
        crew: Arc<Crew>,
        requests: mpsc::Sender<Request>,
        done: mpsc::Receiver<()>,
    }

    impl Served {
        /// Each of the threads has had a turn.
        fn new(threads: usize, wanted: u32) -> Self {
            let crew = Arc::new(Crew::new(threads));
            crew.want(wanted);
            let (requests, taken) = mpsc::channel::<Request>();
            let (finished, done) = mpsc::channel();
            let taken = Arc::new(Mutex::new(taken));
            for _ in 0..threads {
                let (crew, taken, finished) = (crew.clone(), taken.clone(), finished.clone());
                thread::spawn(move || {
                    loop {
                        let Ok(request) = taken.lock().recv() else {
                            return;
                        };
                        crew.begin();
                        request();
                        if finished.send(()).is_err() {
                            return;
                        }
                        crew.finish();
                    }
                });
            }
            let served = Self {
                crew,
                requests,
                done,
            };
            let all = Arc::new(Barrier::new(threads));
            for _ in 0..threads {
                let all = all.clone();
                served.ask(move || {
                    all.wait();
                });
            }
            (0..threads).for_each(|_| served.done.recv().unwrap());
            served
        }

        fn ask(&self, request: impl FnOnce() + Send + 'static) {
            self.requests.send(Box::new(request)).unwrap();
        }

        /// Waits until that many are parked.
        fn parked(&self, wanted: u32) {
            while self.crew.spare.lock().parked != wanted {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn one_waits_and_the_others_are_parked() {
        let served = Served::new(4, 1);
        for _ in 0..100 {
            served.ask(|| {});
            served.done.recv().unwrap();
        }
        served.parked(3);
        while served.crew.nobody_waits() {
            thread::yield_now();
        }
        // One that is called in answers while another takes its time.
        let (end, ended) = mpsc::channel::<()>();
        served.ask(move || assert!(ended.recv().is_ok()));
        while !served.crew.nobody_waits() {
            thread::yield_now();
        }
        served.crew.call();
        served.parked(2);
        served.ask(|| {});
        served.done.recv().unwrap();
        assert!(!served.crew.is_over());
        end.send(()).unwrap();
        served.done.recv().unwrap();
        served.parked(3);
    }

    #[test]
    fn whoever_ends_sets_the_others_free() {
        let served = Served::new(3, 1);
        served.parked(2);
        let Served {
            crew,
            requests,
            done,
        } = served;
        drop(requests);
        // All of them drop their end.
        assert!(done.recv().is_err());
        assert!(crew.is_over());
        assert_eq!(crew.spare.lock().parked, 0);
        assert!(crew.finish(), "nobody is parked any more");
    }

    #[test]
    fn as_many_wait_as_are_wanted() {
        let served = Served::new(4, 2);
        served.parked(2);
        served.crew.call();
        served.parked(1);
        assert_eq!(served.crew.tally().begun, 4);
        served.crew.want(9);
        assert_eq!(served.crew.wanted(), 4);
        served.crew.want(0);
        assert_eq!(served.crew.wanted(), 1);
    }

    #[test]
    fn who_is_busy_does_not_wait() {
        let crew = Arc::new(Crew::new(2));
        assert!(!crew.nobody_waits(), "before the first turn all do");
        crew.begin();
        assert!(crew.nobody_waits());
        assert!(crew.finish());
        assert!(!crew.nobody_waits());
        let busy = crew.busy();
        assert!(crew.nobody_waits());
        drop(busy);
        assert!(!crew.nobody_waits());
        assert_eq!(crew.tally().begun, 1);
    }
}

//! Faults of this process, and the request that caused each of them.
//!
//! A thread notes the request that it works on, which costs one store. If the thread ends the process by a fault, a
//! handler of the signal records the request in memory that the parent process and its other children share.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::shared;
use crate::error::Result;

/// The signals of a fault, and that of abort(3).
const SIGNALS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGILL];
/// The number of requests that are recorded. A later one takes the place of the earliest.
const ENTRIES: usize = 510;
/// The number of bits of an entry for the number of faults.
const COUNT_BITS: u32 = 2;
const MAX_COUNT: u64 = (1 << COUNT_BITS) - 1;
/// The index of the word with the number of recorded faults.
const TOTAL_AT: usize = 0;
/// The index of the word with the number of used entries.
const USED_AT: usize = 1;
const ENTRIES_AT: usize = 2;

thread_local! {
    /// The id of the request that this thread works on; 0 for none. It has no destructor, so that a signal handler can
    /// access it.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// The record in which the handler notes faults.
static WATCHED: OnceLock<CrashRecord> = OnceLock::new();
/// The earlier handlers of [`SIGNALS`].
static EARLIER: [OnceLock<libc::sigaction>; SIGNALS.len()] =
    [const { OnceLock::new() }; SIGNALS.len()];

/// The requests that have ended processes by a fault, in memory that this process shares with those that it forks.
#[derive(Clone, Copy, Debug)]
pub struct CrashRecord(&'static [AtomicU64]);

/// The work of this thread on a request, until it is dropped.
#[derive(Debug)]
pub struct RequestMark(());

impl RequestMark {
    /// Notes that this thread works on the request `id`, which is below 2^62 and not 0.
    pub fn begin(id: u64) -> Self {
        CURRENT.set(id);
        Self(())
    }
}

impl Drop for RequestMark {
    fn drop(&mut self) {
        CURRENT.set(0);
    }
}

impl CrashRecord {
    /// The number of faults of different requests that are recorded at the same time.
    pub const CAPACITY: usize = ENTRIES;

    /// Creates an empty record.
    pub fn create() -> Result<Self> {
        shared::inherited(ENTRIES_AT + ENTRIES).map(Self)
    }

    /// Records the faults of this process from now on.
    pub fn watch(self) -> Result<()> {
        WATCHED.get_or_init(|| self);
        for (signal, earlier) in SIGNALS.into_iter().zip(&EARLIER) {
            // SAFETY: all zero bytes are a valid `sigaction`.
            let mut old = unsafe { std::mem::zeroed::<libc::sigaction>() };
            // SAFETY: the kernel writes to `old`, and changes nothing.
            if unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) } != 0 {
                return Err(nix::errno::Errno::last().into());
            }
            earlier.get_or_init(|| old);
            let mut new = old;
            new.sa_sigaction = handle as *const () as libc::sighandler_t;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND;
            // SAFETY: `handle` has the type that SA_SIGINFO requires, and does only what a signal handler may do: it
            // accesses atomics and a thread-local without a destructor, and calls functions that are safe there.
            if unsafe { libc::sigaction(signal, &raw const new, null_mut()) } != 0 {
                return Err(nix::errno::Errno::last().into());
            }
        }
        Ok(())
    }

    /// Returns how many processes the request has ended, up to three.
    pub fn count(self, id: u64) -> u64 {
        let found = self.entries().find(|entry| is_of(entry, id));
        found.map_or(0, |entry| entry & MAX_COUNT)
    }

    /// Returns the number of recorded faults. The third one of a request does not count, nor do later ones.
    pub fn total(self) -> u64 {
        self.word(TOTAL_AT)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn word(self, at: usize) -> Option<&'static AtomicU64> {
        self.0.get(at)
    }

    fn entries(self) -> impl Iterator<Item = u64> {
        let words = self.0.iter().skip(ENTRIES_AT);
        words.map(|word| word.load(Ordering::Acquire))
    }

    /// Records a fault. Called by the signal handler.
    fn note(self, id: u64) {
        let mut words = self.0.iter().skip(ENTRIES_AT);
        let found = words.find(|word| is_of(&word.load(Ordering::Acquire), id));
        match found {
            Some(word) if word.load(Ordering::Acquire) & MAX_COUNT == MAX_COUNT => return,
            Some(word) => {
                if word.fetch_add(1, Ordering::AcqRel) & MAX_COUNT >= 2 {
                    return;
                }
            }
            None => {
                let next = self
                    .word(USED_AT)
                    .map_or(0, |used| used.fetch_add(1, Ordering::AcqRel));
                let at = usize::try_from(next).unwrap_or(0) % ENTRIES;
                if let Some(word) = self.word(ENTRIES_AT + at) {
                    word.store(id << COUNT_BITS | 1, Ordering::Release);
                }
            }
        }
        if let Some(total) = self.word(TOTAL_AT) {
            total.fetch_add(1, Ordering::AcqRel);
        }
    }
}

fn is_of(entry: &u64, id: u64) -> bool {
    entry >> COUNT_BITS == id
}

/// Records the request of this thread, and lets the process die by the signal.
extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let id = CURRENT.replace(0);
    let origin = Origin::of(info);
    if id != 0
        && origin != Origin::Other
        && let Some(record) = WATCHED.get()
    {
        record.note(id);
    }
    let at = SIGNALS.iter().position(|one| *one == signal);
    let earlier = at
        .and_then(|at| EARLIER.get(at))
        .and_then(|earlier| earlier.get());
    if let Some(earlier) = earlier
        && ![libc::SIG_DFL, libc::SIG_IGN].contains(&earlier.sa_sigaction)
        && earlier.sa_flags & libc::SA_SIGINFO != 0
    {
        type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
        // SAFETY: it is not one of the two constants, and SA_SIGINFO gives the type of the function.
        let next =
            unsafe { std::mem::transmute::<libc::sighandler_t, Handler>(earlier.sa_sigaction) };
        // The standard library's handler reports the overflow of a stack.
        next(signal, info, context);
    }
    if origin != Origin::Fault {
        // The signal has its default effect again, when this handler returns. A fault occurs again by itself.
        // SAFETY: the function has no requirements.
        unsafe { libc::raise(signal) };
    }
}

/// The origin of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A fault of this thread.
    Fault,
    /// A call of this process, as in abort(3).
    Own,
    /// Another process, which can have sent it to any thread.
    Other,
}

impl Origin {
    fn of(info: *const libc::siginfo_t) -> Self {
        // SAFETY: the kernel passes a valid structure.
        let code = unsafe { (*info).si_code };
        if code > 0 {
            return Self::Fault;
        }
        // SAFETY: as above; signals that processes send have this field. The other function has no requirements.
        match unsafe { (*info).si_pid() == libc::getpid() } {
            true => Self::Own,
            false => Self::Other,
        }
    }
}

/// Ends the process by a fault of this thread, for tests.
#[cfg(debug_assertions)]
pub mod injected {
    /// Reads from address 0, which ends the process by SIGSEGV.
    pub fn segmentation_fault() {
        // SAFETY: not upheld, deliberately: it is compiled only for tests.
        unsafe { std::ptr::without_provenance::<u8>(8).read_volatile() };
    }

    /// Overflows the stack of this thread.
    pub fn stack_overflow() -> u64 {
        fn descend(depth: u64) -> u64 {
            let frame = std::hint::black_box([depth; 64]);
            let below = match std::hint::black_box(true) {
                true => descend(depth + 1),
                false => 0,
            };
            below + frame.iter().sum::<u64>()
        }
        descend(0)
    }

    /// Sends a signal to this thread.
    pub fn raise(signal: i32) {
        // SAFETY: the function has no requirements.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_counted_by_request() {
        let record = CrashRecord::create().unwrap();
        assert_eq!((record.count(7), record.total()), (0, 0));
        for (id, count, total) in [(7, 1, 1), (9, 1, 2), (7, 2, 3), (7, 3, 3), (7, 3, 3)] {
            record.note(id);
            assert_eq!((record.count(id), record.total()), (count, total), "{id}");
        }
        assert_eq!(record.count(8), 0);
    }

    #[test]
    fn later_requests_take_the_place_of_the_earliest() {
        let record = CrashRecord::create().unwrap();
        for id in 1..=ENTRIES as u64 + 1 {
            record.note(id);
        }
        assert_eq!(record.count(1), 0);
        assert_eq!(record.count(2), 1);
        assert_eq!(record.count(ENTRIES as u64 + 1), 1);
    }

    /// Ends a child by each kind of fault.
    #[test]
    fn faults_of_a_child_are_recorded_with_the_request_of_the_thread() {
        let record = CrashRecord::create().unwrap();
        let ends: [(u64, i32, fn()); 6] = [
            (11, libc::SIGSEGV, injected::segmentation_fault),
            (12, libc::SIGABRT, || std::process::abort()),
            (13, libc::SIGABRT, || {
                assert_eq!(injected::stack_overflow(), 0)
            }),
            (14, libc::SIGBUS, || injected::raise(libc::SIGBUS)),
            (15, libc::SIGILL, || injected::raise(libc::SIGILL)),
            (0, libc::SIGABRT, || std::process::abort()),
        ];
        for (id, signal, end) in ends {
            // SAFETY: the child uses nothing that another thread of the test could have locked, except for the memory
            // allocator, which fork(2) of glibc leaves usable.
            match unsafe { nix::unistd::fork() }.unwrap() {
                nix::unistd::ForkResult::Child => {
                    record.watch().unwrap();
                    let thread = std::thread::spawn(move || {
                        let _mark = RequestMark::begin(id);
                        end();
                    });
                    drop(thread.join());
                    std::process::exit(0);
                }
                nix::unistd::ForkResult::Parent { child } => {
                    let status = nix::sys::wait::waitpid(child, None).unwrap();
                    let nix::sys::wait::WaitStatus::Signaled(_, by, _) = status else {
                        panic!("{id}: {status:?}");
                    };
                    assert_eq!(by as i32, signal, "{id}");
                    assert_eq!(record.count(id), u64::from(id != 0), "{id}");
                }
            }
        }
        assert_eq!(record.total(), 5);
    }
}

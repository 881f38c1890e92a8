//! Files whose reads and writes the kernel makes itself, on the backing file that was registered for them.
//!
//! What is kept of an inode (by the number that the kernel has for it): how its living opens are answered,
//! and the backing file once it was registered, which costs two system calls each time. The kernel counts
//! an open until it sends RELEASE, and no longer; here it counts from the answer until RELEASE came. So what
//! is answered by this count is never refused.

mod policy;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use fuser::{BackingId, FopenFlags};
use lru::LruCache;
use parking_lot::Mutex;

use cowl_layers::error::Errno;
use cowl_layers::sys;
use cowl_overlay::inode::Inode;
pub(super) use policy::{Asked, Policy};
use policy::{State, Verdict, decide};

/// So many backing files stay registered while nobody has them open.
const IDLE: usize = 1024;

/// Registers a file with the kernel.
pub(super) type Register<'a> = &'a dyn Fn(BorrowedFd<'_>) -> io::Result<BackingId>;

/// The backing files of a mount.
#[derive(Debug)]
pub(super) struct Passing {
    policy: Policy,
    /// The kernel refused to register any file.
    refused: AtomicBool,
    /// How many files it may write to by itself.
    writers: Arc<AtomicU32>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    files: HashMap<u64, Entry>,
    /// Those that nobody has open and that have a backing file, the one used last at the end.
    idle: LruCache<u64, ()>,
    /// File systems whose files the kernel does not take: they lie on others themselves.
    refused: Vec<u64>,
}

#[derive(Debug, Default)]
struct Entry {
    opens: u32,
    /// The living opens are passed through.
    passed: bool,
    backing: Option<Backing>,
    /// The kernel may write to the backing file by itself. Counted in [`Passing::writers`].
    writer: bool,
    /// It may have, at any time: what its page cache has of our file is not to be kept.
    stale: bool,
    /// Stores through a mapping of the backing file tell nobody.
    unsure: bool,
}

#[derive(Debug)]
struct Backing {
    id: Arc<BackingId>,
    /// Which content it is ([`Inode::content_version`]).
    turn: u32,
}

/// What is asked of the table.
pub(super) struct Opening<'a> {
    pub(super) ino: u64,
    pub(super) asked: Asked,
    /// Opened for reading and for writing.
    pub(super) maps: bool,
    /// Says which content is the present one ([`Inode::content_version`]).
    pub(super) inode: &'a Inode,
    /// The file system that it lies on, where that is known.
    pub(super) dev: Option<u64>,
    /// The content, where it was opened, and which it is.
    pub(super) content: Option<(BorrowedFd<'a>, u32)>,
}

/// What becomes of attributes that the kernel cached before an open was passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cached {
    /// They stay.
    Valid,
    /// They may be out of date from here on without a request that says so.
    Unsure,
}

/// How an open is answered, which counts from here on.
#[derive(Debug)]
pub(super) enum Answer {
    /// With these flags.
    Served(FopenFlags),
    /// With these flags, passed through.
    Passed(FopenFlags, Arc<BackingId>, Cached),
    /// With ESTALE; it does not count.
    Renew,
}

impl Entry {
    /// Whether there is anything to remember of a file that nobody has open.
    fn matters(&self) -> bool {
        self.backing.is_some() || self.writer || self.stale || self.unsure
    }
}

impl Passing {
    pub(super) fn new(policy: Policy, writers: Arc<AtomicU32>) -> Self {
        Self {
            policy,
            refused: AtomicBool::new(false),
            writers,
            table: Mutex::new(Table {
                files: HashMap::new(),
                idle: LruCache::unbounded(),
                refused: Vec::new(),
            }),
        }
    }

    /// What this mount passes through.
    pub(super) fn policy(&self) -> Policy {
        if self.refused.load(Ordering::Relaxed) {
            Policy::OFF
        } else {
            self.policy
        }
    }

    /// Whether an open of this content for reading needs nothing but an answer.
    pub(super) fn is_kept(&self, ino: u64, turn: u32) -> bool {
        if !self.policy.any() {
            return false;
        }
        let table = self.table.lock();
        table.files.get(&ino).is_some_and(|entry| {
            let present = entry.backing.as_ref().is_some_and(|b| b.turn == turn);
            present && (entry.passed || entry.opens == 0)
        })
    }

    /// Decides how an open is answered, and counts it.
    pub(super) fn open(&self, opening: &Opening<'_>, register: Register<'_>) -> Answer {
        if !self.policy.any() {
            let cache = if opening.asked.direct {
                FopenFlags::FOPEN_DIRECT_IO
            } else {
                FopenFlags::FOPEN_KEEP_CACHE
            };
            return Answer::Served(cache | FopenFlags::FOPEN_NOFLUSH);
        }
        // What the kernel is told to drop is dropped without the lock.
        let mut dropped = Vec::new();
        let mut table = self.table.lock();
        let done = self.decide(&mut table, opening, register, &mut dropped);
        drop(table);
        done
    }

    fn decide(
        &self,
        table: &mut Table,
        opening: &Opening<'_>,
        register: Register<'_>,
        dropped: &mut Vec<Backing>,
    ) -> Answer {
        let ino = opening.ino;
        // Read under the table's lock: were it read before, an open that was counted in between could have the
        // newer content, and would be taken for one of the older.
        let turn = opening.inode.content_version();
        let entry = table.files.entry(ino).or_default();
        let state = match (entry.opens, entry.passed) {
            (0, _) => State::Idle,
            (_, false) => State::Served,
            (_, true) => State::Passed {
                present: entry.backing.as_ref().is_some_and(|b| b.turn == turn),
            },
        };
        let mut verdict = decide(self.policy(), opening.asked, state);
        if matches!(verdict, Verdict::Pass | Verdict::PassMappings) && state == State::Idle {
            table.idle.pop(&ino);
            if entry.backing.as_ref().is_none_or(|b| b.turn != turn) {
                dropped.extend(entry.backing.take());
                entry.backing = opening
                    .content
                    // Content that has moved in the meantime is not registered for what it no longer is.
                    .filter(|(_, of)| *of == turn)
                    .map(|(fd, _)| fd)
                    .and_then(|fd| self.register(fd, opening, &mut table.refused, register))
                    .map(|id| Backing { id, turn });
            }
            if entry.backing.is_none() {
                verdict = decide(Policy::OFF, opening.asked, state);
            }
        }
        let flags = FopenFlags::FOPEN_NOFLUSH;
        // Once it is unsure, nothing is cached any more.
        let cached = if opening.maps && !entry.unsure {
            Cached::Unsure
        } else {
            Cached::Valid
        };
        let (answer, passes) = match (verdict, &entry.backing) {
            (Verdict::Renew, _) => {
                // Whoever has it under the old number from here on sees what was.
                entry.stale = true;
                entry.unsure = true;
                return Answer::Renew;
            }
            (Verdict::Pass, Some(backing)) => {
                (Answer::Passed(flags, backing.id.clone(), cached), true)
            }
            (Verdict::PassMappings, Some(backing)) => {
                let flags = flags | FopenFlags::FOPEN_DIRECT_IO;
                (Answer::Passed(flags, backing.id.clone(), cached), true)
            }
            (Verdict::Direct, _) => (Answer::Served(flags | FopenFlags::FOPEN_DIRECT_IO), false),
            (Verdict::Cached | Verdict::Pass | Verdict::PassMappings, _) if entry.stale => {
                (Answer::Served(flags), false)
            }
            (Verdict::Cached | Verdict::Pass | Verdict::PassMappings, _) => {
                (Answer::Served(flags | FopenFlags::FOPEN_KEEP_CACHE), false)
            }
        };
        entry.opens += 1;
        entry.passed = passes;
        if !passes {
            if let Some(backing) = entry.backing.take() {
                table.idle.pop(&ino);
                dropped.push(backing);
            }
            return answer;
        }
        entry.unsure |= opening.maps;
        if opening.asked.write {
            entry.stale = true;
            if !std::mem::replace(&mut entry.writer, true) {
                self.writers.fetch_add(1, Ordering::AcqRel);
            }
        }
        answer
    }

    /// Registers a file, unless the kernel has refused its like before.
    fn register(
        &self,
        content: BorrowedFd<'_>,
        opening: &Opening<'_>,
        refused: &mut Vec<u64>,
        register: Register<'_>,
    ) -> Option<Arc<BackingId>> {
        let dev = opening
            .dev
            .map_or_else(|| sys::stat::stat_fd(content).map(|stat| stat.dev), Ok);
        let dev = match dev {
            Ok(dev) => dev,
            Err(error) => {
                log::warn!("a file is not passed through: {error}");
                return None;
            }
        };
        if refused.contains(&dev) {
            return None;
        }
        // The kernel opens the backing file as the program opened ours. What is only read must not be
        // writable by that, so it goes by a read-only mount.
        if !opening.asked.upper && !sys::stat::is_read_only(content) {
            return None;
        }
        // Without the right to keep setuid and setgid: the kernel writes with the rights of this moment, and
        // the program that will write may not have it.
        match sys::creds::without_setid(|| Ok(register(content.as_fd()))) {
            Ok(Ok(id)) => Some(Arc::new(id)),
            Ok(Err(error)) => {
                match Errno::from_io_error(&error) {
                    Some(Errno::LOOP) => {
                        log::info!(
                            "device {dev} lies on another: its files are not passed through"
                        );
                        refused.push(dev);
                    }
                    Some(Errno::PERM | Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL) => {
                        log::info!("nothing is passed through: {error}");
                        self.refused.store(true, Ordering::Relaxed);
                    }
                    // Out of memory, say: the next one may be taken.
                    _ => log::debug!("a file is not passed through: {error}"),
                }
                None
            }
            Err(error) => {
                log::warn!("a file is not passed through: {error}");
                None
            }
        }
    }

    /// The kernel closed one.
    pub(super) fn release(&self, ino: u64) {
        if !self.policy.any() {
            return;
        }
        let mut dropped = None;
        let mut table = self.table.lock();
        let Table { files, idle, .. } = &mut *table;
        let Some(entry) = files.get_mut(&ino) else {
            return;
        };
        entry.opens = entry.opens.saturating_sub(1);
        if entry.opens > 0 {
            return;
        }
        entry.passed = false;
        // A mapping of the backing file outlives this.
        if entry.writer && !entry.unsure {
            entry.writer = false;
            self.writers.fetch_sub(1, Ordering::AcqRel);
        }
        if entry.backing.is_some() {
            idle.put(ino, ());
        } else if !entry.matters() {
            files.remove(&ino);
        }
        if idle.len() > IDLE
            && let Some((oldest, ())) = idle.pop_lru()
            && let Some(entry) = files.get_mut(&oldest)
        {
            dropped = entry.backing.take();
            if !entry.matters() {
                files.remove(&oldest);
            }
        }
        drop(table);
        drop(dropped);
    }

    /// Drops what is kept of an inode that the kernel does not know any more (`is_forgotten`), so that nothing of
    /// it is mapped either.
    ///
    /// That is asked under the lock. Asked before, the inode may be looked up, opened, mapped and closed in between,
    /// and the mapping would not count any more. Every open comes after the lookup that makes it known.
    pub(super) fn forget(&self, ino: u64, is_forgotten: impl FnOnce() -> bool) {
        if !self.policy.any() {
            return;
        }
        let mut table = self.table.lock();
        let Some(entry) = table.files.get(&ino) else {
            return;
        };
        // A created file is open before it counts as known.
        if entry.opens > 0 || !is_forgotten() {
            return;
        }
        table.idle.pop(&ino);
        let entry = table.files.remove(&ino);
        drop(table);
        // Its backing file goes with it, without the lock.
        if entry.is_some_and(|entry| entry.writer) {
            self.writers.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Whether attributes of the inode, with setuid or setgid bits in the mode or not, may be out of date as
    /// soon as they are read: the kernel may write to it by itself, which takes these bits off, or programs
    /// through a mapping, which moves the times.
    pub(super) fn is_unsure(&self, ino: u64, setid: bool) -> bool {
        if !self.policy.any() {
            return false;
        }
        let table = self.table.lock();
        let entry = table.files.get(&ino);
        entry.is_some_and(|entry| entry.unsure || setid && entry.writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was looked up again, opened, mapped and closed since the kernel forgot it.
    #[test]
    fn a_mapping_counts_until_the_kernel_does_not_know_the_inode() {
        let policy = Policy {
            upper: true,
            ..Policy::OFF
        };
        let writers = Arc::new(AtomicU32::new(1));
        let passing = Passing::new(policy, writers.clone());
        let mapped = Entry {
            writer: true,
            unsure: true,
            ..Entry::default()
        };
        passing.table.lock().files.insert(7, mapped);
        passing.forget(7, || false);
        assert!(passing.is_unsure(7, false));
        assert_eq!(writers.load(Ordering::Acquire), 1);
        passing.forget(7, || {
            assert!(passing.table.is_locked(), "or it is known again by now");
            true
        });
        assert!(!passing.is_unsure(7, false));
        assert_eq!(writers.load(Ordering::Acquire), 0);
    }
}

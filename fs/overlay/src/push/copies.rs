//! Copies of files to which programs write at the same time, all with the content of one moment.
//!
//! The moment is the end of the last copy. Each other file must be unchanged from its copy to that moment, which its
//! times show afterwards, and for a mapped file its blocks; a file that changed is copied again. The file that is copied
//! last may change afterwards.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::files::NamedFile;
use super::request::UnattendedCause;
use cowl_layers::error::{Errno, Result};
use cowl_layers::layer::moves::Moves;
use cowl_layers::points::is_disabled;
use cowl_layers::sys;
use cowl_layers::sys::copy::{Copied, WriteBack, cannot_share};
use cowl_layers::sys::order::Order;
use cowl_layers::sys::stat::{Stat, has_fine_times, time_of_last_tick};

/// The maximum number of rounds, and the time after which no further round begins.
const MAX_ROUNDS: u32 = 64;
pub(super) const MAX_TIME: Duration = Duration::from_secs(2);
/// The minimum number of copies for which one sync of the file system is faster than a sync of each copy.
const MANY: usize = 16;
/// The pause before the next attempt to see a tick of the clock.
const PAUSE: Duration = Duration::from_millis(1);

/// Copies of files.
#[derive(Debug)]
pub(super) struct Copies {
    /// The attributes of each file when its copy was made.
    pub(super) seen: Vec<Stat>,
    pub(super) bytes: u64,
    pub(super) rounds: u32,
}

/// Files that could not be copied.
#[derive(Debug)]
pub(super) struct NotCopied {
    /// The indexes of these files.
    pub(super) files: Vec<usize>,
    pub(super) cause: UnattendedCause,
}

/// The way in which files are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// Both files share blocks.
    Share,
    /// The content is read and written.
    Write,
}

/// Returns the name of the copy of a file in the directory of the moves.
pub(super) fn copy_name(index: usize) -> Vec<u8> {
    format!("{index:x}").into_bytes()
}

/// Determines how files are copied, by a copy of the first one.
pub(super) fn choose_method(moves: &Moves, first: &OwnedFd) -> Result<Method> {
    let target = match moves.create_nameless() {
        Ok(target) => target,
        Err(error) if matches!(error.errno(), Errno::OPNOTSUPP | Errno::ISDIR) => {
            return Ok(Method::Write);
        }
        Err(error) => return Err(error),
    };
    match sys::copy::share(first.as_fd(), target.as_fd()) {
        // Whether a copy is current is decided by its blocks.
        Ok(()) => match sys::extents::is_unchanged(first, &target) {
            Ok(_) => Ok(Method::Share),
            Err(error) if cannot_share(error) => Ok(Method::Write),
            Err(error) => Err(error),
        },
        Err(error) if cannot_share(error) => Ok(Method::Write),
        Err(error) => Err(error),
    }
}

/// Copies the files.
pub(super) fn copy_all(
    moves: &Moves,
    files: &[NamedFile],
    method: Method,
    deadline: Instant,
) -> Result<Result<Copies, NotCopied>> {
    let fine = files
        .first()
        .is_some_and(|file| has_fine_times(&file.content));
    let mut seen = vec![Stat::default(); files.len()];
    let mut changes = vec![0_u32; files.len()];
    let mut pending: Vec<usize> = (0..files.len()).collect();
    let copies = create_copies(moves, files.len(), method)?;
    let mut round = 0;
    loop {
        round += 1;
        // Those that change most often are copied last.
        pending.sort_by_key(|index| changes.get(*index).copied());
        for index in &pending {
            let (Some(file), Some(seen), Some(copy)) =
                (files.get(*index), seen.get_mut(*index), copies.get(*index))
            else {
                continue;
            };
            let Some(stat) = stat_for_comparison(file, fine, deadline)? else {
                return Ok(Err(NotCopied {
                    files: pending,
                    cause: UnattendedCause::TooSlow,
                }));
            };
            *seen = stat;
            copy_one(file, copy, method)?;
        }
        let last = match method {
            Method::Share => pending.last().copied(),
            Method::Write => None,
        };
        let mut changed = Vec::new();
        for (index, (file, (seen, copy))) in files.iter().zip(seen.iter().zip(&copies)).enumerate()
        {
            let is_current = Some(index) == last
                || is_unchanged(file, seen)?
                    && (method == Method::Write || has_same_blocks(file, copy)?);
            if !is_current {
                changed.push(index);
            }
        }
        if changed.is_empty() || is_disabled("checks of copies") {
            let bytes = seen.iter().map(|stat| stat.size).sum();
            // The last copy may have content from after `seen`, in which case a write may have removed setuid.
            for (file, seen) in files.iter().zip(&mut seen) {
                *seen = sys::stat::stat_fd(&file.content)?;
            }
            if method == Method::Share {
                for (index, copy) in copies.iter().enumerate() {
                    moves.name_copy(copy, &copy_name(index))?;
                }
            }
            return Ok(Ok(Copies {
                bytes,
                seen,
                rounds: round,
            }));
        }
        if round == MAX_ROUNDS || Instant::now() > deadline {
            return Ok(Err(NotCopied {
                files: changed,
                cause: UnattendedCause::KeptChanging,
            }));
        }
        for index in &changed {
            if let Some(count) = changes.get_mut(*index) {
                *count += 1;
            }
        }
        pending = changed;
    }
}

/// Ensures that the copies are durable before the list.
pub(super) fn sync(copies: &[OwnedFd], order: Order, copied: Copied) -> Result<()> {
    match (order, copies.first()) {
        (Order::NamesFirst | Order::Unknown, Some(first)) if copies.len() >= MANY => {
            sys::dir::sync_fs(first.as_fd())
        }
        _ => copies
            .iter()
            .try_for_each(|copy| order.content_first(copy, copied)),
    }
}

/// Creates the files of the copies. Those that share blocks get their names later.
fn create_copies(moves: &Moves, count: usize, method: Method) -> Result<Vec<OwnedFd>> {
    let create = |index| match method {
        Method::Share => moves.create_nameless(),
        Method::Write => moves.create_copy(&copy_name(index)),
    };
    (0..count).map(create).collect()
}

/// Returns the attributes of a file from a moment after which any change of the content changes its ctime; `None` if there
/// is none before the deadline.
///
/// Without fine times the clock must have advanced since the last change, for which this waits.
fn stat_for_comparison(file: &NamedFile, fine: bool, deadline: Instant) -> Result<Option<Stat>> {
    while Instant::now() <= deadline {
        let tick = time_of_last_tick();
        let stat = sys::stat::stat_fd(&file.content)?;
        if fine || stat.ctime < tick {
            return Ok(Some(stat));
        }
        sleep(PAUSE);
    }
    Ok(None)
}

/// Whether a file has not changed since `seen`.
fn is_unchanged(file: &NamedFile, seen: &Stat) -> Result<bool> {
    let key = |stat: &Stat| (stat.ctime, stat.mtime, stat.size);
    Ok(key(&sys::stat::stat_fd(&file.content)?) == key(seen))
}

/// Whether a file has the same content as its copy, which shares its blocks.
///
/// Only a store through a mapping does not change the times: they change when its page fault begins, which may be before
/// the copy.
fn has_same_blocks(file: &NamedFile, copy: &OwnedFd) -> Result<bool> {
    if !file.is_mapped {
        return Ok(true);
    }
    sys::extents::is_unchanged(&file.content, copy)
}

/// Copies a file, over its previous copy if there is one.
fn copy_one(file: &NamedFile, target: &OwnedFd, method: Method) -> Result<()> {
    if sys::stat::stat_fd(target)?.size > 0 {
        sys::attr::truncate(target, 0)?;
    }
    let (from, to) = (file.content.as_fd(), target.as_fd());
    match method {
        Method::Share => sys::copy::share(from, to),
        Method::Write => {
            // A store through a mapping of a page that is not written yet would not change the times.
            sys::copy::write_pages(from)?;
            let size = sys::stat::stat_fd(from)?.size;
            sys::copy::copy_content(from, to, size, WriteBack::Later).map(drop)
        }
    }
}

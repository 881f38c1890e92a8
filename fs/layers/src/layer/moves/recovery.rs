//! The completion of moves that were interrupted in another process.
//!
//! The work directory may be that of another user, so the list is used only if this user has written it.

use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;
use serde::Deserialize;

use super::{
    DIR, LINKED, LIST, Missing, Moves, RootDir, Stored, TEMPORARY, Times, UNDONE, VERSION, reach,
    release, sync_dirs,
};
use crate::error::{Errno, Error, Result};
use crate::layer::{Layer, Upper, lock};
use crate::name::Name;
use crate::shown::Show as _;
use crate::sys;
use crate::sys::order::Order;
use crate::sys::stat::{FileKind, Stat};

/// The part of the moves that is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The phase in which files must be linked into the new layer, and replaced in the frozen one.
    Listed,
    /// The phase in which files must be replaced in the frozen layer.
    Linked,
    /// The phase in which files must be removed from the new layer.
    Undone,
}

/// The name of the list in each phase.
const PHASES: [(&[u8], Phase); 3] = [
    (UNDONE, Phase::Undone),
    (LINKED, Phase::Linked),
    (LIST, Phase::Listed),
];

/// The version of a list.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

const OTHER_VERSION: Error = Error::Damaged(
    "another version of cowl has written the list of moved files; mount the container once with that version",
);
const NOT_BELOW: Error = Error::Damaged("files move from a layer that is not below");

/// Completes the moves of an interrupted process, on a mount whose layers can be pushed. `below` is the layer
/// below the upper one.
///
/// Nothing else may access the layers meanwhile, except for programs that write to the files: this takes the exclusive
/// lock of `below`, and leaves a shared one.
pub fn complete(upper: &Upper, below: Option<&Arc<Layer>>) -> Result<()> {
    let outer = upper.locks.outer.as_fd();
    let Some(dir) = open_dir(outer)? else {
        return Ok(());
    };
    if !is_own(&sys::stat::stat_fd(&dir)?, FileKind::Directory) {
        return Err(Error::Damaged("another user made a list of moved files"));
    }
    let Some((phase, stored)) = read_list(dir.as_fd())? else {
        return sys::remove::remove_tree(outer, DIR);
    };
    // Files may only be replaced in the layer that the caller knows.
    let below = below.ok_or(NOT_BELOW)?;
    if RootDir::of(below)? != stored.layer {
        return Err(NOT_BELOW);
    }
    let _locked = lock::exclusively(below)?;
    let [from, to, outer] = reach(below, upper)?;
    let checked = sys::stat::stat_fd(&dir)?;
    let dir = sys::dir::open_dir(outer.as_fd(), DIR)?;
    let found = sys::stat::stat_fd(&dir)?;
    if (found.dev, found.ino) != (checked.dev, checked.ino) {
        // The owner of the work directory has replaced it.
        return Err(Error::Errno(Errno::STALE));
    }
    let moves = Moves {
        from,
        to,
        outer,
        dir,
        layer: stored.layer,
        temporary: Name::new(&stored.temporary)?,
        order: upper.order(),
    };
    log::info!(
        "completing the interrupted move of {} files to {}",
        stored.moves.files.len(),
        upper.layer.path().shown()
    );
    if phase == Phase::Listed && !moves.has_new_dirs(&stored.moves)? {
        // After a power cut on btrfs: the directories of the new layer may not be durable when the list is. No program
        // writes to the files any more, so they can stay in the frozen layer. If this is interrupted, it begins again.
        return moves.unlink_with(&stored.moves, Missing::Lost);
    }
    if phase == Phase::Undone {
        let missing = match stored.names_synced {
            true => Missing::Removed,
            false => Missing::Lost,
        };
        return moves.unlink_with(&stored.moves, missing);
    }
    if phase == Phase::Listed {
        moves.link(&stored.moves)?;
        let list = moves.without_lost_names(&stored.moves)?;
        moves.commit_links()?;
        moves.fill(&list)?;
        moves.exchange(&list)?;
        // Those of names that a power cut has removed.
        if release(&moves.from, &moves.temporary, &stored.moves, Times::Current)? {
            sync_dirs(&moves.from, &stored.moves, moves.order)?;
        }
    } else {
        moves.fill(&stored.moves)?;
        moves.exchange(&stored.moves)?;
    }
    moves.finish()
}

/// Removes the placeholders of moves that were interrupted before the new layer was used, and that are not completed.
///
/// `work` is the work directory of the new layer, which is about to be discarded. A daemon may use `below` as its upper
/// layer.
pub fn abandon(work: &Path, below: &Layer) -> Result<()> {
    let outer = sys::dir::open_root(work)?;
    let Some(dir) = open_dir(outer.as_fd())? else {
        return Ok(());
    };
    if !is_own(&sys::stat::stat_fd(&dir)?, FileKind::Directory) {
        return Err(Error::Damaged("another user made a list of moved files"));
    }
    let stored = match read_list(dir.as_fd()) {
        Ok(Some((_, stored))) => stored,
        Ok(None) => return Ok(()),
        // The daemon undoes the moves at the same time, and has removed the placeholders before.
        Err(error) if error.is_absent() => return Ok(()),
        Err(error) => return Err(error),
    };
    if RootDir::of(below)? != stored.layer {
        return Err(NOT_BELOW);
    }
    let from = sys::dir::open_root(below.path())?;
    let temporary = Name::new(&stored.temporary)?;
    if release(&from, &temporary, &stored.moves, Times::Current)? {
        sync_dirs(&from, &stored.moves, Order::for_dir(from.as_fd()))?;
    }
    Ok(())
}

/// Fails if moves must be completed, for a mount on which no layer can be pushed. Ignores those of another user.
pub fn refuse_pending(upper: &Upper) -> Result<()> {
    let Some(dir) = open_dir(upper.locks.outer.as_fd())? else {
        return Ok(());
    };
    let mut has_list = false;
    for (name, _) in PHASES {
        match sys::stat::stat_at(dir.as_fd(), name) {
            Ok(stat) => has_list |= !is_reserved(&stat),
            Err(error) if error.is_absent() => {}
            Err(error) => return Err(error),
        }
    }
    if !has_list {
        return Ok(());
    }
    if is_own(&sys::stat::stat_fd(&dir)?, FileKind::Directory) {
        return Err(Error::Damaged(
            "a snapshot was interrupted, and only a mount by cowl completes it",
        ));
    }
    log::warn!(
        "{}: a list of moved files, which another user made, is ignored",
        upper.work_path.shown()
    );
    Ok(())
}

fn open_dir(outer: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    match sys::dir::open_dir(outer, DIR) {
        Ok(dir) => Ok(Some(dir)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether only this user can have written an object.
fn is_own(stat: &Stat, kind: FileKind) -> bool {
    let uid = rustix::process::geteuid().as_raw();
    stat.kind() == kind && stat.uid == uid && stat.perm() & 0o077 == 0
}

/// Whether a file only reserves the name of a list.
fn is_reserved(stat: &Stat) -> bool {
    stat.kind() == FileKind::Regular && stat.size == 0
}

/// Reads the list; `None` if there is none.
fn read_list(dir: BorrowedFd<'_>) -> Result<Option<(Phase, Stored)>> {
    for (name, phase) in PHASES {
        // Not opened before its kind is known: a device or pipe could block.
        match sys::stat::stat_at(dir, name) {
            Ok(stat) if is_reserved(&stat) => continue,
            Ok(stat) if is_own(&stat, FileKind::Regular) => {}
            Ok(_) => return Err(Error::Damaged("another user made a list of moved files")),
            Err(error) if error.is_absent() => continue,
            Err(error) => return Err(error),
        }
        let mut file = std::fs::File::from(sys::content::open(dir, name, OFlags::RDONLY)?);
        let mut bytes = Vec::new();
        if let Err(error) = file.read_to_end(&mut bytes) {
            return Err(Error::Errno(
                Errno::from_io_error(&error).unwrap_or(Errno::IO),
            ));
        }
        // Before the other members, because their types depend on it.
        let version = serde_json::from_slice(&bytes).map(|Versioned { version }| version);
        if version.is_ok_and(|version| version != VERSION) {
            return Err(OTHER_VERSION);
        }
        let stored = match serde_json::from_slice::<Stored>(&bytes) {
            Ok(stored) => stored,
            // After a power cut on a volatile mount, whose file system was not synced. Treated as a missing list.
            Err(error) if error.is_eof() => {
                log::warn!("a list of moved files is incomplete, and ignored");
                return Ok(None);
            }
            Err(_) => return Err(Error::Damaged("a list of moved files")),
        };
        check(&stored, dir)?;
        return Ok(Some((phase, stored)));
    }
    Ok(None)
}

/// Checks that the copies are those of a push.
fn check(stored: &Stored, dir: BorrowedFd<'_>) -> Result<()> {
    let damaged = Error::Damaged("a list of moved files");
    let is_temporary = stored.temporary.starts_with(TEMPORARY.as_bytes());
    if !is_temporary || Name::new(&stored.temporary).is_err() {
        return Err(damaged);
    }
    for file in &stored.moves.files {
        let is_name = !file.copy.is_empty() && file.copy.iter().all(u8::is_ascii_hexdigit);
        if !is_name {
            return Err(damaged);
        }
        // The owner is that of the file, but only this user can create or rename an object in the directory.
        match sys::stat::stat_at(dir, &file.copy) {
            Ok(stat) if stat.kind() == FileKind::Regular => {}
            Ok(_) => return Err(damaged),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

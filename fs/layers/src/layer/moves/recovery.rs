//! The completion of moves that were interrupted in another process.
//!
//! The work directory may be that of another user, so the list is used only if this user has written it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::{DIR, LINKED, LIST, Moves, Stored, TEMPORARY, UNDONE, VERSION, reach};
use crate::error::{Errno, Error, Result};
use crate::layer::{Layer, Upper, lock};
use crate::name::Name;
use crate::shown::Show as _;
use crate::sys;
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
    let below = below.filter(|layer| layer.id() == stored.layer);
    let below = below.ok_or(Error::Damaged("files move from a layer that is not below"))?;
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
        // writes to the files any more, so they can stay in the frozen layer.
        moves.cancel()?;
        return moves.unlink(&stored.moves);
    }
    if phase == Phase::Undone {
        return moves.unlink(&stored.moves);
    }
    if phase == Phase::Listed {
        moves.link(&stored.moves)?;
        let list = moves.without_lost_names(&stored.moves)?;
        moves.commit_links()?;
        moves.exchange(&list)?;
    } else {
        moves.exchange(&stored.moves)?;
    }
    moves.finish()
}

/// Fails if moves must be completed, for a mount on which no layer can be pushed. Ignores those of another user.
pub fn refuse_pending(upper: &Upper) -> Result<()> {
    let Some(dir) = open_dir(upper.locks.outer.as_fd())? else {
        return Ok(());
    };
    let mut has_list = false;
    for (name, _) in PHASES {
        match sys::stat::stat_at(dir.as_fd(), name) {
            Ok(_) => has_list = true,
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

/// Reads the list; `None` if there is none.
fn read_list(dir: BorrowedFd<'_>) -> Result<Option<(Phase, Stored)>> {
    for (name, phase) in PHASES {
        // Not opened before its kind is known: a device or pipe could block.
        match sys::stat::stat_at(dir, name) {
            Ok(stat) if is_own(&stat, FileKind::Regular) => {}
            Ok(_) => return Err(Error::Damaged("another user made a list of moved files")),
            Err(error) if error.is_absent() => continue,
            Err(error) => return Err(error),
        }
        let file = sys::content::open(dir, name, OFlags::RDONLY)?;
        let reader = std::io::BufReader::new(std::fs::File::from(file));
        let stored = match serde_json::from_reader::<_, Stored>(reader) {
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
    if stored.version != VERSION || !is_temporary || Name::new(&stored.temporary).is_err() {
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

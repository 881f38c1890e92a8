//! The move of files from the frozen layer to the new upper layer.
//!
//! 1. All files are copied into the work directory of the new layer ([`super::copies`]).
//! 2. The directories of their names are copied up.
//! 3. The list of the moves is written, and each file is linked into the new layer.
//! 4. The stack is exchanged, in memory and in the ledger.
//! 5. Each file in the frozen layer is replaced by its copy.
//!
//! An error undoes everything. If the process ends after the list was written, the next user of the new layer completes
//! the moves. If the stack was not exchanged, the new layer may be discarded instead.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copies::{
    Copies, MAX_TIME, Method, NotCopied, choose_method, copy_all, copy_name, sync,
};
use super::files::{FoundFiles, NamedFile, unattended, upper_dir};
use super::helper::{Helper, Ran, run_until};
use super::pass_phase;
use super::request::{Cleanup, Failed, Pushed, Stopped, Unattended, UnattendedCause, Writers};
use crate::copy_up::copy_attributes;
use crate::inode::{DirState, Inode, NumberStorage};
use crate::overlay::Overlay;
use crate::reach::{Context, Stack, stat_on_disk};
use crate::services::Services;
use cowl_layers::error::Result;
use cowl_layers::layer::moves::{ChangedDir, MoveList, MovedFile, Moves};
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::locks::RwLock;
use cowl_layers::points::{is_disabled, point};
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::copy::Copied;
use cowl_layers::sys::order::Order;
use cowl_layers::sys::stat::Time;
use cowl_layers::view::Loc;

/// The part of the limit on open descriptors that files may use.
const DESCRIPTORS: u64 = 4;
/// The maximum number of files.
const MAX_FILES: u64 = 10_000;
/// The time that each further step may take in which a program could prevent the push.
const FURTHER_TIME: Duration = Duration::from_secs(2);
/// The time limit for copies that do not share blocks, while programs are stopped.
const WRITE_TIME: Duration = Duration::from_secs(60);
/// The number of attempts to replace files in the frozen layer, and the pause before each.
const ATTEMPTS: u32 = 10;
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Files that are about to move, with their copies.
#[derive(Debug)]
pub(super) struct Moving {
    moves: Arc<Moves>,
    list: Arc<MoveList>,
    files: Arc<Vec<NamedFile>>,
    deadline: Instant,
    copies: Copies,
    method: Method,
    order: Order,
    from: Arc<Layer>,
    /// The directories of all names.
    parents: Vec<Arc<Inode>>,
    /// The ctime that each file shows, and its mtime, before the move.
    times: Vec<(Time, Time)>,
}

/// The states of directories, and the ctimes that they show, before they were copied up.
#[derive(Debug, Default)]
pub(super) struct Before(Vec<(Arc<Inode>, DirState, Time)>);

impl Before {
    /// Records the state of a directory.
    pub(super) fn note(&mut self, inode: &Arc<Inode>) -> Result<()> {
        let shown = inode.visible_ctime(stat_on_disk(inode)?.ctime);
        self.0.push((inode.clone(), inode.dir()?, shown));
        Ok(())
    }

    /// Restores the states, in memory.
    pub(super) fn restore(self, overlay: &Overlay) {
        for (inode, state, shown) in self.0.into_iter().rev() {
            let identity = state.identity;
            let change = || inode.update_dir(|dir| *dir = state);
            let storage = NumberStorage::OnDisk;
            if let Err(error) = overlay.inodes.relocate(&inode, identity, storage, change) {
                log::error!("cannot restore inode {}: {error}", inode.ino());
            }
            match stat_on_disk(&inode) {
                Ok(stat) => overlay.inodes.show_ctime(&inode, stat.ctime, shown),
                Err(error) => {
                    log::error!("cannot restore the ctime of inode {}: {error}", inode.ino())
                }
            }
        }
    }
}

impl Moving {
    /// Copies the files to the work directory of `upper`; `None` if none is to be moved.
    pub(super) fn begin(
        overlay: &Overlay,
        stack: &Stack,
        upper: &Upper,
        found: &mut FoundFiles,
        writers: Writers,
    ) -> Result<Option<Self>, Failed> {
        if found.named.is_empty() {
            return Ok(None);
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.map_or(MAX_FILES, |limit| MAX_FILES.min(limit / DESCRIPTORS));
        if found.named.len() as u64 > limit {
            let cause = found.unattended(stack, UnattendedCause::TooMany);
            return Err(Failed::from(Stopped::By(cause)));
        }
        let order = match overlay.options.volatile {
            true => Order::Volatile,
            false => upper.order(),
        };
        let from = stack.upper()?.layer.clone();
        let deadline = Instant::now() + MAX_TIME;
        let moves = Arc::new(Moves::begin(&from, upper, order)?);
        let copied = copy_files(stack, &moves, found, writers, deadline);
        let (files, copies, method) = match copied {
            Ok(Some(copied)) => copied,
            other => {
                // A late thread creates nothing more, but can hold the lock of a copy.
                let finish = Cleanup(Box::new(move || {
                    if let Err(error) = moves.finish() {
                        log::warn!("cannot remove copies of files: {error}");
                    }
                }));
                return match other {
                    Ok(_) => {
                        finish.start(overlay.undoing.clone());
                        Ok(None)
                    }
                    Err(cause) => Err(Failed {
                        cause,
                        cleanup: Some(finish),
                    }),
                };
            }
        };
        let (list, parents) = to_list(stack, &files)?;
        Ok(Some(Self {
            moves,
            list: Arc::new(list),
            files,
            deadline: Instant::now() + FURTHER_TIME,
            copies,
            method,
            order,
            from,
            parents,
            times: Vec::new(),
        }))
    }

    /// Returns what has been copied.
    pub(super) fn summary(&self) -> Pushed {
        Pushed {
            copied: self.files.len(),
            bytes: self.copies.bytes,
            rounds: self.copies.rounds,
            shares_blocks: self.method == Method::Share,
            ..Pushed::default()
        }
    }

    /// Links the files into the upper layer of `next`. Returns the directories whose attributes in the kernel's cache are
    /// stale.
    pub(super) fn link(
        &mut self,
        overlay: &Overlay,
        next: &RwLock<Stack>,
        before: &mut Before,
    ) -> Result<Linked> {
        let ledger = overlay.inodes.ledger().map(|ledger| &**ledger);
        let cx = Context::new(next, &overlay.options, ledger);
        let copies = self.complete_copies(&cx)?;
        let services = Services { cx: &cx, overlay };
        for parent in &self.parents {
            note_missing(&cx, parent, before)?;
            services.copy_up().copy_up_dir(parent)?;
        }
        let mut shown = Vec::new();
        for parent in &self.parents {
            shown.push(parent.visible_ctime(stat_on_disk(parent)?.ctime));
        }
        for file in &*self.files {
            let stat = sys::stat::stat_fd(&file.content)?;
            self.times
                .push((file.inode.visible_ctime(stat.ctime), stat.mtime));
        }
        let (moves, list, order) = (self.moves.clone(), self.list.clone(), self.order);
        let copied = match self.method {
            Method::Share => Copied::Shared,
            Method::Write => Copied::Written,
        };
        match run_until(self.deadline, move || sync(&copies, order, copied))? {
            Ran::Done(synced) => synced?,
            Ran::Late(helper) => return Ok(Linked::Late(Some(helper))),
        }
        let reserves = !is_disabled("placeholders");
        if reserves && !self.moves.prepare(&self.list, self.deadline)? {
            return Ok(Linked::Late(None));
        }
        pass_phase();
        self.moves.commit_list(&self.list)?;
        pass_phase();
        if reserves && !self.moves.reserve(&self.list, self.deadline)? {
            return Ok(Linked::Late(None));
        }
        let link = move || {
            let linked = moves.link(&list);
            point("once files are linked");
            pass_phase();
            linked
        };
        match run_until(self.deadline, link)? {
            Ran::Done(linked) => linked?,
            Ran::Late(helper) => return Ok(Linked::Late(Some(helper))),
        }
        self.moves.commit_links()?;
        pass_phase();
        for (parent, shown) in self.parents.iter().zip(shown) {
            let now = stat_on_disk(parent)?.ctime;
            overlay.inodes.show_ctime(parent, now, shown);
        }
        Ok(Linked::Done(cx.take_stale()))
    }

    /// Copies the attributes of the files to their copies, which it returns.
    fn complete_copies(&self, cx: &Context<'_>) -> Result<Vec<OwnedFd>> {
        let mut copies = Vec::new();
        for (index, (file, seen)) in self.files.iter().zip(&self.copies.seen).enumerate() {
            let copy = self.moves.open_copy(&copy_name(index))?;
            let (source, mtime) = (file.content.as_fd(), SetTime::At(seen.mtime));
            copy_attributes(cx, &self.from, source, seen, copy.as_fd(), mtime)?;
            copies.push(copy);
        }
        Ok(copies)
    }

    /// Locates the files in the new layer. `stack` is the new one.
    pub(super) fn relocate(&self, overlay: &Overlay, stack: &Stack) -> Result<()> {
        for (file, (shown, mtime)) in self.files.iter().zip(&self.times) {
            let Some((parent, name)) = file.names.first() else {
                continue;
            };
            let loc = Loc {
                dir: upper_dir(stack, parent)?,
                name: name.clone(),
            };
            let inode = &file.inode;
            let change = || {
                inode.update_file(|state| {
                    state.loc = loc;
                    state.visible = None;
                })
            };
            let storage = NumberStorage::OnDisk;
            (overlay.inodes).relocate(inode, inode.identity(), storage, change)?;
            inode.flags().set_unsynced_name();
            self.show_time(overlay, file, *shown, *mtime)?;
        }
        for parent in &self.parents {
            parent.advance_generation();
        }
        Ok(())
    }

    /// Shows the ctime from before the move, unless a program has written to the file since.
    fn show_time(
        &self,
        overlay: &Overlay,
        file: &NamedFile,
        shown: Time,
        mtime: Time,
    ) -> Result<()> {
        let now = sys::stat::stat_fd(&file.content)?;
        if now.mtime == mtime {
            overlay.inodes.show_ctime(&file.inode, now.ctime, shown);
        }
        Ok(())
    }

    /// Begins to replace the files in the frozen layer by their copies, and waits for a short time.
    ///
    /// If that is late, a program prevents it, and requests must not wait for it: the names in the new layer hide those
    /// below. The placeholders are replaced before: no program can prevent that.
    pub(super) fn exchange(self, overlay: &Overlay) -> Exchanging {
        let fill = || self.moves.fill(&self.list);
        finish_or_abort(fill(), fill);
        let (moves, list) = (self.moves.clone(), self.list.clone());
        let deadline = Instant::now() + FURTHER_TIME;
        let ran = run_until(deadline, move || moves.exchange(&list));
        let is_done = matches!(ran, Ok(Ran::Done(Ok(()))));
        if is_done {
            self.show_times(overlay);
        }
        let ran = (!is_done).then_some(ran);
        Exchanging { moving: self, ran }
    }

    fn show_times(&self, overlay: &Overlay) {
        for (file, (shown, mtime)) in self.files.iter().zip(&self.times) {
            if let Err(error) = self.show_time(overlay, file, *shown, *mtime) {
                log::error!(
                    "cannot restore the ctime of inode {}: {error}",
                    file.inode.ino()
                );
            }
        }
    }

    /// Removes the placeholders from the old upper layer, before the ctimes of its directories are restored.
    pub(super) fn release(&self) {
        if let Err(error) = self.moves.release(&self.list) {
            // The thread that undoes the move tries again.
            log::error!("cannot remove placeholders of files: {error}");
        }
    }

    /// Cancels the move before the new stack is used, after [`Self::release`]. `late` is the thread that links the files. Returns what prevented
    /// the push.
    pub(super) fn cancel(
        self,
        overlay: &Overlay,
        before: &Stack,
        late: Option<Helper<Result<()>>>,
        cause: Stopped,
    ) -> Failed {
        for file in &*self.files {
            if let Err(error) = return_to(overlay, before, file) {
                log::error!("cannot restore inode {}: {error}", file.inode.ino());
            }
        }
        if let Err(error) = self.moves.cancel() {
            // A list that is completed later would move files that have changed their names. No request may be answered.
            log::error!("cannot undo a push of a layer: {error}");
            std::process::abort();
        }
        let Self { moves, list, .. } = self;
        let undo = move || {
            if let Some(Err(error)) = late.map(Helper::join) {
                log::error!("cannot wait for the move of files: {error}");
            }
            pass_phase();
            if let Err(error) = moves.unlink(&list) {
                log::error!("cannot remove files from a layer that was not pushed: {error}");
            }
        };
        Failed {
            cause,
            cleanup: Some(Cleanup(Box::new(undo))),
        }
    }

    /// Returns the files as those that prevented the push.
    pub(super) fn kept_changing(&self, stack: &Stack) -> Stopped {
        let files = self.files.iter().filter(|file| file.is_written);
        Stopped::By(unattended(stack, files, UnattendedCause::KeptChanging))
    }
}

/// The result of [`Moving::link`].
#[derive(Debug)]
pub(super) enum Linked {
    /// The directories whose attributes in the kernel's cache are stale.
    Done(Vec<Arc<Inode>>),
    /// The thread that is still at work, if there is one.
    Late(Option<Helper<Result<()>>>),
}

/// The replacement of files in the frozen layer by their copies.
#[derive(Debug)]
pub(super) struct Exchanging {
    moving: Moving,
    /// The thread that does the work, or its result, unless it has succeeded.
    ran: Option<Result<Ran<Result<()>>>>,
}

impl Exchanging {
    /// Waits for the end, while requests are answered, and removes the list. Returns the directories whose listings in
    /// the kernel's cache are stale.
    pub(super) fn end(self, overlay: &Overlay) -> Vec<Arc<Inode>> {
        let Self { moving, ran } = self;
        let mut stale = Vec::new();
        if let Some(ran) = ran {
            let done = match ran {
                Ok(Ran::Done(done)) => done,
                Ok(Ran::Late(helper)) => helper.join().and_then(|done| done),
                Err(error) => Err(error),
            };
            finish_or_abort(done, || moving.moves.exchange(&moving.list));
            moving.show_times(overlay);
            moving.note_removed();
            // Requests may have seen the name of a copy beside a file.
            for parent in &moving.parents {
                parent.advance_generation();
            }
            stale.clone_from(&moving.parents);
        }
        if let Err(error) = moving.moves.finish() {
            // Not an error of the push: another completion has no effect.
            log::warn!("cannot remove the list of moved files: {error} (the next mount will)");
        }
        stale
    }
}

/// Tries again if an attempt to replace files in the frozen layer has failed, and finally aborts.
fn finish_or_abort(mut done: Result<()>, again: impl Fn() -> Result<()>) {
    for _ in 0..ATTEMPTS {
        let Err(error) = done else { return };
        log::warn!("cannot replace files in a frozen layer: {error}; trying again");
        std::thread::sleep(RETRY_PAUSE);
        done = again();
    }
    if let Err(error) = done {
        // The frozen layer has files that programs write to, so the snapshot must not be completed. A successor, or the
        // next mount, continues from the list.
        log::error!("cannot replace files in a frozen layer: {error}");
        std::process::abort();
    }
}

impl Moving {
    /// Records the files whose last name was removed while they still had one in the frozen layer.
    fn note_removed(&self) {
        for file in &*self.files {
            match sys::stat::stat_fd(&file.content) {
                Ok(stat) if stat.nlink == 0 => {
                    let noted = file.inode.update_file(|state| state.orphan = true);
                    if let Err(error) = noted {
                        log::error!("cannot update inode {}: {error}", file.inode.ino());
                    }
                }
                Ok(_) => {}
                Err(error) => log::error!("cannot stat inode {}: {error}", file.inode.ino()),
            }
        }
    }
}

/// Locates a file in the frozen layer again.
fn return_to(overlay: &Overlay, before: &Stack, file: &NamedFile) -> Result<()> {
    let Some((parent, name)) = file.names.first() else {
        return Ok(());
    };
    let loc = Loc {
        dir: upper_dir(before, parent)?,
        name: name.clone(),
    };
    let inode = &file.inode;
    let change = || inode.update_file(|state| state.loc = loc);
    (overlay.inodes).relocate(inode, inode.identity(), NumberStorage::OnDisk, change)
}

/// Moves files without a name to a new upper layer: their location is only a placeholder.
pub(super) fn move_nameless(overlay: &Overlay, files: &[Arc<Inode>], upper: &Upper) {
    for inode in files {
        let dir = upper.layer.root_dir();
        let change = || inode.update_file(|state| state.loc.dir = dir);
        let storage = NumberStorage::OnDisk;
        if let Err(error) = (overlay.inodes).relocate(inode, inode.identity(), storage, change) {
            log::error!("cannot move inode {}: {error}", inode.ino());
        }
    }
}

/// Files with their copies.
type CopiedFiles = (Arc<Vec<NamedFile>>, Copies, Method);

/// Copies the files that are to be moved; `None` if there are none.
fn copy_files(
    stack: &Stack,
    moves: &Arc<Moves>,
    found: &mut FoundFiles,
    writers: Writers,
    deadline: Instant,
) -> Result<Option<CopiedFiles>, Stopped> {
    let mut first = found.named.first();
    for file in &found.named {
        // An empty file would not show what the file system supports.
        if sys::stat::stat_fd(&file.content)?.size > 0 {
            first = Some(file);
            break;
        }
    }
    let Some(first) = first else {
        return Ok(None);
    };
    let first = sys::dir::duplicate(first.content.as_fd())?;
    let probed = moves.clone();
    let method = match run_until(deadline, move || choose_method(&probed, &first))? {
        Ran::Done(method) => method?,
        Ran::Late(_) => {
            let cause = UnattendedCause::KeptChanging;
            return Err(Stopped::By(found.unattended(stack, cause)));
        }
    };
    if method == Method::Write {
        // Those that are only read can be read in the frozen layer.
        found.named.retain(|file| file.is_written);
        if found.named.is_empty() {
            return Ok(None);
        }
        let refused = |cause| Err(Stopped::By(found.unattended(stack, cause)));
        let Writers::Stopped { max_bytes } = writers else {
            return refused(UnattendedCause::NoSharedBlocks);
        };
        let mut bytes = 0;
        for file in &found.named {
            bytes += sys::stat::stat_fd(&file.content)?.size;
        }
        if bytes > max_bytes {
            return refused(UnattendedCause::TooLarge(bytes));
        }
    }
    let files = Arc::new(std::mem::take(&mut found.named));
    let (moved, copied) = (moves.clone(), files.clone());
    // The time of other copies is limited by their size.
    let limit = match method {
        Method::Share => deadline,
        Method::Write => deadline + WRITE_TIME,
    };
    let all = |cause| -> Unattended {
        unattended(stack, files.iter().filter(|file| file.is_written), cause)
    };
    match run_until(limit, move || copy_all(&moved, &copied, method, limit))? {
        Ran::Done(copied) => match copied? {
            Ok(copies) => Ok(Some((files, copies, method))),
            Err(NotCopied { files: some, cause }) => {
                let some = some.iter().filter_map(|index| files.get(*index));
                Err(Stopped::By(unattended(stack, some, cause)))
            }
        },
        Ran::Late(_) => Err(Stopped::By(all(UnattendedCause::KeptChanging))),
    }
}

/// Returns the list of the moves, and the directories of all names.
fn to_list(stack: &Stack, files: &[NamedFile]) -> Result<(MoveList, Vec<Arc<Inode>>)> {
    let mut list = MoveList::default();
    let mut parents: Vec<Arc<Inode>> = Vec::new();
    let mut known = std::collections::HashSet::new();
    for (index, file) in files.iter().enumerate() {
        list.files.push(MovedFile {
            copy: copy_name(index),
            ino: file.ino,
            names: file.paths(stack)?,
        });
        for (parent, _) in &file.names {
            if known.insert(parent.ino()) {
                parents.push(parent.clone());
            }
        }
    }
    for parent in &parents {
        let dir = upper_dir(stack, parent)?;
        let stat = sys::stat::stat_fd(&*dir.fd()?)?;
        list.dirs.push(ChangedDir {
            path: dir.path_in_layer()?,
            atime: stat.atime,
            mtime: stat.mtime,
        });
    }
    Ok((list, parents))
}

/// Records the states of a directory and those above it that are not in the upper layer.
fn note_missing(cx: &Context<'_>, dir: &Arc<Inode>, before: &mut Before) -> Result<()> {
    let mut missing = Vec::new();
    let mut next = Some(dir.clone());
    while let Some(dir) = next {
        let state = dir.dir()?;
        if cx.stack.upper_dir(&state).is_some() {
            break;
        }
        next = state.alias.as_ref().map(|alias| alias.parent.clone());
        missing.push(dir);
    }
    // Parent directories first: they are restored last.
    for dir in missing.iter().rev() {
        before.note(dir)?;
    }
    Ok(())
}

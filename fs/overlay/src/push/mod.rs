//! A new, empty upper layer on top of a mounted stack: this takes a snapshot, because the old upper layer is frozen.

mod copies;
mod files;
mod helper;
mod moving;
mod request;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::inode::{Identity, Inode, NumberStorage};
use crate::overlay::{Overlay, lock_stack};
use crate::reach::Stack;
use cowl_layers::error::Result;
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::layer::{LayerDir, Upper};
use cowl_layers::locks::RwLock;
use cowl_layers::points::point;
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::view::{Xattrs, without_markers};

pub use files::prepare_push;
use files::{KnownNames, find_files, find_names};
use moving::{Before, Exchanging, Linked, Moving, move_nameless};
use request::{Failed, Stopped};
pub use request::{
    PassthroughFile, PushError, PushRequest, Pushed, Unattended, UnattendedCause, Writers,
};

/// The maximum number of attempts if files are renamed at the same time.
const MAX_ATTEMPTS: u32 = 4;

impl Overlay {
    /// Pushes a new, empty upper layer. The old one becomes a lower layer and is never written again.
    ///
    /// The merged tree does not change, so no cache must be invalidated, except for the attributes of the directories in
    /// the result. The cost does not depend on the size of the tree. Files that are open for writing remain open: the
    /// next write copies the file up first, as an open does ([`crate::content`]).
    ///
    /// Files that the kernel reads or writes without requests move to the new layer, and leave a copy in the old one
    /// (docs/decisions/0043).
    pub fn push_layer(
        &self,
        upper: Arc<Upper>,
        request: &PushRequest<'_>,
    ) -> Result<Pushed, PushError> {
        if Arc::strong_count(&self.undoing) > 1 {
            // It would change the same directories.
            return Err(PushError::Undoing);
        }
        self.check_new_upper(&upper).map_err(PushError::Setup)?;
        self.release_unused_layers();
        let (mut attempt, mut waited) = (0, Duration::ZERO);
        loop {
            attempt += 1;
            let known = find_names(self, &(request.passthrough)());
            let found = Instant::now();
            let mut stack = lock_stack(&self.stack).ok_or(PushError::TooBusy)?;
            waited += found.elapsed();
            let locked = Instant::now();
            let pushed = push_locked(self, &mut stack, &upper, request, &known);
            drop(stack);
            let pushed = match pushed {
                Ok((mut pushed, exchanging)) => {
                    let pause = locked.elapsed();
                    if let Some(exchanging) = exchanging {
                        let stale = exchanging.end(self);
                        let node_id = |inode: &Arc<Inode>| self.inodes.node_id(inode);
                        pushed.stale.extend(stale.iter().map(node_id));
                    }
                    Ok(Pushed {
                        pause,
                        waited,
                        delayed: locked.elapsed() - pause,
                        attempts: attempt,
                        ..pushed
                    })
                }
                Err(Failed { cause, cleanup }) => {
                    if let Some(cleanup) = cleanup {
                        cleanup.start(self.undoing.clone());
                    }
                    Err(cause)
                }
            };
            let is_last = attempt == MAX_ATTEMPTS;
            return match pushed {
                Ok(pushed) => Ok(pushed),
                Err(Stopped::Race) if is_last => Err(PushError::TooBusy),
                Err(Stopped::Race) => continue,
                // A file that is closed or forgotten at the same time may be counted but not listed.
                Err(Stopped::By(files)) if files.cause == UnattendedCause::Unknown && !is_last => {
                    continue;
                }
                Err(Stopped::By(files)) => Err(PushError::Unattended(files)),
                Err(Stopped::Error(error)) => Err(PushError::Setup(SetupError::at(
                    "cannot use",
                    upper.layer.path(),
                    error,
                ))),
            };
        }
    }

    /// Releases the upper layer and the locks of all layers before an unmount. All later writes fail.
    ///
    /// Returns the number of files that are open for writing as the error, if there are any.
    pub fn retire(&self) -> Result<(), u32> {
        let mut stack = self.stack.write();
        match self.opens.writers() {
            0 => {
                stack.release_upper();
                self.locks.lock().clear();
                self.retained.lock().clear();
                Ok(())
            }
            writers => Err(writers),
        }
    }

    /// Syncs the file system of the upper layer.
    pub fn sync_upper(&self) -> Result<()> {
        let upper = self.stack.read().writable().cloned();
        let Some(upper) = upper else { return Ok(()) };
        sys::dir::sync_fs(upper.layer.root_fd())
    }

    /// Replaces the stack by one with `upper` on top. Returns the directories whose attributes in the kernel's cache are
    /// stale.
    ///
    /// An error leaves the old stack in use.
    fn exchange_stack(
        &self,
        stack: &mut Stack,
        upper: &Arc<Upper>,
        mut moving: Option<Moving>,
    ) -> Result<(Vec<Arc<Inode>>, Option<Exchanging>), Failed> {
        let (mut before, mut lock) = (Before::default(), None);
        let changed = (&mut before, &mut lock);
        let (cause, late) = match prepare_exchange(self, stack, upper, moving.as_mut(), changed) {
            Ok((next, Linked::Done(stale))) => {
                self.opens.count_push();
                *stack = next;
                point("in a push");
                self.note_stack(stack);
                point("after a push");
                self.hold_locks(lock.into_iter().collect());
                return Ok((stale, moving.map(|moving| moving.exchange(self))));
            }
            Ok((_, Linked::Late(helper))) => {
                let files = moving.as_ref().map(|moving| moving.kept_changing(stack));
                (files.unwrap_or(Stopped::Race), helper)
            }
            Err(error) => (Stopped::Error(error), None),
        };
        if let Some(moving) = &moving {
            moving.release();
        }
        before.restore(self);
        if lock.is_some()
            && let Some(Err(error)) = stack.writable().map(|old| old.thaw())
        {
            log::warn!("the upper layer is no longer locked exclusively: {error}");
        }
        Err(match moving {
            Some(moving) => moving.cancel(self, stack, late, cause),
            None => cause.into(),
        })
    }

    /// Checks that a new upper layer can be pushed.
    ///
    /// It must be empty, or the merged tree would change. It must be on the file system of the top layer, or all inode
    /// numbers would change.
    fn check_new_upper(&self, upper: &Upper) -> Result<(), SetupError> {
        let path = upper.layer.path();
        let refused = |problem: String, hint| Err(SetupError::new(SetupKind::Usage, problem, hint));
        let entries = sys::dir::entries(upper.layer.root_fd())
            .map_err(|error| SetupError::at("cannot read", path, error))?;
        if !entries.is_empty() {
            let problem = format!("the new layer {} is not empty", path.shown());
            return refused(problem, "use an empty directory");
        }
        let dev = upper.layer.dev();
        let stack = self.stack.read();
        if stack
            .view()
            .layers()
            .first()
            .is_some_and(|top| top.dev() != dev)
        {
            let problem = format!("the new layer {} is on another file system", path.shown());
            return refused(problem, "keep all layers of a container on one file system");
        }
        Ok(())
    }
}

/// Pushes the layer while no operation runs.
fn push_locked(
    overlay: &Overlay,
    stack: &mut Stack,
    upper: &Arc<Upper>,
    request: &PushRequest<'_>,
    known: &KnownNames,
) -> Result<(Pushed, Option<Exchanging>), Failed> {
    let files = (request.passthrough)();
    let written = files.iter().filter(|file| file.is_written).count();
    let counted = overlay.passthrough_writers.load(Ordering::Acquire) as usize;
    if counted > written {
        let cause = UnattendedCause::Unknown;
        return Err(Failed::from(Stopped::By(Unattended {
            count: counted - written,
            names: Vec::new(),
            cause,
        })));
    }
    let mut found = find_files(overlay, stack, &files, known)?;
    let moving = Moving::begin(overlay, stack, upper, &mut found, request.writers)?;
    let summary = moving.as_ref().map(Moving::summary).unwrap_or_default();
    let (stale, exchanging) = overlay.exchange_stack(stack, upper, moving)?;
    move_nameless(overlay, &found.nameless, upper);
    let node_id = |inode: &Arc<Inode>| overlay.inodes.node_id(inode);
    let pushed = Pushed {
        stale: stale.iter().map(node_id).collect(),
        ..summary
    };
    Ok((pushed, exchanging))
}

/// Returns the new stack, whose upper layer has the root directory and the files that move.
///
/// Records the states of directories that it has changed, and the shared lock of the frozen layer, also if it fails.
fn prepare_exchange(
    overlay: &Overlay,
    stack: &Stack,
    upper: &Arc<Upper>,
    moving: Option<&mut Moving>,
    (before, lock): (&mut Before, &mut Option<Arc<LayerLock>>),
) -> Result<(Stack, Linked)> {
    let old_root = overlay.root.dir()?.top()?.clone();
    // The root's attributes come from the topmost root directory. Copy them under the exclusive lock, so that no
    // operation can change them concurrently.
    copy_root(&old_root, &upper.layer.root_dir())?;
    let shown = overlay
        .root
        .visible_ctime(sys::stat::stat_fd(&*old_root.fd()?)?.ctime);
    let mut layers = vec![upper.layer.clone()];
    layers.extend(stack.view().layers().iter().cloned());
    let view = stack.view().with_layers(layers);
    let root = view.root()?;
    *lock = stack.writable().map(|old| old.freeze()).transpose()?;
    point("before a push");

    before.note(&overlay.root)?;
    let identity = Identity::from_stat(&root.stat);
    overlay
        .inodes
        .relocate(&overlay.root, identity, NumberStorage::OnDisk, || {
            overlay.root.update_dir(|dir| {
                dir.locs = root.locs.into();
                dir.identity = identity;
            })
        })?;
    overlay
        .inodes
        .show_ctime(&overlay.root, root.stat.ctime, shown);
    let next = RwLock::new(Stack::new(view, Some(upper.clone())));
    let Some(moving) = moving else {
        return Ok((next.into_inner(), Linked::Done(Vec::new())));
    };
    let linked = moving.link(overlay, &next, before)?;
    let next = next.into_inner();
    if let Linked::Done(_) = linked {
        moving.relocate(overlay, &next)?;
    }
    Ok((next, linked))
}

/// Passes the end of a phase of a move: four of a push that succeeds, and one before a push that failed is undone.
fn pass_phase() {
    point("in a phase of a move");
}

/// Copies owner, xattrs, mode and times of one root directory to another.
fn copy_root(from: &LayerDir, to: &LayerDir) -> Result<()> {
    let (source, target) = (from.fd()?, to.fd()?);
    let (source, target) = ((*source).as_fd(), (*target).as_fd());
    let stat = sys::stat::stat_fd(source)?;
    let user_xattrs = |dir: &LayerDir, fd| -> Result<Xattrs> {
        let space = dir.layer().space();
        Ok(without_markers(space, sys::xattr::all(fd)?))
    };
    sys::attr::chown(target, Some(stat.uid), Some(stat.gid))?;
    let wanted = user_xattrs(from, source)?;
    for (name, _) in user_xattrs(to, target)? {
        if !wanted.iter().any(|(other, _)| *other == name) {
            sys::xattr::remove(target, &name)?;
        }
    }
    for (name, value) in &wanted {
        sys::xattr::set(target, name, value)?;
    }
    sys::attr::chmod(target, stat.perm())?;
    sys::attr::utimens(target, SetTime::At(stat.atime), SetTime::At(stat.mtime))
}

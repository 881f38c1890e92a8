//! A new, empty upper layer on top of a mounted stack: this takes a snapshot, because the old upper layer is frozen.

mod copies;
mod files;
mod helper;
mod moving;
mod request;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::inode::{Identity, Inode, NumberStorage};
use crate::overlay::{Overlay, lock_stack};
use crate::reach::Stack;
use cowl_layers::error::Result;
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
use request::Stopped;
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
        let mut attempt = 0;
        loop {
            attempt += 1;
            let known = find_names(self, &(request.passthrough)());
            let mut stack = lock_stack(&self.stack).ok_or(PushError::TooBusy)?;
            let locked = Instant::now();
            let pushed = push_locked(self, &mut stack, &upper, request, &known);
            drop(stack);
            let pushed = match pushed {
                Ok((pushed, exchanging)) => {
                    let pause = locked.elapsed();
                    if let Some(exchanging) = exchanging {
                        exchanging.end(self);
                    }
                    Ok(Pushed { pause, ..pushed })
                }
                Err(Stopped::Later(cleanup, cause)) => {
                    cleanup.start(self.undoing.clone());
                    Err(*cause)
                }
                Err(stopped) => Err(stopped),
            };
            let is_last = attempt == MAX_ATTEMPTS;
            return match pushed {
                Ok(pushed) => Ok(pushed),
                Err(Stopped::Later(..)) => Err(PushError::TooBusy),
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
    ) -> Result<(Vec<Arc<Inode>>, Option<Exchanging>), Stopped> {
        let old_root = self.root.dir()?.top()?.clone();
        // The root's attributes come from the topmost root directory. Copy them under the exclusive lock, so that no
        // operation can change them concurrently.
        copy_root(&old_root, &upper.layer.root_dir())?;
        let shown = self
            .root
            .visible_ctime(sys::stat::stat_fd(&*old_root.fd()?)?.ctime);
        let mut layers = vec![upper.layer.clone()];
        layers.extend(stack.view().layers().iter().cloned());
        let view = stack.view().with_layers(layers);
        let root = view.root()?;
        let old = stack.writable().cloned();
        let lock = old.as_ref().map(|old| old.freeze()).transpose()?;
        point("before a push");

        let mut before = Before::default();
        before.note(&self.root)?;
        let identity = Identity::from_stat(&root.stat);
        self.inodes
            .relocate(&self.root, identity, NumberStorage::OnDisk, || {
                self.root.update_dir(|dir| {
                    dir.locs = root.locs.into();
                    dir.identity = identity;
                })
            })?;
        self.inodes.show_ctime(&self.root, root.stat.ctime, shown);
        let next = RwLock::new(Stack::new(view, Some(upper.clone())));
        let linked = match &mut moving {
            Some(moving) => moving.link(self, &next, &mut before),
            None => Ok(Linked::Done(Vec::new())),
        };
        let next = next.into_inner();
        let (stopped, late) = match linked {
            Ok(Linked::Done(stale)) => {
                let relocated = moving.as_ref().map(|moving| moving.relocate(self, &next));
                match relocated {
                    None | Some(Ok(())) => {
                        self.opens.count_push();
                        *stack = next;
                        point("in a push");
                        self.note_stack(stack);
                        point("after a push");
                        self.hold_locks(lock.into_iter().collect());
                        return Ok((stale, moving.map(|moving| moving.exchange(self))));
                    }
                    Some(Err(error)) => (Stopped::Error(error), None),
                }
            }
            Ok(Linked::Late(helper)) => {
                let files = moving.as_ref().map(|moving| moving.kept_changing(stack));
                (files.unwrap_or(Stopped::Race), Some(helper))
            }
            Err(error) => (Stopped::Error(error), None),
        };
        before.restore(self);
        if let Some(Err(error)) = old.map(|old| old.thaw()) {
            log::warn!("the upper layer is no longer locked exclusively: {error}");
        }
        Err(match moving {
            Some(moving) => moving.cancel(self, stack, late, stopped),
            None => stopped,
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
) -> Result<(Pushed, Option<Exchanging>), Stopped> {
    let files = (request.passthrough)();
    let written = files.iter().filter(|file| file.is_written).count();
    let counted = overlay.passthrough_writers.load(Ordering::Acquire) as usize;
    if counted > written {
        return Err(Stopped::By(Unattended {
            count: counted - written,
            names: Vec::new(),
            cause: UnattendedCause::Unknown,
        }));
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

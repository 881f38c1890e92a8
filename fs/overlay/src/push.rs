//! A new, empty upper layer on top of a mounted stack: this takes a snapshot, because the old upper layer is frozen.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::inode::{Identity, NumberStorage};
use crate::overlay::{Overlay, lock_stack};
use crate::reach::Stack;
use cowl_layers::error::Result;
use cowl_layers::layer::{LayerDir, Upper};
use cowl_layers::points::point;
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::view::{Xattrs, without_markers};

/// The reason why a layer was not pushed. The stack is unchanged.
#[derive(Debug)]
pub enum PushError {
    /// Running operations did not end before the timeout.
    TooBusy,
    /// This number of files may be written to without a request (passthrough), which would change the frozen layer.
    Unattended(u32),
    /// The new layer cannot be used.
    Setup(SetupError),
}

impl Overlay {
    /// Pushes a new, empty upper layer. The old one becomes a lower layer and is never written again.
    ///
    /// The merged tree does not change, so no cache must be invalidated. The cost does not depend on the size of the
    /// tree. Files that are open for writing remain open: the next write copies the file up first, as an open does
    /// ([`crate::content`]).
    pub fn push_layer(&self, upper: Arc<Upper>) -> Result<(), PushError> {
        self.check_new_upper(&upper).map_err(PushError::Setup)?;
        self.release_unused_layers();
        let mut stack = lock_stack(&self.stack).ok_or(PushError::TooBusy)?;
        match self.passthrough_writers.load(Ordering::Acquire) {
            0 => {}
            writers => return Err(PushError::Unattended(writers)),
        }
        self.exchange_stack(&mut stack, &upper).map_err(|error| {
            PushError::Setup(SetupError::at("cannot use", upper.layer.path(), error))
        })
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

    /// Replaces the stack by one with `upper` on top.
    ///
    /// All steps that can fail precede the first change, so that an error leaves the old stack in use.
    fn exchange_stack(&self, stack: &mut Stack, upper: &Arc<Upper>) -> Result<()> {
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
        let lock = stack.writable().map(|old| old.freeze()).transpose()?;
        point("before a push");

        let identity = Identity::from_stat(&root.stat);
        self.inodes
            .relocate(&self.root, identity, NumberStorage::OnDisk, || {
                self.root.update_dir(|dir| {
                    dir.locs = root.locs.into();
                    dir.identity = identity;
                })
            })?;
        self.inodes.show_ctime(&self.root, root.stat.ctime, shown);
        self.hold_locks(lock.into_iter().collect());
        self.opens.count_push();
        *stack = Stack::new(view, Some(upper.clone()));
        point("in a push");
        self.note_stack(stack);
        point("after a push");
        Ok(())
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

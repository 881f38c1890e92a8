//! A snapshot of a mounted stack: a new, empty upper on top, the old one frozen.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::inode::{Identity, NumberMarker};
use crate::overlay::Overlay;
use crate::reach::Stack;
use cowl_layers::error::Result;
use cowl_layers::layer::{LayerDir, Upper};
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::view::{View, Xattrs, without_marks};

/// The longest time that a push waits for running operations.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest time that operations wait for a push at a time: less than a long copy takes.
const WAIT: Duration = Duration::from_millis(20);

/// Reasons why a layer could not be pushed. Nothing was changed then.
#[derive(Debug)]
pub enum PushError {
    /// Operations went on for too long.
    TooBusy,
    /// This number of files may be written to without a request, and would be when they are frozen.
    Unattended(u32),
    /// The new layer cannot be used.
    Setup(SetupError),
}

impl Overlay {
    /// Puts a new, empty upper on top; the old one is from then on a lower and never written again.
    /// Nothing that the mount shows changes, so no cache must be invalidated; the cost does not depend on the
    /// size of the tree. A file that is open for writing stays so: the next write copies it up first, as an open
    /// does ([`crate::content`]).
    pub fn push_layer(&self, upper: Arc<Upper>) -> Result<(), PushError> {
        self.check_new_upper(&upper).map_err(PushError::Setup)?;
        let deadline = Instant::now() + PATIENCE;
        let mut stack = loop {
            if let Some(stack) = self.stack.try_write_for(WAIT) {
                break stack;
            }
            if Instant::now() > deadline {
                return Err(PushError::TooBusy);
            }
        };
        match self.passthrough_writers.load(Ordering::Acquire) {
            0 => {}
            writers => return Err(PushError::Unattended(writers)),
        }
        self.exchange_stack(&mut stack, &upper).map_err(|error| {
            PushError::Setup(SetupError::at("cannot use", upper.layer.path(), error))
        })
    }

    /// Releases the upper and the locks on all layers: nothing can be written from here on. For an unmount. Fails
    /// with the number of descriptors that are open for writing, if there are any.
    pub fn retire(&self) -> Result<(), u32> {
        let mut stack = self.stack.write();
        match self.opens.writers() {
            0 => {
                stack.release_upper();
                self.locks.lock().clear();
                Ok(())
            }
            writers => Err(writers),
        }
    }

    /// Syncs the file system of the layer that is written.
    pub fn sync_upper(&self) -> Result<()> {
        let upper = self.stack.read().writable().cloned();
        let Some(upper) = upper else { return Ok(()) };
        sys::dir::sync_fs(upper.layer.root_fd())
    }

    /// Everything that can fail comes before the first change.
    fn exchange_stack(&self, stack: &mut Stack, upper: &Arc<Upper>) -> Result<()> {
        let old_root = self.root.dir()?.top()?.clone();
        // The topmost root directory gives the root its attributes. They are copied here, where nothing
        // can change them meanwhile.
        copy_root(&old_root, &upper.layer.root_dir())?;
        let shown = self
            .root
            .visible_ctime(sys::stat::stat_fd(&*old_root.fd()?)?.ctime);
        let mut layers = vec![upper.layer.clone()];
        layers.extend(stack.view().layers().iter().cloned());
        let view = View::new(layers).with_data_layers(stack.view().data_only().to_vec());
        let root = view.root()?;
        let lock = stack.writable().map(|old| old.freeze()).transpose()?;

        let identity = Identity::from_stat(&root.stat);
        self.inodes
            .relocate(&self.root, identity, NumberMarker::Present, || {
                self.root.update_dir(|dir| {
                    dir.locs = root.locs.into();
                    dir.identity = identity;
                })
            })?;
        self.root.override_ctime(root.stat.ctime, shown);
        self.hold_locks(lock.into_iter().collect());
        self.opens.count_push();
        *stack = Stack::new(view, Some(upper.clone()));
        Ok(())
    }

    /// Checks a new upper. It must be empty, or it would change the tree, and lie on the file system of the top
    /// layer, or it would change all inode numbers.
    fn check_new_upper(&self, upper: &Upper) -> Result<(), SetupError> {
        let path = upper.layer.path();
        let refused = |what: String, hint| Err(SetupError::new(SetupKind::Usage, what, hint));
        let entries = sys::dir::entries(upper.layer.root_fd())
            .map_err(|error| SetupError::at("cannot read", path, error))?;
        if !entries.is_empty() {
            let what = format!("the new layer {} is not empty", path.shown());
            return refused(what, "a snapshot begins with an empty layer");
        }
        let dev = upper.layer.dev();
        let stack = self.stack.read();
        if stack
            .view()
            .layers()
            .first()
            .is_some_and(|top| top.dev() != dev)
        {
            let what = format!("the new layer {} is on another file system", path.shown());
            return refused(what, "keep all layers of a container on one");
        }
        Ok(())
    }
}

/// Copies owner, xattrs, mode and times of one root directory to another.
fn copy_root(from: &LayerDir, to: &LayerDir) -> Result<()> {
    let (source, target) = (from.fd()?, to.fd()?);
    let (source, target) = ((*source).as_fd(), (*target).as_fd());
    let stat = sys::stat::stat_fd(source)?;
    let users = |dir: &LayerDir, fd| -> Result<Xattrs> {
        let space = dir.layer().space();
        Ok(without_marks(space, sys::xattr::all(fd)?))
    };
    sys::attr::chown(target, Some(stat.uid), Some(stat.gid))?;
    let wanted = users(from, source)?;
    for (name, _) in users(to, target)? {
        if !wanted.iter().any(|(kept, _)| *kept == name) {
            sys::xattr::remove(target, &name)?;
        }
    }
    for (name, value) in &wanted {
        sys::xattr::set(target, name, value)?;
    }
    sys::attr::chmod(target, stat.perm())?;
    sys::attr::utimens(target, SetTime::At(stat.atime), SetTime::At(stat.mtime))
}

//! Replacement of lower layers of a mounted stack by others with the same merged tree, while files are open
//! (docs/decisions/0033).
//!
//! `cowl flatten` merges layers into a new one. The objects of the merged layers are then at other locations on disk,
//! where they have other inode numbers and ctimes. Known inodes move to the new locations, and retain their visible
//! numbers and ctimes. An object that is not known, because the kernel has forgotten it, is found at its new location
//! by its next lookup.
//!
//! A removed layer remains locked, and thus on disk, as long as it contains an object without a name that is in use: a
//! file that was unlinked while it is open, or a removed directory. It is released by the next change of the stack after
//! that.

mod apply;
mod planner;
mod relocation;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use cowl_layers::layer::Layer;
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::view::View;
use rustc_hash::FxHashSet;

use crate::inode::Inode;
use crate::overlay::{Overlay, lock_stack};
use apply::Applied;
use planner::Planner;
use relocation::Plans;

pub use relocation::Difference;

/// The number of inodes that may be planned while operations wait. It takes a few milliseconds.
const MAX_PLANNED_LOCKED: usize = 500;
/// The number of attempts after which all remaining inodes are planned while operations wait.
const MAX_ATTEMPTS: u32 = 6;

/// The result of a replacement.
#[derive(Debug, Default)]
pub struct Replaced {
    /// The number of known inodes that moved.
    pub moved: usize,
    /// The number of layers that remain locked although they are not in the stack, because they contain objects without
    /// a name.
    pub retained: usize,
    /// The node ids of the directories whose listings the kernel may have cached with other inode numbers.
    pub stale_listings: Vec<u64>,
}

/// The reason why layers were not replaced. The stack is unchanged.
#[derive(Debug)]
pub enum ReplaceError {
    /// Running operations did not end before the timeout.
    TooBusy,
    /// The layers that would remain are in another order, the upper layer is one of them, or there is none.
    OtherStack,
    /// The merged tree would change.
    Different(Difference),
    /// A new layer cannot be used.
    Setup(SetupError),
}

/// The change of a stack.
#[derive(Debug)]
struct StackChange {
    before: View,
    after: View,
    /// The ids of the layers that are only in the stack before the change.
    removed: FxHashSet<u64>,
    /// The ids of the layers that are only in the stack after it.
    added: FxHashSet<u64>,
}

impl StackChange {
    fn new(before: View, lowers: &[Arc<Layer>], upper: Option<&Arc<Layer>>) -> Self {
        let layers = upper.into_iter().chain(lowers).cloned().collect();
        let after = before.with_layers(layers);
        let ids =
            |view: &View| -> FxHashSet<u64> { view.layers().iter().map(|l| l.id()).collect() };
        let (old, new) = (ids(&before), ids(&after));
        Self {
            removed: &old - &new,
            added: &new - &old,
            before,
            after,
        }
    }

    fn removes(&self, layer: &Layer) -> bool {
        self.removed.contains(&layer.id())
    }

    /// Whether the layers that are in both stacks are in the same order in both.
    fn retains_order(&self) -> bool {
        let common = |view: &View, other: &FxHashSet<u64>| -> Vec<u64> {
            let ids = view.layers().iter().map(|layer| layer.id());
            ids.filter(|id| !other.contains(id)).collect()
        };
        common(&self.before, &self.removed) == common(&self.after, &self.added)
    }
}

impl Overlay {
    /// Replaces the lower layers by those at the paths `lowers`, topmost first. Layers that are not in the stack yet
    /// are opened by `open`; they are read-only from now on.
    ///
    /// The merged tree must not change: every known object must exist, with the same type, size and layers above and
    /// below the replaced ones. This is verified for known objects only.
    ///
    /// Nearly all of the work is done while operations run; they wait only during the last step, which takes two to three
    /// microseconds for each known object of the removed layers.
    pub fn replace_layers(
        &self,
        lowers: &[PathBuf],
        open: impl Fn(&Path) -> Result<(Arc<Layer>, Arc<LayerLock>), SetupError>,
    ) -> Result<Replaced, ReplaceError> {
        let (before, upper) = {
            let stack = self.stack.read();
            let upper = stack.writable().map(|upper| upper.layer.clone());
            (stack.view().clone(), upper)
        };
        let current = before.layers().get(usize::from(upper.is_some())..);
        let current = current.unwrap_or_default();
        let unchanged = || Replaced {
            retained: self.release_unused_layers(),
            ..Replaced::default()
        };
        if current.iter().map(|layer| layer.path()).eq(lowers) {
            return Ok(unchanged());
        }
        // Without an upper layer, the mount is about to end.
        if upper
            .as_ref()
            .is_none_or(|upper| lowers.iter().any(|path| path == upper.path()))
        {
            return Err(ReplaceError::OtherStack);
        }
        let (mut layers, mut locks) = (Vec::new(), Vec::new());
        for path in lowers {
            if let Some(layer) = current.iter().find(|layer| layer.path() == path) {
                layers.push(layer.clone());
                continue;
            }
            let (layer, lock) = open(path).map_err(ReplaceError::Setup)?;
            // The same layer can have several paths.
            if let Some(known) = current.iter().find(|known| known.id() == layer.id()) {
                layers.push(known.clone());
                continue;
            }
            layers.push(layer);
            locks.push(lock);
        }
        if layers
            .iter()
            .map(|layer| layer.id())
            .eq(current.iter().map(|layer| layer.id()))
        {
            return Ok(unchanged());
        }
        let change = StackChange::new(before, &layers, upper.as_ref());
        if layers.is_empty() || !change.retains_order() {
            return Err(ReplaceError::OtherStack);
        }
        let started = Instant::now();
        self.locate_all().map_err(|error| {
            let problem = format!("cannot read the layers: {error}");
            ReplaceError::Setup(SetupError::new(SetupKind::Host, problem, ""))
        })?;
        let mut prepared = Plans::default();
        let mut attempts = 0;
        let (mut stack, plans, known, locked) = loop {
            prepared = self.prepare(&change, prepared);
            attempts += 1;
            let stack = lock_stack(&self.stack).ok_or(ReplaceError::TooBusy)?;
            let locked = Instant::now();
            if !is_same_stack(stack.view(), &change.before) {
                return Err(ReplaceError::OtherStack);
            }
            match self.complete(&change, prepared, attempts)? {
                Completed::All(plans, known) => break (stack, plans, known, locked),
                Completed::Partly(plans) => prepared = plans,
            }
        };
        let Applied { mut replaced, old } = self.apply(&mut stack, change, plans, known, locks);
        drop(stack);
        let waited = locked.elapsed();
        drop(old);
        // What the kernel forgot in the meantime could not be dropped, because the plans referred to it.
        self.inodes.release(self.inodes.all());
        replaced.retained = self.release_unused_layers();
        log::info!(
            "the stack has {} lower layers; {} objects moved, operations waited {} ms of {} ms",
            layers.len(),
            replaced.moved,
            waited.as_millis(),
            started.elapsed().as_millis()
        );
        Ok(replaced)
    }

    /// Plans the moves of known inodes while operations run, except for those that are planned.
    ///
    /// An operation may move an object before or after it was planned. So a failure means nothing here, and
    /// [`Self::complete`] checks whether each plan is still valid.
    fn prepare(&self, change: &StackChange, mut plans: Plans) -> Plans {
        plans.retain_valid();
        let mut planner = Planner::new(change, plans);
        for inode in self.inodes.all() {
            if let Err(different) = planner.plan(&inode) {
                log::debug!("not planned yet: {different}");
            }
        }
        let (mut plans, unnamed) = planner.finish();
        for inode in unnamed {
            if let Err(error) = self.find_names(&inode, &mut plans) {
                log::debug!("cannot find the names of inode {}: {error}", inode.ino());
            }
        }
        plans
    }

    /// Finds the names of a file that are not recorded, and records them.
    fn find_names(&self, inode: &Arc<Inode>, plans: &mut Plans) -> cowl_layers::Result<()> {
        let op = self.begin();
        let file = inode.file()?;
        // Each lookup of a name records it.
        let names = op.services().links().visible_names(inode, &file)?;
        if names.is_empty() && !file.orphan {
            plans.hidden.insert(inode.ino(), file.identity);
        }
        Ok(())
    }

    /// Completes the plans while no operation runs, unless that would take long: then they must be prepared again.
    fn complete(
        &self,
        change: &StackChange,
        mut prepared: Plans,
        attempts: u32,
    ) -> Result<Completed, ReplaceError> {
        prepared.retain_valid();
        let mut planner = Planner::new(change, prepared);
        let is_last = attempts >= MAX_ATTEMPTS;
        let known = self.inodes.all();
        for inode in &known {
            match planner.plan(inode) {
                Ok(()) => {}
                // The object may have been changed by the last operation, which the next attempt takes into account.
                Err(different) if is_last => return Err(ReplaceError::Different(different)),
                Err(different) => {
                    log::debug!("{different}");
                    return Ok(Completed::Partly(planner.finish().0));
                }
            }
            if planner.planned > MAX_PLANNED_LOCKED && !is_last {
                return Ok(Completed::Partly(planner.finish().0));
            }
        }
        match planner.finish() {
            (plans, unnamed) if unnamed.is_empty() => Ok(Completed::All(plans, known)),
            (plans, _) if !is_last => Ok(Completed::Partly(plans)),
            _ => Err(ReplaceError::TooBusy),
        }
    }
}

/// The outcome of an attempt to complete the plans.
enum Completed {
    /// The plans, and all known inodes.
    All(Plans, Vec<Arc<Inode>>),
    /// Many objects have become known or have changed since.
    Partly(Plans),
}

fn is_same_stack(one: &View, other: &View) -> bool {
    let (one, other) = (one.layers(), other.layers());
    one.len() == other.len()
        && one
            .iter()
            .zip(other)
            .all(|(one, other)| Arc::ptr_eq(one, other))
}

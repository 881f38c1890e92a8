//! The switch to the new stack, while no operation runs.

use std::collections::HashSet;
use std::sync::Arc;

use cowl_layers::error::Result;
use cowl_layers::layer::lock::LayerLock;

use super::relocation::{NewObject, Plans};
use super::{Replaced, StackChange};
use crate::inode::{Inode, NumberStorage};
use crate::overlay::Overlay;
use crate::reach::Stack;

impl Overlay {
    /// Moves the inodes, exchanges the stack, and releases the removed layers.
    pub(super) fn apply(
        &self,
        stack: &mut Stack,
        change: StackChange,
        plans: Plans,
        locks: Vec<Arc<LayerLock>>,
    ) -> Replaced {
        let Plans {
            dirs,
            files,
            retained,
            hidden: _,
        } = plans;
        let mut replaced = Replaced {
            moved: dirs.len() + files.len(),
            ..Replaced::default()
        };
        for (_, (inode, planned)) in dirs {
            replaced.stale_listings.push(self.inodes.node_id(&inode));
            self.relocate(&inode, planned.object, |inode| planned.apply(inode));
        }
        for (_, (inode, planned)) in files {
            let object = planned.loc.as_ref().map(|(_, _, object)| *object);
            self.relocate(&inode, object, |inode| planned.apply(inode));
        }
        self.inodes
            .reserve_known_numbers(|object| change.after.own_number(object.dev, object.ino));
        self.release_layers(&change, &retained, locks);
        let upper = stack.writable().cloned();
        *stack = Stack::new(change.after, upper);
        self.note_stack(stack);
        // They refer to directories and layers of the old stack.
        self.links.forget_layers(&change.removed);
        self.listings.clear();
        self.deep.clear();
        self.absent.clear();
        replaced
    }

    /// Moves an inode. If it becomes another object on disk, its visible number and ctime are retained.
    fn relocate(
        &self,
        inode: &Arc<Inode>,
        object: Option<NewObject>,
        change: impl FnOnce(&Inode) -> Result<()>,
    ) {
        let moved = match object {
            None => change(inode),
            Some(object) => {
                let shown = inode.visible_ctime(object.ctimes.0);
                let storage = NumberStorage::InMemory;
                let moved = self
                    .inodes
                    .relocate(inode, object.identity, storage, || change(inode));
                self.inodes.show_ctime(inode, object.ctimes.1, shown);
                moved
            }
        };
        self.inodes.note_place(inode);
        // An inode never changes its type.
        if let Err(error) = moved {
            log::error!("cannot move the inode {}: {error}", inode.ino());
        }
    }

    /// Releases the locks of the removed layers, except for `retained` ones, and holds those of the new layers.
    fn release_layers(
        &self,
        change: &StackChange,
        retained: &HashSet<u64>,
        new: Vec<Arc<LayerLock>>,
    ) {
        let removed: Vec<_> = change
            .before
            .layers()
            .iter()
            .filter(|layer| change.removes(layer))
            .collect();
        let mut locks = self.locks.lock();
        let mut kept = self.retained.lock();
        locks.retain(|lock| {
            let Some(layer) = removed.iter().find(|layer| lock.is_of(layer)) else {
                return true;
            };
            if retained.contains(&layer.id()) {
                kept.push(((*layer).clone(), lock.clone()));
            }
            false
        });
        locks.extend(new);
    }
}

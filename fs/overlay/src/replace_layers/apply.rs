//! The switch to the new stack, while no operation runs.

use std::collections::HashSet;
use std::sync::Arc;

use cowl_layers::error::Result;
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::points::point;

use super::relocation::{NewObject, OldLocations, Plans};
use super::{Replaced, StackChange};
use crate::inode::Inode;
use crate::overlay::Overlay;
use crate::reach::Stack;

/// The outcome of the switch, with the state from before it, which is to be dropped after operations continue.
pub(super) struct Applied {
    pub(super) replaced: Replaced,
    pub(super) old: (Stack, OldLocations),
}

impl Overlay {
    /// Moves the inodes, exchanges the stack, and releases the removed layers. `known` contains all known inodes.
    pub(super) fn apply(
        &self,
        stack: &mut Stack,
        change: StackChange,
        plans: Plans,
        known: Vec<Arc<Inode>>,
        locks: Vec<Arc<LayerLock>>,
    ) -> Applied {
        point("before a replacement of layers");
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
        let mut old = OldLocations::default();
        for (_, (inode, planned)) in dirs {
            replaced.stale_listings.push(self.inodes.node_id(&inode));
            let object = planned.object;
            self.relocate(&inode, object, |inode| planned.apply(inode, &mut old));
            point("between the moves of directories");
            old.inodes.push(inode);
        }
        for (_, (inode, planned)) in files {
            let object = planned.loc.as_ref().map(|(_, _, object)| *object);
            self.relocate(&inode, object, |inode| planned.apply(inode, &mut old));
            point("between the moves of files");
            old.inodes.push(inode);
        }
        // This also records the numbers of the moved inodes.
        self.inodes.reserve_numbers(&known, |object| {
            change.after.own_number(object.dev, object.ino)
        });
        old.inodes.extend(known);
        self.release_layers(&change, &retained, locks);
        let upper = stack.writable().cloned();
        let old_stack = std::mem::replace(stack, Stack::new(change.after, upper));
        point("in a replacement of layers");
        self.note_stack(stack);
        point("with stale numbers");
        self.inodes.drop_stale_numbers();
        point("after a replacement of layers");
        // They refer to directories and layers of the old stack.
        self.links.forget_layers(&change.removed);
        self.listings.clear();
        self.deep.clear();
        self.absent.clear();
        self.walk.clear();
        self.prefetched.clear();
        Applied {
            replaced,
            old: (old_stack, old),
        }
    }

    /// Moves an inode. If it becomes another object on disk, its visible ctime is retained.
    fn relocate(
        &self,
        inode: &Arc<Inode>,
        object: Option<NewObject>,
        change: impl FnOnce(&Inode) -> Result<()>,
    ) {
        let shown = object.map(|object| inode.visible_ctime(object.ctimes.0));
        // An inode never changes its type.
        if let Err(error) = change(inode) {
            log::error!("cannot move the inode {}: {error}", inode.ino());
        }
        if let (Some(object), Some(shown)) = (object, shown) {
            self.inodes.show_ctime(inode, object.ctimes.1, shown);
        }
        self.inodes.note_place(inode);
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

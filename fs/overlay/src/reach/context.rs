//! The context of one operation.

use std::cell::RefCell;
use std::sync::Arc;

use cowl_layers::locks::{RwLock, RwLockReadGuard};

use super::options::OverlayOptions;
use super::stack::Stack;
use crate::inode::Inode;
use cowl_layers::error::Result;
use cowl_layers::sys::copy::WriteBack;
use cowl_layers::sys::early::Early;
use cowl_layers::sys::order::Order;

/// The context of one operation: the stack does not change while it lives.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) stack: RwLockReadGuard<'a, Stack>,
    pub(crate) options: &'a OverlayOptions,
    /// Objects of which the kernel may cache outdated attributes.
    stale: RefCell<Vec<Arc<Inode>>>,
}

impl<'a> Context<'a> {
    /// Takes the stack's shared lock.
    pub(crate) fn new(stack: &'a RwLock<Stack>, options: &'a OverlayOptions) -> Self {
        Self {
            stack: stack.read(),
            options,
            stale: RefCell::default(),
        }
    }

    /// Lists an object whose cached attributes must be invalidated before the operation is answered.
    pub(crate) fn note_stale(&self, inode: &Arc<Inode>) {
        let mut stale = self.stale.borrow_mut();
        if !stale.iter().any(|other| Arc::ptr_eq(other, inode)) {
            stale.push(inode.clone());
        }
    }

    /// Returns the objects listed by [`Self::note_stale`], and forgets them.
    pub(crate) fn take_stale(&self) -> Vec<Arc<Inode>> {
        self.stale.take()
    }

    /// Returns the order in which new objects must reach the disk.
    pub(crate) fn order(&self) -> Result<Order> {
        if self.options.volatile {
            return Ok(Order::Careless);
        }
        Ok(self.stack.upper()?.order())
    }

    /// Returns when the disk gets copied content: a volatile mount never waits for it.
    pub(crate) fn write_back(&self) -> WriteBack {
        match self.options.volatile {
            true => WriteBack::Later,
            false => WriteBack::Early,
        }
    }

    /// Returns when write-back is started early.
    pub(crate) fn early(&self) -> Result<Early> {
        if self.options.volatile {
            return Ok(Early::default());
        }
        Ok(self.stack.upper()?.early())
    }
}

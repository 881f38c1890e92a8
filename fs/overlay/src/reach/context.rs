//! The context of one operation.

use std::cell::RefCell;
use std::sync::Arc;

use cowl_layers::locks::{RwLock, RwLockReadGuard};

use super::options::OverlayOptions;
use super::stack::Stack;
use crate::inode::{Inode, take_ended_overrides};
use crate::ledger::{Change, Intent, Kind, Ledger};
use cowl_layers::error::Result;
use cowl_layers::sys::copy::WriteBack;
use cowl_layers::sys::early::Early;
use cowl_layers::sys::order::Order;

/// The context of one operation. It holds a shared lock on the stack, which therefore does not change.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) stack: RwLockReadGuard<'a, Stack>,
    pub(crate) options: &'a OverlayOptions,
    ledger: Option<&'a Ledger>,
    /// Objects whose attributes in the kernel's cache may be stale.
    stale: RefCell<Vec<Arc<Inode>>>,
}

impl<'a> Context<'a> {
    /// Creates a context by taking a shared lock on the stack.
    pub(crate) fn new(
        stack: &'a RwLock<Stack>,
        options: &'a OverlayOptions,
        ledger: Option<&'a Ledger>,
    ) -> Self {
        Self {
            ledger,
            stack: stack.read(),
            options,
            stale: RefCell::default(),
        }
    }

    /// Returns the ledger, if the mount has one.
    pub(crate) fn ledger(&self) -> Option<&'a Ledger> {
        self.ledger
    }

    /// Runs `commit`, which changes names or xattrs by one system call, with its intent in the ledger.
    pub(crate) fn commit<T>(
        &self,
        intent: &Intent<'_>,
        commit: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(ledger) = self.ledger else {
            return commit();
        };
        ledger.intend(intent);
        commit().inspect_err(|_| ledger.withdraw())
    }

    /// Whether a predecessor received the request of this operation as well, and intended this change. It may have
    /// been made.
    pub(crate) fn is_resumed(&self, change: Change) -> bool {
        self.ledger.is_some_and(|ledger| ledger.is_resumed(change))
    }

    /// Whether a predecessor renamed this object in the request of this operation.
    pub(crate) fn was_renamed(&self, change: Change, found: &Inode) -> bool {
        self.is_resumed(change) && self.ledger.and_then(Ledger::resumed_object) == Some(found.ino())
    }

    /// Adds an object whose attributes in the kernel's cache must be invalidated before the reply is sent.
    pub(crate) fn note_stale(&self, inode: &Arc<Inode>) {
        let mut stale = self.stale.borrow_mut();
        if !stale.iter().any(|other| Arc::ptr_eq(other, inode)) {
            stale.push(inode.clone());
        }
    }

    /// Takes the objects that [`Self::note_stale`] added.
    pub(crate) fn take_stale(&self) -> Vec<Arc<Inode>> {
        self.stale.take()
    }

    /// Returns the order in which new objects must reach the disk.
    pub(crate) fn order(&self) -> Result<Order> {
        if self.options.volatile {
            return Ok(Order::Volatile);
        }
        Ok(self.stack.upper()?.order())
    }

    /// Returns when writeback of copied content starts. A volatile mount never waits for it.
    pub(crate) fn write_back(&self) -> WriteBack {
        match self.options.volatile {
            true => WriteBack::Later,
            false => WriteBack::Early,
        }
    }

    /// Returns the conditions for starting writeback early. A volatile mount never does.
    pub(crate) fn early(&self) -> Result<Early> {
        if self.options.volatile {
            return Ok(Early::default());
        }
        Ok(self.stack.upper()?.early())
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        let ended = take_ended_overrides();
        if let Some(ledger) = self.ledger {
            for ino in ended {
                ledger.delete(Kind::Ctime, ino);
            }
        }
    }
}

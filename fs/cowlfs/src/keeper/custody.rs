//! The daemon's side: everything that a successor needs is handed to the keeper before it is used.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowl_layers::error::{Errno, Result};
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::points::point;
use cowl_overlay::{Custodian, Ledger, Overlay};

use super::message::{self, Message};

/// The connection of a daemon to its keeper.
#[derive(Debug)]
pub(crate) struct Custody {
    socket: OwnedFd,
    /// The process id of the keeper.
    keeper: u32,
    /// Whether the keeper has ended.
    is_lost: AtomicBool,
}

impl Custody {
    pub(super) fn new(socket: OwnedFd, keeper: u32) -> Arc<Self> {
        Arc::new(Self {
            socket,
            keeper,
            is_lost: AtomicBool::new(false),
        })
    }

    fn send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        point("before a message to the keeper");
        let sent = message::send(&self.socket, message, descriptors);
        point("after a message to the keeper");
        sent.inspect_err(|error| {
            if !self.is_lost.swap(true, Ordering::Relaxed) {
                log::warn!("the keeper of the mount does not answer: {error}");
            }
        })
    }

    /// Returns the process id of the keeper; `None` if it has ended.
    pub(crate) fn keeper(&self) -> Option<u32> {
        (!self.is_lost.load(Ordering::Relaxed)).then_some(self.keeper)
    }

    /// Hands over the ledger.
    pub(crate) fn hand_over(&self, ledger: &Ledger) -> io::Result<()> {
        self.send(&Message::Ledger, &[ledger.descriptor()])
    }

    /// Reports that the mount is served.
    pub(crate) fn report_serving(&self) -> io::Result<()> {
        self.send(&Message::Serving, &[])
    }

    /// Reports that this process has stopped for the process at the other end of this connection, which waits for
    /// [`super::PROCEED`].
    pub(crate) fn replace(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        self.send(&Message::Replaced, &[connection])
    }

    /// Reports that the mount has ended.
    pub(crate) fn report_end(&self) -> io::Result<()> {
        self.send(&Message::Ended, &[])
    }

    /// Hands over a lower layer, which holds its lock.
    pub(crate) fn keep_layer(&self, layer: &Layer) -> io::Result<()> {
        self.send(&Message::Layer(layer.traits()), &[layer.root_fd()])
    }

    /// Hands over an upper layer.
    pub(crate) fn keep_upper(&self, upper: &Upper) -> io::Result<()> {
        let descriptors = [upper.layer.root_fd(), upper.locked_work()];
        self.send(&Message::Layer(upper.traits()), &descriptors)
    }

    /// Releases all layers that are not in use any more.
    pub(crate) fn keep_only(&self, overlay: &Overlay) -> io::Result<()> {
        self.send(&Message::Layers(overlay.layer_ids()), &[])
    }
}

impl Custodian for Custody {
    fn deposit(&self, number: u64, descriptor: BorrowedFd<'_>) -> Result<()> {
        self.send(&Message::Deposit(number), &[descriptor.as_fd()])
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO).into())
    }

    fn release(&self, number: u64) {
        if let Err(error) = self.send(&Message::Release(number), &[]) {
            log::debug!("cannot release a descriptor in custody: {error}");
        }
    }
}

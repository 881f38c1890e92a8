//! The daemon's side: everything that a successor needs is handed to the keeper before it is used.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowl_layers::error::{Errno, Result};
use cowl_layers::layer::{Layer, Upper};
use cowl_overlay::{Custodian, Ledger, Overlay};
use rustix::event::{PollFd, PollFlags, poll};

use super::message::{self, Message};

/// The time that the keeper may take to read messages.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The connection of a daemon to its keeper.
#[derive(Debug)]
pub(crate) struct Custody {
    socket: OwnedFd,
    /// The process id of the keeper.
    keeper: u32,
    /// Whether the keeper has ended. Then nothing needs to be sent: a new one gets everything.
    is_lost: AtomicBool,
    /// Whether a message could not be sent although the keeper exists.
    is_stuck: AtomicBool,
}

/// Whether an error shows that the other end of the connection was closed.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}

impl Custody {
    pub(super) fn new(socket: OwnedFd, keeper: u32) -> Arc<Self> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        // A keeper that is stopped must not stop requests for good.
        if let Err(error) = set_socket_timeout(&socket, Timeout::Send, Some(TIMEOUT)) {
            log::warn!("a keeper that does not read its messages is not noticed: {error}");
        }
        Arc::new(Self {
            socket,
            keeper,
            is_lost: AtomicBool::new(false),
            is_stuck: AtomicBool::new(false),
        })
    }

    /// Sends a message. If the keeper has ended, it is not needed: the next keeper gets everything.
    fn send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        match self.send_to_living(message, descriptors) {
            Err(error) if is_end(&error) => Ok(()),
            sent => sent,
        }
    }

    /// Sends a message, or fails if the keeper has ended.
    fn send_to_living(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if self.is_stuck.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let sent = message::send(&self.socket, message, descriptors);
        sent.inspect_err(|error| match is_end(error) {
            true => self.note_end(),
            false => {
                if !self.is_stuck.swap(true, Ordering::Relaxed) {
                    log::error!("the keeper of the mount does not take messages: {error}");
                }
            }
        })
    }

    fn note_end(&self) {
        if !self.is_lost.swap(true, Ordering::Relaxed) {
            log::warn!("the keeper of the mount (pid {}) has ended", self.keeper);
        }
    }

    /// Waits until the keeper has ended.
    pub(crate) fn wait_for_end(&self) -> io::Result<()> {
        loop {
            let mut polled = [PollFd::new(&self.socket, PollFlags::empty())];
            match poll(&mut polled, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let [socket] = polled.map(|one| one.revents());
            if socket.intersects(PollFlags::HUP | PollFlags::ERR) {
                self.note_end();
                return Ok(());
            }
        }
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
    /// [`super::PROCEED`]. Fails if the keeper has ended.
    pub(crate) fn replace(&self, connection: BorrowedFd<'_>) -> io::Result<()> {
        self.send_to_living(&Message::Replaced, &[connection])
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

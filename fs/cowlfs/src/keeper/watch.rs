//! Waiting for a message, a signal, or the end of the daemon.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use cowl_layers::sys::child::{BlockedSignals, Child, Ended};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// An event.
pub(super) enum Watched {
    /// A message of the daemon can be received.
    Message,
    /// This signal arrived.
    Signal(i32),
    /// The daemon ended.
    Ended(Ended),
}

/// The time after a message in which the keeper waits for no other one: it is not woken for each of many messages. They
/// are in its queue, so nothing depends on when it receives them.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// Waits like [`watch`], and for a message only after a pause.
pub(super) fn pause_and_watch(socket: &OwnedFd, child: &Child) -> io::Result<Watched> {
    let signals = BlockedSignals::receive()?;
    let mut polled = [
        PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(child.as_fd(), PollFlags::IN),
    ];
    match poll(&mut polled, Some(&PAUSE)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    drop(signals);
    watch(socket, child)
}

/// Waits for the next event. Messages come before the end of the daemon that sent them.
pub(super) fn watch(socket: &OwnedFd, child: &Child) -> io::Result<Watched> {
    let signals = BlockedSignals::receive()?;
    loop {
        let mut polled = [
            PollFd::new(socket, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(child.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let [message, signal, end] = polled.map(|one| one.revents());
        if signal.contains(PollFlags::IN)
            && let Some(signal) = signals.next()?
        {
            return Ok(Watched::Signal(signal));
        }
        // The other end was closed: the end of the daemon follows.
        if message.contains(PollFlags::IN) && !message.contains(PollFlags::HUP) {
            return Ok(Watched::Message);
        }
        if end.contains(PollFlags::IN) {
            return Ok(Watched::Ended(child.wait()?));
        }
        if message.contains(PollFlags::HUP) {
            return Ok(Watched::Ended(child.wait()?));
        }
    }
}

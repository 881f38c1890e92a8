//! Messages from a daemon to its keeper, with descriptors.
//!
//! A message is in the keeper's queue when it was sent, so it arrives even if the daemon ends at once.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use cowl_layers::layer::LayerTraits;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

/// The maximum size of a message in bytes.
const MAX_LENGTH: usize = 128 << 10;

/// The size of the queue of messages in bytes, if the kernel permits it.
const BUFFER: usize = 4 << 20;
/// The pause before a message is sent again because too many descriptors are in queues (ETOOMANYREFS).
const PAUSE: Duration = Duration::from_millis(2);
/// The maximum number of these pauses.
const MAX_PAUSES: u32 = 2000;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// The ledger of this process, which replaces that of its predecessor. One descriptor.
    Ledger,
    /// The mount is served.
    Serving,
    /// A descriptor of an object without a name.
    Deposit(u64),
    /// The descriptor with this number is not needed any more.
    Release(u64),
    /// A layer: the descriptors of its root and, of an upper layer, of its work directory.
    Layer(LayerTraits),
    /// The daemon has stopped, and the process at the other end of this connection takes over. One descriptor.
    Replaced,
    /// The ids of all layers in use. Others can be closed.
    Layers(Vec<u64>),
    /// The mount has ended, and nothing is held in custody any more.
    Ended,
}

/// Creates the connection.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (one, two) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // The daemon waits if the buffer is full. The limit of the kernel applies, so the result can be smaller.
    for end in [&one, &two] {
        rustix::net::sockopt::set_socket_send_buffer_size(end, BUFFER)?;
    }
    Ok((one, two))
}

/// Sends a message with up to two descriptors.
pub(super) fn send(
    socket: impl AsFd,
    message: &Message,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut pauses = 0;
    loop {
        let parts = [IoSlice::new(&bytes)];
        match rustix::net::sendmsg(&socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            // The keeper has not received the last ones yet.
            Err(rustix::io::Errno::TOOMANYREFS) if pauses < MAX_PAUSES => {
                pauses += 1;
                std::thread::sleep(PAUSE);
            }
            sent => return sent.map(drop).map_err(io::Error::from),
        }
    }
}

/// Receives messages.
pub(super) struct Incoming {
    buffer: Vec<u8>,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; MAX_LENGTH],
        }
    }

    /// Receives the next message; `None` if there is none. A message that cannot be decoded is skipped.
    pub(super) fn receive(
        &mut self,
        socket: impl AsFd,
    ) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        receive(socket, &mut self.buffer)
    }
}

fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got =
            rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, flags);
        let got = match got {
            Ok(got) => got.bytes,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if got == 0 {
            return Ok(None);
        }
        let descriptors = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        });
        let descriptors = descriptors.flatten().collect();
        match postcard::from_bytes(buffer.get(..got).unwrap_or_default()) {
            Ok(message) => return Ok(Some((message, descriptors))),
            Err(error) => log::error!("the keeper got an unknown message: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_in_order_with_their_descriptors() {
        let (keeper, daemon) = pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(&daemon, &Message::Deposit(7), &[file.as_fd()]).unwrap();
        send(&daemon, &Message::Layers((0..2000).collect()), &[]).unwrap();
        drop(daemon);
        let mut incoming = Incoming::new();
        let (message, descriptors) = incoming.receive(&keeper).unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (Message::Deposit(7), 1));
        let (message, descriptors) = incoming.receive(&keeper).unwrap().unwrap();
        assert_eq!(message, Message::Layers((0..2000).collect()));
        assert!(descriptors.is_empty());
        assert!(incoming.receive(&keeper).unwrap().is_none());
    }
}

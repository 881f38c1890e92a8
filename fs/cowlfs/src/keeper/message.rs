//! Messages from a daemon to its keeper, with descriptors.
//!
//! A message is in the keeper's queue when it was sent, so it arrives even if the daemon ends at once.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cowl_layers::layer::LayerTraits;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};

/// The maximum size of a message in bytes.
const MAX_LENGTH: usize = 128 << 10;

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
}

/// Creates the connection.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    let (one, two) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
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
    loop {
        let parts = [IoSlice::new(&bytes)];
        match rustix::net::sendmsg(&socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            sent => return sent.map(drop).map_err(io::Error::from),
        }
    }
}

/// The memory for received messages.
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; MAX_LENGTH])
    }

    /// Receives the next message; `None` if there is none. A message that cannot be decoded is skipped.
    pub(super) fn receive(
        &mut self,
        socket: impl AsFd,
    ) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let parts = &mut [IoSliceMut::new(&mut self.0)];
            let got = match rustix::net::recvmsg(&socket, parts, &mut control, flags) {
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
            match postcard::from_bytes(self.0.get(..got).unwrap_or_default()) {
                Ok(message) => return Ok(Some((message, descriptors))),
                Err(error) => log::error!("the keeper got an unknown message: {error}"),
            }
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
        let mut buffer = Buffer::new();
        let (message, descriptors) = buffer.receive(&keeper).unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (Message::Deposit(7), 1));
        let (message, descriptors) = buffer.receive(&keeper).unwrap().unwrap();
        assert_eq!(message, Message::Layers((0..2000).collect()));
        assert!(descriptors.is_empty());
        assert!(buffer.receive(&keeper).unwrap().is_none());
    }
}

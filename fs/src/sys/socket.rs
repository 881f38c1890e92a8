//! What std does not tell of a socket.

use std::os::fd::AsFd;

use rustix::net::RecvFlags;

use crate::error::{Errno, Result};

/// Whether the other end of a stream has hung up, or its process is gone.
pub fn peer_is_gone(stream: impl AsFd) -> Result<bool> {
    let mut byte = [0_u8; 1];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(stream, &mut byte[..], flags) {
        Ok((got, _)) => Ok(got == 0),
        Err(Errno::AGAIN | Errno::INTR) => Ok(false),
        Err(Errno::CONNRESET) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

//! Socket operations that the standard library lacks.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::error::{Errno, Result};

/// Connects to a Unix socket, with a timeout.
///
/// If the listener does not accept connections and its backlog is full, this fails with EAGAIN after `patience`.
pub fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Returns the id of the process that listens at the other end; 0 if it is in an invisible pid namespace.
pub fn peer_process(stream: &UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = libc::socklen_t::try_from(size_of_val(&peer)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel writes at most `size` bytes, the size of `peer`, in which every
    // bit pattern is valid.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut size,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u32::try_from(peer.pid).unwrap_or(0))
}

/// Whether the other end of a stream was closed, by the process or by its death.
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

//! Socket operations that the standard library lacks.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, socket_with,
};

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

/// Whether the process at the other end runs as this process's user or as root.
pub fn peer_may_command(stream: &UnixStream) -> io::Result<bool> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    Ok(peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// Returns the user of the process at the other end, as an id of this process's user namespace.
pub fn peer_user(stream: &UnixStream) -> io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(stream)?.uid.as_raw())
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

/// Returns a descriptor of the process that listens at the other end, which refers to no other process if its id is
/// used again. Requires Linux 6.5.
pub fn peer_handle(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut number: libc::c_int = -1;
    let mut size = libc::socklen_t::try_from(size_of_val(&number)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel writes at most `size` bytes, the size of `number`.
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut number).cast(),
            &raw mut size,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has created the descriptor for this call, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The maximum number of descriptors in one message (SCM_MAX_FD is 253).
const BATCH: usize = 128;

/// Sends descriptors through a socket, each batch with one byte.
pub fn send_descriptors(stream: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    for batch in descriptors.chunks(BATCH) {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(batch)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let data = [io::IoSlice::new(b"d")];
        rustix::net::sendmsg(stream, &data, &mut control, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// Receives `count` descriptors from [`send_descriptors`].
pub fn receive_descriptors(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut descriptors = Vec::new();
    while descriptors.len() < count {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut data = [io::IoSliceMut::new(&mut byte)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(stream, &mut data, &mut control, flags)?;
        let before = descriptors.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        // Fewer than were sent if this process may not open more.
        let wanted = (count - before).min(BATCH);
        if got.bytes == 0 || descriptors.len() - before != wanted {
            return Err(io::Error::other(format!(
                "{} of {count} descriptors arrived",
                descriptors.len()
            )));
        }
    }
    Ok(descriptors)
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

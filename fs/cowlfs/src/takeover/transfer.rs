//! The messages between a daemon and its successor: frames of a length and as many bytes, and descriptors.
//!
//! The successor sends a [`Hello`], receives the bundle and the descriptors, and sends an [`Answer`].

use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use cowl_layers::sys::socket;
use serde::{Deserialize, Serialize};

use super::bundle::{Bundle, BundleError, VERSION};

/// The size of a frame beyond which it is damaged: a record of several hundred million inodes.
const MAX_FRAME: u64 = 16 << 30;
/// The maximum size of the other messages.
const MAX_MESSAGE: u64 = 1 << 16;

/// The first message of the successor.
///
/// It has the same encoding in all versions. So the predecessor refuses one that cannot read its state before it stops any
/// request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The version of the program.
    pub(super) program: String,
    /// The versions of the state that it reads.
    pub(super) reads: Vec<u32>,
}

/// The last message of the successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// It serves the mount as soon as the predecessor has ended.
    Ready,
    /// It ends, for this reason.
    Failed(String),
}

impl Hello {
    /// Returns the reason why this successor cannot take over, if there is one.
    pub(super) fn refusal(&self) -> Option<String> {
        if self.reads.contains(&VERSION) {
            return None;
        }
        Some(format!(
            "version {} reads the state of other versions only ({:?}, not {VERSION})",
            self.program, self.reads
        ))
    }
}

fn write_frame(mut stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_le_bytes())?;
    stream.write_all(bytes)
}

fn read_frame(mut stream: &UnixStream, limit: u64) -> io::Result<Vec<u8>> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > limit {
        return Err(io::Error::other("a message of an impossible size"));
    }
    let mut bytes = Vec::new();
    stream.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

fn send<T: Serialize>(stream: &UnixStream, message: &T) -> io::Result<()> {
    write_frame(
        stream,
        &postcard::to_stdvec(message).map_err(io::Error::other)?,
    )
}

fn receive<T: for<'de> Deserialize<'de>>(stream: &UnixStream) -> io::Result<T> {
    postcard::from_bytes(&read_frame(stream, MAX_MESSAGE)?).map_err(io::Error::other)
}

/// Sends the first message of a successor.
pub(crate) fn send_hello(stream: &UnixStream) -> io::Result<()> {
    let hello = Hello {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        reads: vec![VERSION],
    };
    send(stream, &hello)
}

pub(super) fn receive_hello(stream: &UnixStream) -> io::Result<Hello> {
    receive(stream)
}

/// Sends the last message of a successor.
pub(crate) fn send_answer(stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    send(stream, answer)
}

pub(super) fn receive_answer(stream: &UnixStream) -> io::Result<Answer> {
    receive(stream)
}

pub(super) fn send_bundle(
    stream: &UnixStream,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    write_frame(stream, bytes)?;
    socket::send_descriptors(stream, descriptors)
}

/// Receives a bundle and its descriptors.
pub(crate) fn receive_bundle(
    stream: &UnixStream,
) -> io::Result<Result<(Bundle, Vec<OwnedFd>), BundleError>> {
    let bundle = match Bundle::decode(&read_frame(stream, MAX_FRAME)?) {
        Ok(bundle) => bundle,
        Err(error) => return Ok(Err(error)),
    };
    let descriptors = socket::receive_descriptors(stream, bundle.descriptors.total())?;
    Ok(Ok((bundle, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive() {
        let (one, two) = UnixStream::pair().unwrap();
        send_hello(&one).unwrap();
        assert_eq!(receive_hello(&two).unwrap().refusal(), None);
        let failed = Answer::Failed("no".to_owned());
        send_answer(&one, &failed).unwrap();
        assert_eq!(receive_answer(&two).unwrap(), failed);
        let files: Vec<_> = (0..300).map(|_| tempfile::tempfile().unwrap()).collect();
        let sent: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| socket::send_descriptors(&one, &sent).unwrap());
            let received = socket::receive_descriptors(&two, 300).unwrap();
            let inode = |fd| rustix::fs::fstat(fd).unwrap().st_ino;
            for (file, got) in files.iter().zip(&received) {
                assert_eq!(
                    inode(std::os::fd::AsFd::as_fd(file)),
                    inode(std::os::fd::AsFd::as_fd(got))
                );
            }
        });
        drop(one);
        assert!(receive_hello(&two).is_err());
    }

    #[test]
    fn a_message_of_an_impossible_size_is_refused() {
        let (mut one, two) = UnixStream::pair().unwrap();
        one.write_all(&u64::MAX.to_le_bytes()).unwrap();
        assert!(receive_hello(&two).is_err());
        assert_eq!(
            Hello {
                program: "9.0".to_owned(),
                reads: vec![7, 8]
            }
            .refusal()
            .unwrap(),
            "version 9.0 reads the state of other versions only ([7, 8], not 3)"
        );
    }
}

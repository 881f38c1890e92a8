//! The messages by which LXC's pre-mount hook passes a mount to its daemon (docs/decisions/0037).
//!
//! The hook sends a byte with the descriptor of /dev/fuse, and the device number of the mount in eight bytes. The daemon
//! replies [`SERVING`] when it answers requests, or closes the connection.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowl_layers::sys::mount::{self, MountOptions, PreparedMount};
use cowl_layers::sys::users::Device;
use cowl_layers::sys::{dir, socket};

use crate::error::{Error, Result};

/// The message that ends a daemon which waits for a mount.
pub const CANCEL: &[u8] = b"c";
/// The reply of a daemon that serves the mount.
pub const SERVING: &[u8] = b"serving";
/// The time within which the daemon must reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// The time within which the daemon must accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs `with` with a short path to a socket: its address has at most 107 bytes.
fn with_short_path<T>(path: &Path, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let opened = dir::open_root(parent)
        .map_err(|error| io::Error::from_raw_os_error(error.errno().raw_os_error()))?;
    with(&PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd())).join(name))
}

/// Connects to the daemon that listens at `path`.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    with_short_path(path, |short| socket::connect(short, CONNECT_TIMEOUT))
}

/// Listens at `path`, which must not exist.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    with_short_path(path, |short| UnixListener::bind(short))
}

/// Receives a mount: the descriptor of its device, and its device number; `None` if it is [`CANCEL`].
pub fn receive(mut stream: &UnixStream) -> io::Result<Option<(OwnedFd, Device)>> {
    let mut first = [0];
    // The descriptor comes with the first byte, which must not be consumed without it.
    let flags = rustix::net::RecvFlags::PEEK;
    let (got, _) = rustix::net::recv(stream, &mut first[..], flags)?;
    if got == 1 && first == CANCEL {
        return Ok(None);
    }
    let device = socket::receive_descriptors(stream, 1)?.pop();
    let device = device.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    let (mut major, mut minor) = ([0; 4], [0; 4]);
    stream.read_exact(&mut major)?;
    stream.read_exact(&mut minor)?;
    let number = (u32::from_le_bytes(major), u32::from_le_bytes(minor));
    Ok(Some((device, number.into())))
}

/// Mounts at `mount_point` in the namespaces of this process, passes the mount to the daemon that listens at `socket`, and
/// waits until the daemon serves it. `source` is the source in the mount table.
pub fn pass_mount(socket: &Path, mount_point: &Path, source: &str) -> Result<()> {
    let mut stream = connect(socket).map_err(|error| {
        Error::at("connect to the daemon at", socket, error)
            .hint("start the container with lxc-start, which runs the pre-start hook first")
    })?;
    let device = mount::open_device().map_err(|error| {
        Error::failed("cannot open /dev/fuse in the user namespace of the container")
            .because(error)
            .hint("permit it: as root, chmod 666 /dev/fuse")
    })?;
    let options = MountOptions {
        source: source.to_owned(),
        subtype: "cowlfs".to_owned(),
        allow_other: true,
        ..MountOptions::default()
    };
    let at = |error: cowl_layers::Error| {
        Error::at(
            "mount at",
            mount_point,
            io::Error::from_raw_os_error(error.errno().raw_os_error()),
        )
    };
    let mount = PreparedMount::new(device.as_fd(), &options).map_err(at)?;
    let number = mount.device().map_err(at)?;
    let exact = mount_point
        .canonicalize()
        .map_err(|error| Error::at("mount at", mount_point, error))?;
    mount.attach(&exact).map_err(at)?;
    let failed = |error| Error::failed("cannot pass the mount to its daemon").because(error);
    socket::send_descriptors(&stream, &[device.as_fd()]).map_err(failed)?;
    let bytes = [number.major.to_le_bytes(), number.minor.to_le_bytes()].concat();
    stream.write_all(&bytes).map_err(failed)?;
    drop(device);
    stream
        .set_read_timeout(Some(REPLY_TIMEOUT))
        .map_err(failed)?;
    let mut reply = [0; SERVING.len()];
    match stream.read_exact(&mut reply) {
        Ok(()) if reply == SERVING => Ok(()),
        Ok(()) => Err(failed(io::ErrorKind::InvalidData.into())),
        Err(error) => Err(Error::failed("the daemon does not serve the mount")
            .because(error)
            .hint("cowl status NAME --json prints the path of its log")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_message_is_a_mount() {
        let receive_from = |send: &dyn Fn(&mut UnixStream)| {
            let (mut sender, receiver) = UnixStream::pair().unwrap();
            send(&mut sender);
            drop(sender);
            receive(&receiver)
        };
        let null = std::fs::File::open("/dev/null").unwrap();
        let number = [7_u32.to_le_bytes(), 9_u32.to_le_bytes()].concat();
        let sent = receive_from(&|stream| {
            socket::send_descriptors(stream, &[null.as_fd()]).unwrap();
            stream.write_all(&number).unwrap();
        });
        assert_eq!(sent.unwrap().unwrap().1, (7, 9).into());
        let canceled = receive_from(&|stream| stream.write_all(CANCEL).unwrap());
        assert!(canceled.unwrap().is_none());
        receive_from(&|_| {}).unwrap_err();
        receive_from(&|stream| stream.write_all(b"d12345678").unwrap()).unwrap_err();
        receive_from(&|stream| {
            socket::send_descriptors(stream, &[null.as_fd()]).unwrap();
            stream.write_all(&number[..7]).unwrap();
        })
        .unwrap_err();
        receive_from(&|stream| {
            let two = [null.as_fd(), null.as_fd()];
            socket::send_descriptors(stream, &two).unwrap();
            stream.write_all(&number).unwrap();
        })
        .unwrap_err();
    }
}

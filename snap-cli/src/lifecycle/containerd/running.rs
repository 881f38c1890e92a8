//! Finds a containerd that runs, wherever its socket is.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use cowl_layers::shown::Show as _;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, Result};

/// The socket of containerd, unless its configuration names another one.
const SOCKET: &str = "/run/containerd/containerd.sock";

/// The name of the socket in every distribution of containerd: k3s, rke2, microk8s, k0s and docker have other directories.
const SOCKET_NAME: &str = "containerd.sock";

/// The name of the process (`/proc/PID/comm`).
const PROCESS: &[u8] = b"containerd\n";

/// The flag of a listening socket in `/proc/net/unix` (`__SO_ACCEPTCON`).
const LISTENING: u32 = 1 << 16;

const HINT: &str = "remove containers and images with a client of containerd, or stop it first";

/// Fails with `Busy` if a containerd answers at the default socket, at `CONTAINERD_ADDRESS`, or at another socket with the
/// usual name, or if a process has its name.
pub(super) fn refuse_containerd() -> Result<()> {
    let named = std::env::var_os("CONTAINERD_ADDRESS").filter(|text| !text.is_empty());
    let named = named.as_deref().map(to_path);
    for path in [PathBuf::from(SOCKET)].into_iter().chain(named) {
        refuse_answer(&path)?;
    }
    for path in listening()? {
        // Another user must not be able to prevent the command.
        if is_trusted(&path) {
            refuse_answer(&path)?;
        }
    }
    match find_process()? {
        Some(pid) => {
            Err(Error::busy(format!("containerd runs: the process {}", pid.shown())).hint(HINT))
        }
        None => Ok(()),
    }
}

/// Returns the path in an address of clients, with or without a scheme.
fn to_path(address: &OsStr) -> PathBuf {
    let bytes = address.as_bytes();
    let path = bytes.strip_prefix(b"unix://").unwrap_or(bytes);
    PathBuf::from(OsStr::from_bytes(path))
}

/// Fails with `Busy` if a program answers at a socket. Does not wait for it.
fn refuse_answer(path: &Path) -> Result<()> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connect = || {
        let address = SocketAddrUnix::new(path)?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)
    };
    match connect() {
        // A program whose queue is full runs, or is stopped.
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => {
            Err(Error::busy(format!("containerd runs and answers at {}", path.shown())).hint(HINT))
        }
        Err(Errno::NOENT | Errno::NOTDIR | Errno::CONNREFUSED) => Ok(()),
        Err(error) => Err(Error::at(
            "connect to containerd at",
            path,
            std::io::Error::from(error),
        )),
    }
}

/// Returns the paths of the sockets with the usual name on which programs of this network namespace listen.
fn listening() -> Result<Vec<PathBuf>> {
    let file = Path::new("/proc/net/unix");
    match std::fs::read(file) {
        Ok(text) => Ok(parse(&text)),
        Err(error) => Err(Error::at("read", file, error)),
    }
}

/// Parses `/proc/net/unix`: Num, RefCount, Protocol, Flags, Type, St, Inode and Path.
fn parse(text: &[u8]) -> Vec<PathBuf> {
    let is_listening = |flags: &[u8]| {
        let flags = std::str::from_utf8(flags).ok();
        let flags = flags.and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & LISTENING != 0)
    };
    let path_of = |line: &[u8]| {
        let start = line.iter().position(|byte| *byte == b'/')?;
        let (fields, path) = line.split_at_checked(start)?;
        let fields = fields.split(|byte| *byte == b' ');
        let fields: Vec<_> = fields.filter(|field| !field.is_empty()).collect();
        // An abstract name begins with an at sign, which is not a part of the path.
        let [_, _, _, flags, _, _, _] = fields.as_slice() else {
            return None;
        };
        let path = Path::new(OsStr::from_bytes(path));
        let is_named = path.file_name() == Some(OsStr::new(SOCKET_NAME));
        (is_named && is_listening(flags)).then(|| path.to_owned())
    };
    text.split(|byte| *byte == b'\n')
        .filter_map(path_of)
        .collect()
}

/// Returns whether root or the user of this process owns a socket.
fn is_trusted(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| is_trusted_user(found.uid()))
}

fn is_trusted_user(uid: u32) -> bool {
    [0, rustix::process::geteuid().as_raw()].contains(&uid)
}

/// Returns the pid of a containerd that can use the store: its mount namespace is the one of this process.
fn find_process() -> Result<Option<String>> {
    let proc = Path::new("/proc");
    let list = |error| Error::at("list", proc, error);
    let own = std::fs::read_link("/proc/self/ns/mnt").ok();
    for entry in std::fs::read_dir(proc).map_err(list)? {
        let entry = entry.map_err(list)?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
            continue;
        };
        let path = entry.path();
        // A process that cannot be read has ended.
        let is_containerd = std::fs::read(path.join("comm")).is_ok_and(|name| name == PROCESS)
            && std::fs::metadata(&path).is_ok_and(|found| is_trusted_user(found.uid()));
        if !is_containerd {
            continue;
        }
        match std::fs::read_link(path.join("ns/mnt")) {
            Ok(namespace) if own.as_ref().is_some_and(|own| *own != namespace) => {}
            _ => return Ok(Some(pid.to_owned())),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_with_the_usual_name_are_found() {
        let text = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            ffff: 00000002 00000000 00010000 0001 01 123 /run/k3s/containerd/containerd.sock\n\
            ffff: 00000003 00000000 00000000 0001 03 124 /run/connected/containerd.sock\n\
            ffff: 00000002 00000000 00010000 0001 01     5 /a b/\xff/containerd.sock\n\
            ffff: 00000002 00000000 00010000 0001 01 126 /run/other.sock\n\
            ffff: 00000002 00000000 00010000 0001 01 127 @/containerd.sock\n\
            ffff: 00000003 00000000 00000000 0001 03 128\n/\nx /containerd.sock\n";
        let found = parse(text);
        let expected: [&[u8]; 2] = [
            b"/run/k3s/containerd/containerd.sock",
            b"/a b/\xff/containerd.sock",
        ];
        let found: Vec<_> = found
            .iter()
            .map(|path| path.as_os_str().as_bytes())
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_socket_that_does_not_accept_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET_NAME);
        refuse_answer(&path).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        // The queue of a stopped program becomes full.
        for _ in 0..5 {
            let error = refuse_answer(&path).unwrap_err();
            assert_eq!(error.kind, crate::error::Kind::Busy);
        }
        assert!(listening().unwrap().contains(&path));
        drop(listener);
        refuse_answer(&path).unwrap();
    }

    #[test]
    fn addresses_of_clients_are_paths() {
        assert_eq!(to_path(OsStr::new("unix:///run/x")), Path::new("/run/x"));
        assert_eq!(to_path(OsStr::new("/run/x")), Path::new("/run/x"));
    }
}

//! The socket: passed by systemd, or created here. Only its owner can connect.

use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use cowl::{Error, Result};
use cowl_layers::shown::Show as _;
use listenfd::ListenFd;
use rustix::fs::Mode;
use rustix::process::{geteuid, umask};

/// Returns the socket that the service manager has passed, or creates one at `address`.
///
/// Must be called before other threads are started, because it changes the umask for a moment.
pub(crate) fn listen(address: &Path) -> Result<UnixListener> {
    let mut passed = ListenFd::from_env();
    if passed.len() > 0 {
        let socket = passed.take_unix_listener(0);
        let socket =
            socket.map_err(|error| Error::failed("cannot use the passed socket").because(error))?;
        return socket.ok_or_else(|| Error::failed("the service manager has passed no socket"));
    }
    check_directory(address)?;
    remove_stale(address)?;
    let previous = umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(address);
    umask(previous);
    bound.map_err(|error| Error::at("listen at", address, error))
}

/// Creates the directory of the socket if it does not exist. Fails if other users can write to it: they could replace
/// the socket.
fn check_directory(address: &Path) -> Result<()> {
    let Some(dir) = address.parent().filter(|_| address.is_absolute()) else {
        return Err(Error::usage(format!(
            "the path of the socket is not absolute: {}",
            address.shown()
        )));
    };
    match std::fs::DirBuilder::new().mode(0o755).create(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::at("create the directory", dir, error)),
    }
    let found = std::fs::metadata(dir).map_err(|error| Error::at("inspect", dir, error))?;
    if found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(Error::usage(format!(
            "other users can replace the socket in the directory {}",
            dir.shown()
        ))
        .hint("select a directory that only root can write to"));
    }
    Ok(())
}

/// Removes the socket of a process that has ended. Fails if a process listens, or if it is no socket.
fn remove_stale(address: &Path) -> Result<()> {
    let found = match std::fs::symlink_metadata(address) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::at("inspect", address, error)),
    };
    if !found.file_type().is_socket() {
        return Err(Error::usage(format!(
            "{} exists and is not a socket",
            address.shown()
        )));
    }
    match UnixStream::connect(address) {
        Ok(_) => Err(Error::busy(format!(
            "a process listens at {} already",
            address.shown()
        ))),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(address)
            .map_err(|error| Error::at("remove the stale socket", address, error)),
        Err(error) => Err(Error::at("inspect the socket", address, error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use cowl::Kind;

    use super::*;

    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("run/sock");
        let first = listen(&address).unwrap();
        assert_eq!(std::fs::metadata(&address).unwrap().mode() & 0o777, 0o600);
        assert_eq!(listen(&address).unwrap_err().kind, Kind::Busy);
        drop(first);
        listen(&address).unwrap();
        let file = dir.path().join("run/file");
        std::fs::write(&file, "x").unwrap();
        assert_eq!(listen(&file).unwrap_err().kind, Kind::Usage);
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
        assert_eq!(listen(Path::new("sock")).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(dir.path(), mode).unwrap();
        let error = listen(&dir.path().join("sock")).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
    }
}

//! The replacement of a daemon by a process that its keeper has not started (docs/decisions/0034).
//!
//! The daemon hands its end of the connection to that process over to the keeper, which decides: once the keeper has
//! sent [`PROCEED`], the other process takes over, and otherwise the keeper starts another daemon. The message to the
//! keeper is one system call, so a daemon that is killed has either been replaced or not.

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use cowl_layers::sys::child;

use crate::choices::Supervision;

/// The byte with which a process is permitted to take over.
pub(crate) const PROCEED: u8 = b'p';
/// The byte with which it reports that it continues whatever happens to others.
const SERVES: u8 = b's';

/// Permits a process to take over.
pub(crate) fn permit(mut connection: &UnixStream) -> io::Result<()> {
    connection.write_all(&[PROCEED])
}

/// Reports to the predecessor's keeper that this process serves the mount.
pub(crate) fn report_serves(mut connection: &UnixStream) {
    if let Err(error) = connection.write_all(&[SERVES]) {
        // The predecessor has no keeper, or it has ended.
        log::debug!("cannot report to the keeper of the predecessor: {error}");
    }
}

/// A process that was permitted to take over.
pub(super) struct Replacement(UnixStream);

impl Replacement {
    /// Permits the process to take over. Fails if it has ended.
    pub(super) fn begin(connection: OwnedFd) -> io::Result<Self> {
        let connection = UnixStream::from(connection);
        connection.set_read_timeout(None)?;
        permit(&connection)?;
        Ok(Self(connection))
    }

    /// Waits until the process serves the mount, or has ended before.
    pub(super) fn is_serving(&self) -> bool {
        let mut byte = [0];
        loop {
            match (&self.0).read(&mut byte) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::warn!("the process that takes over has ended: {error}");
                    return false;
                }
            }
        }
    }

    /// Ends this process: at once, or together with the mount if another process watches this one.
    pub(super) fn end(self, supervision: Supervision) -> ! {
        match supervision {
            Supervision::Off => child::exit_at_once(0),
            Supervision::On => child::outlive(self.0.into()),
        }
    }
}

//! Talking to a running daemon over a unix socket: what it serves, how busy it is, a new layer on top,
//! what it has done so far, and the end of its mount. One JSON line asks, one answers.
//!
//! Daemon and command may be of different versions: a daemon lives on when a newer cowl is installed. So a
//! question that is not known is answered, and with words that say what to do.

mod client;
mod detach;
mod place;
mod server;
mod signals;
mod stats;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use client::{Client, ControlError};
pub(crate) use detach::Session;
pub(crate) use place::Place;
pub(crate) use server::{Flush, Serving, listen, serve};
pub(crate) use signals::{Mounted, Signals};
pub(crate) use stats::Gauge;
pub use stats::Stats;

/// How the refusal of a question begins that the daemon does not know.
const NOT_UNDERSTOOD: &str = "not understood";

/// What a client asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
enum Ask {
    /// Answered at once, whatever else is under way.
    Ping,
    Status,
    PushLayer {
        upper: Vec<u8>,
        work: Vec<u8>,
    },
    Flush,
    Detach,
    Stats,
    Settle,
}

/// What the daemon answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
enum Answer {
    Status(Status),
    Stats(Stats),
    Done,
    Busy {
        writers: u32,
        #[serde(default)]
        readers: u32,
    },
    InUse {
        /// Processes whose mount namespace holds a copy, of daemons before copies were detached.
        pids: Vec<u32>,
        #[serde(default)]
        binds: Vec<Bind>,
    },
    Failed {
        why: String,
    },
}

/// A mount of the daemon's file system that was made on purpose, besides its own, or one that lies on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// A process of the mount namespace that it is in.
    pub pid: u32,
    /// Where it is there; the bytes of the path.
    pub at: Vec<u8>,
    /// It is an overlay of the kernel's that has a layer in the mount.
    #[serde(default)]
    pub overlay: bool,
}

/// What a daemon says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its process.
    pub pid: u32,
    /// Where it mounted; the bytes of the path.
    pub mountpoint: Vec<u8>,
    /// The layer that is written.
    pub upper: Option<Vec<u8>>,
    /// The layers below, topmost first.
    pub lowers: Vec<Vec<u8>>,
    /// Descriptors open for reading only.
    pub open_files: u32,
    /// Descriptors open for writing.
    pub open_for_write: u32,
    /// Inodes that the kernel knows.
    pub inodes: usize,
}

/// A socket's path has at most 107 bytes; through a descriptor of its folder any folder will do.
fn short_path(socket: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    let fd = cowl_layers::sys::dir::open_root(folder)
        .map_err(|error| io::Error::from_raw_os_error(error.errno().raw_os_error()))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())).join(name);
    Ok((fd, short))
}

//! The control socket: a client can query a running daemon, push a new top layer, and end the mount.
//!
//! A request is one line of JSON, and so is the response.
//!
//! Client and daemon may be of different versions, because a daemon continues to run when a newer cowl is installed. So
//! the daemon answers an unknown request with a message that starts with [`NOT_UNDERSTOOD`] and names both.

mod client;
mod detach;
mod layers;
mod own_mount;
mod passthrough;
mod server;
mod signals;
mod stats;
mod without_daemon;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use client::{Client, ControlError};
pub(crate) use detach::FuseConnection;
pub(crate) use own_mount::{OwnMount, OwnMountRecord};
pub use passthrough::PassthroughStatus;
pub(crate) use server::{
    Flush, NextProgram, ServedMount, answer_upgraded, listen, listen_again, serve,
};
pub(crate) use signals::{SignalTarget, Signals};
pub use stats::Stats;
pub(crate) use stats::StatsSource;
pub use without_daemon::KernelMount;

/// The start of the error message for an unknown request. Clients recognize it.
const NOT_UNDERSTOOD: &str = "not understood";

/// A request of a client.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
enum Request {
    /// Answered immediately, even during another request.
    Ping,
    /// Waits for a change of the upper layer.
    Status,
    /// Waits for a change of the upper layer.
    Passthrough,
    PushLayer {
        upper: Vec<u8>,
        work: Vec<u8>,
        /// Older clients do not send it, and expect [`Response::Done`].
        #[serde(default)]
        writers: Option<RunningWriters>,
    },
    /// The paths of the new lower layers, topmost first.
    ReplaceLayers {
        lowers: Vec<Vec<u8>>,
    },
    Flush,
    Detach,
    Stats,
    Settle,
    /// Answered by the successor, on the same connection.
    Upgrade {
        /// The program that takes over; the bytes of the path.
        program: Vec<u8>,
    },
}

/// Whether programs write to the mount while a layer is pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunningWriters {
    /// Programs may write.
    Running,
    /// Programs are stopped. If the file system cannot share blocks, files are copied up to a total size.
    Stopped {
        /// The maximum total size of the files in bytes.
        max_bytes: u64,
    },
}

/// The effects of a push of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PushReport {
    /// The number of files that were copied because programs read or write them by passthrough.
    pub copied: usize,
    /// Their size in bytes.
    pub bytes: u64,
    /// The number of rounds in which files were copied, until none changed any more.
    pub rounds: u32,
    /// The time for which requests waited, in seconds.
    pub pause: f64,
    /// The time for which the push waited for requests that were running, in seconds.
    #[serde(default)]
    pub waited: f64,
    /// The time for which the push waited for programs to end their writes after requests had continued, in seconds.
    #[serde(default)]
    pub delayed: f64,
    /// The number of attempts; more than one if names changed at the same time.
    #[serde(default)]
    pub attempts: u32,
    /// Whether the copies share blocks with the files.
    #[serde(default)]
    pub shares_blocks: bool,
}

/// A response of the daemon.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
enum Response {
    Status(Box<Status>),
    Passthrough(PassthroughStatus),
    Stats(Stats),
    Pushed(PushReport),
    Replaced(ReplacedLayers),
    Upgraded(Upgraded),
    Done,
    Busy {
        writers: u32,
        #[serde(default)]
        readers: u32,
    },
    InUse {
        /// Processes whose mount namespace has a copy. Only older daemons send them; newer ones detach copies.
        pids: Vec<u32>,
        #[serde(default)]
        binds: Vec<Bind>,
    },
    /// Programs write to files by passthrough, which prevents a push. Clients that do not send `writers` get
    /// [`Response::Failed`].
    Unattended {
        message: String,
    },
    Failed {
        #[serde(rename = "why")]
        message: String,
    },
}

/// A deliberate mount of the daemon's file system elsewhere, or a kernel overlayfs with a layer on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// A process in its mount namespace.
    pub pid: u32,
    /// Its mount point there; the bytes of the path.
    pub at: Vec<u8>,
    /// It is a kernel overlayfs with a layer on the mount.
    #[serde(default)]
    pub overlay: bool,
}

/// The status of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The process id of the daemon.
    pub pid: u32,
    /// The mount point; the bytes of the path.
    pub mountpoint: Vec<u8>,
    /// The upper layer; the bytes of the path.
    pub upper: Option<Vec<u8>>,
    /// The lower layers, topmost first.
    pub lowers: Vec<Vec<u8>>,
    /// The number of descriptors that are open for reading only.
    pub open_files: u32,
    /// The number of descriptors that are open for writing.
    pub open_for_write: u32,
    /// The number of inodes that the kernel knows.
    pub inodes: usize,
    /// The limits and privileges that the daemon may not change, such as "io-flusher".
    #[serde(default)]
    pub lacking: Vec<String>,
    /// The version of the daemon; empty for daemons that did not report it.
    #[serde(default)]
    pub version: String,
    /// The process that starts another daemon if the daemon is killed.
    #[serde(default)]
    pub keeper: KeeperState,
}

/// The process that starts another daemon if the daemon is killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeeperState {
    /// The mount has none.
    #[default]
    None,
    /// It runs.
    Running,
    /// It has ended, and the daemon tries to start a new one.
    Lost,
}

impl KeeperState {
    /// Returns the name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Running => "running",
            Self::Lost => "lost",
        }
    }
}

/// The result of replacing a daemon by another process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Upgraded {
    /// The process id of the new daemon.
    pub pid: u32,
    /// The version of the previous daemon.
    pub from: String,
    /// The version of the new daemon.
    pub to: String,
    /// The time in seconds for which requests waited.
    pub pause: f64,
}

/// The result of a replacement of lower layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplacedLayers {
    /// The number of known objects that moved to the new layers.
    pub moved: usize,
    /// The number of removed layers that remain in use, because they contain deleted files that are open.
    pub retained: usize,
}

/// Returns a short path to a socket, and the descriptor that the path goes through.
///
/// The address of a socket has at most 107 bytes. A path through a descriptor of the directory avoids this limit.
fn short_path(socket: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = if dir.as_os_str().is_empty() {
        Path::new(".")
    } else {
        dir
    };
    let fd = cowl_layers::sys::dir::open_root(dir)
        .map_err(|error| io::Error::from_raw_os_error(error.errno().raw_os_error()))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())).join(name);
    Ok((fd, short))
}

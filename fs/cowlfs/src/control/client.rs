//! The client side of the control socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{
    Bind, NOT_UNDERSTOOD, PassthroughStatus, PushReport, ReplacedLayers, Request, Response,
    RunningWriters, Stats, Status, Upgraded, short_path,
};
use cowl_layers::sys;

/// The time limit for a daemon to accept a connection and to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// The time limit for a response.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The time limit for a push of a layer, during which the daemon may have to write back files.
const PUSH_TIMEOUT: Duration = Duration::from_secs(120);
/// The interval in which the state of the daemon is checked while waiting for a response.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The time limit for another daemon to take the place of one that was killed.
const REPLACEMENT_TIMEOUT: Duration = Duration::from_secs(20);
const REPLACEMENT_INTERVAL: Duration = Duration::from_millis(10);

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
    /// The process id of the daemon.
    pid: u32,
    /// The process that listens: the daemon, or its keeper.
    listener: u32,
}

/// A failed request to a daemon.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Files are open.
    #[error("{readers} descriptor(s) are open for reading, {writers} for writing")]
    Busy {
        /// The number of descriptors for writing.
        writers: u32,
        /// The number of descriptors for reading only.
        readers: u32,
    },
    /// A process uses the mount, or it is mounted elsewhere.
    #[error("the mount is in use")]
    InUse {
        /// Processes whose mount namespace has a copy of the mount. Only older daemons report them.
        pids: Vec<u32>,
        /// Deliberate mounts of the file system elsewhere.
        binds: Vec<Bind>,
    },
    /// The daemon runs but does not respond in time.
    #[error("the daemon (pid {pid}) does not answer{}", describe(*.state))]
    Silent {
        /// Its process id; 0 if it is not visible in this pid namespace.
        pid: u32,
        /// The state of its process, as in proc(5).
        state: Option<char>,
    },
    /// The daemon was killed, but its process has not exited yet.
    #[error("the daemon (pid {pid}) was killed and has not exited yet")]
    Ending {
        /// Its process id.
        pid: u32,
    },
    /// The daemon does not know the request, because it is of another version.
    #[error("{0}")]
    NotUnderstood(String),
    /// Programs write to files without the daemon (passthrough), which prevents the push of a layer.
    #[error("{0}")]
    Unattended(String),
    /// The daemon reported an error.
    #[error("{0}")]
    Failed(String),
    /// The connection failed, or the response was invalid.
    #[error("no answer from the daemon: {0}")]
    Io(#[from] io::Error),
}

/// The process that answers a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answerer {
    /// The daemon that the client is connected to.
    Daemon,
    /// Perhaps the process that replaces the daemon, which ends meanwhile.
    Successor,
}

/// Formats a process state for the end of a message.
fn describe(state: Option<char>) -> String {
    match state {
        Some(state @ ('T' | 't')) => format!(": it is stopped (state {state})"),
        Some(state) => format!(" (state {state})"),
        None => String::new(),
    }
}

impl Client {
    /// Connects to the socket of a daemon and waits for its response to a ping.
    ///
    /// A connection alone does not prove that the daemon works: a killed process may hold its locks, and accept
    /// connections, for a while.
    pub fn connect(socket: &Path) -> Result<Self, ControlError> {
        let (stream, listener) = open(socket)?;
        let mut client = Self {
            socket: socket.to_path_buf(),
            stream,
            pid: sys::process::same_program_below(listener),
            listener,
        };
        match client.send(&Request::Ping, PING_TIMEOUT, Answerer::Daemon)? {
            // A daemon that does not know the request works as well.
            Response::Done | Response::Failed { .. } => Ok(client),
            other => Err(into_error(other)),
        }
    }

    /// Returns the daemon's process id; 0 if it is not visible in this pid namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Queries the layers of the mount, and the number of open files.
    pub fn status(&mut self) -> Result<Status, ControlError> {
        // A push of a layer delays the response by up to ten seconds.
        match self.send(&Request::Status, Duration::from_secs(12), Answerer::Daemon)? {
            Response::Status(status) => Ok(*status),
            other => Err(into_error(other)),
        }
    }

    /// Queries the passthrough of the mount; `None` if the daemon is of a version that does not report it.
    pub fn passthrough(&mut self) -> Result<Option<PassthroughStatus>, ControlError> {
        let timeout = Duration::from_secs(12);
        match self.send(&Request::Passthrough, timeout, Answerer::Daemon)? {
            Response::Passthrough(status) => Ok(Some(status)),
            other => match into_error(other) {
                ControlError::NotUnderstood(_) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Queries the statistics since the start of the daemon.
    pub fn stats(&mut self) -> Result<Stats, ControlError> {
        match self.send(&Request::Stats, TIMEOUT, Answerer::Daemon)? {
            Response::Stats(stats) => Ok(stats),
            other => Err(into_error(other)),
        }
    }

    /// Pushes an empty layer as the new upper one; see [`cowl_overlay::Overlay::push_layer`].
    pub fn push_layer(
        &mut self,
        upper: &Path,
        work: &Path,
        writers: RunningWriters,
    ) -> Result<PushReport, ControlError> {
        let request = Request::PushLayer {
            upper: upper.as_os_str().as_bytes().to_vec(),
            work: work.as_os_str().as_bytes().to_vec(),
            writers: Some(writers),
        };
        match self.send(&request, PUSH_TIMEOUT, Answerer::Daemon)? {
            Response::Pushed(report) => Ok(report),
            // An older daemon, or one that has pushed the layer before.
            Response::Done => Ok(PushReport::default()),
            other => Err(into_error(other)),
        }
    }

    /// Replaces the lower layers by these, topmost first; see [`cowl_overlay::Overlay::replace_layers`].
    pub fn replace_layers(&mut self, lowers: &[PathBuf]) -> Result<ReplacedLayers, ControlError> {
        let bytes = |path: &PathBuf| path.as_os_str().as_bytes().to_vec();
        let request = Request::ReplaceLayers {
            lowers: lowers.iter().map(bytes).collect(),
        };
        // It looks up every known object of the removed layers.
        match self.send(&request, Duration::from_secs(600), Answerer::Daemon)? {
            Response::Replaced(replaced) => Ok(replaced),
            other => Err(into_error(other)),
        }
    }

    /// Writes everything that programs have stored through mappings to the layers.
    pub fn flush(&mut self) -> Result<(), ControlError> {
        // It may have to write all of the memory.
        self.run(&Request::Flush, Duration::from_secs(600))
    }

    /// Starts to sync the frozen layers in the background, and returns immediately.
    pub fn settle(&mut self) -> Result<(), ControlError> {
        self.run(&Request::Settle, TIMEOUT)
    }

    /// Unmounts, unless the mount is in use in any namespace, and returns immediately.
    pub fn detach(&mut self) -> Result<(), ControlError> {
        self.run(&Request::Detach, TIMEOUT)
    }

    /// Replaces the daemon by a process that runs `program`. After an error the previous daemon serves on.
    pub fn upgrade(&mut self, program: &Path) -> Result<Upgraded, ControlError> {
        let request = Request::Upgrade {
            program: program.as_os_str().as_bytes().to_vec(),
        };
        // It waits for running requests, and finds every known object again.
        let timeout = Duration::from_secs(600);
        match self.send(&request, timeout, Answerer::Successor)? {
            Response::Upgraded(upgraded) => {
                self.pid = upgraded.pid;
                Ok(upgraded)
            }
            other => Err(into_error(other)),
        }
    }

    /// Sends a request that has no result.
    fn run(&mut self, request: &Request, timeout: Duration) -> Result<(), ControlError> {
        match self.send(request, timeout, Answerer::Daemon)? {
            Response::Done => Ok(()),
            other => Err(into_error(other)),
        }
    }

    /// Sends a request and waits for the response.
    ///
    /// If the daemon is killed meanwhile, or replaces itself because its keeper was killed, sends the request to the one
    /// that has taken its place. Every request can be executed twice: a layer that is on top already is not pushed again.
    fn send(
        &mut self,
        request: &Request,
        timeout: Duration,
        answerer: Answerer,
    ) -> Result<Response, ControlError> {
        let until = Instant::now() + REPLACEMENT_TIMEOUT;
        loop {
            let ended = match self.send_to(request, timeout, answerer) {
                Err(ControlError::Io(error)) if is_end(&error) => error,
                other => return other,
            };
            std::thread::sleep(REPLACEMENT_INTERVAL);
            match open(&self.socket) {
                Ok((stream, listener)) if Instant::now() < until => {
                    (self.stream, self.listener) = (stream, listener);
                    self.pid = sys::process::same_program_below(listener);
                }
                // Without a keeper, nothing listens any more.
                _ => return Err(ended.into()),
            }
        }
    }

    fn send_to(
        &mut self,
        request: &Request,
        timeout: Duration,
        answerer: Answerer,
    ) -> Result<Response, ControlError> {
        let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let until = Instant::now() + timeout;
        let mut response = Vec::new();
        let mut ended = false;
        loop {
            match self.stream.read_until(b'\n', &mut response) {
                Ok(_) if response.ends_with(b"\n") => break,
                Ok(_) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if answerer == Answerer::Daemon {
                        // If the daemon was killed before it accepted the connection, the next one does.
                        self.pid = sys::process::same_program_below(self.listener);
                    }
                    let (pid, process) = (self.pid, sys::process::inspect(self.pid));
                    if ended {
                        return Err(ControlError::Ending { pid });
                    }
                    // Race: a daemon that unmounts may respond and exit after the read timed out. Its response is in
                    // the socket's buffer then, so read once more.
                    ended = answerer == Answerer::Daemon
                        && (process.is_some_and(|process| process.killed)
                            || sys::process::is_gone(pid));
                    if ended {
                        continue;
                    }
                    let state = process.map(|process| process.state);
                    if state == Some('T') || Instant::now() >= until {
                        return Err(ControlError::Silent { pid, state });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        serde_json::from_slice(&response).map_err(|error| {
            let message = format!("its response is of another version: {error}");
            io::Error::other(message).into()
        })
    }
}

/// Connects to a socket. Returns the process that listens as well.
fn open(socket: &Path) -> io::Result<(BufReader<UnixStream>, u32)> {
    let (_dir, path) = short_path(socket)?;
    let stream = sys::socket::connect(&path, PING_TIMEOUT)?;
    let listener = sys::socket::peer_process(&stream)?;
    stream.set_write_timeout(Some(PING_TIMEOUT))?;
    stream.set_read_timeout(Some(POLL_INTERVAL))?;
    Ok((BufReader::new(stream), listener))
}

/// Whether the connection was closed by the other end.
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// Returns the error for a response that is not the expected one.
pub(super) fn into_error(response: Response) -> ControlError {
    match response {
        Response::Busy { writers, readers } => ControlError::Busy { writers, readers },
        Response::InUse { pids, binds } => ControlError::InUse { pids, binds },
        Response::Unattended { message } => ControlError::Unattended(message),
        Response::Failed { message } if message.starts_with(NOT_UNDERSTOOD) => {
            ControlError::NotUnderstood(message)
        }
        Response::Failed { message } => ControlError::Failed(message),
        Response::Done
        | Response::Status(_)
        | Response::Passthrough(_)
        | Response::Stats(_)
        | Response::Pushed(_)
        | Response::Replaced(_)
        | Response::Upgraded(_) => {
            ControlError::Io(io::Error::other("the response does not match the request"))
        }
    }
}

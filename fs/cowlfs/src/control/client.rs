//! The asking side.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Answer, Ask, Bind, NOT_UNDERSTOOD, Stats, Status, short_path};
use cowl_layers::sys;

/// How long a daemon may take to accept a connection, and to say that it lives.
const PRESENCE: Duration = Duration::from_secs(5);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is checked meanwhile whether the daemon was stopped.
const SLICE: Duration = Duration::from_millis(100);

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    /// The daemon's process.
    pid: u32,
}

/// Why a daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Files are open.
    #[error("{readers} descriptor(s) are open for reading, {writers} for writing")]
    Busy {
        /// How many for writing.
        writers: u32,
        /// How many for reading only.
        readers: u32,
    },
    /// Somebody uses the mount.
    #[error("the mount is in use")]
    InUse {
        /// Processes in other mount namespaces that hold a copy of it, for daemons that do not detach those.
        pids: Vec<u32>,
        /// Other mounts of the same file system.
        binds: Vec<Bind>,
    },
    /// It lives but does not answer.
    #[error("the daemon (pid {pid}) does not answer{}", described(*.state))]
    Silent {
        /// Its process; 0 where that can't be seen from here.
        pid: u32,
        /// The state of its process, as proc(5) names it.
        state: Option<char>,
    },
    /// It was killed, and the kernel has not ended its process yet.
    #[error("the daemon (pid {pid}) was killed and has not ended yet")]
    Ending {
        /// Its process.
        pid: u32,
    },
    /// It is of another version and does not know the question.
    #[error("{0}")]
    NotUnderstood(String),
    /// It tried and failed.
    #[error("{0}")]
    Failed(String),
    /// It could not be asked, or its answer made no sense.
    #[error("no answer from the daemon: {0}")]
    Io(#[from] io::Error),
}

/// What a process state means, in parentheses.
fn described(state: Option<char>) -> String {
    match state {
        Some(state @ ('T' | 't')) => format!(": it is stopped (state {state})"),
        Some(state) => format!(" (state {state})"),
        None => String::new(),
    }
}

impl Client {
    /// Connects to the socket of a daemon and waits until it says that it lives. That it does so is the proof: a
    /// process that was killed may hold its locks, and take connections, for a while.
    pub fn connect(socket: &Path) -> Result<Self, ControlError> {
        let (_folder, path) = short_path(socket)?;
        let stream = sys::socket::connect(&path, PRESENCE)?;
        let pid = sys::socket::peer_process(&stream)?;
        stream.set_write_timeout(Some(PRESENCE))?;
        stream.set_read_timeout(Some(SLICE))?;
        let mut client = Self {
            stream: BufReader::new(stream),
            pid,
        };
        match client.ask(&Ask::Ping, PRESENCE)? {
            // One that does not know the question lives as well.
            Answer::Done | Answer::Failed { .. } => Ok(client),
            other => Err(unexpected(other)),
        }
    }

    /// Returns the daemon's process id, 0 where that can't be seen from here.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it serves, and how busy it is.
    pub fn status(&mut self) -> Result<Status, ControlError> {
        // A push may be under way, for ten seconds at most.
        match self.ask(&Ask::Status, Duration::from_secs(12))? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected(other)),
        }
    }

    /// What it has done since it was started.
    pub fn stats(&mut self) -> Result<Stats, ControlError> {
        match self.ask(&Ask::Stats, PATIENCE)? {
            Answer::Stats(stats) => Ok(stats),
            other => Err(unexpected(other)),
        }
    }

    /// Puts an empty layer on top; see [`cowl_overlay::Overlay::push_layer`].
    pub fn push_layer(&mut self, upper: &Path, work: &Path) -> Result<(), ControlError> {
        let ask = Ask::PushLayer {
            upper: upper.as_os_str().as_bytes().to_vec(),
            work: work.as_os_str().as_bytes().to_vec(),
        };
        self.done(&ask, PATIENCE)
    }

    /// Has everything that programs stored through mappings written to the layers.
    pub fn flush(&mut self) -> Result<(), ControlError> {
        // As long as it takes to write all of the memory that is mapped.
        self.done(&Ask::Flush, Duration::from_secs(600))
    }

    /// Starts making the frozen layers durable in the background, and returns at once.
    pub fn settle(&mut self) -> Result<(), ControlError> {
        self.done(&Ask::Settle, PATIENCE)
    }

    /// Unmounts, unless the mount is in use anywhere, and returns at once.
    pub fn detach(&mut self) -> Result<(), ControlError> {
        self.done(&Ask::Detach, PATIENCE)
    }

    fn done(&mut self, ask: &Ask, patience: Duration) -> Result<(), ControlError> {
        match self.ask(ask, patience)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    fn ask(&mut self, ask: &Ask, patience: Duration) -> Result<Answer, ControlError> {
        let mut line = serde_json::to_vec(ask).map_err(io::Error::from)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let until = Instant::now() + patience;
        let mut answer = Vec::new();
        let mut ended = false;
        loop {
            match self.stream.read_until(b'\n', &mut answer) {
                Ok(_) if answer.ends_with(b"\n") => break,
                Ok(_) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let (pid, seen) = (self.pid, sys::process::inspect(self.pid));
                    if ended {
                        return Err(ControlError::Ending { pid });
                    }
                    // Race: a daemon that unmounts may answer and exit after the read timed out. Its answer is in the
                    // socket's buffer then, so read once more.
                    ended = seen.is_some_and(|seen| seen.killed) || sys::process::is_gone(pid);
                    if ended {
                        continue;
                    }
                    let state = seen.map(|seen| seen.state);
                    if state == Some('T') || Instant::now() >= until {
                        return Err(ControlError::Silent { pid, state });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        serde_json::from_slice(&answer).map_err(|error| {
            let what = format!("it answers as another version does: {error}");
            io::Error::other(what).into()
        })
    }
}

fn unexpected(answer: Answer) -> ControlError {
    match answer {
        Answer::Busy { writers, readers } => ControlError::Busy { writers, readers },
        Answer::InUse { pids, binds } => ControlError::InUse { pids, binds },
        Answer::Failed { why } if why.starts_with(NOT_UNDERSTOOD) => {
            ControlError::NotUnderstood(why)
        }
        Answer::Failed { why } => ControlError::Failed(why),
        Answer::Done | Answer::Status(_) | Answer::Stats(_) => {
            ControlError::Io(io::Error::other("an answer to another question"))
        }
    }
}

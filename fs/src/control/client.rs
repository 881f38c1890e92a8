//! The asking side.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{Answer, Ask, NOT_UNDERSTOOD, Stats, Status, short_path};

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// Why a daemon did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Files are open for writing.
    #[error("{writers} descriptor(s) are open for writing")]
    Busy {
        /// How many.
        writers: u32,
    },
    /// Somebody uses the mount.
    #[error("the mount is in use")]
    InUse {
        /// Processes in other mount namespaces that hold it; those of this one are found by who asked.
        pids: Vec<u32>,
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

impl Client {
    /// Connects to the socket of a daemon.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let (_folder, path) = short_path(socket)?;
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// What it serves, and how busy it is.
    pub fn status(&mut self) -> Result<Status, ControlError> {
        // A push may be under way, for ten seconds at most; a daemon that takes longer is stopped.
        self.stream
            .get_ref()
            .set_read_timeout(Some(Duration::from_secs(12)))?;
        match self.ask(&Ask::Status)? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected(other)),
        }
    }

    /// What it has done since it was started.
    pub fn stats(&mut self) -> Result<Stats, ControlError> {
        match self.ask(&Ask::Stats)? {
            Answer::Stats(stats) => Ok(stats),
            other => Err(unexpected(other)),
        }
    }

    /// Puts an empty layer on top; see [`crate::overlay::Overlay::push_layer`].
    pub fn push_layer(&mut self, upper: &Path, work: &Path) -> Result<(), ControlError> {
        let ask = Ask::PushLayer {
            upper: upper.as_os_str().as_bytes().to_vec(),
            work: work.as_os_str().as_bytes().to_vec(),
        };
        self.done(&ask)
    }

    /// Has everything that programs stored through mappings written to the layers.
    pub fn flush(&mut self) -> Result<(), ControlError> {
        // As long as it takes to write all of the memory that is mapped.
        self.stream
            .get_ref()
            .set_read_timeout(Some(Duration::from_secs(600)))?;
        self.done(&Ask::Flush)
    }

    /// Starts making the frozen layers durable in the background, and returns at once.
    pub fn settle(&mut self) -> Result<(), ControlError> {
        self.done(&Ask::Settle)
    }

    /// Unmounts, unless the mount is in use anywhere, and returns at once.
    pub fn detach(&mut self) -> Result<(), ControlError> {
        self.done(&Ask::Detach)
    }

    fn done(&mut self, ask: &Ask) -> Result<(), ControlError> {
        match self.ask(ask)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    fn ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        let mut line = serde_json::to_vec(ask)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let mut answer = String::new();
        if self.stream.read_line(&mut answer)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&answer).map_err(|error| {
            io::Error::other(format!("it answers as another version does: {error}"))
        })
    }
}

fn unexpected(answer: Answer) -> ControlError {
    match answer {
        Answer::Busy { writers } => ControlError::Busy { writers },
        Answer::InUse { pids } => ControlError::InUse { pids },
        Answer::Failed { why } if why.starts_with(NOT_UNDERSTOOD) => {
            ControlError::NotUnderstood(why)
        }
        Answer::Failed { why } => ControlError::Failed(why),
        Answer::Done | Answer::Status(_) | Answer::Stats(_) => {
            ControlError::Io(io::Error::other("an answer to another question"))
        }
    }
}

//! The side of the running daemon.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cowl_layers::points::point;
use cowl_layers::shown::Show as _;
use cowl_layers::{panics, sys};
use cowl_overlay::Overlay;

use super::ConfigRecord;
use super::bundle::{Arbiter, Bundle, DescriptorCounts, Origin};
use super::transfer::{self, Answer};
use crate::config::{Config, Successor, Supervision};
use crate::control::{NextProgram, OwnMount, StatsSource};
use crate::fuse::{ClosedGate, SessionSource};
use crate::keeper::{self, Custody};

/// The time in which the successor must start, the running requests must end, and the successor must be ready, each.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The additional time for each known inode.
const TIME_FOR_INODE: Duration = Duration::from_micros(100);
/// The time in which a process ends that has closed the connection.
const GRACE: Duration = Duration::from_millis(100);
/// The environment variables that the successor inherits, apart from those of cowl.
const ENVIRONMENT: [&str; 4] = ["PATH", "HOME", "XDG_RUNTIME_DIR", "RUST_BACKTRACE"];

/// A running daemon that can be replaced.
pub(crate) struct Predecessor {
    pub(crate) session: SessionSource,
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) config: Config,
    pub(crate) mount: OwnMount,
    pub(crate) stats: StatsSource,
    pub(crate) listener: Option<UnixListener>,
    pub(crate) lacking: Vec<String>,
    /// The connection to the keeper, if there is one.
    pub(crate) custody: Option<Arc<Custody>>,
    /// A process that waits for the end of the mount.
    pub(crate) supervisor: Option<Arc<UnixStream>>,
}

/// A started successor. Dropping it kills the process.
struct Started {
    child: Child,
    stream: UnixStream,
}

impl Drop for Started {
    fn drop(&mut self) {
        // Before the connection is closed: the successor takes its end as that of the predecessor.
        let ended = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = ended {
            log::warn!("cannot end the process {}: {error}", self.child.id());
        }
    }
}

impl Predecessor {
    /// Replaces this process by one that runs `program`, and which answers the client if there is one. Returns only the
    /// reason why that failed.
    pub(crate) fn hand_over(&self, program: NextProgram<'_>) -> String {
        match self.attempt(program) {
            Ok(never) => match never {},
            Err(reason) => reason,
        }
    }

    /// Returns the connection to the keeper, if there is one that lives.
    fn custody(&self) -> Option<&Arc<Custody>> {
        let custody = self.custody.as_ref();
        custody.filter(|custody| custody.keeper().is_some())
    }

    fn attempt(&self, program: NextProgram<'_>) -> Result<Infallible, String> {
        let (successor, mut started) = self.prepare(program)?;
        let busy = "requests were running for ten seconds without a pause";
        let gate = self.session.close_gate(TIMEOUT).ok_or(busy)?;
        point("before a handover");
        self.send(&gate, successor, &mut started, program.client())?;
        let stream = &started.stream;
        let custody = self.custody();
        point("before the permission of a successor");
        // Nothing before is final. If this process is killed before the message is sent, the keeper starts another one.
        if custody.is_none_or(|custody| custody.replace(stream.as_fd()).is_err())
            && let Err(error) = keeper::permit(stream)
        {
            return Err(format!("the new process has ended: {error}"));
        }
        point("after the permission of a successor");
        // Nothing may be dropped: the session, its locks and registrations now belong to the successor.
        sys::process::end_now()
    }

    /// Starts the successor, and waits for its first message.
    fn prepare(&self, program: NextProgram<'_>) -> Result<(&Successor, Started), String> {
        if !self.session.can_resend() {
            return Err(
                "the kernel cannot resend requests: Linux 6.9 or later is needed".to_owned(),
            );
        }
        let unable = "the program that mounted it does not support it";
        let successor = self.config.successor.as_ref().ok_or(unable)?;
        let mut started = start(program, successor)?;
        let stream = &started.stream;
        let hello = (stream.set_read_timeout(Some(TIMEOUT)))
            .and_then(|()| stream.set_write_timeout(Some(TIMEOUT)))
            .and_then(|()| transfer::receive_hello(stream))
            .map_err(|error| started.failed("before it has received the state", &error))?;
        match hello.refusal() {
            Some(reason) => Err(reason),
            None => Ok((successor, started)),
        }
    }

    /// Sends the state, and waits until the successor is ready.
    fn send(
        &self,
        gate: &ClosedGate<'_>,
        successor: &Successor,
        started: &mut Started,
        client: Option<&UnixStream>,
    ) -> Result<(), String> {
        let since = sys::process::monotonic_time();
        let recorded = self.session.record(gate, &self.overlay);
        let (session, handover) = recorded.map_err(|error| error.to_string())?;
        let (overlay, layers) = handover.to_parts();
        let mut descriptors = vec![self.session.device()];
        descriptors.extend(self.listener.iter().map(|listener| listener.as_fd()));
        descriptors.extend(client.iter().map(|client| client.as_fd()));
        descriptors.extend(self.supervisor.iter().map(|stream| stream.as_fd()));
        descriptors.extend(successor.descriptors.iter().map(|fd| fd.as_fd()));
        let counts = DescriptorCounts {
            listener: self.listener.is_some(),
            client: client.is_some(),
            supervisor: self.supervisor.is_some(),
            successor: successor.descriptors.len(),
            overlay: layers.len(),
        };
        descriptors.extend(layers);
        let bundle = Bundle {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            origin: Origin::Stopped { since },
            arbiter: match self.custody() {
                Some(_) => Arbiter::Keeper,
                None => Arbiter::None,
            },
            is_supervised: self.custody().is_some() && self.config.supervision == Supervision::On,
            overlay,
            session,
            config: ConfigRecord::new(&self.config),
            mount: self.mount.to_record(),
            requests: self.stats.requests().to_record(),
            uptime: self.stats.uptime(),
            panics: panics::caught(),
            lacking: self.lacking.clone(),
            state: successor.state.clone(),
            descriptors: counts,
        };
        let bytes = bundle.encode().map_err(|error| error.to_string())?;
        drop(bundle);
        let inodes = u32::try_from(self.overlay.inodes().len()).unwrap_or(u32::MAX);
        let timeout = Some(TIMEOUT + TIME_FOR_INODE * inodes);
        let answer = (started.stream.set_read_timeout(timeout))
            .and_then(|()| transfer::send_bundle(&started.stream, &bytes, &descriptors))
            .and_then(|()| transfer::receive_answer(&started.stream))
            .map_err(|error| started.failed("before it was ready", &error))?;
        match answer {
            Answer::Ready => Ok(()),
            Answer::Failed(reason) => Err(reason),
        }
    }
}

impl Started {
    /// Returns the message about a failed exchange.
    fn failed(&mut self, when: &str, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => {
                // A process that has closed the connection without an answer is about to end.
                std::thread::sleep(GRACE);
                let status = self.child.try_wait().ok().flatten();
                let status = status
                    .map(|status| format!(" ({status})"))
                    .unwrap_or_default();
                format!("the new process ended {when}{status}; its messages are in the log")
            }
            io::ErrorKind::WouldBlock => format!("the new process did not answer in time {when}"),
            _ => format!("the new process failed {when}: {error}"),
        }
    }
}

/// Returns a path to the client's program in this mount namespace, which may lack the mount that the program is on.
fn find(program: &Path, client: &UnixStream) -> PathBuf {
    if program.try_exists().unwrap_or(false) {
        return program.to_owned();
    }
    let Ok(below) = program.strip_prefix("/") else {
        return program.to_owned();
    };
    match sys::socket::peer_process(client) {
        Ok(pid) if pid != 0 => PathBuf::from(format!("/proc/{pid}/root")).join(below),
        _ => program.to_owned(),
    }
}

fn start(program: NextProgram<'_>, successor: &Successor) -> Result<Started, String> {
    let (program, name) = match program {
        NextProgram::Of { program, client } => (find(program, client), None),
        // Also if the file was replaced or removed.
        NextProgram::Own => ("/proc/self/exe".into(), std::env::args_os().next()),
    };
    let cannot = |error: io::Error| format!("cannot start {}: {error}", program.shown());
    let (stream, theirs) = UnixStream::pair().map_err(cannot)?;
    let inherited = std::env::vars_os().filter(|(name, _)| is_inherited(name));
    let child = Command::new(&program)
        .arg0(name.as_deref().unwrap_or(program.as_os_str()))
        .args(&successor.arguments)
        .env_clear()
        .envs(inherited)
        .current_dir("/")
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .map_err(cannot)?;
    Ok(Started { child, stream })
}

fn is_inherited(name: &OsString) -> bool {
    name.as_bytes().starts_with(b"COWL_") || ENVIRONMENT.iter().any(|other| name == other)
}

//! Continues the mount of another process, the predecessor.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::daemon::{Daemon, session_settings};
use super::{create_requests, failed};
use crate::config::Config;
use crate::control::{self, OwnMount, Signals, Upgraded};
use crate::fuse::{self, Predecessor, SessionRecord};
use crate::keeper;
use crate::limits;
use crate::start::{Event, Start};
use crate::takeover::{self, Answer, Arbiter, Bundle, Origin};
use cowl_layers::points::{self, point};
use cowl_layers::setup::SetupError;
use cowl_layers::{panics, sys};
use cowl_overlay::{FileHandle, HandoverRecord, Overlay};

/// The interval between checks of whether the predecessor has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The state of a predecessor, which waits for this process to be ready, or was killed.
///
/// The predecessor has started this process, with a socket as standard input.
pub struct Takeover {
    connection: Connection,
    signals: Signals,
    lacking: Vec<String>,
    config: Config,
    state: Vec<u8>,
    successor_descriptors: Vec<OwnedFd>,
    device: OwnedFd,
    listener: Option<UnixListener>,
    client: Option<UnixStream>,
    supervisor: Option<UnixStream>,
    overlay: (HandoverRecord, Vec<OwnedFd>),
    session: SessionRecord,
    mount: OwnMount,
    stats: Counted,
    /// The version of the predecessor.
    from: String,
    origin: Origin,
    arbiter: Arbiter,
    /// Whether the keeper of the predecessor waits for the end of the mount.
    is_supervised: bool,
}

impl fmt::Debug for Takeover {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Takeover").finish_non_exhaustive()
    }
}

/// The counters of the predecessor.
struct Counted {
    requests: Vec<(String, u64)>,
    uptime: Duration,
    panics: u64,
}

/// The connection to the predecessor.
struct Connection(UnixStream);

impl Connection {
    /// Takes the socket from standard input, so that no other code uses it.
    fn take() -> io::Result<Self> {
        let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let null = std::fs::File::open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        Ok(Self(stream))
    }

    /// Reports an error to the predecessor, which then continues.
    fn report(&self, error: &SetupError) {
        if let Err(error) = takeover::send_answer(&self.0, &Answer::Failed(error.to_string())) {
            log::info!("cannot report to the running daemon: {error}");
        }
    }

    /// Reports that this process is ready, and waits until the predecessor has ended.
    ///
    /// If the predecessor was killed meanwhile, its keeper starts another daemon, and this process ends. Without a keeper
    /// this process takes over as well: no request had an effect since the state was recorded.
    fn take_over(mut self, arbiter: Arbiter) -> io::Result<UnixStream> {
        point("before a successor is ready");
        match takeover::send_answer(&self.0, &Answer::Ready) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
        point("after a successor is ready");
        if arbiter == Arbiter::Keeper {
            self.wait_for_permission()?;
        }
        self.wait_for_end()?;
        Ok(self.0)
    }

    fn wait_for_permission(&mut self) -> io::Result<()> {
        let mut byte = [0];
        self.0.read_exact(&mut byte)?;
        match byte {
            [keeper::PROCEED] => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Waits until no thread of the predecessor can read a request any more.
    ///
    /// The connection ends with its last thread. One that waits for a disk in the kernel may take seconds to end, for
    /// example to sync a file system, but the threads that read requests are gone at once.
    fn wait_for_end(&mut self) -> io::Result<()> {
        let predecessor = sys::socket::peer_process(&self.0)?;
        self.0.set_read_timeout(Some(POLL_INTERVAL))?;
        loop {
            match self.0.read(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.kind() {
                    io::ErrorKind::ConnectionReset => return Ok(()),
                    io::ErrorKind::WouldBlock
                        if predecessor != 0
                            && !sys::process::has_thread(predecessor, fuse::WORKER_NAME) =>
                    {
                        return Ok(());
                    }
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl Takeover {
    /// Receives the state. To be called before the process has a second thread.
    ///
    /// Nothing of the mount changes before [`Self::serve`] succeeds: after an error the predecessor continues.
    pub fn receive() -> Result<Self, SetupError> {
        let cannot = |error| failed(format!("cannot receive the state of the daemon: {error}"));
        let connection = Connection::take().map_err(cannot)?;
        let signals = Signals::block();
        let lacking = limits::set_up();
        sys::process::take_name_of_program();
        takeover::send_hello(&connection.0).map_err(cannot)?;
        let received = takeover::receive_bundle(&connection.0).map_err(cannot)?;
        let divided = received
            .map_err(|error| failed(error.to_string()))
            .and_then(|(bundle, descriptors)| {
                let lost = || failed("descriptors of the running daemon are missing".to_owned());
                Divided::new(bundle.descriptors, descriptors)
                    .ok_or_else(lost)
                    .map(|divided| (bundle, divided))
            })
            .inspect_err(|error| connection.report(error));
        let (bundle, divided) = divided?;
        let Bundle {
            program,
            origin,
            arbiter,
            is_supervised,
            overlay,
            session,
            config,
            mount,
            requests,
            uptime,
            panics,
            lacking: inherited,
            state,
            descriptors: _,
        } = bundle;
        if arbiter == Arbiter::Keeper {
            points::arm();
            point("with a received state");
        }
        let config = config.into_config();
        let mounter = config.mounter;
        // Limits and flags of a process are inherited. This process may lack the privilege to set them again.
        let mut lacking = lacking;
        lacking.retain(|name| inherited.contains(name));
        Ok(Self {
            connection,
            signals,
            lacking,
            config,
            state,
            successor_descriptors: divided.successor,
            device: divided.device,
            listener: divided.listener.map(UnixListener::from),
            client: divided.client.map(UnixStream::from),
            supervisor: divided.supervisor.map(UnixStream::from),
            overlay: (overlay, divided.overlay),
            session,
            mount: mount.into_mount(mounter),
            stats: Counted {
                requests,
                uptime,
                panics,
            },
            from: program,
            origin,
            arbiter,
            is_supervised,
        })
    }

    /// Returns the configuration, which lacks [`Config::settle`] and [`Config::successor`].
    pub fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    /// Returns [`crate::config::Successor::state`] of the predecessor.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Takes [`crate::config::Successor::descriptors`] of the predecessor.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.successor_descriptors)
    }

    /// Reports an error of this program to the predecessor, which then continues.
    pub fn refuse(&self, error: &SetupError) {
        self.connection.report(error);
    }

    /// Takes over, reports each [`Event`], and serves requests until the unmount; see [`crate::serve()`].
    pub fn serve(self, mut on: impl FnMut(Event)) -> Result<(), SetupError> {
        let Self {
            connection,
            signals,
            lacking,
            config,
            device,
            listener,
            client,
            supervisor,
            overlay,
            session,
            mount,
            stats: counted,
            from,
            origin,
            arbiter,
            is_supervised,
            ..
        } = self;
        let report = |error: &SetupError| connection.report(error);
        let (overlay, files) = rebuild(overlay).inspect_err(report)?;
        let (requests, started) = (create_requests().inspect_err(report)?, Instant::now());
        requests.add(&counted.requests);
        panics::continue_from(counted.panics);
        let settings = session_settings(&config, &requests);
        let cannot = |error| failed(format!("cannot continue the session: {error}"));
        let kept_device = device.try_clone().map_err(cannot)?;
        let predecessor = Predecessor::Running(session, files);
        let attached = fuse::resume(
            device,
            overlay.clone(),
            predecessor,
            &config.mount,
            &settings,
        )
        .map_err(cannot)
        .inspect_err(report)?;
        let connection = connection
            .take_over(arbiter)
            .map(Arc::new)
            .map_err(|error| failed(format!("the running daemon did not end: {error}")))?;
        if let Some(listener) = &listener
            && let Err(error) = control::listen_again(listener)
        {
            log::warn!("clients may take this daemon for an ended one: {error}");
        }
        let supervisor = match is_supervised {
            true => Some(connection.clone()),
            false => supervisor.map(Arc::new),
        };
        let Origin::Stopped { since } = origin;
        point("after a handover");
        let mut requested = Requested {
            client,
            pid: std::process::id(),
            from,
            since,
        };
        let start = Start {
            overlay,
            attached,
            kept_device,
            settings,
            predecessor: Some(connection),
        };
        let mut on = |event| {
            on(event);
            requested.note(event);
        };
        let daemon = Daemon {
            serving: start.begin(&config, &mut on)?,
            config,
            mount,
            requests,
            uptime: (started, counted.uptime),
            supervisor,
            listener,
            lacking,
        };
        daemon.run(signals, on)
    }
}

/// A takeover that a client has requested.
struct Requested {
    client: Option<UnixStream>,
    /// The process that lasts as long as the mount.
    pid: u32,
    /// The version of the predecessor.
    from: String,
    /// The moment from which requests waited.
    since: Duration,
}

impl Requested {
    /// Logs the takeover, and answers the client, in the first process that serves the mount.
    fn note(&mut self, event: Event) {
        let Some(client) = self.client.take().filter(|_| event != Event::Kept) else {
            return;
        };
        let pause = sys::process::monotonic_time().saturating_sub(self.since);
        let upgraded = Upgraded {
            pid: self.pid,
            from: self.from.clone(),
            to: env!("CARGO_PKG_VERSION").to_owned(),
            pause: pause.as_secs_f64(),
        };
        log::info!(
            "took over from version {}: requests waited for {:.1} ms",
            upgraded.from,
            upgraded.pause * 1e3
        );
        if let Err(error) = control::answer_upgraded(client, upgraded) {
            log::info!("cannot answer the client: {error}");
        }
    }
}

type Rebuilt = (Arc<Overlay>, HashMap<u64, Arc<FileHandle>>);

fn rebuild((record, descriptors): (HandoverRecord, Vec<OwnedFd>)) -> Result<Rebuilt, SetupError> {
    let rebuilt = record
        .into_handover(descriptors)
        .and_then(Overlay::rebuild)
        .map_err(|error| failed(error.to_string()))?;
    Ok((Arc::new(rebuilt.overlay), rebuilt.files))
}

/// The received descriptors by their purposes.
struct Divided {
    device: OwnedFd,
    listener: Option<OwnedFd>,
    client: Option<OwnedFd>,
    supervisor: Option<OwnedFd>,
    successor: Vec<OwnedFd>,
    overlay: Vec<OwnedFd>,
}

impl Divided {
    /// Divides the descriptors; `None` if their number is wrong.
    fn new(counts: takeover::DescriptorCounts, descriptors: Vec<OwnedFd>) -> Option<Self> {
        if descriptors.len() != counts.total() {
            return None;
        }
        let mut rest = descriptors.into_iter();
        let device = rest.next()?;
        let listener = if counts.listener { rest.next() } else { None };
        let client = if counts.client { rest.next() } else { None };
        let supervisor = if counts.supervisor { rest.next() } else { None };
        Some(Self {
            device,
            listener,
            client,
            supervisor,
            successor: rest.by_ref().take(counts.successor).collect(),
            overlay: rest.collect(),
        })
    }
}

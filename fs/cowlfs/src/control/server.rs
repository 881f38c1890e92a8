//! The server side of the control socket, in threads of the daemon.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::detach::{self, Detached};
use super::{
    FuseConnection, NOT_UNDERSTOOD, OwnMount, Request, Response, StatsSource, Status, Upgraded,
    short_path,
};
use super::{layers, passthrough};
use crate::config::Config;
use crate::fuse::PassthroughFiles;
use crate::keeper::Custody;
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_overlay::{Overlay, prepare_push};

/// The time limit for a client to send a request and to receive the response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Creates the socket. Replaces one that a dead daemon left behind.
pub(crate) fn listen(socket: &Path) -> io::Result<UnixListener> {
    let (_dir, path) = short_path(socket)?;
    match std::fs::symlink_metadata(&path) {
        Ok(existing) if existing.file_type().is_socket() => std::fs::remove_file(&path)?,
        Ok(_) => return Err(io::Error::other("the path exists and is not a socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    UnixListener::bind(path)
}

/// Makes the kernel report this process as the peer of clients, instead of the predecessor that created the socket.
pub(crate) fn listen_again(listener: &UnixListener) -> io::Result<()> {
    /// The number of connections that wait to be accepted, as in the standard library.
    const BACKLOG: i32 = 128;
    Ok(rustix::net::listen(listener, BACKLOG)?)
}

/// The state that requests need.
struct Server {
    /// Serializes requests that change anything or take long. Always locked before `upper`.
    changes: Mutex<()>,
    /// Serializes changes of the upper layer with queries of the status. A client that queries the status during a push
    /// must learn the result of the push, because it decides by it which manifest is valid.
    upper: Mutex<()>,
    mount: ServedMount,
}

impl Server {
    fn new(mount: ServedMount) -> Self {
        Self {
            changes: Mutex::new(()),
            upper: Mutex::new(()),
            mount,
        }
    }

    /// Takes the locks that a request needs.
    ///
    /// A status does not wait for a replacement of lower layers or a flush, which can take minutes.
    fn lock(&self, request: &Request) -> [Option<MutexGuard<'_, ()>>; 2] {
        match request {
            // A ping proves that the daemon works, even during another request.
            Request::Ping | Request::Stats => [None, None],
            Request::Status | Request::Passthrough => [None, Some(self.upper.lock())],
            Request::ReplaceLayers { .. } | Request::Flush | Request::Settle => {
                [Some(self.changes.lock()), None]
            }
            Request::PushLayer { .. } | Request::Detach | Request::Upgrade { .. } => {
                [Some(self.changes.lock()), Some(self.upper.lock())]
            }
        }
    }
}

/// Writes back the dirty pages of a file in the kernel; see [`crate::fuse`].
pub(crate) type Flush = Box<dyn Fn(u64) -> io::Result<()> + Send + Sync>;

/// The parts of a daemon that requests query and change.
pub(crate) struct ServedMount {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) config: Config,
    pub(crate) mount: OwnMount,
    pub(crate) stats: StatsSource,
    pub(crate) flush: Arc<Flush>,
    pub(crate) passthrough: PassthroughFiles,
    pub(crate) connection: FuseConnection,
    /// The limits and privileges that the daemon may not change.
    pub(crate) lacking: Vec<String>,
    /// The connection to the keeper, if there is one.
    pub(crate) custody: Option<Arc<Custody>>,
    /// Replaces the daemon.
    pub(crate) upgrade: Upgrade,
}

/// Replaces this process by one that runs a program. The new process answers the client, if there is one.
///
/// Returns only if that failed, with the reason.
pub(crate) type Upgrade = Box<dyn Fn(NextProgram<'_>) -> String + Send + Sync>;

/// The program that takes over from this process.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NextProgram<'a> {
    /// The program of a client.
    Of {
        program: &'a Path,
        client: &'a UnixStream,
    },
    /// This program itself.
    Own,
}

impl<'a> NextProgram<'a> {
    /// Returns the client that waits for an answer.
    pub(crate) fn client(self) -> Option<&'a UnixStream> {
        match self {
            Self::Of { client, .. } => Some(client),
            Self::Own => None,
        }
    }
}

/// The pause after the first failed attempt to start a new keeper, which doubles up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(600);

/// The number of descriptors that are reserved for clients: the connection, and those that a pushed layer needs.
const RESERVE: usize = 16;

/// The delay after the first failed attempt to accept a client, which doubles up to [`MAX_DELAY`].
const MIN_DELAY: Duration = Duration::from_millis(10);
const MAX_DELAY: Duration = Duration::from_secs(5);

/// Serves clients until the process ends, each in a thread of its own. If the keeper ends, starts a new one.
pub(crate) fn serve(listener: Option<UnixListener>, mount: ServedMount) -> io::Result<()> {
    let custody = mount.custody.clone();
    let server = Arc::new(Server::new(mount));
    if let Some(custody) = custody {
        let server = server.clone();
        let name = "keeper".to_owned();
        let replace = move || replace_keeper(&custody, &server);
        thread::Builder::new().name(name).spawn(replace)?;
    }
    let Some(listener) = listener else {
        return Ok(());
    };
    let name = "control".to_owned();
    let accept = move || accept_clients(&listener, &server);
    thread::Builder::new().name(name).spawn(accept).map(drop)
}

/// Waits for the end of the keeper, and replaces this process by one that has a keeper.
fn replace_keeper(custody: &Custody, server: &Server) {
    if let Err(error) = custody.wait_for_end() {
        return log::warn!("the end of the keeper will not be noticed: {error}");
    }
    let mut pause = MIN_PAUSE;
    loop {
        let (changes, upper) = (server.changes.lock(), server.upper.lock());
        if server.mount.connection.wait_for_end(Duration::ZERO) {
            return;
        }
        let reason = (server.mount.upgrade)(NextProgram::Own);
        drop((upper, changes));
        let level = match pause {
            MIN_PAUSE => log::Level::Error,
            _ => log::Level::Debug,
        };
        log::log!(
            level,
            "cannot start a new keeper, so the mount ends if this process is killed: {reason}; trying again"
        );
        thread::sleep(pause);
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Accepts clients until the process ends.
fn accept_clients(listener: &UnixListener, server: &Arc<Server>) {
    let mut reserve = Reserve::take();
    let mut delay = MIN_DELAY;
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // The client waits in the queue of the socket. With a descriptor from the reserve or from the cache
                // of open files, the next attempt succeeds.
                let evicted = sys::open::evict_cached();
                log::warn!("cannot accept a client: {error}; {evicted} descriptors were closed");
                reserve.release();
                thread::sleep(delay);
                delay = (delay * 2).min(MAX_DELAY);
                continue;
            }
        };
        delay = MIN_DELAY;
        if reserve.is_released() {
            // Until there are enough descriptors again, one client at a time, which cannot open further ones.
            report(serve_client(stream, server));
            reserve = Reserve::take();
            continue;
        }
        // The client is served here if the thread cannot be started.
        let pending = Arc::new(Mutex::new(Some(stream)));
        let (taken, shared) = (pending.clone(), server.clone());
        let started = thread::Builder::new().spawn(move || {
            if let Some(stream) = take(&taken) {
                report(serve_client(stream, &shared));
            }
        });
        if let Err(error) = started {
            log::warn!("cannot start a thread for a client: {error}");
            if let Some(stream) = take(&pending) {
                report(serve_client(stream, server));
            }
        }
    }
}

fn take(stream: &Mutex<Option<UnixStream>>) -> Option<UnixStream> {
    stream.lock().take()
}

fn report(served: io::Result<()>) {
    if let Err(error) = served {
        log::info!("control connection: {error}");
    }
}

/// Descriptors that are released for clients when the process has no others left.
struct Reserve(Vec<File>);

impl Reserve {
    /// Opens as many descriptors as a request needs, or none if that fails.
    fn take() -> Self {
        let opened = (0..RESERVE).map(|_| File::open("/dev/null"));
        Self(opened.collect::<io::Result<_>>().unwrap_or_default())
    }

    fn release(&mut self) {
        self.0.clear();
    }

    fn is_released(&self) -> bool {
        self.0.is_empty()
    }
}

/// Answers the requests of one client until it closes the connection.
fn serve_client(stream: UnixStream, server: &Server) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 {
        let (response, detached) = match serde_json::from_str(&line) {
            Ok(request) => {
                let _serialized = server.lock(&request);
                // Race: the client may have been killed while it waited for the lock, and the next command may already
                // have concluded that the request had no effect. So the request must not be executed any more.
                let is_closed = sys::socket::peer_is_gone(stream.get_ref())
                    .map_err(|error| io::Error::from_raw_os_error(error.errno().raw_os_error()))?;
                if is_closed {
                    return Ok(());
                }
                match request {
                    Request::Upgrade { program } => {
                        let program = Path::new(OsStr::from_bytes(&program));
                        (upgrade(program, stream.get_ref(), &server.mount), None)
                    }
                    request => execute(request, &server.mount),
                }
            }
            Err(error) => (not_understood(&line, &error), None),
        };
        let mut text = serde_json::to_vec(&response)?;
        text.push(b'\n');
        stream.get_mut().write_all(&text)?;
        // This drops the last mount. The kernel then drops its caches, the worker threads answer the requests that this
        // causes, and the process exits.
        if let Some(detached) = detached {
            detached.end(&server.mount.connection);
        }
        line.clear();
    }
    Ok(())
}

/// Returns the response to an unknown request, which names the request if there is a name.
fn not_understood(line: &str, error: &serde_json::Error) -> Response {
    let value = serde_json::from_str::<serde_json::Value>(line);
    let name = value
        .as_ref()
        .ok()
        .and_then(|value| value.get("ask")?.as_str());
    let message = match name {
        Some(name) => format!(
            "{NOT_UNDERSTOOD}: a daemon of version {} does not know the request \"{}\" ({error})",
            env!("CARGO_PKG_VERSION"),
            name.shown()
        ),
        None => format!("{NOT_UNDERSTOOD}: {error}"),
    };
    Response::Failed { message }
}

/// Executes a request. Returns the response, and after a [`Request::Detach`] the mount, to be ended after the response.
fn execute(request: Request, served: &ServedMount) -> (Response, Option<Detached>) {
    let (overlay, config) = (&served.overlay, &served.config);
    let custody = served.custody.as_ref();
    match request {
        Request::Status => (Response::Status(Box::new(status(served))), None),
        Request::Passthrough => {
            let status = passthrough::query(overlay, config, served.passthrough.refusal(overlay));
            (Response::Passthrough(status), None)
        }
        Request::PushLayer {
            upper,
            work,
            writers,
        } => {
            let upper = Path::new(OsStr::from_bytes(&upper));
            let work = Path::new(OsStr::from_bytes(&work));
            let pushed = layers::push(
                (overlay, custody),
                config,
                (upper, work),
                (writers, &served.passthrough),
                |ino| (served.flush)(ino),
            );
            (pushed, None)
        }
        Request::ReplaceLayers { lowers } => {
            let invalidate = |ino| (served.flush)(ino);
            (
                layers::replace((overlay, custody), config, lowers, invalidate),
                None,
            )
        }
        Request::Flush => (flush(served), None),
        Request::Stats => (stats(served), None),
        Request::Ping => (Response::Done, None),
        Request::Detach => match detach::detach(overlay, &served.mount) {
            Ok(detached) => (Response::Done, Some(detached)),
            Err(response) => (response, None),
        },
        Request::Settle => (settle(config), None),
        // Its caller handles it, because it needs the connection.
        Request::Upgrade { .. } => {
            let message = "an upgrade needs a connection".to_owned();
            (Response::Failed { message }, None)
        }
    }
}

/// Replaces the daemon. Returns only the reason why that failed.
fn upgrade(program: &Path, client: &UnixStream, served: &ServedMount) -> Response {
    let message = match sys::socket::peer_may_command(client) {
        Ok(true) => (served.upgrade)(NextProgram::Of { program, client }),
        Ok(false) => "only the daemon's user and root may replace it".to_owned(),
        Err(error) => format!("cannot determine the user of the client: {error}"),
    };
    log::warn!("not replaced by {}: {message}", program.shown());
    Response::Failed { message }
}

/// Answers the client that has requested to replace the predecessor of this process.
pub(crate) fn answer_upgraded(mut client: UnixStream, upgraded: Upgraded) -> io::Result<()> {
    let mut text = serde_json::to_vec(&Response::Upgraded(upgraded))?;
    text.push(b'\n');
    client.write_all(&text)
}

fn status(served: &ServedMount) -> Status {
    let (overlay, config) = (&served.overlay, &served.config);
    let (open_files, open_for_write) = overlay.open_files().unwrap_or_default();
    let (upper, lowers) = overlay.layer_paths();
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    Status {
        pid: served.stats.pid(),
        mountpoint: bytes(&config.mountpoint),
        upper: upper.as_deref().map(bytes),
        lowers: lowers.iter().map(|path| bytes(path)).collect(),
        open_files,
        open_for_write,
        inodes: overlay.inodes().len(),
        lacking: served.lacking.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        keeper: served.stats.keeper(),
    }
}

fn stats(served: &ServedMount) -> Response {
    match served.stats.read() {
        Ok(stats) => Response::Stats(stats),
        Err(error) => Response::Failed {
            message: format!("cannot read the memory usage: {error}"),
        },
    }
}

/// Writes everything that programs have stored through mappings to the layers.
fn flush(served: &ServedMount) -> Response {
    for ino in cowl_overlay::unopened::possibly_mapped(&served.overlay) {
        if let Err(error) = (served.flush)(ino) {
            let message = format!("cannot write back mapped pages: {error}");
            return Response::Failed { message };
        }
    }
    // Those of files that the kernel writes itself: a push would have to wait for them.
    prepare_push(&served.overlay, &served.passthrough.in_use());
    Response::Done
}

/// Wakes the thread of the daemon that syncs layers. It does not wait for the sync.
fn settle(config: &Config) -> Response {
    match config.settle.as_ref().map(|settle| settle.send(())) {
        Some(Ok(())) => Response::Done,
        Some(Err(error)) => Response::Failed {
            message: format!("the thread that syncs layers has exited: {error}"),
        },
        None => Response::Failed {
            message: format!("{NOT_UNDERSTOOD}: this daemon does not sync its layers"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use cowl_layers::format::XattrSpace;
    use cowl_layers::layer::{Layer, Upper};
    use cowl_overlay::OverlayOptions;
    use std::time::Instant;

    use crate::config::Mounter;
    use crate::requests::Requests;

    #[test]
    fn an_unknown_request_is_named() {
        let refused = |line: &str| {
            let error = serde_json::from_str::<Request>(line).unwrap_err();
            match not_understood(line, &error) {
                Response::Failed { message } => message,
                other => panic!("{other:?}"),
            }
        };
        let message = refused("{\"ask\": \"of_tomorrow\", \"more\": 1}\n");
        assert!(message.starts_with(NOT_UNDERSTOOD), "{message}");
        assert!(message.contains("\"of_tomorrow\""), "{message}");
        assert!(message.contains(env!("CARGO_PKG_VERSION")), "{message}");
        let message = refused("what?\n");
        assert!(message.starts_with(NOT_UNDERSTOOD), "{message}");
    }

    fn serve_new_mount(top: &Path) -> Server {
        for name in ["lower", "upper", "work", "next", "next-work"] {
            std::fs::create_dir(top.join(name)).unwrap();
        }
        let space = XattrSpace::detect();
        let upper = Upper::open(&top.join("upper"), &top.join("work"), space).unwrap();
        let lower = Layer::open(&top.join("lower"), space).unwrap();
        let overlay = Overlay::new(Some(upper), vec![lower], OverlayOptions::default()).unwrap();
        let config = Config {
            snapshots: true,
            ..Config::new(vec![top.join("lower")], None, top.join("mount"))
        };
        let overlay = Arc::new(overlay);
        Server::new(ServedMount {
            stats: StatsSource::new(
                overlay.clone(),
                Arc::new(Requests::create().unwrap()),
                (Instant::now(), Duration::ZERO),
                None,
            ),
            overlay,
            config,
            mount: OwnMount::record(top.join("mount"), (0, 0).into(), Mounter::Daemon),
            flush: Arc::new(Box::new(|_| Ok(()))),
            passthrough: PassthroughFiles::for_test(),
            connection: FuseConnection::default(),
            lacking: Vec::new(),
            custody: None,
            upgrade: Box::new(|_| String::new()),
        })
    }

    fn send(mut client: &UnixStream, request: &Request) {
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        client.write_all(&line).unwrap();
    }

    fn receive(client: &UnixStream) -> io::Result<String> {
        let mut response = String::new();
        BufReader::new(client).read_line(&mut response)?;
        Ok(response)
    }

    /// The next command may already have concluded that the killed one had no effect.
    #[test]
    fn a_request_of_a_killed_client_is_not_executed() {
        let top = tempfile::tempdir().unwrap();
        let path = |name: &str| top.path().join(name);
        let server = serve_new_mount(top.path());
        let request = Request::PushLayer {
            upper: path("next").into_os_string().into_encoded_bytes(),
            work: path("next-work").into_os_string().into_encoded_bytes(),
            writers: None,
        };

        let (client, stream) = UnixStream::pair().unwrap();
        send(&client, &request);
        drop(client);
        serve_client(stream, &server).unwrap();
        assert_eq!(server.mount.overlay.layer_paths().0, Some(path("upper")));

        let (client, stream) = UnixStream::pair().unwrap();
        send(&client, &request);
        thread::scope(|scope| {
            scope.spawn(|| serve_client(stream, &server).unwrap());
            let response = receive(&client).unwrap();
            assert!(response.contains("done"), "{response}");
            client.shutdown(std::net::Shutdown::Both).unwrap();
        });
        assert_eq!(server.mount.overlay.layer_paths().0, Some(path("next")));
    }

    #[test]
    fn queries_are_answered_during_a_replacement_of_layers_but_not_during_a_push() {
        let top = tempfile::tempdir().unwrap();
        let server = serve_new_mount(top.path());
        let query = |request: &Request| {
            let (client, stream) = UnixStream::pair().unwrap();
            client.set_read_timeout(Some(TIMEOUT)).unwrap();
            send(&client, request);
            thread::scope(|scope| {
                scope.spawn(|| serve_client(stream, &server));
                let response = receive(&client);
                client.shutdown(std::net::Shutdown::Both).unwrap();
                response
            })
        };
        let replacement = Request::ReplaceLayers { lowers: Vec::new() };
        let held = server.lock(&replacement);
        for (request, answer) in [
            (Request::Ping, "done"),
            (Request::Status, "status"),
            (Request::Stats, "stats"),
        ] {
            let response = query(&request).unwrap();
            assert!(response.contains(answer), "{response}");
        }
        drop(held);

        let (client, stream) = UnixStream::pair().unwrap();
        client
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        send(&client, &Request::Status);
        thread::scope(|scope| {
            let held = server.lock(&Request::Detach);
            scope.spawn(|| serve_client(stream, &server));
            let early = receive(&client).unwrap_err();
            assert_eq!(early.kind(), io::ErrorKind::WouldBlock);
            drop(held);
            client.set_read_timeout(Some(TIMEOUT)).unwrap();
            assert!(receive(&client).unwrap().contains("status"));
            client.shutdown(std::net::Shutdown::Both).unwrap();
        });
    }
}

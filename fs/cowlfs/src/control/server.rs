//! The answering side, in a thread of the daemon.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::detach::{self, Detached};
use super::{Answer, Ask, Gauge, NOT_UNDERSTOOD, Place, Session, Status, short_path};
use crate::config::Config;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::sys;
use cowl_overlay::{Overlay, PushError};

/// How long a client may take for its question, and for taking the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the socket, in place of one that a dead daemon left.
pub(crate) fn listen(socket: &Path) -> io::Result<UnixListener> {
    let (_folder, path) = short_path(socket)?;
    match std::fs::symlink_metadata(&path) {
        Ok(there) if there.file_type().is_socket() => std::fs::remove_file(&path)?,
        Ok(_) => return Err(io::Error::other("something that is no socket is there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    UnixListener::bind(path)
}

/// What an answer needs.
struct Daemon {
    /// One answer at a time: who asks for the status while a layer is being pushed must hear how that
    /// ended, because it decides by it which manifest holds.
    answering: Mutex<()>,
    overlay: Arc<Overlay>,
    config: Config,
    place: Place,
    gauge: Gauge,
    /// Has the kernel hand over what it keeps of a file.
    flush: Arc<Flush>,
    session: Session,
}

/// See [`crate::fuse`].
pub(crate) type Flush = Box<dyn Fn(u64) -> io::Result<()> + Send + Sync>;

/// What there is to be asked about.
pub(crate) struct Serving {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) config: Config,
    pub(crate) place: Place,
    pub(crate) gauge: Gauge,
    pub(crate) flush: Arc<Flush>,
    pub(crate) session: Session,
}

/// Answers until the process ends, each client in a thread of its own.
pub(crate) fn serve(listener: UnixListener, serving: Serving) {
    let daemon = Arc::new(Daemon {
        answering: Mutex::new(()),
        overlay: serving.overlay,
        config: serving.config,
        place: serving.place,
        gauge: serving.gauge,
        flush: serving.flush,
        session: serving.session,
    });
    thread::spawn(move || {
        for stream in listener.incoming() {
            let daemon = daemon.clone();
            thread::spawn(move || {
                if let Err(error) = stream.and_then(|stream| answer_all(stream, &daemon)) {
                    log::info!("control connection: {error}");
                }
            });
        }
    });
}

fn answer_all(stream: UnixStream, daemon: &Daemon) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while stream.read_line(&mut line)? > 0 {
        let (answer, detached) = match serde_json::from_str(&line) {
            // Shows that the daemon lives, also while it is busy with another question.
            Ok(Ask::Ping) => (Answer::Done, None),
            Ok(ask) => {
                let _one = daemon.answering.lock();
                // A command that was killed meanwhile must not change anything any more: the next one
                // has decided already that it did not.
                let gone = sys::socket::peer_is_gone(stream.get_ref())
                    .map_err(|error| io::Error::from_raw_os_error(error.errno().raw_os_error()))?;
                if gone {
                    return Ok(());
                }
                answer(ask, daemon)
            }
            Err(error) => (not_understood(&line, &error), None),
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        stream.get_mut().write_all(&text)?;
        // What keeps a detached mount alive goes: the kernel drops its caches now, whose requests the other
        // threads answer, and then the process ends.
        if let Some(detached) = detached {
            detached.end(&daemon.session);
        }
        line.clear();
    }
    Ok(())
}

/// An older or a newer client's question is named; what is no question at all is told as it is.
fn not_understood(line: &str, error: &serde_json::Error) -> Answer {
    let asked = serde_json::from_str::<serde_json::Value>(line);
    let asked = asked
        .as_ref()
        .ok()
        .and_then(|asked| asked.get("ask")?.as_str());
    let why = match asked {
        Some(ask) => format!(
            "{NOT_UNDERSTOOD}: a daemon of version {} does not know the question \"{}\" ({error})",
            env!("CARGO_PKG_VERSION"),
            ask.escape_default()
        ),
        None => format!("{NOT_UNDERSTOOD}: {error}"),
    };
    Answer::Failed { why }
}

fn answer(ask: Ask, daemon: &Daemon) -> (Answer, Option<Detached>) {
    let (overlay, config) = (&daemon.overlay, &daemon.config);
    match ask {
        Ask::Status => (Answer::Status(status(overlay, config)), None),
        Ask::PushLayer { upper, work } => {
            let upper = Path::new(OsStr::from_bytes(&upper));
            let work = Path::new(OsStr::from_bytes(&work));
            (push(overlay, config, upper, work), None)
        }
        Ask::Flush => (flush(daemon), None),
        Ask::Stats => (stats(daemon), None),
        Ask::Ping => (Answer::Done, None),
        Ask::Detach => match detach::detach(overlay, &daemon.place) {
            Ok(detached) => (Answer::Done, Some(detached)),
            Err(answer) => (answer, None),
        },
        Ask::Settle => (settle(config), None),
    }
}

fn status(overlay: &Overlay, config: &Config) -> Status {
    let (open_files, open_for_write) = overlay.open_files();
    let (upper, lowers) = overlay.layer_paths();
    let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
    Status {
        pid: std::process::id(),
        mountpoint: bytes(&config.mountpoint),
        upper: upper.as_deref().map(bytes),
        lowers: lowers.iter().map(|path| bytes(path)).collect(),
        open_files,
        open_for_write,
        inodes: overlay.inodes().len(),
    }
}

fn stats(daemon: &Daemon) -> Answer {
    match daemon.gauge.read() {
        Ok(stats) => Answer::Stats(stats),
        Err(error) => Answer::Failed {
            why: format!("cannot tell how much memory it takes: {error}"),
        },
    }
}

/// What programs stored through mappings is in the layers afterwards.
fn flush(daemon: &Daemon) -> Answer {
    for ino in daemon.overlay.inodes_with_writers() {
        if let Err(error) = (daemon.flush)(ino) {
            let why = format!("cannot have the kernel write what it keeps: {error}");
            return Answer::Failed { why };
        }
    }
    Answer::Done
}

/// Wakes the thread of the daemon that syncs layers. The request itself waits for no disk.
fn settle(config: &Config) -> Answer {
    match config.settle.as_ref().map(|settle| settle.send(())) {
        Some(Ok(())) => Answer::Done,
        Some(Err(error)) => Answer::Failed {
            why: format!("nothing syncs its layers: {error}"),
        },
        None => Answer::Failed {
            why: format!("{NOT_UNDERSTOOD}: this daemon does not sync its layers"),
        },
    }
}

fn push(overlay: &Overlay, config: &Config, upper: &Path, work: &Path) -> Answer {
    let failed = |why: String| Answer::Failed { why };
    if !config.snapshots {
        return failed("this mount takes no new layers".into());
    }
    let space = config.space.unwrap_or_else(XattrSpace::detect);
    let opened = Layer::open(upper, space)
        .and_then(|layer| Upper::from_layer(config.mount.through(), layer, work));
    let new = match opened {
        Ok(new) => new,
        Err(error) => return failed(error.to_string()),
    };
    match overlay.push_layer(new) {
        Ok(()) => Answer::Done,
        Err(PushError::TooBusy) => failed("requests went on for ten seconds; try again".into()),
        Err(PushError::Unattended(writers)) => failed(format!(
            "{writers} file(s) are written to past the daemon, which a snapshot can't stop: close them (one that \
             was opened for reading and writing counts until the kernel forgets it: 'sysctl vm.drop_caches=2'), or \
             mount anew with passthrough=read"
        )),
        Err(PushError::Setup(error)) => failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use cowl_overlay::OverlayOptions;

    #[test]
    fn a_question_of_another_version_is_named() {
        let refused = |line: &str| {
            let error = serde_json::from_str::<Ask>(line).unwrap_err();
            match not_understood(line, &error) {
                Answer::Failed { why } => why,
                other => panic!("{other:?}"),
            }
        };
        let why = refused("{\"ask\": \"of_tomorrow\", \"more\": 1}\n");
        assert!(why.starts_with(NOT_UNDERSTOOD), "{why}");
        assert!(why.contains("\"of_tomorrow\""), "{why}");
        assert!(why.contains(env!("CARGO_PKG_VERSION")), "{why}");
        let why = refused("what?\n");
        assert!(why.starts_with(NOT_UNDERSTOOD), "{why}");
    }

    /// The next command has decided by then that the killed one changed nothing.
    #[test]
    fn what_a_killed_command_asked_for_is_not_done() {
        let top = tempfile::tempdir().unwrap();
        let path = |name: &str| top.path().join(name);
        for name in ["lower", "upper", "work", "next", "next-work"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        let space = XattrSpace::detect();
        let upper = Upper::open(&path("upper"), &path("work"), space).unwrap();
        let lower = Layer::open(&path("lower"), space).unwrap();
        let overlay = Overlay::new(Some(upper), vec![lower], OverlayOptions::default()).unwrap();
        let config = Config {
            snapshots: true,
            ..Config::new(vec![path("lower")], None, path("mount"))
        };
        let overlay = Arc::new(overlay);
        let daemon = Daemon {
            answering: Mutex::new(()),
            gauge: Gauge::new(overlay.clone(), Arc::default()),
            overlay,
            place: Place::attached(path("mount"), (0, 0).into()),
            config,
            flush: Arc::new(Box::new(|_| Ok(()))),
            session: Session::default(),
        };
        let ask = Ask::PushLayer {
            upper: path("next").into_os_string().into_encoded_bytes(),
            work: path("next-work").into_os_string().into_encoded_bytes(),
        };
        let mut line = serde_json::to_vec(&ask).unwrap();
        line.push(b'\n');

        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&line).unwrap();
        drop(client);
        answer_all(server, &daemon).unwrap();
        assert_eq!(daemon.overlay.layer_paths().0, Some(path("upper")));

        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&line).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| answer_all(server, &daemon).unwrap());
            let mut answer = String::new();
            BufReader::new(&client).read_line(&mut answer).unwrap();
            assert!(answer.contains("done"), "{answer}");
            client.shutdown(std::net::Shutdown::Both).unwrap();
        });
        assert_eq!(daemon.overlay.layer_paths().0, Some(path("next")));
    }
}

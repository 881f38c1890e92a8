//! Mounting: starting the daemon in the background, and ending it.

use cowlfs::config::{Awake, Coherence, Passthrough, choice_name};
use std::io::{Read, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::state::{self, Lifetime, Mounted, RunState};
use super::{Container, Swap, daemon, detach};
use crate::error::{Error, Kind, Result};
use crate::host::reach;
use crate::lxc::binding;
use crate::shell::quoted;
use crate::store::Store;
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerManifest, Ephemeral};
use crate::store::mount_points;
use crate::store::reserve;
use crate::wait::poll_until;
use cowl_layers::shown::Show as _;

/// A log longer than this is put aside.
pub const LOG_LIMIT: u64 = 1 << 20;

/// What the daemon says when the mount is there.
const READY: &str = "ready";

/// Whether set-user-ID programs and device nodes have an effect in a mount at a place that the caller chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileges {
    /// They have.
    Honored,
    /// Where no other user reaches the place: such a user would be root by what the container's root left there.
    WherePrivate,
}

/// What follows an unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It stays unmounted.
    StayUnmounted,
    /// The caller mounts it again at once. If the caller is killed in between, the next command does.
    MountAgain,
}

/// Whether a daemon whose mount is gone has ended.
#[derive(PartialEq, Eq)]
enum Ended {
    Yes,
    /// It serves the mount in another mount namespace.
    No,
}

impl Container<'_> {
    /// Mounts it: at `at`, else at a place in the store. Already mounted there, it stays as it is.
    pub fn mount(
        &mut self,
        at: Option<(&Path, Privileges)>,
        lifetime: Lifetime,
    ) -> Result<PathBuf> {
        self.note_mount(Ephemeral::Mounted)?;
        let mounted = self.mount_noted(at, lifetime);
        if mounted.is_err() && self.mounted()? == Mounted::No {
            self.note_mount(Ephemeral::Waiting)?;
        }
        mounted
    }

    /// Records, for a container that exists for one mount only, that it is about to be mounted, or that it was not
    /// after all.
    fn note_mount(&mut self, is: Ephemeral) -> Result<()> {
        if self.manifest().ephemeral.is_none_or(|was| was == is) {
            return Ok(());
        }
        let next = ContainerManifest {
            ephemeral: Some(is),
            ..self.manifest().clone()
        };
        self.commit(next, None, |_| Ok(Swap::Done))
    }

    /// Like [`Container::mount`], for a container that does not exist for one mount only.
    pub(crate) fn mount_noted(
        &self,
        at: Option<(&Path, Privileges)>,
        lifetime: Lifetime,
    ) -> Result<PathBuf> {
        if let Mounted::Alive(state) = self.mounted()? {
            if let Some(place) = self.already(&state, at.map(|(at, _)| at), lifetime)? {
                return Ok(place);
            }
            // It was unmounted from outside, and its daemon is about to end.
            self.wait_for_end(&state)?;
            state::remove(self.store, self.id)?;
        }
        let (place, nosuid) = match at {
            Some((at, privileges)) => {
                let place = own_place(at, self.store.root())?;
                let nosuid = privileges == Privileges::WherePrivate && !reach::is_private(&place)?;
                (place, nosuid)
            }
            None => (self.make_place()?, false),
        };
        self.start(&place, lifetime, nosuid)?;
        Ok(place)
    }

    /// Where it is mounted when nobody says otherwise.
    pub(crate) fn place(&self) -> Result<PathBuf> {
        Ok(match &self.manifest().lxc {
            Some(link) => binding::mount_point(self.store, self.id, &binding::read_config(link)?),
            None => self.store.paths().mount_dir(self.id),
        })
    }

    fn make_place(&self) -> Result<PathBuf> {
        // Without its config it is none that LXC could start.
        let place = self.place().unwrap_or_else(|error| {
            log::info!("{error}");
            self.store.paths().mount_dir(self.id)
        });
        let root = match &self.manifest().lxc {
            Some(link) if place != self.store.paths().mount_dir(self.id) => {
                binding::mapped_root(link, &binding::read_config(link)?)?
            }
            _ => None,
        };
        let group = root.map(|(_, group)| group);
        mount_points::create(self.store.paths(), self.id, &place, group)?;
        check_empty(&place)?;
        Ok(place)
    }

    fn already(
        &self,
        state: &RunState,
        at: Option<&Path>,
        lifetime: Lifetime,
    ) -> Result<Option<PathBuf>> {
        let name = self.name();
        if !state.is_here()? {
            return Ok(None);
        }
        // It is where it was, and every program that enters it hangs until its daemon goes on.
        daemon::connect(self.store, self.id)?;
        if let Some(at) = at {
            let asked = at
                .canonicalize()
                .map_err(|e| Error::at("mount at", at, e))?;
            if asked != state.mountpoint {
                return Err(Error::busy(format!(
                    "{name} is mounted at {} already",
                    state.mountpoint.shown()
                ))
                .hint(format!("unmount it there first: cowl umount {name}")));
            }
        }
        if state.transient && lifetime == Lifetime::UntilUnmounted {
            let state = RunState {
                transient: false,
                ..state.clone()
            };
            state::write(self.store, self.id, &state)?;
        }
        Ok(Some(state.mountpoint.clone()))
    }

    /// Starts a daemon and waits until the mount is there.
    fn start(&self, place: &Path, lifetime: Lifetime, nosuid: bool) -> Result<()> {
        reserve::make_room_to_remove(self.store)?;
        let log = state::ensure_run_dir(self.store, self.id)?.join("log");
        // Until it has noted that it is there: were we killed before, others would take the container for
        // one that nobody has mounted, and freeze the layer that it is about to write to.
        let held = self.lock.for_child()?;
        launch(self.store, &log, |command| {
            command.stdin(held);
            if lifetime == Lifetime::OfCommand {
                command.arg("--transient");
            }
            if nosuid {
                command.arg("--nosuid");
            }
            command.arg(self.id.to_string()).arg(place);
        })
    }

    /// Unmounts it; returns `None` if it is not mounted. Refused while a process uses it, in any mount namespace.
    /// When this returns, the daemon writes to no layer any more.
    pub fn unmount(&self, then: Then) -> Result<Option<RunState>> {
        let Mounted::Alive(state) = self.mounted()? else {
            return Ok(None);
        };
        if then == Then::MountAgain {
            let replacing = RunState {
                replacing: true,
                ..state.clone()
            };
            state::write(self.store, self.id, &replacing)?;
        }
        let target = detach::Target {
            socket: daemon::socket(self.store, self.id),
            pid: state.pid,
            mountpoint: &state.mountpoint,
            device: state.device()?,
        };
        match detach::unmount(self, &target) {
            Ok(()) => {
                if then == Then::StayUnmounted {
                    state::remove(self.store, self.id)?;
                    self.remove_mount_point();
                }
                Ok(Some(state))
            }
            Err(error) => {
                if then == Then::MountAgain {
                    state::write(self.store, self.id, &state)?;
                }
                Err(error)
            }
        }
    }

    /// LXC's own tools would take an empty folder for the root file system, and snapshot that.
    fn remove_mount_point(&self) {
        if self.manifest().lxc.is_some()
            && let Err(error) = mount_points::remove(self.store.paths(), self.id)
        {
            log::debug!("{error}");
        }
    }

    /// Waits until a daemon whose mount is gone has ended.
    fn wait_for_end(&self, state: &RunState) -> Result<()> {
        /// How long a copy in another mount namespace may take to go.
        const PASSING: Duration = Duration::from_secs(2);
        let start = Instant::now();
        let patience = self.store.session().patience;
        // It ends at once if only unused copies in other mount namespaces are left.
        let asked = daemon::connect(self.store, self.id)
            .map(|client| cowl_layers::sys::process::ask_to_check(client.pid()));
        if let Ok(Err(error)) = asked {
            log::info!("cannot ask the daemon whether its mount is in use: {error}");
        }
        let path = state::daemon_lock(self.store, self.id, state.daemon);
        let mut checked = false;
        // Mounted nowhere any more, it drops its caches, however long that takes.
        let ended = poll_until(start + patience, Duration::from_millis(1), || {
            if !Lock::is_held(&path)? {
                return Ok(Some(Ended::Yes));
            }
            if checked || start.elapsed() < PASSING {
                return Ok::<_, Error>(None);
            }
            checked = true;
            let mounted = state.device.map(cowl_layers::sys::namespace::is_mounted);
            Ok(matches!(mounted, Some(Ok(true))).then_some(Ended::No))
        })?;
        if ended == Some(Ended::Yes) {
            return Ok(());
        }
        let name = self.name();
        Err(Error::busy(format!(
            "{name} is not mounted at {} here, but its daemon (pid {}) still serves it in another mount namespace",
            state.mountpoint.shown(),
            state.pid
        ))
        .hint(format!(
            "unmount it there: cowl umount {name} (cowl status {name} shows what uses it)"
        )))
    }

    /// Mounts it again where it was before [`Container::unmount`], or before its daemon died. The state is removed
    /// only if that fails: if this command is killed meanwhile, the next one tries again.
    pub fn mount_again(&self, was: &RunState) -> Result<()> {
        let started = self.start(&was.mountpoint, was.lifetime(), was.nosuid);
        if started.is_err() {
            state::remove(self.store, self.id)?;
        }
        started
    }
}

/// Starts a daemon with these arguments and waits until its mount is there.
pub(super) fn launch(store: &Store, log: &Path, fill: impl FnOnce(&mut Command)) -> Result<()> {
    let program = std::env::current_exe()
        .map_err(|e| Error::failed("cannot find the cowl program itself").because(e))?;
    let mut command = Command::new(&program);
    command.stdin(Stdio::null());
    command.arg("--store").arg(store.root()).arg("serve");
    // It reads no configuration file: what this command has read, or was told, holds.
    let mounts = store.session().mounts;
    for (variable, value) in [
        (
            "COWL_PASSTHROUGH",
            choice_name(&Passthrough::NAMES, &mounts.passthrough),
        ),
        (
            "COWL_COHERENCE",
            choice_name(&Coherence::NAMES, &mounts.coherence),
        ),
        ("COWL_AWAKE", choice_name(&Awake::NAMES, &mounts.awake)),
    ] {
        command.env(variable, value);
    }
    fill(&mut command);
    command
        .current_dir("/")
        .stdout(Stdio::piped())
        .stderr(open_log(log)?);
    let mut child = command
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut said)
            .map_err(|e| Error::failed("cannot hear from the daemon").because(e))?;
    }
    if said.trim() == READY {
        return Ok(());
    }
    child
        .wait()
        .map_err(|e| Error::failed("cannot wait for the daemon").because(e))?;
    Err(failure(&said, log))
}

/// Reports to the command that waits in [`launch`] that the mount is there, and closes the pipe to it.
pub(crate) fn say_ready() -> Result<()> {
    let lost =
        |error: std::io::Error| Error::failed("cannot tell that the mount is there").because(error);
    let mut out = std::io::stdout();
    out.write_all(READY.as_bytes())
        .and_then(|()| out.flush())
        .map_err(lost)?;
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .map_err(lost)?;
    rustix::stdio::dup2_stdout(&null).map_err(|e| lost(e.into()))
}

pub(super) fn own_place(at: &Path, store: &Path) -> Result<PathBuf> {
    let refused = |why: &str| {
        Err(Error::failed(format!(
            "cannot mount at {}: {why}",
            at.shown()
        )))
    };
    let place = match at.canonicalize() {
        Ok(place) => place,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(
                Error::failed(format!("the mount point {} does not exist", at.shown()))
                    .hint(format!("make it first: mkdir -p {}", quoted(at))),
            );
        }
        Err(error) => return Err(Error::at("mount at", at, error)),
    };
    if !place.is_dir() {
        return refused("it is not a folder");
    }
    let store = store
        .canonicalize()
        .map_err(|e| Error::at("use the store", store, e))?;
    if store.starts_with(&place)
        || ["layers", "containers"]
            .iter()
            .any(|f| place.starts_with(store.join(f)))
    {
        return refused("that would hide a part of the store");
    }
    check_empty(&place)?;
    Ok(place)
}

pub(super) fn check_empty(place: &Path) -> Result<()> {
    let at = |error| Error::at("look into the mount point", place, error);
    match std::fs::read_dir(place).map_err(at)?.next() {
        None => Ok(()),
        Some(entry) => {
            let name = entry.map_err(at)?.file_name();
            Err(Error::failed(format!(
                "the mount point {} is not empty: it holds {}",
                place.shown(),
                name.as_bytes().escape_ascii()
            ))
            .hint("name an empty folder: what lies in it would be hidden"))
        }
    }
}

pub(super) fn open_log(path: &Path) -> Result<std::fs::File> {
    let at = |error| Error::at("open the log", path, error);
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() > LOG_LIMIT => {
            std::fs::rename(path, path.with_extension("old")).map_err(at)?;
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(at(error)),
    }
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(at)
}

/// The daemon's last words as an error.
fn failure(said: &str, log: &Path) -> Error {
    let field = |value: &serde_json::Value, key: &str| {
        value.get(key).and_then(|v| v.as_str()).map(str::to_owned)
    };
    if let Ok(value) = serde_json::from_str::<serde_json::Value>(said)
        && let Some(what) = field(&value, "what")
    {
        let kind = field(&value, "kind").and_then(|kind| Kind::from_name(&kind));
        let error = Error::new(kind.unwrap_or(Kind::Failed), what);
        return match field(&value, "hint") {
            Some(hint) => error.hint(hint),
            None => error,
        };
    }
    Error::failed("the daemon ended before the mount was there")
        .hint(format!("its log says why: {}", log.shown()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemons_last_words() {
        let log = Path::new("/log");
        let error = failure(r#"{"kind":"busy","what":"in use","hint":"wait"}"#, log);
        assert_eq!((error.kind, error.what.as_str()), (Kind::Busy, "in use"));
        assert_eq!(error.hint.as_deref(), Some("wait"));
        for said in ["", "read", "{}", "[1]"] {
            let error = failure(said, log);
            assert_eq!(error.kind, Kind::Failed);
            assert!(error.hint.unwrap().contains("/log"));
        }
    }

    #[test]
    fn places_that_can_not_be() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        let layers = store.join("layers/x");
        let full = dir.path().join("full");
        std::fs::create_dir_all(&layers).unwrap();
        std::fs::create_dir(&full).unwrap();
        std::fs::write(full.join("file\n"), b"").unwrap();
        for (place, word) in [
            (dir.path().join("absent"), "does not exist"),
            (full.join("file\n"), "not a folder"),
            (full.clone(), "not empty"),
            (layers, "hide"),
            (dir.path().to_path_buf(), "hide"),
        ] {
            let error = own_place(&place, &store).unwrap_err();
            assert!(error.what.contains(word), "{error}");
        }
        let good = dir.path().join("good");
        std::fs::create_dir(&good).unwrap();
        own_place(&good, &store).unwrap();
    }
}

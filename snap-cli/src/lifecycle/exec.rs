//! Runs a command in a container: mounts it if necessary, waits, and returns the exit code.
//!
//! A second cowl process (see [`super::enter`]) starts the command in its own mount namespace, so that its
//! mounts are not visible outside.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus};

use cowl_layers::shown::Show as _;
use cowl_layers::sys::child::BlockedSignals;
use nix::libc;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use super::program::ImageProgram;
use super::terminal::Terminal;
use crate::container::mount::{AfterUnmount, MountRequest};
use crate::container::state::Lifetime;
use crate::container::state::{self, Mounted};
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::host::users::Device;
use crate::lxc::config::IdMap;
use crate::lxc::{binding, command, trust};
use crate::recover;
use crate::store::Store;
use crate::store::kernel::Driver;
use crate::store::lock::{Lock, Mode};
use crate::store::manifest::ContainerManifest;
use crate::store::name::ContainerName;

/// The options of [`exec`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecOptions<'a> {
    /// The ids of the command (see [`id_map`]).
    pub map: Option<&'a IdMap>,
    /// The driver of the mount; `None`: that of the existing mount, or of the settings.
    pub driver: Option<Driver>,
    /// The process of the container's image, if the command is that.
    pub process: Option<&'a ImageProgram>,
}

/// Runs a command in the container.
///
/// Returns its exit code, or 128 plus the number of the signal that killed it.
pub fn exec(
    store: &Store,
    name: &ContainerName,
    command: &[OsString],
    options: ExecOptions<'_>,
) -> Result<u8> {
    let mut container = recover::open(store, name)?;
    refuse_in_lxc(&container)?;
    state::ensure_run_dir(store, container.id())?;
    let session = store.session();
    // This lock shows other exec commands that the mount is in use, even before it exists.
    let running = Lock::take(
        &state::exec_lock(store, container.id()),
        Mode::Shared,
        &session.command,
        session.patience,
    )?;
    let mountpoint = container.mount(MountRequest {
        driver: options.driver,
        ..MountRequest::of(Lifetime::OfCommand)
    })?;
    let device = match container.mounted()? {
        Mounted::Alive(state) => state.device()?,
        Mounted::No | Mounted::Dead(_) => None,
    };
    drop(container);
    let at = mountpoint.canonicalize();
    let at = at.map_err(|error| Error::at("enter", &mountpoint, error))?;
    let code = run((&at, device), command, options);
    drop(running);
    unmount_if_last(store, name)?;
    code
}

/// Fails if LXC has mounted the container in its own namespaces, where only LXC can run a command.
fn refuse_in_lxc(container: &Container<'_>) -> Result<()> {
    let Some(link) = &container.manifest().lxc else {
        return Ok(());
    };
    match container.mounted()? {
        Mounted::Alive(state) if state.in_lxc => Err(Error::busy(format!(
            "{} is mounted in its LXC container",
            container.name()
        ))
        .hint(format!(
            "run the command in it: lxc-attach {} -- CMD",
            binding::from_link(link).options()
        ))),
        _ => Ok(()),
    }
}

/// The ids of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// Those of the container, if it has an id map.
    OfContainer,
    /// Those of the caller.
    OfHost,
}

/// Returns the id map of a container, if it has one. A command in it must not have more power.
///
/// Records the map, so that it is not lost together with LXC's config.
pub fn id_map(container: &mut Container<'_>, ids: Ids) -> Result<Option<IdMap>> {
    if ids == Ids::OfHost {
        return Ok(None);
    }
    let recorded = &container.manifest().id_map;
    let recorded = IdMap::from_values(recorded.iter().map(String::as_bytes));
    let name = container.name().clone();
    let Some(link) = container.manifest().lxc.clone() else {
        return match recorded.is_empty() {
            true => Ok(None),
            false => binding::to_own_ids(recorded, &name).map(Some),
        };
    };
    let config = link.config();
    trust::check(&config)?;
    let text = binding::read_config(&link).map_err(|error| {
        error.hint(format!(
            "the ids of a command are those of LXC's config; write it again: cowl restore {name} SNAP --with-config"
        ))
    })?;
    let found = binding::configured_id_map(&config, &text)?;
    if found.is_empty() {
        return match recorded.is_empty() {
            true if binding::has_included_files(&text) && !command::is_installed() => {
                Err(Error::failed(format!(
                    "cannot determine whether a file that {} includes has an id map: lxc-info is not in PATH",
                    config.shown()
                ))
                .hint("install it (apt install lxc), or add its directory to PATH"))
            }
            true => Ok(None),
            false => Err(Error::failed(format!(
                "{} no longer has an lxc.idmap, but the files of {name} have its ids: {}",
                config.shown(),
                recorded.values().collect::<Vec<_>>().join(", ")
            ))
            .hint("restore the lxc.idmap lines; to run the command with your own ids: cowl exec --host-ids")),
        };
    }
    if !found.is_usable() {
        return Err(Error::failed(format!(
            "lxc.idmap in {} is invalid, or does not map user 0 and group 0",
            config.shown()
        ))
        .hint("write both as follows: lxc.idmap = u 0 100000 65536, and the same with g"));
    }
    if found != recorded {
        let next = ContainerManifest {
            id_map: found.values().collect(),
            ..container.manifest().clone()
        };
        container.commit(next, None, |_| Ok(Swap::Done))?;
    }
    binding::to_own_ids(found, config.shown()).map(Some)
}

/// Unmounts a mount that was created for exec, after the last command.
fn unmount_if_last(store: &Store, name: &ContainerName) -> Result<()> {
    let container = match recover::open(store, name) {
        Ok(container) => container,
        // The container was destroyed meanwhile, so it is not mounted.
        Err(error) if error.kind == crate::error::Kind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let Mounted::Alive(state) = container.mounted()? else {
        return Ok(());
    };
    let path = state::exec_lock(store, container.id());
    let last = Lock::try_take(&path, Mode::Exclusive, &store.session().command)?;
    if !state.transient || last.is_none() {
        return Ok(());
    }
    match container.unmount(AfterUnmount::StayUnmounted) {
        Ok(_) => recover::end_if_ephemeral(container).map(drop),
        Err(error) if error.kind == crate::error::Kind::Busy => {
            log::warn!("{name} remains mounted: {error}");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn run(
    (mountpoint, device): (&Path, Option<Device>),
    command: &[OsString],
    ExecOptions { map, process, .. }: ExecOptions<'_>,
) -> Result<u8> {
    let failed =
        |message: &str, error: std::io::Error| Error::failed(message.to_owned()).because(error);
    // A signal that is sent to this process is meant for the command, and this process must survive it to clean up.
    let mut blocked = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGWINCH,
    ] {
        blocked.add(signal);
    }
    let signals = blocked
        .thread_block()
        .map_err(std::io::Error::from)
        .and_then(|()| BlockedSignals::receive())
        .map_err(|e| failed("cannot block signals", e))?;
    // The root of the container, or the user of its image, is not trusted with the terminal.
    let has_user = process.is_some_and(|process| process.user.is_some());
    let is_confined = map.is_some() || has_user;
    let owner = match map {
        Some(map) => map.root().unwrap_or_default(),
        // The ids of the user are known only in the container.
        None => (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        ),
    };
    let terminal = match is_confined.then_some(owner) {
        Some(owner) => Terminal::open(owner).map_err(|e| failed("cannot open a terminal", e))?,
        None => None,
    };
    let program =
        std::env::current_exe().map_err(|e| failed("cannot find the cowl program itself", e))?;
    let ranges = map.iter().flat_map(|map| map.values());
    let mut enter = Command::new(&program);
    let device = device.map(|device| format!("--device={}:{}", device.major, device.minor));
    enter
        .arg("enter")
        .args(device)
        .args(ranges.flat_map(|range| ["--id-map".to_owned(), range]))
        .args(process.map(settings).unwrap_or_default())
        .arg(mountpoint)
        .arg("--")
        .args(command);
    if is_confined {
        // The caller's terminal must not send signals to it: they are forwarded.
        enter.process_group(0);
    }
    if let Some(terminal) = &terminal {
        let streams = terminal.stdio();
        let [input, output, error] = streams.map_err(|e| failed("cannot use a terminal", e))?;
        enter.stdin(input).stdout(output).stderr(error);
    }
    let mut child = enter
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let pid =
        i32::try_from(child.id()).map_err(|e| Error::failed("invalid process id").because(e))?;
    // It holds the other side of the terminal.
    drop(enter);
    let forward = |signal: i32| {
        // The terminal sends some signals to a command that is not confined as well.
        let is_meant = is_confined || [libc::SIGTERM, libc::SIGHUP].contains(&signal);
        if is_meant && let Err(error) = kill(Pid::from_raw(pid), Signal::try_from(signal).ok()) {
            log::warn!("cannot forward the signal {signal}: {error}");
        }
    };
    let attended = attend(pid, terminal, &signals, forward);
    let status = child
        .wait()
        .map_err(|e| failed("cannot wait for the command", e))?;
    attended.map_err(|e| failed("cannot relay between the terminal and the command", e))?;
    Ok(exit_code(status))
}

/// Returns the options of `cowl enter` for the process of an image.
///
/// They are not variables of its environment, because they would affect cowl itself outside of the container.
fn settings(process: &ImageProgram) -> Vec<String> {
    let mut options = vec!["--of-image".to_owned()];
    let variables = process.environment.iter();
    options.extend(variables.map(|(name, value)| format!("--env={name}={value}")));
    options.extend(process.user.iter().map(|user| format!("--user={user}")));
    let directory = process.directory.iter();
    options.extend(directory.map(|directory| format!("--directory={directory}")));
    options
}

/// Relays signals, and what a terminal reads and shows, until the command has ended.
fn attend(
    pid: i32,
    terminal: Option<Terminal>,
    signals: &BlockedSignals,
    forward: impl Fn(i32),
) -> std::io::Result<()> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or(ErrorKind::InvalidInput)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    if let Some(terminal) = terminal {
        return terminal.relay(ended.as_fd(), signals, forward);
    }
    loop {
        let mut polled = [
            PollFd::new(&ended, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [ended, _] = polled.map(|one| one.revents());
        while let Some(signal) = signals.next()? {
            if signal != libc::SIGWINCH {
                forward(signal);
            }
        }
        if ended.contains(PollFlags::IN) {
            return Ok(());
        }
    }
}

/// Returns the exit code that a shell would report.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(125)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_become_exit_codes() {
        for (raw, code) in [(0, 0), (7 << 8, 7), (9, 137), (15, 143), (127 << 8, 127)] {
            assert_eq!(exit_code(ExitStatus::from_raw(raw)), code);
        }
    }
}

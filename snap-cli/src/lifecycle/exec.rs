//! Runs a command in a container: mounts it if necessary, waits, and returns the exit code.
//!
//! A second cowl process (see [`super::enter`]) starts the command in its own mount namespace, so that its
//! mounts are not visible outside.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use cowl_layers::shown::Show as _;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::container::Container;
use crate::container::mount::{AfterUnmount, MountRequest};
use crate::container::state::Lifetime;
use crate::container::state::{self, Mounted};
use crate::error::{Error, Result};
use crate::lxc::binding;
use crate::lxc::config::IdMap;
use crate::recover;
use crate::store::Store;
use crate::store::kernel::Driver;
use crate::store::lock::{Lock, Mode};
use crate::store::name::ContainerName;

/// The options of [`exec`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecOptions<'a> {
    /// The ids of the command (see [`id_map`]).
    pub map: Option<&'a IdMap>,
    /// The driver of the mount; `None`: that of the existing mount, or of the settings.
    pub driver: Option<Driver>,
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
    drop(container);
    let code = run(&mountpoint, command, options.map);
    drop(running);
    unmount_if_last(store, name)?;
    code
}

/// Returns the id map of an LXC container, if it has one. A command in it must not have more power.
pub fn id_map(container: &Container<'_>) -> Result<Option<IdMap>> {
    let Some(link) = &container.manifest().lxc else {
        return Ok(None);
    };
    let config = link.config();
    let text = binding::read_config(link).map_err(|error| {
        let name = container.name();
        error.hint(format!(
            "the ids of a command are those of LXC's config; write it again: cowl restore {name} SNAP --with-config"
        ))
    })?;
    let map = binding::id_map(&config, &text)?;
    if map.is_empty() {
        return Ok(None);
    }
    if !map.is_usable() {
        return Err(Error::failed(format!(
            "lxc.idmap in {} is invalid, or does not map user 0 and group 0",
            config.shown()
        ))
        .hint("write both as follows: lxc.idmap = u 0 100000 65536, and the same with g"));
    }
    Ok(Some(map))
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

fn run(mountpoint: &std::path::Path, command: &[OsString], map: Option<&IdMap>) -> Result<u8> {
    let failed =
        |message: &str, error: std::io::Error| Error::failed(message.to_owned()).because(error);
    // The terminal sends these signals to the command as well. A signal that is sent to this process alone is
    // meant for the command, and this process must survive it to clean up.
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGHUP,
    ] {
        signals.add(signal);
    }
    signals
        .thread_block()
        .map_err(|e| failed("cannot block signals", e.into()))?;
    let program =
        std::env::current_exe().map_err(|e| failed("cannot find the cowl program itself", e))?;
    let map = map.iter().flat_map(|map| map.values());
    let mut child = Command::new(&program)
        .arg("enter")
        .args(map.flat_map(|range| ["--id-map".to_owned(), range]))
        .arg(mountpoint)
        .arg("--")
        .args(command)
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let pid =
        i32::try_from(child.id()).map_err(|e| Error::failed("invalid process id").because(e))?;
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if matches!(signal, Signal::SIGTERM | Signal::SIGHUP)
                && let Err(error) = kill(Pid::from_raw(pid), signal)
            {
                log::warn!("cannot forward {signal}: {error}");
            }
        }
    });
    let status = child
        .wait()
        .map_err(|e| failed("cannot wait for the command", e))?;
    Ok(exit_code(status))
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

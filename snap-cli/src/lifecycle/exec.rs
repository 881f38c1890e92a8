//! Running a command in a container: mounts it if need be, waits, passes the exit code on.
//!
//! The command itself is started by a second cowl process (see [`super::enter`]) that makes a mount
//! namespace of its own, so that nothing of it shows outside.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::container::mount::AfterUnmount;
use crate::container::state::Lifetime;
use crate::container::state::{self, Mounted};
use crate::error::{Error, Result};
use crate::recover;
use crate::store::Store;
use crate::store::lock::{Lock, Mode};
use crate::store::name::ContainerName;

/// Runs a command in the container and answers with its exit code, or 128 and the signal's number.
pub fn exec(store: &Store, name: &ContainerName, command: &[OsString]) -> Result<u8> {
    let mut container = recover::open(store, name)?;
    state::ensure_run_dir(store, container.id())?;
    let session = store.session();
    // Tells other runs of exec that the mount is needed, from before it is there.
    let running = Lock::take(
        &state::exec_lock(store, container.id()),
        Mode::Shared,
        &session.command,
        session.patience,
    )?;
    let place = container.mount(None, Lifetime::OfCommand)?;
    drop(container);
    let code = run(&place, command);
    drop(running);
    leave(store, name)?;
    code
}

/// Takes down a mount that was made for exec, after the last one.
fn leave(store: &Store, name: &ContainerName) -> Result<()> {
    let container = match recover::open(store, name) {
        Ok(container) => container,
        // Destroyed meanwhile: nothing is mounted.
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
            log::warn!("{name} stays mounted: {error}");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn run(place: &std::path::Path, command: &[OsString]) -> Result<u8> {
    let lost = |what: &str, error: std::io::Error| Error::failed(what.to_owned()).because(error);
    // The terminal sends these to the command as well. Whoever sends them to us alone means the command;
    // and we must stay to clean up.
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
        .map_err(|e| lost("cannot block signals", e.into()))?;
    let program =
        std::env::current_exe().map_err(|e| lost("cannot find the cowl program itself", e))?;
    let mut child = Command::new(&program)
        .arg("enter")
        .arg(place)
        .arg("--")
        .args(command)
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let pid = i32::try_from(child.id()).map_err(|e| Error::failed("a process id").because(e))?;
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if matches!(signal, Signal::SIGTERM | Signal::SIGHUP)
                && let Err(error) = kill(Pid::from_raw(pid), signal)
            {
                log::warn!("cannot pass {signal} on: {error}");
            }
        }
    });
    let status = child
        .wait()
        .map_err(|e| lost("cannot wait for the command", e))?;
    Ok(code_of(status))
}

/// The code that a shell would give.
fn code_of(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(125)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        for (raw, code) in [(0, 0), (7 << 8, 7), (9, 137), (15, 143), (127 << 8, 127)] {
            assert_eq!(code_of(ExitStatus::from_raw(raw)), code);
        }
    }
}

//! A user namespace for a command in a container with an id map.
//!
//! Only a process outside of a namespace can map the ids of others in it. So a child creates the namespace, and this
//! process maps its ids and enters it.

use std::io::{ErrorKind, Read, Write};
use std::process::{Command, Stdio};

use cowl_layers::sys::confine;
use cowl_layers::sys::user_namespace::{self, UserNamespace};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::error::{Error, Result};
use crate::lxc::config::IdMap;

/// Moves this process into a new user namespace, with copies of the mounts. Until [`become_root`], it has the user and
/// group of before, which the namespace may not map.
pub(super) fn enter_namespace(map: &IdMap) -> Result<()> {
    let failed = |error| {
        Error::failed("cannot enter a user namespace with the id map of the container")
            .because(error)
    };
    create(map)?.enter_with_own_mounts().map_err(failed)
}

/// Creates a user namespace with the map.
fn create(map: &IdMap) -> Result<UserNamespace> {
    let program = std::env::current_exe()
        .map_err(|e| Error::failed("cannot find the cowl program itself").because(e))?;
    let mut child = Command::new(&program)
        .arg("user-namespace")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| Error::at("start", &program, error))?;
    let created = match child.stdout.as_mut().map(|out| out.read_exact(&mut [0])) {
        Some(Ok(())) => open_mapped(child.id(), map),
        // The child has said why.
        _ => Err(Error::failed("there is no user namespace for the command")),
    };
    // The child ends at the end of its input.
    drop(child.stdin.take());
    child
        .wait()
        .map_err(|e| Error::failed("cannot wait for a child").because(e))?;
    created
}

/// Maps the ids in the user namespace of the process `pid`, and opens the namespace.
fn open_mapped(pid: u32, map: &IdMap) -> Result<UserNamespace> {
    for (file, ranges) in [("gid_map", &map.groups), ("uid_map", &map.users)] {
        let lines = ranges
            .iter()
            .map(|[inside, outside, count]| format!("{inside} {outside} {count}\n"));
        let path = format!("/proc/{pid}/{file}");
        std::fs::write(&path, lines.collect::<String>()).map_err(|error| {
            let hint = match error.kind() {
                ErrorKind::InvalidInput => "check lxc.idmap in the config: ranges must not overlap",
                _ => "run the command as root of this machine",
            };
            Error::failed("cannot map the ids of the container")
                .because(format!("writing {path}: {error}"))
                .hint(hint)
        })?;
    }
    UserNamespace::of(pid)
        .map_err(|error| Error::failed("cannot open the new user namespace").because(error))
}

/// Creates a user namespace, reports it by a byte on the standard output, and waits until the standard input ends.
pub fn hold_namespace() -> Result<()> {
    user_namespace::create().map_err(|error| {
        Error::failed("cannot create a user namespace")
            .because(error)
            .hint("allow more user namespaces: sysctl user.max_user_namespaces")
    })?;
    let mut out = std::io::stdout();
    // The byte has no meaning.
    out.write_all(b".")
        .and_then(|()| out.flush())
        .and_then(|()| std::io::stdin().read_to_end(&mut Vec::new()))
        .map_err(|error| Error::failed("the parent of this process has ended").because(error))?;
    Ok(())
}

/// Becomes the root of the user namespace, without the host's keys and without power over the host's terminal: the root of
/// the container is not trusted by the user of this process, which is mostly root of the machine.
pub(super) fn become_root() -> Result<()> {
    let failed =
        |error| Error::failed("cannot confine the command to the container").because(error);
    confine::deny_input_to_terminals().map_err(failed)?;
    let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|error| Error::failed("cannot become root in the container").because(error))?;
    // The new keyring belongs to the new user.
    confine::leave_session_keyring().map_err(failed)
}

//! A user namespace for a command in a container with an id map.
//!
//! Only a process outside of a namespace can map the ids of others in it. So a child creates the namespace, and this
//! process maps its ids and enters it.

use std::ffi::{OsStr, OsString};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use cowl_layers::sys::confine;
use cowl_layers::sys::user_namespace::{self, UserNamespace};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use rustix::mount::{MountFlags, mount};

use super::terminal::standard_terminal;
use crate::error::{Error, Result};
use crate::lxc::config::IdMap;

/// Moves this process into a new user namespace, with copies of the mounts. Until [`become_root`], it has the user and
/// group of before, which the namespace may not map.
pub(super) fn enter_namespace(map: &IdMap) -> Result<()> {
    let failed = |error| {
        Error::failed("cannot enter a user namespace with the id map of the container")
            .because(error)
    };
    create(map)?.enter_with_own_mounts().map_err(failed)?;
    // Shared memory and message queues of the host.
    unshare(CloneFlags::CLONE_NEWIPC).map_err(|error| failed(error.into()))
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

/// Withholds everything that the caller has open, except for the standard streams, from the command.
pub(super) fn hide_descriptors() -> Result<()> {
    confine::close_on_exec_from(3)
        .map_err(|error| Error::failed("cannot close the files of the caller").because(error))
}

/// Leaves the session and the terminal of the caller. If a standard stream is a terminal, which is not the caller's, it
/// becomes that of the new session.
pub(super) fn leave_session() -> Result<()> {
    let failed = |error: std::io::Error| {
        Error::failed("cannot leave the session of the caller").because(error)
    };
    confine::reset_terminal_signals().map_err(|error| failed(error.errno().into()))?;
    rustix::process::setsid().map_err(|error| failed(error.into()))?;
    if let Some(terminal) = standard_terminal() {
        rustix::process::ioctl_tiocsctty(terminal).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

/// Returns the environment of a command: nothing of the caller's but the terminal and the language.
pub(super) fn environment() -> Vec<(OsString, OsString)> {
    let is_kept = |name: &OsStr| {
        let name = name.as_encoded_bytes();
        [&b"TERM"[..], b"COLORTERM", b"LANG", b"LANGUAGE", b"TZ"].contains(&name)
            || name.starts_with(b"LC_")
    };
    let fixed = [
        ("HOME", "/root"),
        (
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ),
        ("USER", "root"),
    ];
    let fixed = fixed.map(|(name, value)| (name.into(), value.into()));
    let kept = std::env::vars_os().filter(|(name, _)| is_kept(name));
    kept.chain(fixed).collect()
}

/// Adds terminals and shared memory of its own to a /dev, and the terminal of the command as its console.
pub(super) fn populate_dev(dev: &Path) -> std::io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let (pts, shm) = (dev.join("pts"), dev.join("shm"));
    std::fs::create_dir(&pts)?;
    // The group of terminals in Debian; root's, if the container has no such group.
    let options = [
        c"newinstance,ptmxmode=0666,mode=0620,gid=5",
        c"newinstance,ptmxmode=0666,mode=0620",
    ];
    let [first, second] = options.map(|options| mount("devpts", &pts, "devpts", flags, options));
    first.or(second)?;
    std::fs::create_dir(&shm)?;
    let nodev = flags | MountFlags::NODEV;
    mount("tmpfs", &shm, "tmpfs", nodev, c"mode=1777,size=50%")?;
    let console = dev.join("console");
    let terminal = (0..3).find_map(|number| {
        let link = std::fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
        link.starts_with("/dev/pts").then_some(link)
    });
    if let Some(terminal) = terminal {
        std::fs::write(&console, b"")?;
        if let Err(error) = rustix::mount::mount_bind(&terminal, &console) {
            // Programs that look for the name of their terminal do not find it.
            log::info!("the command has no /dev/console: {error}");
        }
    }
    Ok(())
}

/// Becomes the root of the user namespace, without the host's keys and without power over the host's terminal: the root of
/// the container is not trusted by the user of this process, which is mostly root of the machine.
pub(super) fn become_root() -> Result<()> {
    deny_input_to_terminals()?;
    let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|error| Error::failed("cannot become root in the container").because(error))?;
    // The new keyring belongs to the new user.
    leave_session_keyring()
}

fn confine_error(error: cowl_layers::error::Error) -> Error {
    Error::failed("cannot confine the command to the container").because(error)
}

/// Prevents this process, and the programs that it executes, from inserting input into a terminal.
pub(super) fn deny_input_to_terminals() -> Result<()> {
    confine::deny_input_to_terminals().map_err(confine_error)
}

/// Leaves the keys of the caller.
pub(super) fn leave_session_keyring() -> Result<()> {
    confine::leave_session_keyring().map_err(confine_error)
}

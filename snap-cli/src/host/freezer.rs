//! Stops all processes of an LXC container for a moment, by the freezer of its control group.
//!
//! A separate process lets them continue, so that they do so even if cowl is killed.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::cgroup;
use super::mountinfo::{self, Mount};
use crate::error::{Error, Result};
use crate::wait::wait_until;
use cowl_layers::shown::Show as _;

/// The time for which a group may continue to run after the request to stop. A process that waits for a device cannot
/// be stopped.
const PATIENCE: Duration = Duration::from_secs(2);

/// The control group of an LXC container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreezerGroup {
    dir: PathBuf,
    interface: Interface,
}

/// The files by which a group is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interface {
    /// The files of control groups version 2.
    Unified,
    /// The files of the freezer of version 1.
    Legacy,
}

/// Processes that do not run until this value is dropped.
#[derive(Debug)]
pub struct Stopped {
    /// The process that lets them continue; `None` if another program had stopped them.
    guard: Option<Child>,
    group: FreezerGroup,
}

impl Interface {
    /// Returns the file that stops the group, and the words that stop it and let it continue.
    fn control(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Unified => ("cgroup.freeze", "1", "0"),
            Self::Legacy => ("freezer.state", "FROZEN", "THAWED"),
        }
    }
}

impl FreezerGroup {
    /// Returns the group of the container whose first process is `pid`; `None` if it has none that can be frozen.
    pub fn of_container(pid: u32) -> Result<Option<Self>> {
        let read = |path: PathBuf| {
            std::fs::read_to_string(&path).map_err(|error| Error::at("read", &path, error))
        };
        let groups = read(PathBuf::from(format!("/proc/{pid}/cgroup")))?;
        let own = read(PathBuf::from("/proc/self/cgroup"))?;
        let found = find(&mountinfo::read()?, &groups, &own);
        Ok(found.into_iter().find(|group| group.control().is_file()))
    }

    fn control(&self) -> PathBuf {
        self.dir.join(self.interface.control().0)
    }

    /// Stops all processes of the group. They continue when the result is dropped.
    pub fn stop(self) -> Result<Stopped> {
        if self.is_requested()? {
            let stopped = Stopped {
                guard: None,
                group: self,
            };
            stopped.group.wait()?;
            return Ok(stopped);
        }
        let (_, stop, resume) = self.interface.control();
        let path = self.control();
        let at = |error| Error::at("write to", &path, error);
        let open = || std::fs::OpenOptions::new().write(true).open(&path);
        let mut control = open().map_err(at)?;
        let guard = start_guard(control.try_clone().map_err(at)?, resume)?;
        let stopped = Stopped {
            guard: Some(guard),
            group: self,
        };
        control.write_all(stop.as_bytes()).map_err(at)?;
        stopped.group.wait()?;
        Ok(stopped)
    }

    /// Whether a program has requested that the group stops.
    fn is_requested(&self) -> Result<bool> {
        let path = self.control();
        let state =
            std::fs::read_to_string(&path).map_err(|error| Error::at("read", &path, error))?;
        Ok(matches!(state.trim(), "1" | "FROZEN" | "FREEZING"))
    }

    /// Waits until all processes of the group have stopped.
    fn wait(&self) -> Result<()> {
        let (file, line) = match self.interface {
            Interface::Unified => ("cgroup.events", "frozen 1"),
            Interface::Legacy => ("freezer.state", "FROZEN"),
        };
        let path = self.dir.join(file);
        let is_stopped = || {
            let state =
                std::fs::read_to_string(&path).map_err(|error| Error::at("read", &path, error))?;
            Ok::<_, Error>(state.lines().any(|found| found == line))
        };
        let deadline = Instant::now() + PATIENCE;
        match wait_until(deadline, Duration::from_millis(1), is_stopped)? {
            true => Ok(()),
            false => Err(Error::busy(format!(
                "the processes of {} did not stop within {} seconds",
                self.dir.shown(),
                PATIENCE.as_secs()
            ))
            .hint("try again; a process that waits for a device cannot be stopped")),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let Some(guard) = &mut self.guard else {
            return;
        };
        drop(guard.stdin.take());
        match guard.wait() {
            Ok(status) if status.success() => {}
            Ok(_) | Err(_) => log::error!(
                "cannot let the processes of {} continue: write {} to {}",
                self.group.dir.shown(),
                self.group.interface.control().2,
                self.group.control().shown()
            ),
        }
    }
}

/// Starts the process that lets a group continue when its standard input ends, because this process closes it or ends.
///
/// It has its own process group, so that Ctrl-C does not end it, and leaves the control groups of this process, which
/// may be killed as a whole.
fn start_guard(control: std::fs::File, resume: &str) -> Result<Child> {
    let guard = Command::new("/bin/sh")
        .args([
            "-c",
            "trap '' TERM HUP INT; read -r _; echo \"$1\"",
            "sh",
            resume,
        ])
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(control)
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Error::failed("cannot run /bin/sh").because(error))?;
    cgroup::move_out(guard.id());
    Ok(guard)
}

/// Returns the groups of a container, given the lines of /proc/PID/cgroup of its first process and of this one.
///
/// LXC uses the freezer of version 1 where it is mounted. A group that contains this process is not one of the container:
/// cowl itself may run in an LXC container.
fn find(mounts: &[Mount], groups: &str, own: &str) -> Vec<FreezerGroup> {
    let of = |text: &str, wanted: &str| {
        let mut lines = text.lines().filter_map(cgroup::parse);
        let found = lines.find(|(controllers, _)| controllers.split(',').any(|c| c == wanted));
        found.map(|(_, group)| PathBuf::from(group))
    };
    let kinds = [("freezer", Interface::Legacy), ("", Interface::Unified)];
    let found = kinds.into_iter().filter_map(|(controller, interface)| {
        let own = of(own, controller)?;
        let group = of_lxc(&of(groups, controller)?, &own)?;
        let root = cgroup::root(mounts, controller)?;
        let dir = root.join(group.strip_prefix("/").ok()?);
        Some(FreezerGroup { dir, interface })
    });
    found.collect()
}

/// Returns the outermost group that LXC has created for a container, of those that contain `group` but not `own`.
fn of_lxc(group: &Path, own: &Path) -> Option<PathBuf> {
    let is_payload = |dir: &Path| {
        let name = dir.file_name().and_then(|name| name.to_str());
        let parent = dir.parent().and_then(Path::file_name);
        name.is_some_and(|name| name.starts_with("lxc.payload"))
            || parent.is_some_and(|parent| parent == "lxc")
    };
    let candidates = group.ancestors().filter(|dir| is_payload(dir));
    // The innermost ones come first.
    candidates
        .filter(|dir| !own.starts_with(dir))
        .last()
        .map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_a_container_does_not_contain_this_process() {
        let of = |group: &str, own: &str| of_lxc(Path::new(group), Path::new(own));
        let some = |path: &str| Some(PathBuf::from(path));
        assert_eq!(of("/lxc.payload.c1", "/"), some("/lxc.payload.c1"));
        assert_eq!(
            of("/lxc.payload.c1/init.scope", "/cowl"),
            some("/lxc.payload.c1")
        );
        assert_eq!(of("/lxc/c1/system.slice", "/lxc"), some("/lxc/c1"));
        assert_eq!(
            of(
                "/lxc.payload.a/lxc.payload.b/x",
                "/lxc.payload.a/init.scope"
            ),
            some("/lxc.payload.a/lxc.payload.b")
        );
        // A container can create groups with such names below its own.
        assert_eq!(
            of("/lxc.payload.a/lxc.payload.b", "/"),
            some("/lxc.payload.a")
        );
        assert_eq!(of("/lxc.payload.a/x", "/lxc.payload.a/y"), None);
        assert_eq!(of("/user.slice/session-1.scope", "/"), None);
        assert_eq!(of("/", "/"), None);
    }

    #[test]
    fn the_processes_continue_when_the_value_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let group = FreezerGroup {
            dir: dir.path().to_owned(),
            interface: Interface::Unified,
        };
        let control = dir.path().join("cgroup.freeze");
        std::fs::write(&control, "0\n").unwrap();
        std::fs::write(dir.path().join("cgroup.events"), "populated 1\nfrozen 1\n").unwrap();
        let stopped = group.stop().unwrap();
        assert_eq!(std::fs::read_to_string(&control).unwrap(), "1\n");
        drop(stopped);
        assert_eq!(std::fs::read_to_string(&control).unwrap(), "10\n");
    }
}

//! Moves daemons and guards out of the control groups of the process that started it.
//!
//! Otherwise such a process would be frozen, limited or killed with them, for example when a session ends, a service stops,
//! or a container's monitor exits.

use std::path::{Path, PathBuf};

use super::mountinfo;
use crate::error::{Error, Result};

/// The group of daemons.
const DAEMON_GROUP: &str = "cowl";

/// Moves a process out of its control groups. Failures, for example without root, are logged.
pub fn move_out(pid: u32) {
    let table = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let groups = match std::fs::read_to_string(&table) {
        Ok(text) => text,
        Err(error) => return log::info!("{}", Error::at("read", &table, error)),
    };
    // systemd is the only writer of the groups that it manages. Those of LXC are delegated.
    let manager = match std::fs::symlink_metadata("/run/systemd/system").is_ok() {
        true => Manager::Systemd,
        false => Manager::None,
    };
    let mounts = match mountinfo::read() {
        Ok(mounts) => mounts,
        Err(error) => return log::info!("{error}"),
    };
    for (controllers, group) in groups.lines().filter_map(parse) {
        let Some(target) = target(controllers, group, manager) else {
            continue;
        };
        let Some(root) = root(&mounts, controllers) else {
            continue;
        };
        if let Err(error) = enter(&root.join(target), pid) {
            log::info!("{error}");
        }
    }
}

/// The program that manages the control groups of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manager {
    Systemd,
    None,
}

/// Returns the controllers and the group of a line of /proc/PID/cgroup.
pub(super) fn parse(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(':')?;
    rest.split_once(':')
}

/// Returns the group to move to from `group`; `None` to stay.
///
/// The groups of LXC are left in every hierarchy, others only in hierarchies that freeze or kill processes by group, or
/// limit their number or their memory, and not if systemd manages them.
fn target(controllers: &str, group: &str, manager: Manager) -> Option<PathBuf> {
    let mut above = PathBuf::new();
    for part in group.split('/').filter(|part| !part.is_empty()) {
        if part.starts_with("lxc.") || part == "lxc" {
            return Some(above);
        }
        above.push(part);
    }
    let is_managed = manager == Manager::Systemd;
    let ends_processes = matches!(
        controllers,
        "" | "freezer" | "name=systemd" | "memory" | "pids"
    );
    let is_outside = group == "/" || above == Path::new(DAEMON_GROUP);
    (ends_processes && !is_managed && !is_outside).then(|| PathBuf::from(DAEMON_GROUP))
}

/// Returns the mount point of the hierarchy of these controllers.
pub(super) fn root(mounts: &[mountinfo::Mount], controllers: &str) -> Option<PathBuf> {
    let first = controllers.split(',').next().unwrap_or_default();
    let name = first.strip_prefix("name=").unwrap_or(first);
    let found = mounts.iter().find(|mount| match controllers {
        "" => mount.kind == b"cgroup2",
        _ => {
            let last = mount.at.file_name().and_then(|last| last.to_str());
            let at = last.unwrap_or_default();
            mount.kind == b"cgroup" && at.split(',').any(|part| part == name)
        }
    });
    found.map(|mount| mount.at.clone())
}

/// Creates the group if necessary, and moves a process to it.
fn enter(group: &Path, pid: u32) -> Result<()> {
    match std::fs::create_dir(group) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::at("create the control group", group, error)),
    }
    let procs = group.join("cgroup.procs");
    std::fs::write(&procs, pid.to_string())
        .map_err(|error| Error::at("enter the control group", group, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_groups_are_selected() {
        let to = |controllers, group| target(controllers, group, Manager::None);
        let managed = |controllers, group| target(controllers, group, Manager::Systemd);
        let some = |path: &str| Some(PathBuf::from(path));
        assert_eq!(to("memory", "/lxc.monitor.c1"), some(""));
        assert_eq!(to("memory", "/a/b/lxc.pivot"), some("a/b"));
        assert_eq!(to("", "/lxc.monitor.c1/x"), some(""));
        assert_eq!(to("memory", "/user.slice"), some("cowl"));
        assert_eq!(to("cpu,cpuacct", "/user.slice"), None);
        assert_eq!(managed("", "/user.slice/session-1.scope"), None);
        assert_eq!(managed("", "/lxc.monitor.c1/x"), some(""));
        assert_eq!(to("freezer", "/user.slice"), some("cowl"));
        assert_eq!(to("", "/user.slice/session-1.scope"), some("cowl"));
        assert_eq!(to("", "/"), None);
        assert_eq!(to("", "/cowl"), None);
        assert_eq!(parse("5:cpu,cpuacct:/x"), Some(("cpu,cpuacct", "/x")));
        assert_eq!(parse("0::/"), Some(("", "/")));
    }
}

//! Leaving the control groups of whoever started a daemon: what freezes, limits or kills them (a session that
//! ends, a service that stops, a container's monitor) is not to reach it.

use std::path::{Path, PathBuf};

use super::mountinfo;
use crate::error::{Error, Result};

/// The group that daemons live in.
const OWN: &str = "cowl";

/// Moves this process out. What can't be done (without root, say) is left, with a note in the log.
pub fn leave() {
    let table = Path::new("/proc/self/cgroup");
    let groups = match std::fs::read_to_string(table) {
        Ok(text) => text,
        Err(error) => return log::info!("{}", Error::at("read", table, error)),
    };
    let mounts = match mountinfo::read() {
        Ok(mounts) => mounts,
        Err(error) => return log::info!("{error}"),
    };
    for (controllers, group) in groups.lines().filter_map(parse) {
        let Some(target) = target(controllers, group) else {
            continue;
        };
        let Some(root) = root(&mounts, controllers) else {
            continue;
        };
        let place = root.join(target);
        if let Err(error) = enter(&place) {
            log::info!("{error}");
        }
    }
}

/// Controllers and group of a line of /proc/PID/cgroup.
fn parse(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(':')?;
    rest.split_once(':')
}

/// Where to go from a group; `None`: stay. LXC's own groups are left in every hierarchy, others only where
/// processes are frozen or killed by their group.
fn target(controllers: &str, group: &str) -> Option<PathBuf> {
    let mut above = PathBuf::new();
    for part in group.split('/').filter(|part| !part.is_empty()) {
        if part.starts_with("lxc.") || part == "lxc" {
            return Some(above);
        }
        above.push(part);
    }
    let by_group = matches!(controllers, "" | "freezer" | "name=systemd");
    let there = group == "/" || above == Path::new(OWN);
    (by_group && !there).then(|| PathBuf::from(OWN))
}

/// Where the hierarchy of these controllers is mounted.
fn root(mounts: &[mountinfo::Mount], controllers: &str) -> Option<PathBuf> {
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

fn enter(group: &Path) -> Result<()> {
    match std::fs::create_dir(group) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::at("make the control group", group, error)),
    }
    let procs = group.join("cgroup.procs");
    std::fs::write(&procs, std::process::id().to_string())
        .map_err(|error| Error::at("enter the control group", group, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_to_go() {
        let to = |controllers, group| target(controllers, group);
        let some = |path: &str| Some(PathBuf::from(path));
        assert_eq!(to("memory", "/lxc.monitor.c1"), some(""));
        assert_eq!(to("memory", "/a/b/lxc.pivot"), some("a/b"));
        assert_eq!(to("", "/lxc.monitor.c1/x"), some(""));
        assert_eq!(to("memory", "/user.slice"), None);
        assert_eq!(to("freezer", "/user.slice"), some("cowl"));
        assert_eq!(to("", "/user.slice/session-1.scope"), some("cowl"));
        assert_eq!(to("", "/"), None);
        assert_eq!(to("", "/cowl"), None);
        assert_eq!(parse("5:cpu,cpuacct:/x"), Some(("cpu,cpuacct", "/x")));
        assert_eq!(parse("0::/"), Some(("", "/")));
    }
}

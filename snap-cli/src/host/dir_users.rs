//! Finds the processes that use a directory which is not a mount point: open files, working and root directories,
//! executables and mappings.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowl_layers::sys::users::{command, pids};

use super::users::{Hold, User};
use crate::error::{Error, Result};

/// Lists all processes except this one that use `dir` or anything below it.
///
/// Processes in other mount namespaces are recognized only if `dir` itself is their root or working directory.
pub fn list(dir: &Path) -> Result<Vec<User>> {
    let meta = fs::metadata(dir).map_err(|e| Error::at("inspect", dir, e))?;
    let id = (meta.dev(), meta.ino());
    let own_pid = std::process::id();
    let mut users = Vec::new();
    for pid in pids()
        .map_err(|e| Error::at("list", Path::new("/proc"), e))?
        .into_iter()
        .filter(|pid| *pid != own_pid)
    {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let holds = holds(&proc, dir, id);
        if !holds.is_empty() {
            users.push(User {
                pid,
                command: command(&proc),
                holds,
            });
        }
    }
    Ok(users)
}

/// Returns the ways in which a process uses `dir`, which has the device and inode number `id`.
fn holds(proc: &Path, dir: &Path, id: (u64, u64)) -> Vec<Hold> {
    let is_within = |link: &Path| fs::read_link(link).is_ok_and(|to| to.starts_with(dir));
    let is_dir = |link: &Path| fs::metadata(link).is_ok_and(|meta| (meta.dev(), meta.ino()) == id);
    let mut holds = Vec::new();
    for (name, hold) in [("cwd", Hold::Cwd), ("root", Hold::Root)] {
        let link = proc.join(name);
        if is_within(&link) || is_dir(&link) {
            holds.push(hold);
        }
    }
    if is_within(&proc.join("exe")) {
        holds.push(Hold::Exe);
    }
    // The entries of a process that has ended, or that this process may not inspect, are omitted.
    let fds = fs::read_dir(proc.join("fd"));
    if fds
        .into_iter()
        .flatten()
        .flatten()
        .any(|fd| is_within(&fd.path()))
    {
        holds.push(Hold::Open(true));
    }
    let maps = fs::read_dir(proc.join("map_files"));
    if maps
        .into_iter()
        .flatten()
        .flatten()
        .any(|map| is_within(&map.path()))
    {
        holds.push(Hold::Map);
    }
    holds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_its_working_directory_in_it_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(list(&path).unwrap(), []);
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .current_dir(&path)
            .spawn()
            .unwrap();
        let found = list(&path).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            found
                .iter()
                .any(|user| user.pid == child.id() && user.holds == [Hold::Cwd])
        );
    }
}

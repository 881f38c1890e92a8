//! Who uses a folder that is no mount: processes with files open in it, working in it, or living in it as
//! their root.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowl_layers::sys::users::{command, pids};

use super::users::{Hold, User};
use crate::error::{Error, Result};

/// All processes but this one that use something in `folder`. Those in other mount namespaces are told by
/// their root and working directory alone.
pub fn of(folder: &Path) -> Result<Vec<User>> {
    let meta = fs::metadata(folder).map_err(|e| Error::at("look at", folder, e))?;
    let id = (meta.dev(), meta.ino());
    let me = std::process::id();
    let mut users = Vec::new();
    for pid in pids()
        .map_err(|e| Error::at("list", Path::new("/proc"), e))?
        .into_iter()
        .filter(|pid| *pid != me)
    {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let holds = holds(&proc, folder, id);
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

fn holds(proc: &Path, folder: &Path, id: (u64, u64)) -> Vec<Hold> {
    let leads_in = |link: &Path| fs::read_link(link).is_ok_and(|to| to.starts_with(folder));
    let is_it = |link: &Path| fs::metadata(link).is_ok_and(|meta| (meta.dev(), meta.ino()) == id);
    let mut holds = Vec::new();
    for (name, hold) in [("cwd", Hold::Cwd), ("root", Hold::Root)] {
        let link = proc.join(name);
        if leads_in(&link) || is_it(&link) {
            holds.push(hold);
        }
    }
    if leads_in(&proc.join("exe")) {
        holds.push(Hold::Exe);
    }
    // A process that is gone, or that we may not look into, holds nothing that we could name.
    let fds = fs::read_dir(proc.join("fd"));
    if fds
        .into_iter()
        .flatten()
        .flatten()
        .any(|fd| leads_in(&fd.path()))
    {
        holds.push(Hold::Open(true));
    }
    let maps = fs::read_dir(proc.join("map_files"));
    if maps
        .into_iter()
        .flatten()
        .flatten()
        .any(|map| leads_in(&map.path()))
    {
        holds.push(Hold::Map);
    }
    holds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_in_the_folder_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().canonicalize().unwrap();
        assert_eq!(of(&folder).unwrap(), []);
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .current_dir(&folder)
            .spawn()
            .unwrap();
        let found = of(&folder).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(
            found
                .iter()
                .any(|user| user.pid == child.id() && user.holds == [Hold::Cwd])
        );
    }
}

//! The end of a user's namespace, and commands that mount a container meanwhile.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_layers::sys::user_namespace::{self, UserNamespace};
use cowl_layers::sys::{self, process, users};

use super::holder::{self, Origin};
use super::lock::{self, NamespaceFile};
use super::{Caller, ENTERED, LEAVE, enter_found, find, inspection_failed, is_system_root};
use crate::error::{Error, Result};
use crate::host::mountinfo::Mount;
use crate::shell::quoted;
use crate::wait::poll_until;

/// The time in which commands and daemons that are about to end may leave the namespace.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ends the namespace of the user, if there is one. Fails if containers are mounted in it.
pub fn stop() -> Result<()> {
    let caller = Caller::get();
    // Such a process sees the holders, and would end what it uses itself.
    if caller.uid == 0 && !is_system_root() {
        let error = Error::busy("this command runs in a namespace of your user");
        return Err(error.hint(LEAVE));
    }
    for dir in lock::dirs(caller.uid) {
        let Some(file) = NamespaceFile::open(&dir)? else {
            continue;
        };
        if file.holder()?.is_none() {
            continue;
        }
        file.lock_creation()?;
        if let Some(found) = find(&file, caller)? {
            return stop_found(&file, &found);
        }
    }
    Ok(())
}

/// Ends the holders of a namespace. The caller has locked its creation.
fn stop_found(file: &NamespaceFile, found: &UserNamespace) -> Result<()> {
    enter_found(found)?;
    check_mounts(&own_mounts()?)?;
    check_programs(&holder::group(file)?)?;
    holder::stop(file)?;
    // The namespace exists as long as this process has it open. A command may have entered it before the holders ended.
    let enter = || found.enter_mounts().map_err(inspection_failed);
    enter()?;
    let unused = check_mounts(&own_mounts()?).and_then(|()| check_programs(&[]));
    if unused.is_err() {
        enter()?;
        // A holder opens no store.
        holder::start(file, Path::new("/"), Origin::Existing)?;
    }
    unused
}

fn check_mounts(at: &[String]) -> Result<()> {
    if at.is_empty() {
        return Ok(());
    }
    Err(Error::busy(format!(
        "containers are mounted in the namespace: {}",
        at.join(", ")
    ))
    .hint("list them, and unmount each: cowl status; cowl umount NAME"))
}

/// Returns an error if programs other than these processes and this one run in the user namespace of this process.
fn check_programs(except: &[u32]) -> Result<()> {
    let own = rustix::fs::stat("/proc/self/ns/user").map_err(|e| inspection_failed(e.into()))?;
    let is_inside = |pid: &u32| {
        // The link of a process of another namespace cannot be read.
        let theirs = rustix::fs::stat(format!("/proc/{pid}/ns/user"));
        theirs.is_ok_and(|theirs| (theirs.st_dev, theirs.st_ino) == (own.st_dev, own.st_ino))
            && *pid != std::process::id()
            && !except.contains(pid)
            && process::inspect(*pid).is_some_and(|state| !state.killed)
    };
    let list = || -> Result<Vec<u32>> {
        let pids = users::pids().map_err(inspection_failed)?;
        Ok(pids.into_iter().filter(is_inside).collect())
    };
    let ended = poll_until(Instant::now() + PATIENCE, Duration::from_millis(20), || {
        Ok::<_, Error>(list()?.is_empty().then_some(()))
    })?;
    if ended.is_some() {
        return Ok(());
    }
    let names = list()?.into_iter().map(|pid| {
        let name = users::command(&PathBuf::from(format!("/proc/{pid}")));
        format!("{name} (pid {pid})")
    });
    Err(Error::busy(format!(
        "programs run in the namespace: {}",
        names.collect::<Vec<_>>().join(", ")
    ))
    .hint("end them, then try again"))
}

/// Makes sure that the namespace which this process has entered continues, after it has mounted a container there:
/// `cowl unshare --stop` may have ended the holders in between.
pub fn hold_again() -> Result<()> {
    let Some(entered) = ENTERED.get() else {
        return Ok(());
    };
    let file = NamespaceFile::open_or_create(&entered.dir)?;
    file.lock_creation()?;
    let Some(pid) = file.holder()? else {
        // A holder opens no store.
        return holder::start(&file, Path::new("/"), Origin::Existing);
    };
    match UserNamespace::of(pid).and_then(|found| found.is_current()) {
        Ok(true) => Ok(()),
        // The namespaces of a process in another user namespace cannot be opened.
        Ok(false) | Err(_) => Err(Error::busy(
            "your namespace was ended while this command ran, and there is another one",
        )
        .hint("try again")),
    }
}

/// Returns the mount points of the containers that were mounted in the namespace. This process gets another one.
///
/// The kernel does not permit to unmount what was mounted before the namespace was created, and mounts that have
/// appeared since then belong to those elsewhere. So the remaining mounts of a copy that can be unmounted are those that
/// were made inside.
fn own_mounts() -> Result<Vec<String>> {
    let path = Path::new("/proc/self/mountinfo");
    let table = std::fs::read(path).map_err(|error| Error::at("read", path, error))?;
    let mounts = mounts_without_master(&table);
    user_namespace::copy_mounts().map_err(inspection_failed)?;
    // With the driver kernel, a container is an overlay.
    let is_container = |mount: &Mount| [&b"fuse.cowlfs"[..], b"overlay"].contains(&&*mount.kind);
    let is_own =
        |mount: &&Mount| is_container(mount) && sys::mount::unmount_lazily(&mount.at).is_ok();
    let own = mounts.iter().filter(is_own);
    Ok(own.map(|mount| quoted(&mount.at)).collect())
}

/// Parses the mounts of mountinfo that did not appear because of a mount in another namespace.
fn mounts_without_master(table: &[u8]) -> Vec<Mount> {
    let is_apart = |line: &&[u8]| {
        // The optional fields end with a hyphen.
        let mut optional = line.split(|&b| b == b' ').skip(6).take_while(|f| f != b"-");
        !optional.any(|field| field.starts_with(b"master:"))
    };
    let lines: Vec<_> = table.split(|&b| b == b'\n').filter(is_apart).collect();
    sys::mountinfo::parse(&lines.join(&b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_appeared_from_elsewhere_are_skipped() {
        let table = b"30 1 0:40 / /own rw,nosuid - fuse.cowlfs cowl rw\n\
            31 1 0:41 / /shared rw shared:7 - fuse.cowlfs cowl rw\n\
            32 1 0:42 / /other rw master:3 - fuse.cowlfs cowl rw\n\
            33 1 0:43 / /both rw shared:8 master:3 propagate_from:2 - fuse.cowlfs cowl rw\n\
            34 1 0:44 / /name rw - fuse.cowlfs master:3 rw\n";
        let at = mounts_without_master(table).into_iter().map(|m| m.at);
        let at: Vec<_> = at.collect();
        assert_eq!(at, ["/own", "/shared", "/name"].map(PathBuf::from));
    }
}

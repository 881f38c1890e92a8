//! The file by whose lock the holder of a user's namespace is found.
//!
//! The holder has a lock of fcntl(2) on a byte of the file. The kernel reports the process that holds such a lock, and
//! releases it when the process ends. So neither a process id that was used again nor the content of a file can lead
//! cowl to another namespace. Only the user can open the file.
//!
//! The file is in the home directory, not in the runtime directory: logind removes the latter with the last session of
//! the user, and mounts outlive the session. Its name contains the id of the boot and that of the pid namespace, because
//! machines and containers may share the home directory. The kernel reports holders in containers too, and a container's
//! root controls the namespaces there.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, flock};
use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::error::{Error, Result};
use crate::host::boot_id;
use crate::shell::quoted;
use crate::wait::poll_until;
use cowl_layers::shown::Show as _;

/// The byte that each holder of the namespace locks.
const HOLDER: i64 = 0;
/// The byte that a process locks while it creates the namespace.
const CREATION: i64 = 1;

/// The age from which a file of another boot or of a container is removed.
const OLD: Duration = Duration::from_secs(30 * 24 * 3600);

/// The longest time in which other commands create or end the namespace, and the interval of the attempts.
const PATIENCE: Duration = Duration::from_secs(60);
const INTERVAL: Duration = Duration::from_millis(20);

/// The beginning of the file's name.
const PREFIX: &str = "namespace-";

/// The lock file of a user.
#[derive(Debug)]
pub(super) struct NamespaceFile {
    file: File,
    dir: PathBuf,
}

/// Returns the directories that may contain the file, in order of preference.
pub(super) fn dirs(uid: u32) -> Vec<PathBuf> {
    let variable = |name| {
        let value = std::env::var_os(name).map(PathBuf::from);
        value.filter(|path| path.is_absolute())
    };
    let account = || {
        let user = nix::unistd::User::from_uid(uid.into()).ok().flatten();
        user.map(|user| user.dir).filter(|home| home.is_absolute())
    };
    let home = || variable("HOME").or_else(account);
    let state = variable("XDG_STATE_HOME").or_else(|| Some(home()?.join(".local/state")));
    let runtime = variable("XDG_RUNTIME_DIR");
    let usual = PathBuf::from(format!("/run/user/{uid}"));
    let all = state.into_iter().chain(runtime).chain([usual]);
    all.map(|base| base.join("cowl")).collect()
}

impl NamespaceFile {
    /// Opens the file in `dir`; `None` if it does not exist, or if the directory belongs to another user.
    pub(super) fn open(dir: &Path) -> Result<Option<Self>> {
        let Some(opened) = open_dir(dir)? else {
            return Ok(None);
        };
        let name = file_name()?;
        let path = dir.join(&name);
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match openat(&opened, &name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(Error::at("open", &path, std::io::Error::from(error))),
        };
        check_owner(&path, &file, 0o077)?;
        Ok(Some(Self {
            file,
            dir: dir.to_owned(),
        }))
    }

    /// Opens the file in `dir`, and creates both if necessary.
    pub(super) fn open_or_create(dir: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| Error::at("create a file in", dir, error);
        let foreign = || failed(std::io::Error::other("another user owns it"));
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed)?;
        let opened = open_dir(dir)?.ok_or_else(foreign)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        match openat(&opened, file_name()?, flags, Mode::RUSR | Mode::WUSR) {
            Ok(_) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(failed(error.into())),
        }
        Self::open(dir)?.ok_or_else(foreign)
    }

    /// Returns the directory of the file.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes this process a holder, until it ends or closes any descriptor of the file.
    pub(super) fn hold(&self) -> Result<()> {
        let lock = range(HOLDER, libc::F_RDLCK);
        fcntl(&self.file, FcntlArg::F_SETLK(&lock))
            .map(drop)
            .map_err(|error| self.failed(error))
    }

    /// Returns a process that is a holder. Fails if it is in another pid namespace.
    pub(super) fn holder(&self) -> Result<Option<u32>> {
        let mut lock = range(HOLDER, libc::F_WRLCK);
        fcntl(&self.file, FcntlArg::F_GETLK(&mut lock)).map_err(|error| self.failed(error))?;
        if lock.l_type == i16::try_from(libc::F_UNLCK).unwrap_or(i16::MAX) {
            return Ok(None);
        }
        match u32::try_from(lock.l_pid) {
            Ok(pid) if pid != 0 => Ok(Some(pid)),
            _ => Err(Error::failed(
                "cannot enter your namespace: the process that holds it is not visible here",
            )
            .hint(
                "type the command outside of this container, or set XDG_STATE_HOME to another directory",
            )),
        }
    }

    /// Waits until no other process creates or ends the namespace, and excludes others until the file is closed.
    pub(super) fn lock_creation(&self) -> Result<()> {
        self.lock_creation_for(PATIENCE)
    }

    fn lock_creation_for(&self, patience: Duration) -> Result<()> {
        let lock = range(CREATION, libc::F_WRLCK);
        let locked = poll_until(Instant::now() + patience, INTERVAL, || {
            match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)) {
                Ok(_) => Ok(Some(())),
                Err(Errno::EINTR | Errno::EAGAIN | Errno::EACCES) => Ok(None),
                Err(error) => Err(self.failed(error)),
            }
        })?;
        if locked.is_none() {
            let path = self.dir.join(file_name()?);
            return Err(
                Error::busy("another command creates or ends your namespace").hint(format!(
                    "wait for that command, or end it if it hangs: lsof {}",
                    quoted(&path)
                )),
            );
        }
        // The age of a file is that of its last use.
        let used = self.file.set_modified(SystemTime::now());
        let used = used.map_err(|error| Error::at("write to a file in", &self.dir, error));
        if let Err(error) = used.and_then(|()| self.remove_old()) {
            log::debug!("{error}");
        }
        Ok(())
    }

    /// Removes files of earlier boots and of containers.
    fn remove_old(&self) -> Result<()> {
        let at = |error| Error::at("inspect", &self.dir, error);
        let own = self.file.metadata().map_err(at)?.ino();
        for entry in std::fs::read_dir(&self.dir).map_err(at)? {
            let entry = entry.map_err(at)?;
            let meta = entry.metadata().map_err(at)?;
            let age = meta.modified().map_err(at)?.elapsed().unwrap_or_default();
            let is_named = entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(PREFIX.as_bytes());
            if !is_named || !meta.is_file() || meta.ino() == own || age < OLD {
                continue;
            }
            let file = File::options().read(true).write(true).open(entry.path());
            let other = Self {
                file: file.map_err(at)?,
                dir: self.dir.clone(),
            };
            // A machine that shares the home directory may still hold it.
            if matches!(other.holder(), Ok(None)) {
                std::fs::remove_file(entry.path()).map_err(at)?;
            }
        }
        Ok(())
    }

    fn failed(&self, error: Errno) -> Error {
        Error::at("lock a file in", &self.dir, error)
            .hint("set XDG_STATE_HOME to a directory on a local file system")
    }
}

/// Returns the name of the file in this boot and this pid namespace.
fn file_name() -> Result<String> {
    let path = Path::new("/proc/self/ns/pid");
    let processes = std::fs::metadata(path).map_err(|error| Error::at("inspect", path, error))?;
    Ok(format!("{PREFIX}{}-{}", boot_id()?, processes.ino()))
}

/// Opens the directory of the file; `None` if there is none, or if it belongs to another user.
fn open_dir(dir: &Path) -> Result<Option<File>> {
    // A symbolic link is followed: what is checked is the directory itself.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = match openat(CWD, dir, flags, Mode::empty()) {
        Ok(opened) => File::from(opened),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::ACCESS) => return Ok(None),
        Err(error @ (rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP)) => {
            log::info!("{} is not used: {error}", dir.shown());
            return Ok(None);
        }
        Err(error) => return Err(Error::at("open", dir, std::io::Error::from(error))),
    };
    let own = rustix::process::geteuid().as_raw();
    let meta = opened.metadata();
    if meta.map_err(|e| Error::at("inspect", dir, e))?.uid() != own {
        log::info!("{} is not used: another user owns it", dir.shown());
        return Ok(None);
    }
    check_owner(dir, &opened, 0o022)?;
    Ok(Some(opened))
}

fn range(start: i64, kind: i32) -> flock {
    flock {
        l_type: i16::try_from(kind).unwrap_or(i16::MAX),
        l_whence: 0,
        l_start: start,
        l_len: 1,
        l_pid: 0,
    }
}

/// Fails if the object belongs to another user, or if another user has one of the permissions `others`.
fn check_owner(path: &Path, opened: &File, others: u32) -> Result<()> {
    let meta = opened
        .metadata()
        .map_err(|error| Error::at("inspect", path, error))?;
    let own = rustix::process::geteuid().as_raw();
    match meta.uid() == own && meta.mode() & others == 0 {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "cannot use {}: another user owns it or has access to it",
            path.shown()
        ))
        .hint(format!(
            "remove it, or set XDG_STATE_HOME to a directory of your own: rm -r {}",
            quoted(path)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::error::Kind;

    #[test]
    fn only_a_private_file_of_the_user_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let (own, link) = (dir.path().join("own"), dir.path().join("link"));
        assert!(NamespaceFile::open(&own).unwrap().is_none());
        let file = NamespaceFile::open_or_create(&own).unwrap();
        assert_eq!(file.holder().unwrap(), None, "the file alone is no holder");
        file.lock_creation().unwrap();
        assert_eq!(file.holder().unwrap(), None);

        std::os::unix::fs::symlink(&own, &link).unwrap();
        NamespaceFile::open(&link).unwrap().unwrap();
        let path = own.join(file_name().unwrap());
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set(&path, 0o644);
        NamespaceFile::open(&own).unwrap_err();
        set(&path, 0o600);
        set(&own, 0o777);
        NamespaceFile::open(&own).unwrap_err();
        set(&own, 0o755);
        NamespaceFile::open(&own).unwrap().unwrap();
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        NamespaceFile::open(&own).unwrap_err();
        NamespaceFile::open_or_create(&own).unwrap_err();
    }

    #[test]
    fn a_directory_that_cannot_be_opened_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cowl");
        std::fs::write(&path, "").unwrap();
        assert!(NamespaceFile::open(&path).unwrap().is_none());
        NamespaceFile::open_or_create(&path).unwrap_err();
        for target in ["cowl", "none"] {
            std::fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink(target, &path).unwrap();
            assert!(NamespaceFile::open(&path).unwrap().is_none());
            NamespaceFile::open_or_create(&path).unwrap_err();
        }
    }

    #[test]
    fn a_creation_that_hangs_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let other = NamespaceFile::open_or_create(dir.path()).unwrap();
        other.lock_creation().unwrap();
        let file = NamespaceFile::open(dir.path()).unwrap().unwrap();
        let error = file.lock_creation_for(Duration::ZERO).unwrap_err();
        assert_eq!(error.kind, Kind::Busy);
        assert!(error.hint.unwrap().contains("lsof "));
        drop(other);
        file.lock_creation_for(Duration::ZERO).unwrap();
    }
}

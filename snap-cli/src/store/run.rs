//! The directories of run-time files: socket, log, locks and state of each running mount.
//!
//! For root they are `/run/cowl/KEY/ID`, so that a mount needs no space on the store's disk. `KEY` consists of the
//! store's uuid and the device and inode of its directory: a copy of a store has the same uuid and the same container
//! ids, and must not find the original's mounts. If `/run` cannot be used, and for other users, they are
//! `STORE/run/ID`. If the disk is full, other users fall back to `$XDG_RUNTIME_DIR`. (It is not their first choice,
//! because logind removes it with the user's last session, and a mount outlives the session.)
//!
//! A running mount is found in any directory that holds its state, including `STORE/run`, which older versions used
//! (docs/decisions/0009).

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::disk;
use super::disk::remove_tree;
use super::lock::Lock;
use super::manifest::ContainerId;
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The file whose existence means that a mount uses the directory.
pub const STATE: &str = "state.json";

/// The symlink from a volatile directory to its store.
const STORE: &str = "store";

/// The minimum space for the files of a mount in bytes, which is tested before a directory is chosen.
const PROBE: usize = 16 * 1024;

/// A base directory that does not survive a reboot, and the store's directory in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Volatile {
    /// `/run` or `/run/user/1000`.
    base: PathBuf,
    /// The store's directory, two levels below.
    dir: PathBuf,
    /// Whether it is `/run`, which only root can write to, and which is preferred over `STORE/run`.
    is_system: bool,
}

/// The candidate directories for the run-time files of a store.
#[derive(Clone, Debug)]
pub struct RunDirs {
    volatile: Vec<Volatile>,
    /// `STORE/run`.
    own: PathBuf,
    /// The uid of the store's owner. Objects of other users are not used.
    owner: u32,
    /// The key of the store: see the module's documentation.
    key: String,
}

impl RunDirs {
    /// Determines the directories for the store at `root`.
    pub(super) fn for_store(root: &Path, store: Uuid) -> Result<Self> {
        let meta = std::fs::metadata(root).map_err(|e| Error::at("inspect", root, e))?;
        let mut bases = Vec::new();
        if rustix::process::geteuid().is_root() && meta.uid() == 0 {
            bases.push((PathBuf::from("/run"), true));
        }
        let from_env = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        bases.extend(
            from_env
                .filter(|path| path.is_absolute())
                .map(|p| (p, false)),
        );
        // The location that pam_systemd uses, for commands without the environment variable (cron, sudo).
        let usual = (PathBuf::from(format!("/run/user/{}", meta.uid())), false);
        if !bases.contains(&usual) {
            bases.push(usual);
        }
        let key = format!("{store}-{:x}-{:x}", meta.dev(), meta.ino());
        let volatile = bases.into_iter().map(|(base, is_system)| Volatile {
            dir: base.join("cowl").join(&key),
            base,
            is_system,
        });
        Ok(Self {
            volatile: volatile.collect(),
            own: root.join("run"),
            owner: meta.uid(),
            key,
        })
    }

    /// Returns the key of the store: its uuid and the device and inode number of its directory. A copy has another key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns whether only the owner can have created the content of a volatile directory.
    fn is_private(&self, volatile: &Volatile) -> bool {
        let base_is_safe = match std::fs::symlink_metadata(&volatile.base) {
            // `/run` is readable by all users, but only root can create names in it. (In a user namespace, its owner is
            // not mapped, and the check fails.)
            Ok(meta) if volatile.is_system => {
                meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0
            }
            Ok(meta) => is_private_dir(&meta, self.owner),
            Err(_) => false,
        };
        let below = volatile
            .dir
            .parent()
            .into_iter()
            .chain([volatile.dir.as_path()]);
        base_is_safe
            && below
                .map(std::fs::symlink_metadata)
                .all(|meta| meta.is_ok_and(|meta| is_private_dir(&meta, self.owner)))
    }

    /// Returns all directories that may contain run-time files of containers, in order of preference.
    pub(super) fn roots(&self) -> impl Iterator<Item = &Path> {
        let volatile = self
            .volatile
            .iter()
            .filter(|volatile| self.is_private(volatile));
        let volatile = volatile.map(|volatile| volatile.dir.as_path());
        volatile.chain([self.own.as_path()])
    }

    /// Returns all directories that may contain run-time files of a container, in order of preference.
    pub fn dirs(&self, id: ContainerId) -> Vec<PathBuf> {
        self.roots().map(|root| root.join(id.to_string())).collect()
    }

    /// Returns the directory of a container's running mount.
    fn find_in_use(&self, id: ContainerId) -> Option<PathBuf> {
        let mut dirs = self.dirs(id).into_iter();
        dirs.find(|dir| dir.join(STATE).symlink_metadata().is_ok())
    }

    /// Returns the directory of a container's run-time files: that of its running mount, or the one used last.
    pub fn dir(&self, id: ContainerId) -> PathBuf {
        let existing = || self.dirs(id).into_iter().find(|dir| dir.is_dir());
        self.find_in_use(id)
            .or_else(existing)
            .unwrap_or_else(|| self.own.join(id.to_string()))
    }

    /// Creates a directory with sufficient space for a container's run-time files.
    ///
    /// [`RunDirs::dir`] returns the same directory afterwards.
    pub fn create(&self, id: ContainerId) -> Result<PathBuf> {
        if let Some(dir) = self.find_in_use(id) {
            return Ok(dir);
        }
        let name = id.to_string();
        // An existing directory takes precedence, because other commands may hold locks in it.
        let is_preferred = |volatile: &&Volatile| {
            volatile.is_system || (self.is_private(volatile) && volatile.dir.join(&name).is_dir())
        };
        let (preferred, fallback): (Vec<_>, Vec<_>) = self.volatile.iter().partition(is_preferred);
        let create_own = || {
            let dir = self.own.join(&name);
            disk::ensure_dir(&dir)?;
            check_space(dir)
        };
        let mut first = None;
        let mut record = |error: Error| {
            log::debug!("{error}");
            first.get_or_insert(error);
        };
        for volatile in preferred {
            match self.create_in(volatile, &name) {
                Ok(dir) => return Ok(dir),
                Err(error) => record(error),
            }
        }
        match create_own() {
            Ok(dir) => {
                self.remove_others(id, &dir)?;
                return Ok(dir);
            }
            Err(error) => record(error),
        }
        for volatile in fallback {
            match self.create_in(volatile, &name) {
                Ok(dir) => return Ok(dir),
                Err(error) => record(error),
            }
        }
        Err(first.unwrap_or_else(|| Error::failed("cannot find a directory for run-time files")))
    }

    /// Creates a container's directory in a volatile directory.
    fn create_in(&self, volatile: &Volatile, name: &str) -> Result<PathBuf> {
        if rustix::process::geteuid().as_raw() != self.owner {
            return Err(Error::failed(format!(
                "{} belongs to another user",
                volatile.base.shown()
            )));
        }
        for dir in volatile
            .dir
            .parent()
            .into_iter()
            .chain([volatile.dir.as_path()])
        {
            create_private(dir)?;
        }
        if !self.is_private(volatile) {
            return Err(Error::failed(format!(
                "cannot use {} for run-time files: only uid {} may have access to it",
                volatile.dir.shown(),
                self.owner
            )));
        }
        let dir = volatile.dir.join(name);
        create_private(&dir)?;
        let dir = check_space(dir)?;
        self.record_store(volatile)?;
        Ok(dir)
    }

    /// Records the store that a directory belongs to, and removes the directories of stores that do not exist any more.
    fn record_store(&self, volatile: &Volatile) -> Result<()> {
        let link = volatile.dir.join(STORE);
        let root = self.own.parent().unwrap_or(&self.own);
        match std::os::unix::fs::symlink(root, &link) {
            Ok(()) => {}
            // The symlink may contain an earlier path of the store. This is harmless: see `remove_stale`.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
            Err(error) => return Err(Error::at("create the symlink", &link, error)),
        }
        for name in disk::names(&volatile.base.join("cowl"))? {
            let dir = volatile.base.join("cowl").join(name);
            if dir != volatile.dir
                && let Err(error) = remove_stale(&dir)
            {
                log::debug!("{error}");
            }
        }
        Ok(())
    }

    /// Removes directories of the container that take precedence over `chosen` but are not usable.
    ///
    /// The container must not be mounted. Fails if snapshots of it are mounted from such a directory.
    fn remove_others(&self, id: ContainerId, chosen: &Path) -> Result<()> {
        for dir in self.dirs(id) {
            if dir == chosen {
                break;
            }
            if disk::names(&dir)?.iter().any(|name| name.ends_with(".ro")) {
                return Err(Error::failed(format!(
                    "cannot write to {}, which mounted snapshots use",
                    dir.shown()
                ))
                .hint("unmount the snapshots, or free space there"));
            }
            remove_tree(&dir)?;
        }
        Ok(())
    }
}

/// Removes a store's directory if the store does not exist any more.
///
/// The store may still be visible in another mount namespace. So the directory is retained if a daemon or command holds
/// a lock in it, or if it changed within the last hour.
fn remove_stale(dir: &Path) -> Result<()> {
    const MIN_AGE: Duration = Duration::from_secs(3600);
    let at = |error| Error::at("inspect", dir, error);
    // An earlier version created the directory, without the symlink.
    let Ok(root) = std::fs::read_link(dir.join(STORE)) else {
        return Ok(());
    };
    let is_its_own = std::fs::metadata(&root).is_ok_and(|meta| {
        let name = dir.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.ends_with(&format!("-{:x}-{:x}", meta.dev(), meta.ino())))
    });
    if is_its_own {
        return Ok(());
    }
    let mut todo = vec![dir.to_path_buf()];
    while let Some(next) = todo.pop() {
        let meta = std::fs::symlink_metadata(&next).map_err(at)?;
        let age = meta.modified().map_err(at)?.elapsed().unwrap_or_default();
        if age < MIN_AGE {
            return Ok(());
        }
        if meta.is_dir() {
            let names = disk::names(&next)?;
            todo.extend(names.iter().map(|name| next.join(name)));
        } else if meta.is_file() && Lock::is_used(&next)? {
            return Ok(());
        }
    }
    remove_tree(dir)
}

/// Returns whether only `owner` has access to a directory.
fn is_private_dir(meta: &std::fs::Metadata, owner: u32) -> bool {
    meta.is_dir() && meta.uid() == owner && meta.mode() & 0o077 == 0
}

/// Creates a directory with mode 0700 unless it exists.
fn create_private(dir: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(Error::at("make the directory", dir, error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Returns `dir` if it has space for a mount's files; otherwise removes it if it is empty.
fn check_space(dir: PathBuf) -> Result<PathBuf> {
    probe(&dir).inspect_err(|_| {
        if let Err(error) = std::fs::remove_dir(&dir) {
            log::debug!("{}", Error::at("remove", &dir, error));
        }
    })?;
    Ok(dir)
}

/// Verifies that there is space for a mount's files: a socket, a lock, a log and the state.
pub(super) fn probe(dir: &Path) -> Result<()> {
    let path = dir.join(format!("probe.{}", std::process::id()));
    let written = File::create(&path).and_then(|mut file| file.write_all(&[0; PROBE]));
    disk::remove_if_exists(&path)?;
    written.map_err(|error| Error::at("write run-time files to", dir, error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::lock::Mode;
    use super::*;

    fn run_dirs(root: &Path, base: &Path) -> RunDirs {
        RunDirs {
            volatile: vec![Volatile {
                base: base.to_path_buf(),
                dir: base.join("cowl/key"),
                is_system: false,
            }],
            own: root.join("run"),
            owner: rustix::process::geteuid().as_raw(),
            key: "key".to_owned(),
        }
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    struct Fixture {
        _dir: tempfile::TempDir,
        store: PathBuf,
        base: PathBuf,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let (store, base) = (dir.path().join("store"), dir.path().join("base"));
        for path in [&store, &store.join("run"), &base] {
            std::fs::create_dir(path).unwrap();
            set_mode(path, 0o700);
        }
        Fixture {
            _dir: dir,
            store,
            base,
        }
    }

    #[test]
    fn a_running_mount_is_found_in_any_directory() {
        let Fixture { store, base, _dir } = fixture();
        let run_dirs = run_dirs(&store, &base);
        let id = ContainerId::fresh();
        let (own, volatile) = (
            store.join("run").join(id.to_string()),
            base.join("cowl/key").join(id.to_string()),
        );
        assert_eq!(run_dirs.dir(id), own);
        assert_eq!(run_dirs.create(id).unwrap(), own);
        std::fs::write(own.join(STATE), "{}").unwrap();

        // A directory elsewhere changes nothing while a mount's state is here.
        std::fs::create_dir_all(&volatile).unwrap();
        for path in [base.join("cowl"), base.join("cowl/key"), volatile.clone()] {
            set_mode(&path, 0o700);
        }
        assert_eq!(run_dirs.dir(id), own);
        assert_eq!(run_dirs.create(id).unwrap(), own);

        std::fs::remove_file(own.join(STATE)).unwrap();
        assert_eq!(run_dirs.dir(id), volatile);
        assert_eq!(
            run_dirs.create(id).unwrap(),
            volatile,
            "what was chosen stays"
        );
        assert_eq!(run_dirs.dirs(id), [volatile, own]);
    }

    #[test]
    fn a_directory_that_others_can_write_is_not_used() {
        let Fixture { store, base, _dir } = fixture();
        let other = store.join("other");
        let spoil: [fn(&Path, &Path); 4] = [
            |base, _| set_mode(base, 0o777),
            |base, _| {
                std::fs::create_dir(base.join("cowl")).unwrap();
                set_mode(&base.join("cowl"), 0o755);
            },
            |base, other| {
                std::fs::create_dir(other).unwrap();
                set_mode(other, 0o700);
                std::os::unix::fs::symlink(other, base.join("cowl")).unwrap();
            },
            |base, _| std::fs::write(base.join("cowl"), "").unwrap(),
        ];
        for spoil in spoil {
            spoil(&base, &other);
            let run_dirs = run_dirs(&store, &base);
            let id = ContainerId::fresh();
            let volatile = &run_dirs.volatile[0];
            assert!(run_dirs.create_in(volatile, &id.to_string()).is_err());
            assert!(!run_dirs.is_private(volatile));
            assert_eq!(run_dirs.dirs(id).len(), 1);
            assert_eq!(
                run_dirs.create(id).unwrap(),
                store.join("run").join(id.to_string())
            );
            set_mode(&base, 0o700);
            match std::fs::symlink_metadata(base.join("cowl")) {
                Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(base.join("cowl")).unwrap(),
                Ok(_) => std::fs::remove_file(base.join("cowl")).unwrap(),
                Err(_) => {}
            }
        }
    }

    fn seconds_of(moment: std::time::SystemTime) -> u64 {
        moment
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    }

    #[test]
    fn directories_of_removed_stores_are_removed() {
        let Fixture { store, base, _dir } = fixture();
        let gone = fixture();
        let old = run_dirs(&gone.store, &base);
        let mut old_dir = old.volatile[0].clone();
        old_dir.dir = base.join("cowl/0-1-2");
        let id = ContainerId::fresh().to_string();
        let run = old.create_in(&old_dir, &id).unwrap();
        let (log, lock) = (run.join("log"), run.join("x.lock"));
        std::fs::write(&log, "x").unwrap();
        let held = Lock::take(&lock, Mode::Exclusive, "test", Duration::ZERO).unwrap();
        let dirs = [old_dir.dir.clone(), run.clone()];
        let age = |seconds: u64| {
            let then = std::time::SystemTime::now() - Duration::from_secs(seconds);
            for path in dirs.iter().chain([&log, &lock]) {
                File::open(path).unwrap().set_modified(then).unwrap();
            }
            let now = rustix::fs::Timespec {
                tv_sec: i64::try_from(seconds_of(then)).unwrap(),
                tv_nsec: 0,
            };
            let times = rustix::fs::Timestamps {
                last_access: now,
                last_modification: now,
            };
            let (link, flags) = (dirs[0].join(STORE), rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
            rustix::fs::utimensat(rustix::fs::CWD, link, &times, flags).unwrap();
        };
        drop(gone);
        let new = run_dirs(&store, &base);
        let sweep = || {
            let volatile = &new.volatile[0];
            disk::remove_if_exists(&volatile.dir.join(STORE)).unwrap();
            new.create_in(volatile, &id).unwrap();
        };
        age(10);
        sweep();
        assert!(log.is_file(), "it changed a moment ago");
        age(7200);
        sweep();
        assert!(log.is_file(), "a daemon holds its lock");
        drop(held);
        age(7200);
        sweep();
        assert!(!dirs[0].is_dir());
        assert!(new.volatile[0].dir.is_dir());
    }

    #[test]
    fn copies_and_other_stores_have_different_keys() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = Uuid::new_v4();
        let paths = ["one", "two"].map(|name| dir.path().join(name));
        for path in &paths {
            std::fs::create_dir(path).unwrap();
        }
        std::os::unix::fs::symlink(&paths[0], dir.path().join("link")).unwrap();
        let key = |path: &Path, uuid| RunDirs::for_store(path, uuid).unwrap().volatile;
        let one = key(&paths[0], uuid);
        assert_ne!(one, key(&paths[1], uuid), "a copy");
        assert_ne!(one, key(&paths[0], Uuid::new_v4()), "another store");
        assert_eq!(one, key(&dir.path().join("link"), uuid), "another path");
    }
}

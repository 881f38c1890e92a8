//! The store: where things lie, what the files say, who may change them when, and what nobody needs any
//! more. It knows nothing of mounts or of what a snapshot is good for.
//!
//! ```text
//! STORE/store.json                       format and id
//!       layers/<id>/tree, work           one tree; `work` only serves while it is a head
//!                  /layer.json           what it was made over, its size once frozen
//!       containers/<id>/container.json   THE commit point of every change of a container
//!                      /container.json.next   a change under way (see `crate::container`)
//!                      /snapshots/<id>.json
//!       mnt/<id>                         mount points (see [`mount_points`])
//!       mapped/<id>/rootfs               those of LXC containers with an id map
//!       run/<id>                         socket, log and state of a running mount (root's: see [`run`])
//!       locks/                           one file a lock
//!       deleted/<id>.<since>.<until>     destroyed containers that may still come back
//!       trash/                           on its way out
//!       damaged/                         what could not be read, moved out of the way by a repair
//!       cache/<id>.json                  what could be found out again (see [`sizes`])
//!       reserve/                         space for the day when the disk is full
//!       moving/<id>                      left by a command that changes more than the store, while it does
//!       stores.json                      the other stores of the family (see [`family`])
//! ```

pub mod bytes;
pub mod collect;
pub mod containers;
pub mod deleted;
pub mod disk;
pub mod family;
pub mod layers;
pub mod leftovers;
pub mod lock;
pub mod making;
pub mod manifest;
pub mod measure;
pub mod mount_points;
pub mod name;
mod notes;
pub mod orphans;
pub mod outside;
pub mod paths;
pub mod record;
pub mod reserve;
pub mod retention;
pub mod run;
pub mod sizes;
pub mod span;
pub mod survey;
pub mod synced;
pub mod trash;
pub mod usage;

use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowl_layers::format::XattrSpace;
use rustix::process::geteuid;
use serde_json::Map;
use uuid::Uuid;

use crate::error::{Error, Kind, Result};
use cowl_layers::shown::Show as _;
use cowlfs::config::{Awake, Coherence, Passthrough};
use lock::{Lock, Mode};
use manifest::{ContainerId, MarkerSpace, StoreManifest};
use paths::Paths;

pub use containers::{Listed, no_container};
use record::Record;
pub use span::now;

/// Who works on the store, and how long it waits for others.
#[derive(Clone, Debug)]
pub struct Session {
    /// The command, for the messages of those who wait for it: "cowl snapshot web".
    pub command: String,
    /// How long to wait for a lock.
    pub patience: Duration,
    /// How containers are mounted.
    pub mounts: Mounts,
}

/// How containers are mounted, where that can be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// Which files the kernel reads and writes by itself.
    pub passthrough: Passthrough,
    /// What descriptors of a base's files show that were opened before the file was written to.
    pub coherence: Coherence,
    /// Whether idle CPUs are kept awake while requests come in numbers.
    pub awake: Awake,
}

impl Mounts {
    /// Has a mount be like that.
    pub(crate) fn apply(self, config: &mut cowlfs::config::Config) {
        config.passthrough = self.passthrough;
        config.coherence = self.coherence;
        config.awake = self.awake;
    }
}

/// The owner of the directory `root`, if it is neither the caller nor root. What root did in a store that a user can
/// write to would happen where that user wants it.
fn another_owner(root: &Path) -> Result<Option<u32>> {
    match std::fs::metadata(root) {
        Ok(found) => Ok(Some(found.uid()).filter(|owner| ![0, geteuid().as_raw()].contains(owner))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("open the store", root, error)),
    }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    paths: Paths,
    /// The store that knows the whole family: where names are claimed.
    home: PathBuf,
    manifest: StoreManifest,
    session: Session,
    run: run::RunDirs,
}

/// Folders of a store and their modes. Root file systems hold set-user-ID programs: no other user may reach
/// them, neither by way of the layers nor by way of the mounts (see [`mount_points`]).
const FOLDERS: [(&str, u32); 6] = [
    ("layers", 0o700),
    ("containers", 0o700),
    (paths::MNT, 0o700),
    ("run", 0o700),
    ("locks", 0o700),
    ("trash", 0o700),
];

impl Store {
    /// Where the store lies: what was asked for, else /var/lib/cowl for root, else
    /// $XDG_DATA_HOME/cowl.
    pub fn locate(asked: Option<PathBuf>) -> Result<PathBuf> {
        if let Some(path) = asked {
            if path.as_os_str().is_empty() {
                return Err(Error::usage("the store's path is empty")
                    .hint("give --store (or COWL_STORE) the path of a folder"));
            }
            return std::path::absolute(&path).map_err(|e| Error::at("use", &path, e));
        }
        if geteuid().is_root() {
            return Ok(PathBuf::from("/var/lib/cowl"));
        }
        let absolute = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("cowl"))
            .ok_or_else(|| {
                Error::usage("neither XDG_DATA_HOME nor HOME is set")
                    .hint("say where the store is with --store or COWL_STORE")
            })
    }

    /// Opens the store at `root`.
    pub fn open(root: &Path, session: Session) -> Result<Self> {
        if let Some(owner) = another_owner(root)? {
            return Err(Error::usage(format!(
                "the store {} belongs to the user {owner}, who can replace every file in it",
                root.shown()
            ))
            .hint(format!(
                "run the command as that user: sudo -u '#{owner}' cowl ..."
            )));
        }
        let file = root.join("store.json");
        let Some(record) = disk::read_opt::<StoreManifest>(&file)? else {
            return Err(
                Error::not_found(format!("there is no store at {}", root.shown()))
                    .hint("`cowl create` makes one; name another with --store or COWL_STORE"),
            );
        };
        let store = Self {
            run: run::RunDirs::for_store(root, record.body.uuid)?,
            paths: Paths::new(root),
            home: root.to_path_buf(),
            manifest: record.body,
            session,
        };
        if let Err(error) =
            mount_points::close_mnt(&store.paths, mount_points::ClosedTo::OtherUsers)
        {
            log::warn!("other users may reach what is mounted in the store: {error}");
        }
        Ok(store)
    }

    /// Opens the store at `root`; makes it where there is nothing.
    pub fn open_or_make(root: &Path, session: Session) -> Result<Self> {
        match Self::open(root, session.clone()) {
            Err(error) if error.kind == Kind::NotFound => Self::make(root, session),
            other => other,
        }
    }

    fn make(root: &Path, session: Session) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(root)
            .map_err(|error| {
                Error::at("make the store", root, error)
                    .hint("name a place that you may write with --store or COWL_STORE")
            })?;
        let lock = Lock::take(
            &root.join(".making"),
            Mode::Exclusive,
            &session.command,
            session.patience,
        )?;
        let made = Self::fill(root, session);
        lock.remove()?;
        made
    }

    fn fill(root: &Path, session: Session) -> Result<Self> {
        match Self::open(root, session.clone()) {
            Err(error) if error.kind == Kind::NotFound => {}
            // Somebody was quicker.
            other => return other,
        }
        // What an interrupted making may have left; anything else is not ours to use.
        let ours = |name: &str| {
            name == ".making"
                || name.starts_with("store.json.")
                || FOLDERS.iter().any(|(folder, _)| name == *folder)
        };
        if let Some(name) = disk::names(root)?.iter().find(|name| !ours(name)) {
            return Err(Error::usage(format!(
                "{} is no store, and not empty: it holds {}",
                root.shown(),
                name.escape_default()
            ))
            .hint("name an empty folder, or a new one, with --store or COWL_STORE"));
        }
        for (folder, mode) in FOLDERS {
            let path = root.join(folder);
            match std::fs::DirBuilder::new().mode(mode).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::at("make the folder", &path, error)),
            }
        }
        let manifest = StoreManifest {
            uuid: Uuid::new_v4(),
            marks: match XattrSpace::detect() {
                XattrSpace::Trusted => MarkerSpace::Trusted,
                XattrSpace::User => MarkerSpace::User,
            },
            extra: Map::new(),
        };
        disk::replace(&root.join("store.json"), &Record::first(manifest.clone()))?;
        disk::sync_parent(root)?;
        Ok(Self {
            run: run::RunDirs::for_store(root, manifest.uuid)?,
            paths: Paths::new(root),
            home: root.to_path_buf(),
            manifest,
            session,
        })
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        self.paths.root()
    }

    /// Who works on it.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Where the marks of its layers lie.
    pub fn space(&self) -> XattrSpace {
        match self.manifest.marks {
            MarkerSpace::Trusted => XattrSpace::Trusted,
            MarkerSpace::User => XattrSpace::User,
        }
    }

    /// The store that keeps the family's list.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// As a store of the family whose list the store at `home` keeps.
    pub(super) fn with_home(self, home: &Path) -> Self {
        Self {
            home: home.to_path_buf(),
            ..self
        }
    }

    /// The store's own id.
    pub fn uuid(&self) -> Uuid {
        self.manifest.uuid
    }

    /// The directories of run-time files.
    pub fn run(&self) -> &run::RunDirs {
        &self.run
    }

    /// The paths of what is in it.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    fn lock(&self, name: &str, mode: Mode) -> Result<Lock> {
        let session = &self.session;
        Lock::take(
            &self.paths().lock_file(name),
            mode,
            &session.command,
            session.patience,
        )
    }

    /// Alone with one container.
    pub fn lock_container(&self, id: ContainerId) -> Result<Lock> {
        self.lock(&format!("container-{id}"), Mode::Exclusive)
    }

    /// The same without waiting; `None` when somebody is at work on it.
    pub fn try_lock_container(&self, id: ContainerId) -> Result<Option<Lock>> {
        let path = self.paths().lock_file(&format!("container-{id}"));
        Lock::try_take(&path, Mode::Exclusive, &self.session.command)
    }

    /// Alone with the store: nobody makes or reads anything.
    pub fn lock_exclusive(&self) -> Result<Lock> {
        self.lock("store", Mode::Exclusive)
    }

    /// The right to sync a container's snapshots in the background.
    pub fn lock_settling(&self, id: ContainerId) -> Result<Lock> {
        self.lock(&format!("settling-{id}"), Mode::Exclusive)
    }

    /// Keeps collection away: what is made, or read, now stays until this is dropped.
    pub fn lock_shared(&self) -> Result<Lock> {
        self.lock("store", Mode::Shared)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn session() -> Session {
        Session {
            command: "cowl test".to_owned(),
            patience: Duration::from_millis(50),
            mounts: Default::default(),
        }
    }

    #[test]
    fn a_store_is_made_once_and_only_in_an_empty_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("a/b");
        assert_eq!(
            Store::open(&root, session()).unwrap_err().kind,
            Kind::NotFound
        );
        let one = Store::open_or_make(&root, session()).unwrap();
        let two = Store::open_or_make(&root, session()).unwrap();
        assert_eq!(one.manifest, two.manifest);

        let home = dir.path().join("home");
        std::fs::create_dir(&home).unwrap();
        std::fs::write(home.join("thesis.txt"), b"x").unwrap();
        let error = Store::open_or_make(&home, session()).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert_eq!(disk::names(&home).unwrap(), ["thesis.txt"]);
    }

    #[test]
    fn a_store_of_a_newer_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("store.json"), b"{\"format\": 9}").unwrap();
        for tried in [
            Store::open(dir.path(), session()),
            Store::open_or_make(dir.path(), session()),
        ] {
            let error = tried.unwrap_err();
            assert_eq!(error.kind, Kind::Failed);
            assert!(error.to_string().contains("format 9"), "{error}");
            assert!(error.hint.unwrap().contains("newer cowl"));
        }
        assert_eq!(disk::names(dir.path()).unwrap(), ["store.json"]);
    }
}

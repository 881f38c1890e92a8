//! The store: paths, manifests, locks and garbage collection. It knows nothing of mounts or of snapshot operations.
//!
//! ```text
//! STORE/store.json                       format and id
//!       layers/<id>/tree, work           one layer; `work` is used only while it is a head
//!                  /layer.json           the layers below at its creation; its size once frozen
//!                  /packed.json          the blobs that it was packed to (see [`packed`])
//!       containers/<id>/container.json   the commit point of every change of a container
//!                      /container.json.next   a pending change (see `crate::container`)
//!                      /snapshots/<id>.json
//!       mnt/<id>                         mount points (see [`mount_points`])
//!       mapped/<id>/rootfs               mount points of LXC containers with an id map
//!       run/<id>                         socket, log and state of a running mount (for root: see [`run`])
//!       locks/                           one file for each lock
//!       deleted/<id>.<since>.<until>     destroyed containers that can be undeleted
//!       trash/                           objects being removed
//!       received/<id>.<until>            layers of interrupted transfers (see [`received`])
//!       damaged/                         unreadable files that a repair replaced
//!       cache/<id>.json                  data that can be computed again (see [`sizes`])
//!       transfers/<hex>, transfers/push-<id>  interrupted downloads and uploads (see [`transfers`])
//!       reserve/                         space for a full disk (see [`reserve`])
//!       moving/<id>                      markers of pending changes outside the store
//!       stores.json                      the other stores of the family (see [`family`])
//! ```

pub mod bytes;
pub mod collect;
pub mod containerd;
pub mod containerd_ids;
pub mod containers;
pub mod creation;
pub mod deleted;
pub mod disk;
pub mod family;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod held;
pub mod identity;
pub mod image_layers;
pub mod image_record;
pub mod kernel;
pub mod layers;
pub mod leftovers;
pub mod lock;
pub mod manifest;
pub mod measure;
pub mod mount_points;
pub mod name;
mod notes;
pub mod orphans;
pub mod outside;
pub mod ownership;
pub mod packed;
pub mod paths;
pub mod received;
pub mod record;
pub mod reserve;
pub mod retention;
pub mod run;
pub mod settling;
pub mod sizes;
pub mod span;
pub mod survey;
pub mod synced;
pub mod transfers;
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
use crate::host::rootless;
use cowl_layers::shown::Show as _;
use cowlfs::config::{Awake, Coherence, Keeper, Passthrough};
use kernel::Driver;
use lock::{Lock, Mode};
use manifest::{ContainerId, MarkerSpace, StoreManifest};
use paths::Paths;

pub use containers::{Listed, no_container};
use record::Record;
pub use span::now;

/// The command that uses the store, and its options.
#[derive(Clone, Debug)]
pub struct Session {
    /// The command line, for messages and for hints that repeat it: "cowl snapshot web".
    pub command: String,
    /// The time to wait for a lock.
    pub patience: Duration,
    /// The options of mounts. All but the driver concern mounts of cowlfs.
    pub mounts: Mounts,
    /// The program `cowl`, which serves mounts; `None`: the program of this process.
    pub program: Option<PathBuf>,
}

impl Session {
    /// Returns the path of the program that serves mounts.
    pub(crate) fn program(&self) -> Result<PathBuf> {
        match &self.program {
            Some(program) => Ok(program.clone()),
            None => std::env::current_exe()
                .map_err(|e| Error::failed("cannot find the cowl program itself").because(e)),
        }
    }
}

/// The options of mounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mounts {
    /// The files that are handled by passthrough.
    pub passthrough: Passthrough,
    /// The coherence of descriptors of lower files that were opened before the copy-up.
    pub coherence: Coherence,
    /// Whether idle CPUs are kept awake during a burst of requests.
    pub awake: Awake,
    /// Whether a mount outlives its daemon.
    pub keeper: Keeper,
    /// The program that merges the layers.
    pub driver: Driver,
}

impl Mounts {
    /// Sets these options in the configuration of a mount.
    pub(crate) fn apply(self, config: &mut cowlfs::config::Config) {
        config.passthrough = self.passthrough;
        config.coherence = self.coherence;
        config.awake = self.awake;
        config.keeper = self.keeper;
    }
}

/// Returns the owner of the directory `root`, if it is neither the caller nor root.
///
/// If root used a store that a user can write to, that user could redirect root's changes through symlinks.
fn another_owner(root: &Path) -> Result<Option<u32>> {
    match std::fs::metadata(root) {
        Ok(found) => Ok(Some(found.uid()).filter(|owner| ![0, geteuid().as_raw()].contains(owner))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("open the store", root, error)),
    }
}

fn owned_by_another(root: &Path, owner: u32) -> Error {
    let root = root.shown();
    if owner == rootless::UNMAPPED && rootless::is_inside() {
        return Error::usage(format!("the store {root} belongs to another user"))
            .hint("select a store of your own with --store or COWL_STORE");
    }
    Error::usage(format!(
        "the store {root} belongs to the user {owner}, who can replace every file in it"
    ))
    .hint(format!(
        "run the command as that user: sudo -u '#{owner}' cowl ..."
    ))
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    paths: Paths,
    /// The home store of the family, where names are claimed (see [`family`]).
    home: PathBuf,
    manifest: StoreManifest,
    session: Session,
    run: run::RunDirs,
}

/// The time that a transfer waits for a collection, which may have to measure a large layer.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(3600);

/// The directories of a store and their modes.
///
/// Root filesystems contain set-user-ID programs. Other users must not reach them, neither through layers nor through
/// mounts (see [`mount_points`]).
const DIRS: [(&str, u32); 6] = [
    ("layers", 0o700),
    ("containers", 0o700),
    (paths::MNT, 0o700),
    ("run", 0o700),
    ("locks", 0o700),
    ("trash", 0o700),
];

impl Store {
    /// Returns the path of the store: `requested` if given, else /var/lib/cowl for root, else $XDG_DATA_HOME/cowl.
    pub fn locate(requested: Option<PathBuf>) -> Result<PathBuf> {
        if let Some(path) = requested {
            if path.as_os_str().is_empty() {
                return Err(Error::usage("the store's path is empty")
                    .hint("set --store or COWL_STORE to the path of a directory"));
            }
            return std::path::absolute(&path).map_err(|e| Error::at("use", &path, e));
        }
        if rootless::is_system_root() {
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
                Error::usage("cannot locate the store: neither XDG_DATA_HOME nor HOME is set")
                    .hint("set --store or COWL_STORE to the path of the store")
            })
    }

    /// Opens the store at `root`.
    pub fn open(root: &Path, session: Session) -> Result<Self> {
        if let Some(owner) = another_owner(root)? {
            return Err(owned_by_another(root, owner));
        }
        let file = root.join("store.json");
        let Some(record) = disk::read_opt::<StoreManifest>(&file)? else {
            return Err(
                Error::not_found(format!("there is no store at {}", root.shown()))
                    .hint("`cowl create` creates one; select another with --store or COWL_STORE"),
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
            log::warn!("other users may have access to mounts in the store: {error}");
        }
        Ok(store)
    }

    /// Opens the store at `root`, or creates it if there is none.
    pub fn open_or_make(root: &Path, session: Session) -> Result<Self> {
        match Self::open(root, session.clone()) {
            Err(error) if error.kind == Kind::NotFound => Self::create(root, session),
            other => other,
        }
    }

    /// Creates a store, serialized with other commands that create it.
    fn create(root: &Path, session: Session) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(root)
            .map_err(|error| {
                Error::at("create the store", root, error)
                    .hint("select a writable directory with --store or COWL_STORE")
            })?;
        let lock = Lock::take(
            &root.join(".making"),
            Mode::Exclusive,
            &session.command,
            session.patience,
        )?;
        let made = Self::initialize(root, session);
        lock.remove()?;
        made
    }

    /// Creates the directories and the manifest of a store. The caller must hold the lock `.making`.
    fn initialize(root: &Path, session: Session) -> Result<Self> {
        match Self::open(root, session.clone()) {
            Err(error) if error.kind == Kind::NotFound => {}
            // A race: another command has created the store.
            other => return other,
        }
        // An interrupted creation may have left these names. A directory with any other name is not used.
        let is_own = |name: &str| {
            name == ".making"
                || name.starts_with("store.json.")
                || DIRS.iter().any(|(dir, _)| name == *dir)
        };
        if let Some(name) = disk::names(root)?.iter().find(|name| !is_own(name)) {
            return Err(Error::usage(format!(
                "{} is not a store, and not empty: it contains {}",
                root.shown(),
                name.shown()
            ))
            .hint("select an empty or new directory with --store or COWL_STORE"));
        }
        for (dir, mode) in DIRS {
            let path = root.join(dir);
            match std::fs::DirBuilder::new().mode(mode).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::at("create the directory", &path, error)),
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

    /// Returns the store's directory.
    pub fn root(&self) -> &Path {
        self.paths.root()
    }

    /// Returns the session: the command that uses the store, and its options.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Returns the namespace of its layers' marker xattrs.
    pub fn space(&self) -> XattrSpace {
        match self.manifest.marks {
            MarkerSpace::Trusted => XattrSpace::Trusted,
            MarkerSpace::User => XattrSpace::User,
        }
    }

    /// Returns the directory of the family's home store, which contains the list of stores.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Returns the store as a member of the family whose home store is at `home`.
    pub(super) fn with_home(self, home: &Path) -> Self {
        Self {
            home: home.to_path_buf(),
            ..self
        }
    }

    /// Returns the store's id.
    pub fn uuid(&self) -> Uuid {
        self.manifest.uuid
    }

    /// Returns the directories of run-time files.
    pub fn run(&self) -> &run::RunDirs {
        &self.run
    }

    /// Returns the paths in the store.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Acquires the lock `name`.
    fn lock(&self, name: &str, mode: Mode) -> Result<Lock> {
        let session = &self.session;
        Lock::take(
            &self.paths().lock_file(name),
            mode,
            &session.command,
            session.patience,
        )
    }

    /// Acquires the exclusive lock of a container.
    pub fn lock_container(&self, id: ContainerId) -> Result<Lock> {
        self.lock(&format!("container-{id}"), Mode::Exclusive)
    }

    /// Acquires the exclusive lock of a container without waiting; `None` if another command holds it.
    pub fn try_lock_container(&self, id: ContainerId) -> Result<Option<Lock>> {
        let path = self.paths().lock_file(&format!("container-{id}"));
        Lock::try_take(&path, Mode::Exclusive, &self.session.command)
    }

    /// Acquires the exclusive lock of the store: no other command creates or reads anything.
    pub fn lock_exclusive(&self) -> Result<Lock> {
        self.lock("store", Mode::Exclusive)
    }

    /// Acquires the lock of the background process that syncs a container's snapshots.
    pub fn lock_settling(&self, id: ContainerId) -> Result<Lock> {
        self.lock(&format!("settling-{id}"), Mode::Exclusive)
    }

    /// Acquires the lock of the program that manages containerd's snapshots in the store.
    pub fn lock_containerd(&self) -> Result<Lock> {
        self.lock("containerd", Mode::Exclusive)
    }

    /// Like [`Store::lock_containerd`], without waiting; `None` if that program runs.
    pub fn try_lock_containerd(&self) -> Result<Option<Lock>> {
        let path = self.paths().lock_file("containerd");
        Lock::try_take(&path, Mode::Exclusive, &self.session.command)
    }

    /// Acquires a shared lock of the store, which excludes garbage collection: objects that are created or read while
    /// it is held are retained.
    pub fn lock_shared(&self) -> Result<Lock> {
        self.lock("store", Mode::Shared)
    }

    /// Acquires the same lock within a transfer, which has possibly received for hours. Waits longer: a process with the
    /// exclusive lock does not wait for another host.
    pub fn lock_shared_in_transfer(&self) -> Result<Lock> {
        let patience = self.session.patience.max(TRANSFER_PATIENCE);
        let path = self.paths().lock_file("store");
        Lock::take(&path, Mode::Shared, &self.session.command, patience)
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
            program: None,
        }
    }

    #[test]
    fn a_store_is_created_once_and_only_in_an_empty_directory() {
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

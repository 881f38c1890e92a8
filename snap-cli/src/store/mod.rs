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
//!       mnt/<id>                         mount points (see [`places`])
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
pub mod deleted;
pub mod disk;
pub mod family;
pub mod layers;
pub mod lock;
pub mod manifest;
pub mod name;
pub mod outside;
pub mod places;
pub mod record;
pub mod reserve;
pub mod run;
pub mod sizes;
pub mod span;
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
use manifest::{
    ContainerId, ContainerManifest, LayerId, Marks, SnapshotId, SnapshotManifest, StoreManifest,
};
use name::ContainerName;
use record::Record;

/// Who works on the store, and how long it waits for others.
#[derive(Clone, Debug)]
pub struct Session {
    /// The command, for the messages of those who wait for it: "cowl snapshot web".
    pub who: String,
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
    root: PathBuf,
    /// The store that knows the whole family: where names are claimed.
    home: PathBuf,
    manifest: StoreManifest,
    session: Session,
    run: run::RunPlaces,
}

/// A container's id with what its manifest says, or why that can't be read.
pub type Listed = (ContainerId, Result<Record<ContainerManifest>>);

/// A container's id with its name alone, or why that can't be read.
pub type Named = (ContainerId, Result<ContainerName>);

/// What ends the names of lock files.
pub const LOCK: &str = ".lock";

/// Folders of a store and their modes. Root file systems hold set-user-ID programs: no other user may reach
/// them, neither by way of the layers nor by way of the mounts (see [`places`]).
const FOLDERS: [(&str, u32); 6] = [
    ("layers", 0o700),
    ("containers", 0o700),
    (places::MNT, 0o700),
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
            run: run::RunPlaces::of(root, record.body.uuid)?,
            root: root.to_path_buf(),
            home: root.to_path_buf(),
            manifest: record.body,
            session,
        };
        if let Err(error) = store.close_mnt(false) {
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
            &session.who,
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
                XattrSpace::Trusted => Marks::Trusted,
                XattrSpace::User => Marks::User,
            },
            extra: Map::new(),
        };
        disk::replace(&root.join("store.json"), &Record::first(manifest.clone()))?;
        disk::sync_parent(root)?;
        Ok(Self {
            run: run::RunPlaces::of(root, manifest.uuid)?,
            root: root.to_path_buf(),
            home: root.to_path_buf(),
            manifest,
            session,
        })
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Who works on it.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Where the marks of its layers lie.
    pub fn space(&self) -> XattrSpace {
        match self.manifest.marks {
            Marks::Trusted => XattrSpace::Trusted,
            Marks::User => XattrSpace::User,
        }
    }

    /// A layer's folder.
    pub fn layer_dir(&self, id: LayerId) -> PathBuf {
        self.root.join("layers").join(id.to_string())
    }

    /// A layer's tree.
    pub fn layer_tree(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("tree")
    }

    /// A head's work folder.
    pub fn layer_work(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("work")
    }

    /// A layer's manifest.
    pub fn layer_file(&self, id: LayerId) -> PathBuf {
        self.layer_dir(id).join("layer.json")
    }

    /// A container's folder.
    pub fn container_dir(&self, id: ContainerId) -> PathBuf {
        self.root.join("containers").join(id.to_string())
    }

    /// A container's manifest.
    pub fn container_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("container.json")
    }

    /// What lies in a container's folder until its manifest is there.
    pub fn unfinished_file(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("unfinished")
    }

    /// The folder of a container's snapshot files.
    pub fn snapshots_dir(&self, id: ContainerId) -> PathBuf {
        self.container_dir(id).join("snapshots")
    }

    /// A snapshot's file.
    pub fn snapshot_file(&self, id: ContainerId, snapshot: SnapshotId) -> PathBuf {
        self.snapshots_dir(id).join(format!("{snapshot}.json"))
    }

    /// The file of the lock `name`.
    pub fn lock_file(&self, name: &str) -> PathBuf {
        self.root.join("locks").join(format!("{name}{LOCK}"))
    }

    fn lock(&self, name: &str, mode: Mode) -> Result<Lock> {
        let session = &self.session;
        Lock::take(&self.lock_file(name), mode, &session.who, session.patience)
    }

    /// The ids of all layers that there are.
    pub fn layer_ids(&self) -> Result<Vec<LayerId>> {
        let names = disk::names(&self.root.join("layers"))?;
        Ok(names
            .iter()
            .filter_map(|name| LayerId::parse(name))
            .collect())
    }

    /// Alone with one container.
    pub fn lock_container(&self, id: ContainerId) -> Result<Lock> {
        self.lock(&format!("container-{id}"), Mode::Exclusive)
    }

    /// The same without waiting; `None` when somebody is at work on it.
    pub fn try_lock_container(&self, id: ContainerId) -> Result<Option<Lock>> {
        let path = self.lock_file(&format!("container-{id}"));
        Lock::try_take(&path, Mode::Exclusive, &self.session.who)
    }

    /// Alone with the store: nobody makes or reads anything.
    pub fn alone(&self) -> Result<Lock> {
        self.lock("store", Mode::Exclusive)
    }

    /// The right to give `name` to a new container, which nobody in the family of stores has or claims.
    /// Hold it until the container's manifest is there; then remove it.
    pub fn claim(&self, name: &ContainerName) -> Result<Lock> {
        let session = &self.session;
        let path = self.home.join("locks").join(format!("name-{name}{LOCK}"));
        let lock = Lock::take(&path, Mode::Exclusive, &session.who, session.patience)?;
        for (_, known) in self.names_of_family()? {
            let known = match known {
                Ok(known) => known,
                // It may have had this name; then whoever mends it is told of the two.
                Err(error) => {
                    log::warn!("{error}");
                    continue;
                }
            };
            if known == *name {
                lock.remove()?;
                return Err(
                    Error::failed(format!("a container named {name} exists already")).hint(
                        format!(
                            "choose another name, or remove that one with `cowl destroy {name}`"
                        ),
                    ),
                );
            }
        }
        Ok(lock)
    }

    /// The right to sync a container's snapshots in the background.
    pub fn settling_alone(&self, id: ContainerId) -> Result<Lock> {
        self.lock(&format!("settling-{id}"), Mode::Exclusive)
    }

    /// The right to take something over into the family of stores.
    pub fn adopting(&self) -> Result<Lock> {
        let session = &self.session;
        let path = self.home.join("locks").join(format!("adopting{LOCK}"));
        Lock::take(&path, Mode::Exclusive, &session.who, session.patience)
    }

    /// Keeps collection away: what is made, or read, now stays until this is dropped.
    pub fn share(&self) -> Result<Lock> {
        self.lock("store", Mode::Shared)
    }

    /// All containers, by name. One whose manifest can't be read hides none of the others.
    pub fn containers(&self) -> Result<Vec<Listed>> {
        let mut found = Vec::new();
        for name in disk::names(&self.root.join("containers"))? {
            let Some(id) = ContainerId::parse(&name) else {
                continue;
            };
            match self.container(id) {
                // Half-made: it does not count.
                Ok(None) => {}
                Ok(Some(record)) => found.push((id, Ok(record))),
                Err(error) => found.push((id, Err(error))),
            }
        }
        let key = |entry: &Listed| entry.1.as_ref().ok().map(|r| r.body.name.clone());
        found.sort_by_key(key);
        Ok(found)
    }

    /// One container's manifest; `None` where there is none.
    pub fn container(&self, id: ContainerId) -> Result<Option<Record<ContainerManifest>>> {
        self.container_at(&self.container_file(id))
    }

    /// A container's manifest at a path.
    pub fn container_at(&self, path: &Path) -> Result<Option<Record<ContainerManifest>>> {
        let Some(record) = disk::read_opt::<ContainerManifest>(path)? else {
            return Ok(None);
        };
        match record.body.check() {
            Ok(()) => Ok(Some(record)),
            Err(why) => Err(disk::impossible::<ContainerManifest>(path, why)),
        }
    }

    /// The names of all containers, in no order: far cheaper than [`Store::containers`].
    pub fn names(&self) -> Result<Vec<Named>> {
        names_below(&self.root)
    }

    /// The container of this name.
    pub fn find(&self, name: &ContainerName) -> Result<(ContainerId, Record<ContainerManifest>)> {
        let id = self.find_id(name)?;
        match self.container(id)? {
            Some(record) => Ok((id, record)),
            None => Err(no_container(name, [])),
        }
    }

    /// The id of the container of this name.
    pub fn find_id(&self, name: &ContainerName) -> Result<ContainerId> {
        let mut known = Vec::new();
        let mut unreadable = None;
        for (id, found) in self.names()? {
            match found {
                Ok(found) if found == *name => return Ok(id),
                Ok(found) => known.push(found),
                Err(error) => unreadable = Some(error),
            }
        }
        match unreadable {
            Some(error) => Err(error),
            None => Err(no_container(name, &known)),
        }
    }

    /// A snapshot's manifest.
    pub fn snapshot(&self, id: ContainerId, snapshot: SnapshotId) -> Result<SnapshotManifest> {
        self.snapshot_in(&self.container_dir(id), snapshot)
    }

    /// The same for a container whose folder lies elsewhere.
    pub fn snapshot_in(&self, dir: &Path, snapshot: SnapshotId) -> Result<SnapshotManifest> {
        let path = dir.join("snapshots").join(format!("{snapshot}.json"));
        let body = disk::read::<SnapshotManifest>(&path)?.body;
        match body.check() {
            Ok(()) => Ok(body),
            Err(why) => Err(disk::impossible::<SnapshotManifest>(&path, why)),
        }
    }
}

/// The names of the containers of the store at `root`.
fn names_below(root: &Path) -> Result<Vec<Named>> {
    let containers = root.join("containers");
    let mut found = Vec::new();
    for name in disk::names(&containers)? {
        let Some(id) = ContainerId::parse(&name) else {
            continue;
        };
        match disk::read_name(&containers.join(name).join("container.json")) {
            // Half-made: it does not count.
            Ok(None) => {}
            Ok(Some(name)) => found.push((id, Ok(name))),
            Err(error) => found.push((id, Err(error))),
        }
    }
    Ok(found)
}

/// The complaint about a name that no container has, with the one that may have been meant.
pub fn no_container<'a>(
    name: &ContainerName,
    known: impl IntoIterator<Item = &'a ContainerName>,
) -> Error {
    let known = known.into_iter().map(ContainerName::as_str);
    let hint = match name::nearest(name.as_str(), known) {
        Some(near) => format!("did you mean {near}?"),
        None => "`cowl list` shows all containers".to_owned(),
    };
    Error::not_found(format!("there is no container named {name}")).hint(hint)
}

/// The moment, as manifests tell it.
pub fn now() -> String {
    let now = jiff::Timestamp::now();
    match now.round(jiff::Unit::Millisecond) {
        Ok(rounded) => rounded.to_string(),
        Err(_) => now.to_string(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn session() -> Session {
        Session {
            who: "cowl test".to_owned(),
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

    #[test]
    fn a_name_is_claimed_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let name = ContainerName::parse("web").unwrap();
        let claim = store.claim(&name).unwrap();
        assert_eq!(store.claim(&name).unwrap_err().kind, Kind::Busy);
        claim.remove().unwrap();
        store.claim(&name).unwrap().remove().unwrap();
    }
}

//! The family of stores: one store on each file system with adopted containers, so that an adoption is a rename.
//!
//! The first store, the home store, contains the list of the others in `stores.json`. Names of containers are unique in
//! the family and are claimed in the home store.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::containerd;
use super::containers::{ListedName, no_container, read_names};
use super::lock::{Lock, Mode};
use super::name::ContainerName;
use super::paths::LOCK;
use super::record::{Body, Record};
use super::{Session, Store, disk};
use crate::error::{Error, Kind, Result};
use cowl_layers::shown::Show as _;

/// The list of stores in a home store: `stores.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreList {
    /// The other stores.
    pub stores: Vec<StoreEntry>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Body for StoreList {
    const TYPE_NAME: &'static str = "list of stores";
}

/// An entry of the list: a store other than the home store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreEntry {
    /// The store's id, which must match the store at `path`.
    pub uuid: Uuid,
    /// The store's directory.
    pub path: PathBuf,
}

fn list_file(home: &Path) -> PathBuf {
    home.join("stores.json")
}

/// Reads the list of a home store.
fn entries(home: &Path) -> Result<Vec<StoreEntry>> {
    let list = disk::read_opt::<StoreList>(&list_file(home))?;
    Ok(list.map_or_else(Vec::new, |list| list.body.stores))
}

/// Opens all stores of the family of the home store at `home`, which comes first.
///
/// Stores that cannot be opened, for example because their disk is not mounted, are skipped with a warning.
pub fn stores(home: &Path, session: &Session) -> Result<Vec<Store>> {
    let mut stores = vec![Store::open(home, session.clone())?];
    for entry in entries(home)? {
        match Store::open(&entry.path, session.clone()) {
            Ok(store) if store.uuid() == entry.uuid => stores.push(store.with_home(home)),
            Ok(_) => log::warn!(
                "skipped the store {}: its id differs from that in the list of stores",
                entry.path.shown()
            ),
            Err(error) if error.kind == Kind::NotFound => log::warn!(
                "cannot find the store {}: is its disk mounted?",
                entry.path.shown()
            ),
            // A damaged store must not make the others unusable.
            Err(error) => log::warn!("skipped the store {}: {error}", entry.path.shown()),
        }
    }
    Ok(stores)
}

/// Returns the store of the family that contains the container `name`.
pub fn holding(home: &Path, session: &Session, name: &ContainerName) -> Result<Store> {
    let (mut holding, mut known, mut unreadable) = (Vec::new(), Vec::new(), None);
    for store in stores(home, session)? {
        let names = store.names()?;
        for (_, found) in names {
            match found {
                Ok(found) if found == *name => {
                    holding.push(store);
                    break;
                }
                Ok(found) => known.push(found),
                Err(error) => unreadable = Some(error),
            }
        }
    }
    match (holding.pop(), holding.first(), unreadable) {
        (Some(store), None, _) => Ok(store),
        (Some(one), Some(other), _) => Err(Error::failed(format!(
            "two stores have a container named {name}: {} and {}",
            other.root().shown(),
            one.root().shown()
        ))
        .hint("select one of them with --store, and rename the container there")),
        (None, _, Some(error)) => Err(error),
        (None, _, None) => Err(no_container(name, &known)),
    }
}

/// Opens the store at `path` as a member of the family. Creates it and adds it to the list if necessary.
pub fn join(store: &Store, path: &Path) -> Result<Store> {
    let session = store.session();
    if path == store.home() {
        return Store::open(path, session.clone());
    }
    let made = Store::open_or_make(path, session.clone())?;
    let lock = store.home().join("locks").join(format!("stores{LOCK}"));
    let _alone = Lock::take(&lock, Mode::Exclusive, &session.command, session.patience)?;
    let file = list_file(store.home());
    let old = disk::read_opt::<StoreList>(&file)?;
    let mut list = old
        .as_ref()
        .map_or_else(StoreList::default, |old| old.body.clone());
    let entry = StoreEntry {
        uuid: made.uuid(),
        path: path.to_path_buf(),
    };
    if !list.stores.contains(&entry) {
        list.stores
            .retain(|known| known.uuid != entry.uuid && known.path != entry.path);
        list.stores.push(entry);
        let next = match &old {
            Some(old) => old.next(list),
            None => Record::first(list),
        };
        disk::replace(&file, &next)?;
    }
    Ok(made.with_home(store.home()))
}

/// Claims `name` for a new container.
///
/// Fails if another container of the family has the name or another command claims it. The caller holds the returned
/// lock until the container's manifest exists, and then removes it.
pub fn claim(store: &Store, name: &ContainerName) -> Result<Lock> {
    if containerd::is_reserved(name) {
        return Err(Error::usage(format!(
            "the name {name} is reserved for containers of containerd"
        ))
        .hint(format!(
            "choose a name that does not begin with {}",
            containerd::PREFIX
        )));
    }
    let session = store.session();
    let path = store
        .home()
        .join("locks")
        .join(format!("name-{name}{LOCK}"));
    let lock = Lock::take(&path, Mode::Exclusive, &session.command, session.patience)?;
    for (_, known) in names(store)? {
        let known = match known {
            Ok(known) => known,
            // The unreadable container may have the same name. `cowl check` reports this once it is repaired.
            Err(error) => {
                log::warn!("{error}");
                continue;
            }
        };
        if known == *name {
            lock.remove()?;
            return Err(
                Error::failed(format!("a container named {name} already exists")).hint(format!(
                    "choose another name, or destroy that container: cowl destroy {name}"
                )),
            );
        }
    }
    Ok(lock)
}

/// Acquires the lock that serializes adoptions into the family of stores.
pub fn lock_adoption(store: &Store) -> Result<Lock> {
    let session = store.session();
    let path = store.home().join("locks").join(format!("adopting{LOCK}"));
    Lock::take(&path, Mode::Exclusive, &session.command, session.patience)
}

/// Returns the problems in the list of stores, each with the path of the entry. Empty if the store is not a home store.
pub fn list_problems(store: &Store) -> Result<Vec<(PathBuf, String)>> {
    let mut problems = Vec::new();
    if store.root() != store.home() {
        return Ok(problems);
    }
    let mut seen = Vec::new();
    for entry in entries(store.home())? {
        let why = match Store::open(&entry.path, store.session().clone()) {
            Ok(store) if store.uuid() != entry.uuid => {
                "the store there has another id than the list of stores says".to_owned()
            }
            Ok(_) if seen.contains(&entry.uuid) || entry.uuid == store.uuid() => {
                "the list of stores contains it twice".to_owned()
            }
            Ok(_) => String::new(),
            Err(error) => format!("the list of stores contains it, but it cannot be used: {error}"),
        };
        seen.push(entry.uuid);
        if !why.is_empty() {
            problems.push((entry.path, why));
        }
    }
    Ok(problems)
}

/// Returns the names of all containers of the family. Stores that cannot be read are skipped with a warning.
fn names(store: &Store) -> Result<Vec<ListedName>> {
    let mut names = read_names(store.home())?;
    let others = entries(store.home())?;
    for other in &others {
        match read_names(&other.path) {
            Ok(found) => names.extend(found),
            Err(error) => log::warn!("{error}"),
        }
    }
    // The store may be a member that was opened by its path, and has no list of its own.
    if store.root() != store.home() && others.iter().all(|other| other.path != store.root()) {
        names.extend(read_names(store.root())?);
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::super::tests::session;
    use super::*;

    #[test]
    fn names_are_unique_in_the_family() {
        let dir = tempfile::tempdir().unwrap();
        let home = Store::open_or_make(&dir.path().join("home"), session()).unwrap();
        let other = join(&home, &dir.path().join("other")).unwrap();
        assert_eq!(other.home(), home.root());
        let again = join(&home, &dir.path().join("other")).unwrap();
        assert_eq!(again.uuid(), other.uuid());
        assert_eq!(entries(home.root()).unwrap().len(), 1);

        let name = ContainerName::parse("web").unwrap();
        let claimed = claim(&other, &name).unwrap();
        assert_eq!(claim(&home, &name).unwrap_err().kind, Kind::Busy);
        claimed.remove().unwrap();
        let error = holding(home.root(), &session(), &name).unwrap_err();
        assert_eq!(error.kind, Kind::NotFound);

        // A missing disk does not affect the other stores.
        std::fs::rename(dir.path().join("other"), dir.path().join("moved")).unwrap();
        assert_eq!(stores(home.root(), &session()).unwrap().len(), 1);
        claim(&home, &name).unwrap().remove().unwrap();
    }

    #[test]
    fn only_one_command_claims_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let name = ContainerName::parse("web").unwrap();
        let claimed = claim(&store, &name).unwrap();
        assert_eq!(claim(&store, &name).unwrap_err().kind, Kind::Busy);
        claimed.remove().unwrap();
        claim(&store, &name).unwrap().remove().unwrap();
    }
}

//! The containers that arguments name, and their stores.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use super::Context;
use crate::error::{Kind, Result};
use crate::store::Store;
use crate::store::containerd_ids::{self, Abbreviation, IdQuery};
use crate::store::family;
use crate::store::name::{Address, ContainerName, SnapshotName, StatePath};

impl Context {
    /// Opens the store of the container `name` and cleans it up.
    pub(super) fn store_for(&self, name: &ContainerName) -> Result<Store> {
        let found = self.found.take().filter(|(found, _)| found == name);
        let store = match found {
            Some((_, store)) => store,
            None => family::holding(&self.root, &self.session, name)?,
        };
        self.clean_up(store)
    }

    /// Parses the name of an existing container.
    ///
    /// If no container has this name, the id of a container of containerd is accepted as well, alone or after the
    /// namespace: `NAMESPACE/ID`. If there is no such container either, the name is returned, and opening it fails.
    pub(super) fn container(&self, raw: impl AsRef<OsStr>) -> Result<ContainerName> {
        self.container_by(raw.as_ref(), Abbreviation::Accepted)
    }

    /// Like [`Context::container`], but the beginning of an id selects no container: what the command does cannot be
    /// undone, or no person reads its output.
    pub(super) fn container_exactly(&self, raw: impl AsRef<OsStr>) -> Result<ContainerName> {
        self.container_by(raw.as_ref(), Abbreviation::Refused)
    }

    fn container_by(&self, raw: &OsStr, abbreviation: Abbreviation) -> Result<ContainerName> {
        let by_id = |text| self.by_id(text, abbreviation);
        match ContainerName::parse(raw) {
            Ok(name) => self.known(name, abbreviation),
            Err(error) => match raw.to_str().map(by_id).transpose()? {
                Some(Some(name)) => Ok(name),
                Some(None) | None => Err(error),
            },
        }
    }

    /// Parses the address of a state of an existing container, like [`Context::container`].
    pub(super) fn address(&self, raw: impl AsRef<OsStr>) -> Result<Address> {
        let raw = raw.as_ref();
        match Address::parse(raw) {
            Ok(address) => Ok(Address {
                container: self.known(address.container, Abbreviation::Accepted)?,
                ..address
            }),
            Err(error) => {
                let Some(text) = raw.to_str() else {
                    return Err(error);
                };
                let (id, snapshot) = match text.split_once('@') {
                    Some((id, snapshot)) => (id, Some(SnapshotName::parse(snapshot)?)),
                    None => (text, None),
                };
                let found = self.by_id(id, Abbreviation::Accepted)?;
                let container = found.ok_or(error)?;
                Ok(Address {
                    container,
                    snapshot,
                })
            }
        }
    }

    /// Parses a path in a state of an existing container, like [`Context::container`].
    pub(super) fn state_path(&self, raw: &OsString) -> Result<StatePath> {
        let bytes = raw.as_bytes();
        let end = bytes.iter().position(|&byte| byte == b':');
        let (address, path) = match end.and_then(|end| bytes.split_at_checked(end)) {
            Some((address, path)) => (address, path.get(1..)),
            None => (bytes, None),
        };
        Ok(StatePath {
            address: self.address(OsStr::from_bytes(address))?,
            path: path.map(<[u8]>::to_vec),
        })
    }

    /// Returns the name of the container of containerd with this id; `None` if there is none.
    pub(super) fn by_id(
        &self,
        text: &str,
        abbreviation: Abbreviation,
    ) -> Result<Option<ContainerName>> {
        let Some(query) = IdQuery::parse(text) else {
            return Ok(None);
        };
        match family::stores(&self.root, &self.session) {
            Ok(stores) => containerd_ids::find(&stores, query, abbreviation),
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns `name` if a container has it, else the name of the container with this id.
    fn known(&self, name: ContainerName, abbreviation: Abbreviation) -> Result<ContainerName> {
        let found = self.found.borrow();
        if found.as_ref().is_some_and(|(found, _)| *found == name) {
            return Ok(name);
        }
        drop(found);
        match family::holding(&self.root, &self.session, &name) {
            Ok(store) => {
                self.found.replace(Some((name.clone(), store)));
                Ok(name)
            }
            Err(error) if error.kind == Kind::NotFound => {
                let found = self.by_id(name.as_str(), abbreviation)?;
                Ok(found.unwrap_or(name))
            }
            // The command reports it.
            Err(_) => Ok(name),
        }
    }
}

//! Logging in to a registry and out of it.

use std::path::PathBuf;
use std::time::Duration;

use ureq::http::Method;

use super::auth_file::{self, AuthFiles, Update};
use super::client::{Call, Client};
use super::credentials::{self, Credential};
use super::reference::RegistryName;
use super::transport::Connection;
use super::trust::Trust;
use crate::error::{Error, Result};

/// Verifies the name and the password of a user, and stores them. Returns the file in which they are, or `None` if a
/// credential helper has stored them. Waits at most for `patience` for another command that changes the file.
pub fn log_in(
    registry: &RegistryName,
    (user, password): (&str, &str),
    (trust, files): (&Trust, &AuthFiles),
    patience: Duration,
) -> Result<Option<PathBuf>> {
    if user.is_empty() || user.contains(':') || user.chars().any(char::is_control) {
        return Err(Error::usage(
            "the name of a user is not empty and contains no colon",
        ));
    }
    let connection = Connection::open(registry, trust)?;
    verify(connection, user, password)?;
    let (path, origin) = files.to_write();
    let auth = Credential::encode(user, password);
    let entry = (registry.as_str(), Some(auth.as_str()));
    let done = auth_file::update((&path, origin), entry, patience, |file| {
        let helper = file.helper(registry.as_str()).or(file.default_helper());
        match helper {
            Some(helper) => {
                credentials::store(helper, registry.as_str(), user, password)?;
                Ok(false)
            }
            None => Ok(true),
        }
    })?;
    Ok((done != Update::Declined).then_some(path))
}

/// Sends a request with the credentials, which must succeed.
fn verify(connection: Connection, user: &str, password: &str) -> Result<()> {
    let registry = connection.registry().clone();
    let url = connection.url("/v2/");
    let credential = Credential::Basic(user.to_owned(), password.to_owned());
    let client = Client::new(connection, String::new(), Vec::new(), Some(credential));
    let call = Call::new(Method::GET, url);
    let response = client.send(&call)?;
    match response.status().as_u16() {
        200..=299 => Ok(()),
        401 | 403 => Err(Error::failed(format!(
            "{registry} does not accept this user and password"
        ))),
        _ => Err(client.refusal("cannot log in", response)),
    }
}

/// Removes the stored credentials of a registry. Returns whether there were any.
pub fn log_out(registry: &RegistryName, files: &AuthFiles, patience: Duration) -> Result<bool> {
    let mut erased = false;
    let (path, origin) = files.to_write();
    let entry = (registry.as_str(), None);
    let done = auth_file::update((&path, origin), entry, patience, |file| {
        if let Some(helper) = file.helper(registry.as_str()).or(file.default_helper()) {
            erased = credentials::erase(helper, registry.as_str())?;
        }
        Ok(true)
    })?;
    Ok(done == Update::Done || erased)
}

//! The credentials for a registry: found in files, or by programs that store them (credential helpers of Docker).

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::auth_file::{AuthFile, AuthFiles};
use super::reference::RegistryName;
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The maximum number of bytes that a helper prints.
const MAX_OUTPUT: u64 = 256 << 10;

/// The name of a user that stands for a token.
const TOKEN_USER: &str = "<token>";

/// The keys of Docker's own registry.
const DOCKER_KEYS: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Credentials for a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// The name of a user, and a password.
    Basic(String, String),
    /// A token with which the token server issues others.
    Identity(String),
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential")
    }
}

impl Credential {
    /// Returns the value of `auth` in a file: the name and the password in Base64.
    pub(super) fn encode(user: &str, password: &str) -> String {
        STANDARD.encode(format!("{user}:{password}"))
    }

    /// Returns the credential in an entry of a file, if it has one.
    fn from_entry(entry: &Map<String, Value>) -> Option<Self> {
        let text = |key: &str| {
            entry
                .get(key)
                .and_then(Value::as_str)
                .filter(|t| !t.is_empty())
        };
        if let Some(token) = text("identitytoken") {
            return Some(Self::Identity(token.to_owned()));
        }
        if let Some(auth) = text("auth") {
            let decoded = String::from_utf8(STANDARD.decode(auth.trim()).ok()?).ok()?;
            // Docker pads the password with zeros.
            let (user, password) = decoded.trim_end_matches('\0').split_once(':')?;
            return Some(Self::from_parts(user, password));
        }
        Some(Self::from_parts(text("username")?, text("password")?))
    }

    fn from_parts(user: &str, password: &str) -> Self {
        match user {
            TOKEN_USER => Self::Identity(password.to_owned()),
            user => Self::Basic(user.to_owned(), password.to_owned()),
        }
    }
}

/// Finds the credential for a repository.
///
/// In each file, the helper of the registry comes first, then the entry with the longest matching key, then the helper
/// for all registries.
pub(super) fn find(
    files: &AuthFiles,
    registry: &RegistryName,
    repository: &str,
) -> Result<Option<Credential>> {
    for file in files.read()? {
        if let Some(found) = find_in(&file, registry, repository)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn find_in(
    file: &AuthFile,
    registry: &RegistryName,
    repository: &str,
) -> Result<Option<Credential>> {
    let names = names(registry);
    for name in &names {
        if let Some(helper) = file.helper(name)
            && let Some(found) = ask(helper, name)?
        {
            return Ok(Some(found));
        }
    }
    for wanted in keys(registry, repository) {
        for (key, entry) in file.entries() {
            if normalized(key) == wanted
                && let Some(found) = Credential::from_entry(entry)
            {
                return Ok(Some(found));
            }
        }
    }
    if let Some(helper) = file.default_helper() {
        let legacy = "https://index.docker.io/v1/";
        let legacy = names.len().gt(&1).then_some(legacy);
        for name in names.iter().copied().chain(legacy) {
            if let Some(found) = ask(helper, name)? {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}

/// Returns the names of a registry.
fn names(registry: &RegistryName) -> Vec<&str> {
    match DOCKER_KEYS.contains(&registry.as_str()) {
        true => DOCKER_KEYS.to_vec(),
        false => vec![registry.as_str()],
    }
}

/// Returns the keys for a repository: it, its parents, and the registry.
fn keys(registry: &RegistryName, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    for name in names(registry) {
        let mut path = repository;
        while !path.is_empty() {
            keys.push(format!("{name}/{path}"));
            path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        }
    }
    keys.extend(names(registry).into_iter().map(str::to_owned));
    keys
}

/// Returns a key without the scheme and the version of the API, with which Docker writes it.
fn normalized(key: &str) -> String {
    let own = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"));
    let own = own.unwrap_or(key).trim_end_matches('/');
    let own = own
        .strip_suffix("/v1")
        .or_else(|| own.strip_suffix("/v2"))
        .unwrap_or(own);
    match own.split_once('/') {
        Some((host, path)) => format!("{}/{path}", host.to_ascii_lowercase()),
        None => own.to_ascii_lowercase(),
    }
}

/// The credential in the form of a helper.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct HelperEntry {
    #[serde(rename = "ServerURL")]
    server_url: String,
    username: String,
    secret: String,
}

/// Asks a helper for a credential; `None` if it has none.
fn ask(helper: &str, registry: &str) -> Result<Option<Credential>> {
    let (succeeded, output) = run(helper, "get", registry)?;
    if !succeeded {
        // The helpers have no other way to report this.
        let text = output.trim_ascii().shown().to_string();
        if text.contains("not found") {
            return Ok(None);
        }
        return Err(failed(helper, &output));
    }
    let entry: HelperEntry = serde_json::from_slice(&output)
        .map_err(|_| helper_error(helper, "it did not print a credential in JSON"))?;
    match entry.username.is_empty() && entry.secret.is_empty() {
        true => Ok(None),
        false => Ok(Some(Credential::from_parts(&entry.username, &entry.secret))),
    }
}

/// Stores a credential with a helper.
pub(super) fn store(helper: &str, registry: &str, user: &str, password: &str) -> Result<()> {
    let entry = HelperEntry {
        server_url: registry.to_owned(),
        username: user.to_owned(),
        secret: password.to_owned(),
    };
    let entry = serde_json::to_string(&entry).map_err(|error| {
        helper_error(helper, "the credential has no form in JSON").because(error)
    })?;
    match run(helper, "store", &entry)? {
        (true, _) => Ok(()),
        (false, output) => Err(failed(helper, &output)),
    }
}

/// Removes the credential of a registry from a helper. Returns whether there was one.
pub(super) fn erase(helper: &str, registry: &str) -> Result<bool> {
    if ask(helper, registry)?.is_none() {
        return Ok(false);
    }
    match run(helper, "erase", registry)? {
        (true, _) => Ok(true),
        (false, output) => Err(failed(helper, &output)),
    }
}

fn failed(helper: &str, output: &[u8]) -> Error {
    let why = super::answer::shortened(&output.trim_ascii().shown().to_string());
    helper_error(helper, &why)
}

fn helper_error(helper: &str, why: &str) -> Error {
    Error::failed(format!(
        "the credential helper docker-credential-{} failed: {why}",
        helper.shown()
    ))
    .hint("test the helper, or select another file with credentials: --authfile")
}

/// Runs a helper. Returns whether it succeeded, and its output.
fn run(helper: &str, action: &str, input: &str) -> Result<(bool, Vec<u8>)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if helper.is_empty() || !helper.chars().all(is_word) {
        let shown = helper.shown();
        let what = format!("invalid name of a credential helper: \"{shown}\"");
        return Err(Error::failed(what));
    }
    let program = format!("docker-credential-{helper}");
    let failed = |error: std::io::Error| {
        Error::failed(format!("cannot run {program}"))
            .hint("install this helper, or select another file with credentials: --authfile")
            .because(error)
    };
    let mut child = Command::new(&program)
        .arg(action)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut written = Ok(());
    if let Some(mut stdin) = child.stdin.take() {
        written = stdin.write_all(input.as_bytes());
    }
    let mut output = Vec::new();
    let mut read = Ok(0);
    if let Some(stdout) = child.stdout.take() {
        read = stdout.take(MAX_OUTPUT).read_to_end(&mut output);
    }
    let status = child.wait().map_err(failed)?;
    read.map_err(failed)?;
    if status.success() {
        written.map_err(failed)?;
    }
    Ok((status.success(), output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_for(json: Value, registry: &str, repository: &str) -> Option<Credential> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let files = AuthFiles::from_option(Some(path));
        find(&files, &RegistryName::parse(registry).unwrap(), repository).unwrap()
    }

    #[test]
    fn the_longest_matching_key_is_used() {
        let auth = |user: &str| serde_json::json!({ "auth": Credential::encode(user, "p:w") });
        let file = serde_json::json!({ "auths": {
            "r.example": auth("host"),
            "r.example/a": auth("parent"),
            "r.example/a/b": auth("exact"),
            "https://other.example/v1/": auth("legacy"),
            "https://index.docker.io/v1/": auth("docker"),
            "token.example": { "identitytoken": "t", "auth": "" },
            "plain.example": { "username": "u", "password": "p:w" },
            "bad.example": { "auth": "%%%" },
        }});
        for (registry, repository, user) in [
            ("r.example", "a/b", Some("exact")),
            ("r.example", "a/c", Some("parent")),
            ("r.example", "ab", Some("host")),
            ("R.example", "x", Some("host")),
            ("r.example:5000", "a", None),
            ("other.example", "a", Some("legacy")),
            ("docker.io", "library/debian", Some("docker")),
            ("plain.example", "a", Some("u")),
            ("bad.example", "a", None),
        ] {
            let found = find_for(file.clone(), registry, repository);
            let expected = user.map(|user| Credential::Basic(user.to_owned(), "p:w".to_owned()));
            assert!(found == expected, "{registry} {repository}");
        }
        let token = find_for(file, "token.example", "a");
        assert!(token == Some(Credential::Identity("t".to_owned())));
    }

    #[test]
    fn names_of_helpers_are_checked() {
        for bad in ["", "../x", "a b", "a/b", "x;y"] {
            assert!(run(bad, "get", "r.example").is_err(), "{bad}");
        }
    }
}

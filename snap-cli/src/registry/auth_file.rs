//! Files with credentials of registries: `containers-auth.json(5)`, and Docker's `config.json`.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;
use serde_json::{Map, Value};

use super::answer;
use crate::archive::unfinished::UnfinishedFile;
use crate::error::{Error, Result};
use crate::host::rootless::Caller;
use cowl_layers::shown::Show as _;

/// The maximum size of a file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The time between two attempts to lock a directory.
const POLL: Duration = Duration::from_millis(50);

/// The files in which credentials are searched and stored.
#[derive(Clone, Debug)]
pub struct AuthFiles {
    /// The file that the user has specified.
    explicit: Option<PathBuf>,
}

/// The way in which a file was selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The user has named it.
    Option,
    /// The environment has, which may be that of another user.
    Default,
}

/// The result of [`update`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Update {
    /// The file has another content.
    Done,
    /// The entry to be removed does not exist.
    NotFound,
    /// The caller has declined the change.
    Declined,
}

/// The content of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct AuthFile(Map<String, Value>);

impl AuthFiles {
    /// Returns the files for the option `--authfile`, or else for the environment.
    pub fn from_option(file: Option<PathBuf>) -> Self {
        Self {
            explicit: file.or_else(|| variable("REGISTRY_AUTH_FILE")),
        }
    }

    /// Returns the file to which credentials are written: by default that of podman.
    pub(super) fn to_write(&self) -> (PathBuf, Origin) {
        match &self.explicit {
            Some(file) => (file.clone(), Origin::Option),
            None => (runtime_file(), Origin::Default),
        }
    }

    /// Reads the files, the most important one first.
    pub(super) fn read(&self) -> Result<Vec<AuthFile>> {
        if let Some(file) = &self.explicit {
            let found = AuthFile::read(file, Origin::Option)?;
            return found.map(|file| vec![file]).ok_or_else(|| {
                Error::not_found(format!("{} does not exist", file.shown()))
                    .hint("create it with cowl login, podman login or docker login")
            });
        }
        let mut found = Vec::new();
        for path in default_files() {
            let Some(file) = open(&path)? else {
                continue;
            };
            match distrust((&file, &path))? {
                None => found.push(AuthFile::parse((&file, &path))?),
                Some(error) => log::warn!(
                    "{error}; it is ignored{}",
                    error
                        .hint
                        .as_deref()
                        .map_or_else(String::new, |hint| format!(" ({hint})"))
                ),
            }
        }
        Ok(found)
    }
}

/// Returns the value of a variable that is an absolute path.
fn variable(name: &str) -> Option<PathBuf> {
    let value = std::env::var_os(name).map(PathBuf::from);
    value.filter(|path| !path.as_os_str().is_empty())
}

/// Returns the file of podman, which does not survive a reboot.
fn runtime_file() -> PathBuf {
    let dir = variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers"));
    let own = || PathBuf::from(format!("/run/containers/{}", Caller::get().uid));
    dir.unwrap_or_else(own).join("auth.json")
}

fn default_files() -> Vec<PathBuf> {
    let home = variable("HOME");
    let config = variable("XDG_CONFIG_HOME").or_else(|| Some(home.as_ref()?.join(".config")));
    let docker = variable("DOCKER_CONFIG").or_else(|| Some(home.as_ref()?.join(".docker")));
    let mut files = vec![runtime_file()];
    files.extend(config.map(|dir| dir.join("containers/auth.json")));
    files.extend(docker.map(|dir| dir.join("config.json")));
    files
}

/// Returns why an open file or directory is not used unless the user names it; `None` if only the caller and root can
/// change it. It can name programs that are run, and HOME and XDG_RUNTIME_DIR can be those of another user.
fn distrust((file, path): (&File, &Path)) -> Result<Option<Error>> {
    let meta = file
        .metadata()
        .map_err(|error| Error::at("inspect", path, error))?;
    let owner = meta.uid();
    let is_own = owner == 0 || owner == rustix::process::geteuid().as_raw();
    // In a sticky directory, a user cannot replace the files of another one.
    let is_open = match meta.is_dir() {
        true => meta.mode() & 0o1002 == 0o002,
        false => meta.mode() & 0o002 != 0,
    };
    let path = path.shown();
    Ok(match (is_own, is_open) {
        (true, false) => None,
        (false, _) => Some(
            Error::failed(format!("{path} belongs to the user {owner}"))
                .hint("to use a file there nevertheless: --authfile FILE"),
        ),
        (true, true) => Some(
            Error::failed(format!("{path} can be changed by all users"))
                .hint(format!("correct its mode: chmod o-w {path}")),
        ),
    })
}

/// Refuses an open file or directory that the user has not named and that others can change.
fn refuse_untrusted(file: (&File, &Path), origin: Origin) -> Result<()> {
    if origin == Origin::Option {
        return Ok(());
    }
    distrust(file)?.map_or(Ok(()), Err)
}

/// Opens a file or a directory; `None` if it does not exist.
fn open(path: &Path) -> Result<Option<File>> {
    let mut options = File::options();
    // A fifo of another user must not block.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    match options.read(true).custom_flags(flags).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("read", path, error)),
    }
}

impl AuthFile {
    /// Reads a file; `None` if it does not exist.
    fn read(path: &Path, origin: Origin) -> Result<Option<Self>> {
        let Some(file) = open(path)? else {
            return Ok(None);
        };
        // The open file: another one can get the name.
        refuse_untrusted((&file, path), origin)?;
        Self::parse((&file, path)).map(Some)
    }

    fn parse((file, path): (&File, &Path)) -> Result<Self> {
        let data = answer::read_open_file((file, path), MAX_FILE)?;
        if data.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let content = serde_json::from_slice(&data);
        content.map(Self).map_err(|error| {
            // The cause could quote a password.
            log::debug!("line {}, column {}", error.line(), error.column());
            Error::failed(format!("{} is not a file of credentials", path.shown()))
                .hint("it is JSON with the key \"auths\", see containers-auth.json(5)")
        })
    }

    /// Returns the entries of credentials, with their keys.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &Map<String, Value>)> {
        let auths = self.0.get("auths").and_then(Value::as_object);
        let entries = auths.into_iter().flatten();
        entries.filter_map(|(key, value)| Some((key.as_str(), value.as_object()?)))
    }

    /// Returns the name of the helper for one registry.
    pub(super) fn helper(&self, registry: &str) -> Option<&str> {
        self.0.get("credHelpers")?.get(registry)?.as_str()
    }

    /// Returns the name of the helper for all registries.
    pub(super) fn default_helper(&self) -> Option<&str> {
        let helper = self.0.get("credsStore")?.as_str()?;
        (!helper.is_empty()).then_some(helper)
    }

    /// Sets the entry of a registry, or removes it. Returns whether the content changed; `None` if the file has no valid
    /// entries.
    fn set(&mut self, registry: &str, auth: Option<&str>) -> Option<bool> {
        let auths = self.0.entry("auths").or_insert(Value::Null);
        if auths.is_null() {
            *auths = Value::Object(Map::new());
        }
        let auths = auths.as_object_mut()?;
        Some(match auth {
            Some(auth) => {
                let entry = serde_json::json!({ "auth": auth });
                auths.insert(registry.to_owned(), entry);
                true
            }
            None => auths.remove(registry).is_some(),
        })
    }
}

/// Sets or removes the entry of a registry in a file, which is replaced atomically.
///
/// `accept` inspects the file before the change; if it returns false, the file is not changed. Waits at most for `patience`
/// for another command.
pub(super) fn update(
    (path, origin): (&Path, Origin),
    (registry, auth): (&str, Option<&str>),
    patience: Duration,
    accept: impl FnOnce(&AuthFile) -> Result<bool>,
) -> Result<Update> {
    let at = |error| Error::at("write", path, error);
    let dir = parent(path);
    if auth.is_some() {
        let above = parent(dir);
        if let Some(opened) = open(above)? {
            refuse_untrusted((&opened, above), origin)?;
        }
        let mut builder = std::fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(at)?;
    }
    let Some(opened) = open(dir)? else {
        return Ok(Update::NotFound);
    };
    refuse_untrusted((&opened, dir), origin)?;
    // Excludes another login, which would overwrite this one.
    lock((&opened, dir), patience)?;
    let mut content = AuthFile::read(path, origin)?.unwrap_or_default();
    if !accept(&content)? {
        return Ok(Update::Declined);
    }
    match content.set(registry, auth) {
        Some(true) => {}
        Some(false) => return Ok(Update::NotFound),
        None => {
            return Err(Error::failed(format!(
                "cannot change {}: its value \"auths\" is not an object",
                path.shown()
            ))
            .hint(
                "correct the file, see containers-auth.json(5), or select another one: --authfile",
            ));
        }
    }
    let text = format!("{:#}\n", Value::Object(content.0));
    // The target of a link is replaced, not the link.
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let unfinished = UnfinishedFile::with_mode(&target, 0o600)?;
    unfinished.file().write_all(text.as_bytes()).map_err(at)?;
    unfinished.finish()?;
    Ok(Update::Done)
}

/// Returns the directory that contains a path.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        Some(_) => Path::new("."),
        None => path,
    }
}

/// Locks a directory. Another user may hold such a lock for ever.
fn lock((dir, path): (&File, &Path), patience: Duration) -> Result<()> {
    let end = Instant::now() + patience;
    loop {
        match rustix::fs::flock(dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(POLL),
            Err(Errno::WOULDBLOCK) => {
                return Err(
                    Error::busy(format!("another command has locked {}", path.shown()))
                        .hint("try again, or select a file in another directory: --authfile"),
                );
            }
            Err(error) => return Err(Error::at("lock", path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changes a file that the user has named.
    fn set_in(path: &Path, registry: &str, auth: Option<&str>) -> Result<Update> {
        update(
            (path, Origin::Option),
            (registry, auth),
            Duration::ZERO,
            |_| Ok(true),
        )
    }

    #[test]
    fn other_entries_are_preserved() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/auth.json");
        let set = |registry: &str, auth| set_in(&path, registry, auth).unwrap();
        assert_eq!(set("r.example", None), Update::NotFound);
        assert_eq!(set("r.example", Some("eA==")), Update::Done);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut value: Value = serde_json::from_str(&text).unwrap();
        value["credsStore"] = "x".into();
        std::fs::write(&path, value.to_string()).unwrap();
        assert_eq!(set("s.example", Some("eQ==")), Update::Done);
        assert_eq!(set("r.example", None), Update::Done);
        let file = AuthFile::read(&path, Origin::Option).unwrap().unwrap();
        assert_eq!(
            file.entries().map(|(key, _)| key).collect::<Vec<_>>(),
            ["s.example"]
        );
        assert_eq!(file.default_helper(), Some("x"));
        for bad in ["[]", "{", "{\"auths\":1,}"] {
            std::fs::write(&path, bad).unwrap();
            assert!(AuthFile::read(&path, Origin::Option).is_err(), "{bad}");
        }
        for bad in ["{\"auths\":1}", "{\"auths\":[]}"] {
            std::fs::write(&path, bad).unwrap();
            let error = set_in(&path, "r.example", Some("eA==")).unwrap_err();
            assert!(error.to_string().contains("auths"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), bad);
        }
        std::fs::write(&path, "{\"auths\":null}").unwrap();
        assert_eq!(set("r.example", Some("eA==")), Update::Done);
    }

    #[test]
    fn default_files_of_other_users_are_not_used() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("run");
        let path = parent.join("containers/auth.json");
        let set = || {
            update(
                (&path, Origin::Default),
                ("r.example", Some("eA==")),
                Duration::ZERO,
                |_| Ok(true),
            )
        };
        let refused = |result: Result<Update>, why: &str| {
            let error = result.unwrap_err().to_string();
            error.contains(why)
        };
        let (open, foreign) = ("can be changed by all users", "belongs to the user 4321");
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        std::fs::create_dir(&parent).unwrap();
        mode(&parent, 0o777);
        assert!(refused(set(), open) && !parent.join("containers").try_exists().unwrap());
        mode(&parent, 0o700);
        assert_eq!(set().unwrap(), Update::Done);
        mode(&parent.join("containers"), 0o777);
        assert!(refused(set(), open));
        mode(&parent.join("containers"), 0o700);
        mode(&path, 0o666);
        assert!(refused(set(), open));
        mode(&path, 0o600);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(4321), None).unwrap();
            assert!(refused(set(), foreign));
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
            std::os::unix::fs::chown(&parent, Some(4321), None).unwrap();
            assert!(refused(set(), foreign));
        }
        assert!(set_in(&path, "r.example", None).is_ok());
    }

    #[test]
    fn a_lock_of_another_command_is_not_waited_for_endlessly() {
        let dir = tempfile::tempdir().unwrap();
        let other = File::open(dir.path()).unwrap();
        rustix::fs::flock(&other, FlockOperation::LockExclusive).unwrap();
        let path = dir.path().join("auth.json");
        let error = set_in(&path, "r.example", Some("eA==")).unwrap_err();
        assert_eq!(error.kind, crate::error::Kind::Busy);
        assert!(!path.try_exists().unwrap());
    }
}

//! The namespace of a plain user: a user namespace and a mount namespace, in which the user may mount containers.
//!
//! There is one for each user. The first command creates it, a small process holds it (see [`holder`]), and every later
//! command enters it before it opens a store (docs/decisions/0036).

pub mod holder;
mod ids;
mod limits;
mod lock;

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cowl_layers::sys;
pub use cowl_layers::sys::user_namespace::is_system_root;
use cowl_layers::sys::user_namespace::{self, UserNamespace};
use rustix::fs::{CWD, Mode, OFlags};

use crate::error::{Error, Kind, Result};
use crate::host::mountinfo::Mount;
use crate::shell::quoted;
use holder::Origin;
use ids::IdMap;
use lock::NamespaceFile;

/// The ids of the user that called this process, as they are outside of its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
}

/// The hint to a command that cannot use the namespace, because it is in that or another one.
const LEAVE: &str = "leave the namespace first: exit";

/// Set once this process has entered the user's namespace.
static ENTERED: OnceLock<Caller> = OnceLock::new();

impl Caller {
    /// Returns the user that called this process.
    pub fn get() -> Self {
        ENTERED.get().copied().unwrap_or_else(|| Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        })
    }

    /// Returns the name of the user; `None` if it has none.
    pub fn name(&self) -> Option<String> {
        let found = nix::unistd::User::from_uid(self.uid.into());
        found.ok().flatten().map(|user| user.name)
    }
}

/// Returns whether this process has entered the namespace of the user.
pub fn has_entered() -> bool {
    ENTERED.get().is_some()
}

/// Enters the namespace of the user, and creates it if necessary. The process must have a single thread.
///
/// Does nothing for a process that may mount, and if the store at `store` belongs to another user.
pub fn enter(store: &Path) -> Result<()> {
    let may_mount = user_namespace::may_mount()
        .map_err(|error| Error::failed("cannot read the capabilities").because(error))?;
    let caller = Caller::get();
    if may_mount || caller.uid == 0 || !is_owner(caller, store) {
        return Ok(());
    }
    let wanted = IdMap::of(&caller);
    let from = WorkingDir::open();
    let ids = enter_or_create(caller, &wanted, store)?;
    from.restore();
    ENTERED.get_or_init(|| caller);
    log::info!("in the namespace of this user, with {}", ids.describe());
    if ids != wanted && wanted.has_ranges() {
        log::warn!(
            "your namespace has {}, and /etc/subuid and /etc/subgid assign {}; to renew it: unmount all containers \
             (cowl status), then type: cowl unshare --stop",
            ids.describe(),
            wanted.describe()
        );
    }
    Ok(())
}

/// Describes the ids of the namespace that this process is in.
pub fn describe_ids() -> Result<String> {
    IdMap::current().map(|ids| ids.describe())
}

/// Ends the namespace of the user, if there is one. Fails if containers are mounted in it.
pub fn stop() -> Result<()> {
    let caller = Caller::get();
    // Such a process sees the holders, and would end what it uses itself.
    if caller.uid == 0 && !is_system_root() {
        let error = Error::busy("this command runs in a namespace of your user");
        return Err(error.hint(LEAVE));
    }
    for dir in lock::dirs(caller.uid) {
        let Some(file) = NamespaceFile::open(&dir)? else {
            continue;
        };
        if file.holder()?.is_none() {
            continue;
        }
        file.lock_creation()?;
        if let Some(found) = find(&file, caller)? {
            return stop_found(&file, &found);
        }
    }
    Ok(())
}

/// Ends the holders of a namespace. The caller has locked its creation.
fn stop_found(file: &NamespaceFile, found: &UserNamespace) -> Result<()> {
    enter_found(found)?;
    check_unused(&own_mounts()?)?;
    holder::stop(file)?;
    // The namespace exists as long as this process has it open. A command that has entered it before may have mounted a
    // container meanwhile.
    let enter = || found.enter_mounts().map_err(inspection_failed);
    enter()?;
    let unused = check_unused(&own_mounts()?);
    if unused.is_err() {
        enter()?;
        // A holder opens no store.
        holder::start(file, Path::new("/"), Origin::Existing)?;
    }
    unused
}

fn check_unused(at: &[String]) -> Result<()> {
    if at.is_empty() {
        return Ok(());
    }
    Err(Error::busy(format!(
        "containers are mounted in the namespace: {}",
        at.join(", ")
    ))
    .hint("list them, and unmount each: cowl status; cowl umount NAME"))
}

/// Returns the mount points of the containers that were mounted in the namespace. This process gets another one.
///
/// The kernel does not permit to unmount what was mounted before the namespace was created, and mounts that have
/// appeared since then belong to those elsewhere. So the remaining mounts of a copy that can be unmounted are those that
/// were made inside.
fn own_mounts() -> Result<Vec<String>> {
    let path = Path::new("/proc/self/mountinfo");
    let table = std::fs::read(path).map_err(|error| Error::at("read", path, error))?;
    let mounts = mounts_without_master(&table);
    user_namespace::copy_mounts().map_err(inspection_failed)?;
    // With the driver kernel, a container is an overlay.
    let is_container = |mount: &Mount| [&b"fuse.cowlfs"[..], b"overlay"].contains(&&*mount.kind);
    let is_own =
        |mount: &&Mount| is_container(mount) && sys::mount::unmount_lazily(&mount.at).is_ok();
    let own = mounts.iter().filter(is_own);
    Ok(own.map(|mount| quoted(&mount.at)).collect())
}

/// Parses the mounts of mountinfo that did not appear because of a mount in another namespace.
fn mounts_without_master(table: &[u8]) -> Vec<Mount> {
    let is_apart = |line: &&[u8]| {
        // The optional fields end with a hyphen.
        let mut optional = line.split(|&b| b == b' ').skip(6).take_while(|f| f != b"-");
        !optional.any(|field| field.starts_with(b"master:"))
    };
    let lines: Vec<_> = table.split(|&b| b == b'\n').filter(is_apart).collect();
    sys::mountinfo::parse(&lines.join(&b'\n'))
}

fn inspection_failed(error: cowl_layers::Error) -> Error {
    Error::failed("cannot inspect your namespace").because(error)
}

/// Returns whether the store belongs to the user, or does not exist. No namespace gives access to one of another user.
fn is_owner(caller: Caller, store: &Path) -> bool {
    let owner = std::fs::metadata(store).map(|meta| meta.uid());
    owner.map_or_else(
        |error| error.kind() == std::io::ErrorKind::NotFound,
        |uid| uid == caller.uid,
    )
}

/// Enters the namespace. Returns the ids that it has.
fn enter_or_create(caller: Caller, wanted: &IdMap, store: &Path) -> Result<IdMap> {
    let dirs = lock::dirs(caller.uid);
    for dir in &dirs {
        if let Some(file) = NamespaceFile::open(dir)?
            && let Some(found) = find(&file, caller)?
        {
            return enter_found(&found);
        }
    }
    let file = create_file(&dirs)?;
    file.lock_creation()?;
    // A race: another command has created it.
    if let Some(found) = find(&file, caller)? {
        return enter_found(&found);
    }
    if holder::enter_daemons_namespace(store) {
        holder::start(&file, store, Origin::Existing)?;
        log::warn!("the process that held your namespace was killed: another one holds it now");
        return IdMap::current();
    }
    if wanted.has_ranges() {
        match holder::start(&file, store, Origin::New(wanted)) {
            Err(error) if matches!(error.kind, Kind::Usage | Kind::Busy) => return Err(error),
            Err(error) => log::warn!("your namespace has one user id only: {error}"),
            Ok(()) => return enter_held(&file, caller),
        }
    }
    holder::start(&file, store, Origin::New(&wanted.own_only()))?;
    enter_held(&file, caller)
}

/// Opens the file in the first directory in which it can be created.
fn create_file(dirs: &[PathBuf]) -> Result<NamespaceFile> {
    let mut first = None;
    for dir in dirs {
        match NamespaceFile::open_or_create(dir) {
            Ok(file) => return Ok(file),
            Err(error) => {
                log::debug!("{error}");
                first.get_or_insert(error);
            }
        }
    }
    let error = first.unwrap_or_else(|| Error::failed("no directory is known"));
    let hint = error
        .hint
        .clone()
        .unwrap_or_else(|| "set HOME or XDG_STATE_HOME to a directory of your own".to_owned());
    Err(Error::failed("cannot create your namespace")
        .because(error)
        .hint(hint))
}

/// Opens the namespace of the process that holds it; `None` if there is none.
fn find(file: &NamespaceFile, caller: Caller) -> Result<Option<UserNamespace>> {
    while let Some(pid) = file.holder()? {
        let found = UserNamespace::of(pid);
        // If it has ended, its id may be that of another process.
        if file.holder()? != Some(pid) {
            continue;
        }
        let found = found.map_err(inspection_failed)?;
        // A container's root controls the namespace of a process there, also one that the user owns.
        if !found.shares_processes().map_err(inspection_failed)? {
            return Err(Error::failed(format!(
                "the process {pid}, which is in a container, holds a namespace of your user"
            ))
            .hint("set XDG_STATE_HOME to a directory that the container does not have"));
        }
        if found.owner().map_err(inspection_failed)? != caller.uid {
            return Err(Error::failed(format!(
                "the process {pid} holds no namespace of your user"
            ))
            .hint(format!("end it: kill {pid}")));
        }
        if !found.is_child().map_err(inspection_failed)? {
            return Err(Error::failed(
                "your namespace was not created in the namespace of this command",
            )
            .hint(LEAVE));
        }
        return Ok(Some(found));
    }
    Ok(None)
}

fn enter_held(file: &NamespaceFile, caller: Caller) -> Result<IdMap> {
    let found = find(file, caller)?;
    enter_found(&found.ok_or_else(|| {
        Error::failed("the process that holds your namespace was killed").hint("try again")
    })?)
}

fn enter_found(found: &UserNamespace) -> Result<IdMap> {
    found
        .enter()
        .map_err(|error| Error::failed("cannot enter your namespace").because(error))?;
    IdMap::current()
}

/// The working directory before the namespace was entered.
struct WorkingDir {
    path: Option<PathBuf>,
    dir: Option<File>,
}

impl WorkingDir {
    fn open() -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self {
            path: std::env::current_dir().ok(),
            dir: rustix::fs::openat(CWD, ".", flags, Mode::empty())
                .ok()
                .map(File::from),
        }
    }

    /// Enters the directory at the same path, which may be a mount in the namespace; otherwise the directory itself.
    fn restore(&self) {
        let by_path = self.path.as_ref().map(std::env::set_current_dir);
        if matches!(by_path, Some(Ok(()))) {
            return;
        }
        let entered = self.dir.as_ref().map(rustix::process::fchdir);
        if !matches!(entered, Some(Ok(()))) {
            log::info!("the working directory does not exist in the namespace of this user");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_appeared_from_elsewhere_are_skipped() {
        let table = b"30 1 0:40 / /own rw,nosuid - fuse.cowlfs cowl rw\n\
            31 1 0:41 / /shared rw shared:7 - fuse.cowlfs cowl rw\n\
            32 1 0:42 / /other rw master:3 - fuse.cowlfs cowl rw\n\
            33 1 0:43 / /both rw shared:8 master:3 propagate_from:2 - fuse.cowlfs cowl rw\n\
            34 1 0:44 / /name rw - fuse.cowlfs master:3 rw\n";
        let at = mounts_without_master(table).into_iter().map(|m| m.at);
        let at: Vec<_> = at.collect();
        assert_eq!(at, ["/own", "/shared", "/name"].map(PathBuf::from));
    }
}

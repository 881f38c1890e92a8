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
use crate::host::mountinfo::{self, Mount};
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
    for dir in lock::dirs(caller.uid) {
        let Some(file) = NamespaceFile::open(&dir)? else {
            continue;
        };
        let Some(found) = find(&file, caller)? else {
            continue;
        };
        enter_found(&found)?;
        let at = own_mounts()?;
        if at.is_empty() {
            return holder::stop(&file);
        }
        return Err(Error::busy(format!(
            "containers are mounted in the namespace: {}",
            at.join(", ")
        ))
        .hint("list them, and unmount each: cowl status; cowl umount NAME"));
    }
    Ok(())
}

/// Returns the mount points of the containers that were mounted in the namespace. This process gets another one.
///
/// The kernel does not permit to unmount what was mounted before the namespace was created. So the mounts of a copy
/// that can be unmounted are those that were made inside.
fn own_mounts() -> Result<Vec<String>> {
    let failed = |error| Error::failed("cannot inspect your namespace").because(error);
    user_namespace::copy_mounts().map_err(failed)?;
    let mounts = mountinfo::read()?;
    let is_own = |mount: &&Mount| {
        mount.kind == b"fuse.cowlfs" && sys::mount::unmount_lazily(&mount.at).is_ok()
    };
    let own = mounts.iter().filter(is_own);
    Ok(own.map(|mount| quoted(&mount.at)).collect())
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
            Err(error) if error.kind == Kind::Usage => return Err(error),
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
    let failed = |error| Error::failed("cannot inspect your namespace").because(error);
    while let Some(pid) = file.holder()? {
        let found = UserNamespace::of(pid);
        // If it has ended, its id may be that of another process.
        if file.holder()? != Some(pid) {
            continue;
        }
        let found = found.map_err(failed)?;
        let owner = found.owner().map_err(failed)?;
        if owner != caller.uid || found.is_own().map_err(failed)? {
            return Err(Error::failed(format!(
                "the process {pid} holds no namespace of your user"
            ))
            .hint(format!("end it: kill {pid}")));
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

//! The namespace of a plain user: a user namespace and a mount namespace, in which the user may mount containers.
//!
//! There is one for each user. The first command creates it, a small process holds it (see [`holder`]), and every later
//! command enters it before it opens a store (docs/decisions/0036).

mod end;
pub mod holder;
mod ids;
mod limits;
mod lock;
pub mod outside;

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use cowl_layers::sys::user_namespace::is_system_root;
use cowl_layers::sys::user_namespace::{self, UserNamespace};
pub use end::{hold_again, stop};
use rustix::fs::{CWD, Mode, OFlags};

use crate::error::{Error, Kind, Result};
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

/// The owner that the kernel shows for users without an id in a user namespace.
pub const UNMAPPED: u32 = 65534;

/// The hint to a command that cannot use the namespace, because it is in that or another one.
const LEAVE: &str = "leave the namespace first: exit";

/// The namespace that this process has entered.
#[derive(Debug)]
struct Entered {
    caller: Caller,
    /// The directory of the user's lock file.
    dir: PathBuf,
}

/// Set once this process has entered the user's namespace.
static ENTERED: OnceLock<Entered> = OnceLock::new();

impl Caller {
    /// Returns the user that called this process.
    pub fn get() -> Self {
        let own = || Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        ENTERED.get().map_or_else(own, |entered| entered.caller)
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

/// The programs that a command runs outside of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunsOutside {
    /// Those that start and stop LXC containers.
    LxcTools,
    /// None.
    Nothing,
}

/// Enters the namespace of the user, and creates it if necessary. The process must have a single thread.
///
/// Does nothing for a process that may mount, and if the store at `store` belongs to another user.
pub fn enter(store: &Path, outside: RunsOutside) -> Result<()> {
    let may_mount = user_namespace::may_mount()
        .map_err(|error| Error::failed("cannot read the capabilities").because(error))?;
    let caller = Caller::get();
    if may_mount || caller.uid == 0 || !is_owner(caller, store) {
        return Ok(());
    }
    if outside == RunsOutside::LxcTools {
        outside::start()?;
    }
    let wanted = IdMap::of(&caller);
    let from = WorkingDir::open();
    let (ids, dir) = enter_or_create(caller, &wanted, store)?;
    from.restore();
    ENTERED.get_or_init(|| Entered { caller, dir });
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

/// Whether this process is root of a namespace of a plain user.
pub fn is_inside() -> bool {
    rustix::process::geteuid().is_root() && !is_system_root()
}

/// Translates ranges of user ids and of group ids, each with a first id in a container, a first id outside of the
/// namespace that this process is in, and a count, to ids of the namespace; `None` if it lacks one of them.
pub fn translate(users: &[[u32; 3]], groups: &[[u32; 3]]) -> Result<Option<[Vec<[u32; 3]>; 2]>> {
    Ok(IdMap::current()?.translate(users, groups))
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

/// Enters the namespace. Returns the ids that it has, and the directory of the lock file.
fn enter_or_create(caller: Caller, wanted: &IdMap, store: &Path) -> Result<(IdMap, PathBuf)> {
    let dirs = lock::dirs(caller.uid);
    for dir in &dirs {
        if let Some(file) = NamespaceFile::open(dir)?
            && let Some(found) = find(&file, caller)?
        {
            return Ok((enter_found(&found)?, dir.clone()));
        }
    }
    let file = create_file(&dirs)?;
    file.lock_creation()?;
    let ids = enter_locked(&file, caller, (wanted, store))?;
    Ok((ids, file.dir().to_owned()))
}

/// Enters the namespace. This process has locked its creation.
fn enter_locked(
    file: &NamespaceFile,
    caller: Caller,
    (wanted, store): (&IdMap, &Path),
) -> Result<IdMap> {
    // A race: another command has created it.
    if let Some(found) = find(file, caller)? {
        return enter_found(&found);
    }
    if holder::enter_daemons_namespace(store) {
        holder::start(file, store, Origin::Existing)?;
        log::warn!("the process that held your namespace was killed: another one holds it now");
        return IdMap::current();
    }
    if wanted.has_ranges() {
        match holder::start(file, store, Origin::New(wanted)) {
            Err(error) if matches!(error.kind, Kind::Usage | Kind::Busy) => return Err(error),
            Err(error) => log::warn!("your namespace has one user id only: {error}"),
            Ok(()) => return enter_held(file, caller),
        }
    }
    holder::start(file, store, Origin::New(&wanted.own_only()))?;
    enter_held(file, caller)
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

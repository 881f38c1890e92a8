//! Whether the config of an LXC container can be trusted: it names programs that LXC runs with the privileges of the
//! caller, and the ids of a container.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use cowl_layers::shown::Show as _;

use crate::error::{Error, Result};
use crate::host::{reach, rootless};
use crate::shell::quoted;

/// Write permission for others, and for the group.
const OTHERS: u32 = 0o002;
const GROUP: u32 = 0o020;

/// Fails if a user other than root and this one can change the config in `file`.
///
/// To be called before the config is read, also by LXC's tools. Its directory may belong to the root of the container if
/// that user cannot enter the directories above. Nothing is checked for a plain user, who cannot give others more than they
/// have.
pub fn check(file: &Path) -> Result<()> {
    if !rootless::is_system_root() {
        return Ok(());
    }
    let at = |path: &Path, error| Error::at("inspect", path, error);
    let real = match file.canonicalize() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|error| at(file, error))?,
    };
    let meta = std::fs::symlink_metadata(&real).map_err(|error| at(&real, error))?;
    if !meta.is_file() {
        // It is refused when it is read.
        return Ok(());
    }
    // Also the links on the way.
    for path in [file, &real] {
        check_path(path)?;
    }
    let is_group_trusted = meta.mode() & GROUP == 0 || meta.gid() == 0 && !reach::has_acl(&real)?;
    match meta.uid() == 0 && meta.mode() & OTHERS == 0 && is_group_trusted {
        true => Ok(()),
        false => Err(refusal(&real, &real)),
    }
}

/// Checks the directories above a config.
fn check_path(file: &Path) -> Result<()> {
    let Some(dir) = file.parent() else {
        return Ok(());
    };
    let meta = std::fs::metadata(dir).map_err(|error| Error::at("inspect", dir, error))?;
    let is_owner_trusted =
        meta.uid() == 0 || reach::blocked_for(dir, meta.uid(), meta.gid())?.is_some();
    let is_group_trusted = meta.mode() & GROUP == 0
        || (meta.gid() == 0 || reach::blocked_for(dir, meta.uid(), meta.gid())?.is_some())
            && !reach::has_acl(dir)?;
    if !is_owner_trusted || !is_group_trusted || meta.mode() & OTHERS != 0 {
        return Err(refusal(dir, file));
    }
    match reach::replaceable(dir)? {
        Some(above) => Err(refusal(&above, file)),
        None => Ok(()),
    }
}

fn refusal(path: &Path, file: &Path) -> Error {
    let dir = file.parent().unwrap_or(file);
    Error::failed(format!(
        "a user other than root can change {}: LXC would run programs for that user as root",
        path.shown()
    ))
    .hint(format!(
        "run the command as that user, or move the container to a directory of root, and type: chown root:root {} {}",
        quoted(dir),
        quoted(file)
    ))
}

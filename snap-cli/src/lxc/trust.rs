//! Whether the config of an LXC container can be trusted: it names programs that LXC runs with the privileges of the
//! caller, and the ids of a container.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use cowl_layers::shown::Show as _;

use super::binding;
use crate::error::{Error, Result};
use crate::host::{reach, rootless};
use crate::shell::quoted;

/// Write permission for others, and for the group.
const OTHERS: u32 = 0o002;
const GROUP: u32 = 0o020;

/// Fails if a user other than root and this one can change the config in `file`, whose content is `text`.
///
/// Its directory may belong to the root of the container, which cannot reach it. Nothing is checked for a plain user, who
/// cannot give others more than they have.
pub fn check(file: &Path, text: &[u8]) -> Result<()> {
    if !rootless::is_system_root() {
        return Ok(());
    }
    let root = binding::mapped_root(file, text)?;
    let file = file
        .canonicalize()
        .map_err(|error| Error::at("inspect", file, error))?;
    let refuse = |path: &Path| {
        let dir = file.parent().unwrap_or(&file);
        Err(Error::failed(format!(
            "a user other than root can change {}: LXC would run programs for that user as root",
            path.shown()
        ))
        .hint(format!(
            "run the command as that user, or move the container to a directory of root, and type: chown root:root {} {}",
            quoted(dir),
            quoted(&file)
        )))
    };
    let inspect =
        |path: &Path| std::fs::symlink_metadata(path).map_err(|e| Error::at("inspect", path, e));
    let meta = inspect(&file)?;
    if meta.uid() != 0 || meta.mode() & OTHERS != 0 || meta.mode() & GROUP != 0 && meta.gid() != 0 {
        return refuse(&file);
    }
    let Some(dir) = file.parent() else {
        return Ok(());
    };
    let meta = inspect(dir)?;
    let (user, group) = root.unwrap_or_default();
    let is_owner_trusted = [0, user].contains(&meta.uid());
    let is_group_trusted = meta.mode() & GROUP == 0 || [0, group].contains(&meta.gid());
    if !is_owner_trusted || !is_group_trusted || meta.mode() & OTHERS != 0 {
        return refuse(dir);
    }
    match reach::replaceable(dir)? {
        Some(above) => refuse(&above),
        None => Ok(()),
    }
}

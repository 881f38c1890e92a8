//! The LXC container to which a container of a store is bound, by the link in its manifest.

use std::fmt::Display;
use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use cowl_layers::shown::Show as _;

use super::command::{LxcContainer, read_config_value};
use super::config::{self, IdMap, OwnLines};
use crate::error::{Error, Result};
use crate::host::{files, rootless};
use crate::shell::posix_quoted;
use crate::store::manifest::ContainerId;
use crate::store::name::ContainerName;
use crate::store::outside::Lxc;
use crate::store::{Store, disk};

/// Returns the LXC container of a link.
pub fn from_link(link: &Lxc) -> LxcContainer {
    LxcContainer {
        lxcpath: link.lxcpath.clone(),
        name: link.name.clone(),
    }
}

/// Fails unless LXC could start the container: that of a plain user needs an id map within the ranges of the user. Its
/// config is in `file`, and has the content `text`.
pub fn require_startable(name: &str, file: &Path, text: &[u8]) -> Result<()> {
    if !rootless::is_inside() || id_map(file, text)?.is_usable() {
        return Ok(());
    }
    Err(Error::failed(format!(
        "the LXC container {name} of a plain user has no valid id map"
    ))
    .hint("map users and groups to your ranges in /etc/subuid and /etc/subgid: lxc.idmap = u 0 100000 65536, and the same with g"))
}

/// Returns the id map of an LXC container, with ids of the user namespace of this process. Its config is in `file`, and
/// has the content `text`.
///
/// Fails if the namespace lacks an id of the map.
pub fn id_map(file: &Path, text: &[u8]) -> Result<IdMap> {
    to_own_ids(readable_id_map(file, text), file.shown())
}

/// Returns a map with ids of the user namespace of this process, for one with ids of the host. It is that of the container
/// or the config `of`.
pub fn to_own_ids(map: IdMap, of: impl Display) -> Result<IdMap> {
    if !rootless::is_inside() {
        return Ok(map);
    }
    let found = rootless::translate(&map.users, &map.groups)?;
    found.map(|ranges| map.with_ranges(ranges)).ok_or_else(|| {
        Error::failed(format!(
            "the id map of {} has ids that your namespace does not have",
            of
        ))
        .hint("use your ranges in /etc/subuid and /etc/subgid; if they were changed: cowl unshare --stop")
    })
}

/// Whether the id map may be in a file that only LXC's tools can find.
pub fn has_included_files(text: &[u8]) -> bool {
    config::has(text, config::INCLUDE)
}

/// Returns the id map that the config contains, with ids of the host. If LXC cannot read an included file, so that it
/// cannot start the container either, this is the map in the config itself.
pub fn readable_id_map(file: &Path, text: &[u8]) -> IdMap {
    configured_id_map(file, text).unwrap_or_else(|error| {
        log::info!("{error}");
        IdMap::of(text)
    })
}

/// Returns the id map that the config contains, with ids of the host.
pub fn configured_id_map(file: &Path, text: &[u8]) -> Result<IdMap> {
    let own = IdMap::of(text);
    if own.root().is_some() || !has_included_files(text) {
        return Ok(own);
    }
    let Some(found) = read_config_value(file, "lxc.idmap")? else {
        return Ok(own);
    };
    Ok(IdMap::from_values(found.split(|&byte| byte == b'\n')))
}

/// Returns the user and the group outside of an LXC container that are root in it, if that is not root of the machine.
///
/// Its config is in `file`, and has the content `text`.
pub fn mapped_root(file: &Path, text: &[u8]) -> Result<Option<(u32, u32)>> {
    let map = id_map(file, text)?;
    Ok(match rootless::is_inside() {
        true => map.root_ids(),
        false => map.root(),
    })
}

/// Returns where a container is mounted for LXC: whichever of its two mount points its config names.
pub fn mount_point(store: &Store, id: ContainerId, text: &[u8]) -> PathBuf {
    let mapped = store.paths().mapped_dir(id);
    let named = config::get(text, config::ROOTFS).unwrap_or_default();
    let named = named.strip_prefix(b"dir:").unwrap_or(named);
    match named == mapped.as_os_str().as_bytes() {
        true => mapped,
        false => store.paths().mount_dir(id),
    }
}

/// Returns cowl's lines for an LXC config that is in `file` and has the content `text`.
pub fn own_lines(
    store: &Store,
    id: ContainerId,
    name: &ContainerName,
    (file, text): (&Path, &[u8]),
) -> Result<OwnLines> {
    let rootfs = match mapped_root(file, text)? {
        Some(_) => store.paths().mapped_dir(id),
        None => store.paths().mount_dir(id),
    };
    let program = std::env::current_exe()
        .map_err(|e| Error::failed("cannot find the cowl program itself").because(e))?;
    let (program, root) = (
        program.as_os_str().as_bytes(),
        store.root().as_os_str().as_bytes(),
    );
    if let Some(bad) = [program, root].iter().find(|path| path.contains(&b'\n')) {
        return Err(Error::usage(format!(
            "cannot write the path {} to LXC's config: it contains a line break",
            bad.shown()
        )));
    }
    let hook = |kind: &str| -> Vec<u8> {
        let mut line = posix_quoted(program);
        line.extend_from_slice(b" --store ");
        line.extend(posix_quoted(root));
        line.extend_from_slice(format!(" hook {kind} {id}").as_bytes());
        line
    };
    Ok(OwnLines {
        id: id.to_string(),
        rootfs: rootfs.into_os_string().into_encoded_bytes(),
        pre_start: hook("pre-start"),
        pre_mount: rootless::is_inside().then(|| hook("pre-mount")),
        post_stop: hook("post-stop"),
        destroy: hook("destroy"),
        note: format!("to get them back, and these lines out: cowl release {name}"),
    })
}

/// Stops the LXC container of the container `name`, if it has one and it runs, and returns it, to be started again.
///
/// The container must not be locked, because LXC calls cowl.
pub fn stop(store: &Store, name: &ContainerName) -> Result<Option<LxcContainer>> {
    let (_, record) = store.find(name)?;
    let Some(link) = &record.body.lxc else {
        return Ok(None);
    };
    let container = from_link(link);
    Ok(container.stop()?.then_some(container))
}

/// Reads the config of an LXC container.
pub fn read_config(link: &Lxc) -> Result<Vec<u8>> {
    files::read(&link.config())
}

/// Creates the directory of a new LXC container with the mode that LXC's tools use, and for a plain user with the owner
/// that they give it: root of the container, whose config is `text`.
pub fn ensure_dir(link: &Lxc, text: &[u8]) -> Result<()> {
    let dir = link.dir();
    if disk::exists(&dir)? {
        return Ok(());
    }
    disk::ensure_dir(&dir)?;
    std::fs::set_permissions(&dir, Permissions::from_mode(0o770))
        .map_err(|e| Error::at("set the mode of", &dir, e))?;
    if rootless::is_inside()
        && let Some((user, _)) = mapped_root(&link.config(), text)?
    {
        chown(&dir, Some(user), None).map_err(|e| Error::at("set the owner of", &dir, e))?;
    }
    disk::sync_parent(&dir)
}

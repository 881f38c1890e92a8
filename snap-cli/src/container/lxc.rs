//! Containers that LXC runs: cowl's lines in the config, the copy of the config in a snapshot, and new LXC containers
//! for clones.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use serde_json::Map;

use super::{Container, Swap, external};
use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::config::{
    CopyRewrite, IdMap, OwnLines, attach, detach, detach_all, own_ids, rewrite_for_copy,
};
use crate::lxc::layout::{Rootfs, rootfs};
use crate::lxc::mounts::{RootPaths, with_relative_targets};
use crate::lxc::{self as tools, LxcContainer, binding, own_files};
use crate::store::Store;
use crate::store::bytes::Blob;
use crate::store::disk;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::outside::{Adopted, Lxc, Moving, OwnFile};
use cowl_layers::shown::Show as _;

/// Returns the hint to stop the LXC container that uses a mount; `None` if it is not an LXC container or not running.
///
/// `command` is the command to repeat.
pub(crate) fn stop_hint(container: &Container<'_>, command: &str) -> Option<String> {
    let lxc = binding::from_link(container.manifest().lxc.as_ref()?);
    if !matches!(lxc.state(), Ok(tools::LxcState::Running { .. })) {
        return None;
    }
    let takes = |verbs: &[&str]| command.split(' ').any(|word| verbs.contains(&word));
    let or = if takes(&["restore"]) {
        format!("; or have cowl do all of it: {command} --stop --start")
    } else if takes(&["destroy"]) {
        format!("; or have cowl do both: {command} --stop")
    } else {
        String::new()
    };
    Some(format!(
        "stop it: lxc-stop {}; then type: {command}{or}",
        lxc.options()
    ))
}

/// Returns whether LXC reports the container as running.
pub(super) fn is_running(container: &Container<'_>) -> Result<bool> {
    let Some(link) = &container.manifest().lxc else {
        return Ok(false);
    };
    let state = binding::from_link(link).state()?;
    Ok(state != tools::LxcState::Stopped)
}

/// Returns the error for a command that needs the mount which LXC has made in the namespaces of a container.
pub(crate) fn runs_in_lxc(container: &Container<'_>) -> Error {
    let name = container.name();
    let command = &container.store.session().command;
    let hint = stop_hint(container, command)
        .unwrap_or_else(|| format!("wait until the LXC container has ended, then type: {command}"));
    Error::busy(format!("{name} is mounted in its LXC container")).hint(hint)
}

/// Reads the LXC config for a snapshot. `None`, with a warning, if it cannot be read.
pub fn read_config_copy(container: &Container<'_>) -> Option<Blob> {
    let link = container.manifest().lxc.as_ref()?;
    match binding::read_config(link) {
        Ok(text) => Some(Blob(text)),
        Err(error) => {
            log::warn!("the snapshot does not include the LXC config: {error}");
            None
        }
    }
}

/// Reads the LXC config for an export, without cowl's lines, which refer to this store, and the files in its directory
/// to which it refers.
pub fn read_plain_config(container: &Container<'_>) -> Result<Option<(Blob, Vec<OwnFile>)>> {
    let link = container.manifest().lxc.as_ref();
    let Some((Blob(text), link)) = read_config_copy(container).zip(link) else {
        return Ok(None);
    };
    let original = match &link.original {
        Some(original) => original.0.clone(),
        None => rootfs_line(&link.dir()),
    };
    let id = container.id.to_string();
    let plain = detach(&text, Some(&original), &id);
    let (files, notes) = own_files::collect(&plain, &link.dir())?;
    for note in notes {
        log::warn!("{note}");
    }
    Ok(Some((Blob(plain), files)))
}

/// Returns the line for a root filesystem at its usual path in the directory of an LXC container.
fn rootfs_line(dir: &Path) -> Vec<u8> {
    let rootfs = dir.join("rootfs");
    [
        b"lxc.rootfs.path = dir:",
        rootfs.as_os_str().as_bytes(),
        b"\n",
    ]
    .concat()
}

/// The hosts whose configs a restore installs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigTrust {
    /// Only this one: the config is that of the container when the snapshot was taken.
    ThisHost,
    /// Also one that has sent the snapshot. LXC runs the programs that the config names as root.
    AnyHost,
}

impl Container<'_> {
    /// Makes the next commit restore LXC's config from a snapshot, with cowl's current lines.
    pub fn restore_config_from(&mut self, name: &SnapshotName, trust: ConfigTrust) -> Result<()> {
        let (_, snapshot) = self.snapshot(name)?;
        let Some(link) = &self.manifest().lxc else {
            return Err(
                Error::usage(format!("{} is not an LXC container", self.name()))
                    .hint("omit --with-config"),
            );
        };
        let received = match (snapshot.received_config, trust) {
            (Some(_), ConfigTrust::ThisHost) if snapshot.config.is_none() => {
                return Err(Error::failed(format!(
                    "cannot restore the LXC config of {name}: another host has sent it, and LXC would run the \
                     programs that it names as root"
                ))
                .hint(format!(
                    "inspect it (cowl show {}@{name}), and add --trust-config; or omit --with-config",
                    self.name()
                )));
            }
            (received, ConfigTrust::AnyHost) => received,
            (_, ConfigTrust::ThisHost) => None,
        };
        let Some(saved) = snapshot.config.or(received) else {
            return Err(
                Error::failed(format!("{name} has no copy of the LXC config"))
                    .hint("omit --with-config: the config stays unchanged"),
            );
        };
        let ours =
            binding::own_lines(self.store, self.id, self.name(), (&link.config(), &saved.0))?;
        self.config = Some(Blob(attach(&saved.0, &ours)));
        Ok(())
    }
}

/// The directory of LXC containers in which a copy is created.
#[derive(Clone, Debug)]
pub enum CopyTarget {
    /// This one.
    In(PathBuf),
    /// This one, where lxc-create has just created a container without files.
    Created(PathBuf),
}

/// The LXC side of a container's copy.
#[derive(Debug)]
pub struct LxcCopy {
    /// The directory of the original, in place of which paths in the config get that of the copy.
    dir: Option<PathBuf>,
    lxcpath: PathBuf,
    text: Vec<u8>,
    /// The files in the original's directory to which the config refers.
    files: Vec<OwnFile>,
    name: ContainerName,
    /// Notes for the user.
    pub notes: Vec<String>,
}

impl LxcCopy {
    /// Prepares a copy of a container; `None` if it is not an LXC container. Without a target, the copy is created beside
    /// the original.
    ///
    /// `saved` is the config of the copied state; without it the copy gets the current one.
    pub fn for_container(
        manifest: &ContainerManifest,
        saved: Option<&Blob>,
        (name, target): (&ContainerName, Option<&CopyTarget>),
    ) -> Result<Option<Self>> {
        let Some(from) = &manifest.lxc else {
            return Ok(None);
        };
        let text = match saved {
            Some(saved) => saved.0.clone(),
            None => binding::read_config(from)?,
        };
        let dir = from.dir();
        let (files, notes) = own_files::collect(&text, &dir)?;
        let beside = CopyTarget::In(from.lxcpath.clone());
        let copy = Self::new(text, Some(dir), target.unwrap_or(&beside), name)?;
        Ok(Some(Self {
            files,
            notes,
            ..copy
        }))
    }

    /// Prepares an LXC container `name` with the config of any other LXC container.
    pub fn from_config(path: &Path, target: &CopyTarget, name: &ContainerName) -> Result<Self> {
        let path = std::path::absolute(path).map_err(|e| Error::at("read", path, e))?;
        let text = files::read(&path)?;
        let dir = config_dir(&path).or_else(|| original_dir(&text));
        let (files, notes) = match &dir {
            Some(dir) => own_files::collect(&text, dir)?,
            None => Default::default(),
        };
        let copy = Self::new(text, dir, target, name)?;
        Ok(Self {
            files,
            notes,
            ..copy
        })
    }

    /// Prepares an LXC container `name` in `lxcpath` with the config and its files from an archive.
    pub fn from_archive(
        text: Vec<u8>,
        files: Vec<OwnFile>,
        lxcpath: PathBuf,
        name: &ContainerName,
    ) -> Result<Self> {
        let dir = original_dir(&text);
        let copy = Self::new(text, dir, &CopyTarget::In(lxcpath), name)?;
        Ok(Self { files, ..copy })
    }

    fn new(
        text: Vec<u8>,
        dir: Option<PathBuf>,
        target: &CopyTarget,
        name: &ContainerName,
    ) -> Result<Self> {
        let lxcpath = match target {
            CopyTarget::In(lxcpath) => {
                check_free(lxcpath, name)?;
                lxcpath.clone()
            }
            CopyTarget::Created(lxcpath) => {
                check_created(&lxcpath.join(name.as_str()))?;
                lxcpath.clone()
            }
        };
        Ok(Self {
            dir,
            lxcpath,
            text,
            files: Vec::new(),
            name: name.clone(),
            notes: Vec::new(),
        })
    }

    /// Returns the options with which LXC's tools find the copy.
    pub fn options(&self) -> String {
        let container = LxcContainer {
            lxcpath: self.lxcpath.clone(),
            name: self.name.to_string(),
        };
        container.options()
    }

    /// Makes the existing `container` an LXC container. Returns notes for the user.
    ///
    /// The caller completes the change outside the store (`recover::complete_outside`).
    pub fn convert(mut self, container: &mut Container<'_>) -> Result<Vec<String>> {
        let mut next = container.manifest().clone();
        if let Some(link) = &next.lxc {
            return Err(Error::failed(format!(
                "{} is already an LXC container: {}",
                container.name(),
                link.dir().shown()
            )));
        }
        if next.adopted.is_some() {
            return Err(Error::failed(format!(
                "{} was adopted from a directory and can be released to it",
                container.name()
            ))
            .hint(format!(
                "convert a copy instead: cowl clone {} NEW",
                container.name()
            )));
        }
        self.fill_manifest(container.store, container.id, &mut next)?;
        container.commit(next, None, |_| Ok(Swap::Done))?;
        Ok(self.notes)
    }

    /// Fills in the manifest of the copy. Recovery creates the LXC container when the copy is first opened.
    pub fn fill_manifest(
        &mut self,
        store: &Store,
        id: ContainerId,
        manifest: &mut ContainerManifest,
    ) -> Result<()> {
        let mut link = Lxc {
            lxcpath: self.lxcpath.clone(),
            name: self.name.to_string(),
            original: None,
            written: Blob::default(),
            files: Vec::new(),
            extra: Map::new(),
        };
        let (from, to) = (self.dir.as_deref(), link.dir());
        let how = CopyRewrite {
            from: from.map_or(b"", |dir| dir.as_os_str().as_bytes()),
            to: to.as_os_str().as_bytes(),
            name: &link.name,
        };
        let roots = RootPaths::new(from.unwrap_or(&to), &self.text, &to.join("rootfs"));
        let (text, _) = with_relative_targets(&self.text, &roots);
        let plain = detach_all(&text, Some(&rootfs_line(&to)));
        let map = IdMap::of(&plain);
        if !map.is_empty() {
            manifest.id_map = map.values().collect();
        }
        let (plain, notes) = rewrite_for_copy(&plain, &how, tools::random_address);
        self.notes.extend(notes);
        let files = own_files::rewritten(std::mem::take(&mut self.files), &how);
        let ours = own_lines(store, id, &self.name, &plain)?;
        let config = Blob(attach(&plain, &ours));
        link.original = Some(Blob(plain));
        link.written = config.clone();
        link.files = files;
        external::write_marker(store, id, &external::Leftover::default())?;
        manifest.adopted = Some(Adopted {
            rootfs: to.join("rootfs"),
            // There was never such a directory.
            inode: 0,
            extra: Map::new(),
        });
        manifest.moving = Some(Moving::Writing {
            config,
            hostname: Some(link.name.clone()),
        });
        manifest.lxc = Some(link);
        Ok(())
    }
}

/// Returns the directory of the LXC container to which a config file belongs: LXC's tools give it this name.
fn config_dir(path: &Path) -> Option<PathBuf> {
    let is_own = path.file_name()? == "config";
    let dir = path.parent()?;
    (is_own && dir != Path::new("/") && dir != Path::new("/etc")).then(|| dir.to_path_buf())
}

/// Returns the directory of the LXC container according to a config without cowl's lines.
fn original_dir(text: &[u8]) -> Option<PathBuf> {
    if !own_ids(text).is_empty() {
        return None;
    }
    match rootfs(text)? {
        Rootfs::Dir(path) if path.file_name()? == "rootfs" => path.parent().map(Path::to_path_buf),
        Rootfs::Dir(_) | Rootfs::Overlay { .. } | Rootfs::Other(_) => None,
    }
}

/// Returns cowl's lines for a config that is in no file yet.
fn own_lines(
    store: &Store,
    id: ContainerId,
    name: &ContainerName,
    text: &[u8],
) -> Result<OwnLines> {
    let at = |error| Error::failed("cannot write a temporary file").because(error);
    let dir = tempfile::tempdir().map_err(at)?;
    let file = dir.path().join("config");
    std::fs::write(&file, text).map_err(at)?;
    binding::require_startable(name.as_str(), &file, text)?;
    binding::own_lines(store, id, name, (&file, text))
}

/// Returns an error if the directory of a new LXC container exists.
fn check_free(lxcpath: &Path, name: &ContainerName) -> Result<()> {
    let dir = lxcpath.join(name.as_str());
    if !disk::exists(&dir)? {
        return Ok(());
    }
    Err(Error::failed(format!("{} already exists", dir.shown()))
        .hint("choose another name, or remove that directory"))
}

/// Returns an error if the directory of an LXC container has other content than that which lxc-create makes before it
/// calls a template.
fn check_created(dir: &Path) -> Result<()> {
    for name in disk::names(dir)? {
        let is_known = match name.as_bytes() {
            b"config" | b"partial" => true,
            b"rootfs" => disk::names(&dir.join(&name))?.is_empty(),
            _ => false,
        };
        if !is_known {
            return Err(Error::failed(format!(
                "{} contains more than a new LXC container does: {}",
                dir.shown(),
                name.shown()
            ))
            .hint("use lxc-create, or: cowl clone NAME@SNAP NEW"));
        }
    }
    Ok(())
}

/// Returns the manifest's entry that recreates the LXC container of an undeleted container.
///
/// `None` if the container is not an LXC container, or if its LXC config still exists.
pub(crate) fn begin_recreation(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
) -> Result<Option<Moving>> {
    let Some(link) = &manifest.lxc else {
        return Ok(None);
    };
    let path = link.config();
    if disk::exists(&path)? {
        if tools::config::has_own_lines(&binding::read_config(link)?, &id.to_string()) {
            return Ok(None);
        }
        return Err(Error::failed(format!(
            "{} belongs to another LXC container now",
            link.dir().shown()
        ))
        .hint("rename that container first (lxc-copy -R)"));
    }
    external::begin_writing(store, id, link.written.clone()).map(Some)
}

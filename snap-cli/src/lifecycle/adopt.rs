//! Adopts an existing root filesystem: an LXC container or any directory.
//!
//! Nothing is copied. One rename turns the directory into a layer, so the store must be on the same
//! file system.

use std::collections::HashMap;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::sys::stat::FileKind;
use serde_json::Map;

use crate::container::external::{self, Leftover};
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::host::files;
use crate::host::{dir_users, mountinfo, users};
use crate::lxc::binding;
use crate::lxc::command::config_value;
use crate::lxc::config::IdMap;
use crate::lxc::mounts::{self, RootPaths};
use crate::lxc::{self as tools, LxcContainer, config, snapshots, trust};
use crate::recover::{self, moving};
use crate::shell::quoted;
use crate::store::bytes::Blob;
use crate::store::creation::Creation;
use crate::store::family;
use crate::store::manifest::{ContainerManifest, LayerKind};
use crate::store::name::ContainerName;
use crate::store::outside::{Adopted, Lxc, Moving};
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::tree::walk::{self, Item};
use cowl_layers::shown::Show as _;

/// The source of an adoption.
#[derive(Clone, Debug)]
pub enum AdoptSource {
    /// A directory.
    Directory(PathBuf),
    /// An LXC container.
    Lxc(LxcContainer),
}

/// A root filesystem that passed all checks for an adoption.
#[derive(Debug)]
pub struct Candidate {
    /// The canonical path of the root filesystem.
    rootfs: PathBuf,
    /// Its inode number, to detect that another directory has replaced it.
    inode: u64,
    lxc: Option<Lxc>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

impl Candidate {
    /// Inspects the source of an adoption, without changing anything.
    pub fn inspect(home: &Store, source: &AdoptSource) -> Result<Self> {
        let mut notes = Vec::new();
        let (rootfs, lxc) = match source {
            AdoptSource::Directory(path) => (path.clone(), None),
            AdoptSource::Lxc(container) => {
                let (rootfs, link) = inspect_lxc(home, container, &mut notes)?;
                (rootfs, Some(link))
            }
        };
        let at = |error| Error::at("adopt", &rootfs, error);
        let real = rootfs.canonicalize().map_err(at)?;
        if !real.is_dir() {
            return Err(
                Error::usage(format!("{} is not a directory", rootfs.shown())).hint(
                    "specify the directory of a root filesystem, or the name of an LXC container",
                ),
            );
        }
        if real != std::path::absolute(&rootfs).map_err(at)? {
            notes.push(format!("the adopted directory is {}", real.shown()));
        }
        check_location(home, &real)?;
        let meta = std::fs::symlink_metadata(&real).map_err(at)?;
        Ok(Self {
            rootfs: real,
            inode: meta.ino(),
            lxc,
            notes,
        })
    }

    /// Returns the store for the adoption: one of the family on the same file system, or a new one there.
    pub fn store(&self, home: &Store, requested: Option<&Path>) -> Result<Store> {
        let parent = self.rootfs.parent().unwrap_or(Path::new("/"));
        let mount = mountinfo::find_containing(parent)?;
        if let Some(requested) = requested {
            let requested =
                std::path::absolute(requested).map_err(|e| Error::at("use", requested, e))?;
            // If the store does not exist yet, its nearest existing ancestor counts.
            let real = requested
                .ancestors()
                .find_map(|path| path.canonicalize().ok());
            if real.is_some_and(|real| real.starts_with(&self.rootfs)) {
                return Err(Error::usage(format!(
                    "cannot create the store {} in the directory to be adopted",
                    requested.shown()
                ))
                .hint("specify a directory next to it"));
            }
            let holder = requested
                .ancestors()
                .find_map(|path| mountinfo::find_containing(path).ok());
            if holder.is_none_or(|holder| holder.id != mount.id) {
                return Err(Error::usage(format!(
                    "{} is not on the file system of {}, which is mounted at {}",
                    requested.shown(),
                    self.rootfs.shown(),
                    mount.at.shown()
                ))
                .hint(format!(
                    "specify a directory on that file system, or copy it instead: cowl create NAME \
                     --from {}",
                    quoted(&self.rootfs)
                )));
            }
            return family::join(home, &requested);
        }
        for store in family::stores(home.home(), home.session())? {
            if mountinfo::find_containing(store.root())?.id == mount.id {
                return Ok(store);
            }
        }
        family::join(home, &mount.at.join(".cowl"))
    }
}

/// Inspects an LXC container, and returns its root filesystem and its connection to LXC.
fn inspect_lxc(
    home: &Store,
    container: &LxcContainer,
    notes: &mut Vec<String>,
) -> Result<(PathBuf, Lxc)> {
    let path = container.config();
    trust::check(&path)?;
    let text = match files::read_opt(&path)? {
        Some(text) => text,
        None => {
            let lxcpath = &container.lxcpath;
            return Err(Error::not_found(format!(
                "LXC container {} does not exist in {}",
                container.name,
                lxcpath.shown()
            ))
            .hint(format!(
                "list the containers (lxc-ls -P {}), or specify another directory with -P",
                quoted(lxcpath)
            )));
        }
    };
    binding::require_startable(&container.name, &path, &text)?;
    refuse_adopted(home, container)?;
    if let tools::LxcState::Running { word, pid } = container.state()? {
        let pid = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        return Err(
            Error::busy(format!("{} is {word}{pid}", container.name)).hint(format!(
                "stop it: lxc-stop {}; then type: {}",
                container.options(),
                home.session().command
            )),
        );
    }
    let rootfs = find_rootfs(container, &text)?;
    if !snapshots::dependants(&container.dir())?.is_empty() {
        return Err(Error::failed(format!(
            "cannot adopt {}: other LXC containers depend on its files, see {}",
            container.name,
            container.dir().join("lxc_snapshots").shown()
        ))
        .hint(format!(
            "copy it instead: cowl create {} --from {}",
            container.name,
            quoted(&rootfs)
        )));
    }
    inspect_mounts(container, (&text, &rootfs), notes)?;
    let snaps = container.dir().join("snaps");
    if !disk::names(&snaps)?.is_empty() {
        notes.push(format!(
            "the snapshots that lxc-snapshot took remain in {}; use only cowl's lxc-snapshot to \
             restore them",
            snaps.shown()
        ));
    }
    let link = Lxc {
        lxcpath: container.lxcpath.clone(),
        name: container.name.clone(),
        original: Some(Blob(text.clone())),
        written: Blob(text),
        files: Vec::new(),
        extra: Map::new(),
    };
    Ok((rootfs, link))
}

/// Checks the targets of the container's mounts. An adoption makes those in the config relative; in other files, users have
/// to do that.
fn inspect_mounts(
    container: &LxcContainer,
    (text, rootfs): (&[u8], &Path),
    notes: &mut Vec<String>,
) -> Result<()> {
    let real = rootfs.canonicalize();
    let real = real.map_err(|error| Error::at("adopt", rootfs, error))?;
    let roots = RootPaths::new(&container.dir(), text, &real);
    let refuse = |place: &str, entry: &[u8], relative: &[u8]| {
        let message = format!(
            "cannot adopt {}: LXC would ignore a mount in {place}, whose target is an absolute path in {}: {}",
            container.name,
            rootfs.shown(),
            entry.shown()
        );
        let hint = format!("write the target as a relative path: {}", relative.shown());
        Err(Error::failed(message).hint(hint))
    };
    let (_, changed) = mounts::with_relative_targets(text, &roots);
    if changed > 0 {
        notes.push(format!(
            "absolute targets of lxc.mount.entry in the config become relative: {changed}"
        ));
    }
    let config = container.config();
    if config::get(text, config::INCLUDE).is_some() {
        let own = mounts::entries(text);
        let all = config_value(&config, mounts::ENTRY)?.unwrap_or_default();
        let found = mounts::absolute_targets(&all, &roots);
        if let Some((entry, relative)) = found.iter().find(|(entry, _)| !own.contains(entry)) {
            return refuse("an included file", entry, relative);
        }
    }
    let table = match config::get(text, mounts::FSTAB) {
        Some(path) => Some(path.to_vec()),
        None if config::get(text, config::INCLUDE).is_some() => {
            config_value(&config, mounts::FSTAB)?
        }
        None => None,
    };
    let Some(table) = table.map(|path| PathBuf::from(std::ffi::OsString::from_vec(path))) else {
        return Ok(());
    };
    // LXC itself reports a table that does not exist.
    let content = files::read_opt(&table)?.unwrap_or_default();
    match mounts::absolute_targets(&content, &roots).first() {
        Some((entry, relative)) => refuse(&table.shown().to_string(), entry, relative),
        None => Ok(()),
    }
}

fn refuse_adopted(home: &Store, container: &LxcContainer) -> Result<()> {
    match find_adopted(home, container)? {
        None => Ok(()),
        Some((_, name)) => Err(Error::failed(format!(
            "{} is already adopted, as the container {name}",
            container.name
        ))
        .hint(format!("list its snapshots: cowl list {name}"))),
    }
}

/// Returns the container that an LXC container was adopted as, with its store.
pub fn find_adopted(
    home: &Store,
    container: &LxcContainer,
) -> Result<Option<(Store, ContainerName)>> {
    let wanted = container.dir().canonicalize();
    let wanted = wanted.unwrap_or_else(|_| container.dir());
    for store in family::stores(home.home(), home.session())? {
        for (_, record) in store.containers()? {
            let Ok(record) = record else { continue };
            let Some(link) = &record.body.lxc else {
                continue;
            };
            if link.dir() == wanted || link.dir() == container.dir() {
                let name = record.body.name;
                return Ok(Some((store, name)));
            }
        }
    }
    Ok(None)
}

/// Updates cowl's lines in the LXC config of an adopted container, and returns whether they changed.
///
/// They are outdated if the program or the store has moved, or if a user removed them.
pub fn update_config(store: &Store, name: &ContainerName) -> Result<bool> {
    let mut container = recover::open(store, name)?;
    let Some(link) = &container.manifest().lxc else {
        return Ok(false);
    };
    let now = binding::read_config(link)?;
    let ours = binding::own_lines(store, container.id(), name, (&link.config(), &now))?;
    let with = config::attach(&now, &ours);
    if with == now {
        return Ok(false);
    }
    container.write_config_with_next(Blob(with));
    let next = container.manifest().clone();
    container.commit(next, None, |_| Ok(Swap::Done))?;
    recover::complete_outside(container)?;
    Ok(true)
}

/// Returns the directory of the root filesystem according to the config.
fn find_rootfs(container: &LxcContainer, text: &[u8]) -> Result<PathBuf> {
    let value = match config::get(text, config::ROOTFS) {
        Some(value) => value.to_vec(),
        // The value may be in an included file.
        None => config_value(&container.config(), config::ROOTFS)?.unwrap_or_default(),
    };
    let path = value.strip_prefix(b"dir:").unwrap_or(&value).to_vec();
    if path.first() == Some(&b'/') {
        return Ok(PathBuf::from(std::ffi::OsString::from_vec(path)));
    }
    let config = container.config();
    if path.is_empty() {
        return Err(Error::failed(format!(
            "cannot adopt a container without lxc.rootfs.path in {}",
            config.shown()
        ))
        .hint(format!(
            "update an old config first: lxc-update-config -c {}",
            quoted(&config)
        )));
    }
    let kind = path.split(|&byte| byte == b':').next().unwrap_or_default();
    Err(Error::failed(format!(
        "the root filesystem of {} is not a directory but {}: {}",
        container.name,
        kind.shown(),
        path.shown()
    ))
    .hint(format!(
        "copy it to a directory, and adopt the copy: lxc-copy {} -N {}-dir -B dir",
        container.options(),
        container.name
    )))
}

/// Checks the location of a root filesystem: outside of stores, not mounted, not in use.
fn check_location(home: &Store, rootfs: &Path) -> Result<()> {
    if rootfs.parent().is_none() {
        return Err(Error::usage(
            "cannot adopt the root filesystem of this machine",
        ));
    }
    for store in family::stores(home.home(), home.session())? {
        let root = store.root().canonicalize();
        let root = root.map_err(|e| Error::at("use", store.root(), e))?;
        if rootfs.starts_with(&root) || root.starts_with(rootfs) {
            return Err(Error::usage(format!(
                "cannot adopt {}: it contains the store {}, or is inside it",
                rootfs.shown(),
                root.shown()
            )));
        }
    }
    refuse_marker(rootfs)?;
    let mounts = mountinfo::read()?;
    if mountinfo::topmost(&mounts, rootfs).is_some() {
        return Err(Error::busy(format!("{} is a mount point", rootfs.shown()))
            .hint("unmount it, or adopt a directory in it"));
    }
    let inner: Vec<_> = mountinfo::below(&mounts, rootfs)
        .map(|mount| &mount.at)
        .collect();
    if let Some(last) = inner.last() {
        let all: Vec<_> = inner.iter().map(|at| at.shown().to_string()).collect();
        return Err(Error::busy(format!(
            "cannot adopt {}: file systems are mounted in it: {}",
            rootfs.shown(),
            all.join(", ")
        ))
        .hint(format!(
            "unmount it: umount {}; then type: {}",
            quoted(last),
            home.session().command
        )));
    }
    refuse_users(rootfs, rootfs, &home.session().command)
}

/// Fails if the directory has the README that an adoption leaves in place of the files.
fn refuse_marker(rootfs: &Path) -> Result<()> {
    if !disk::exists(&rootfs.join(external::README))? {
        return Ok(());
    }
    Err(Error::failed(format!(
        "the files of {} are already adopted: see {} in it",
        rootfs.shown(),
        external::README
    ))
    .hint("list all containers: cowl list"))
}

/// Fails if processes use the files at `path`.
///
/// Messages show `rootfs` instead of `path`, and the hint asks the user to repeat `command`.
fn refuse_users(path: &Path, rootfs: &Path, command: &str) -> Result<()> {
    let inside = dir_users::list(path)?;
    if inside.is_empty() {
        return Ok(());
    }
    let pids: Vec<_> = inside.iter().map(|user| user.pid.to_string()).collect();
    Err(Error::busy(format!(
        "{} is in use by {}",
        rootfs.shown(),
        users::describe(&inside)
    ))
    .hint(format!(
        "stop them (kill {}), then type: {command}",
        pids.join(" ")
    )))
}

/// Fails if a tree contains an overlay marker, which would be invisible in a layer.
///
/// Returns the number of files with hard links outside the tree, through which they can be modified
/// outside the store.
fn scan_tree(rootfs: &Path, space: XattrSpace) -> Result<usize> {
    let mut found: Option<Vec<u8>> = None;
    let mut linked: HashMap<u64, u64> = HashMap::new();
    walk::visit_dir(rootfs, &mut |item: &Item<'_>| {
        if found.is_some() {
            return Ok(());
        }
        if item.kind() != FileKind::Directory && item.stat.nlink > 1 {
            let left = linked.entry(item.stat.ino).or_insert(item.stat.nlink);
            *left = left.saturating_sub(1);
        }
        let name = item.name();
        let is_whiteout = item.kind() == FileKind::CharDevice && item.stat.rdev == 0;
        let has_marker = || -> Result<bool, crate::tree::TreeError> {
            let xattrs = item.xattrs()?;
            Ok(xattrs
                .iter()
                .any(|(name, _)| space.to_disk(name).as_ref() != name.as_slice()))
        };
        if is_whiteout || name.starts_with(b".wh.") || has_marker()? {
            found = Some(item.path.to_vec());
        }
        Ok(())
    })?;
    let Some(path) = found else {
        return Ok(linked.values().filter(|left| **left > 0).count());
    };
    Err(Error::failed(format!(
        "cannot adopt {}: {} is an overlay marker, which would be invisible in a layer",
        rootfs.shown(),
        path.shown()
    ))
    .hint(format!(
        "copy it instead, which preserves markers: cowl create NAME --from {}",
        quoted(rootfs)
    )))
}

/// Adopts a root filesystem as the container `name` of `store`, which must be on its file system.
///
/// Returns notes for the user.
pub fn adopt(store: &Store, candidate: &Candidate, name: &ContainerName) -> Result<Vec<String>> {
    let rootfs = &candidate.rootfs;
    let outside = scan_tree(rootfs, store.space())?;
    let claim = family::claim(store, name)?;
    let done = adopt_locked(store, candidate, name);
    claim.remove()?;
    done?;
    let mut notes = candidate.notes.clone();
    if outside > 0 {
        let files = match outside {
            1 => "one file has a hard link".to_owned(),
            n => format!("{n} files have hard links"),
        };
        notes.push(format!(
            "{files} outside {}: a write through such a link changes the container and its snapshots",
            rootfs.shown()
        ));
    }
    Ok(notes)
}

/// Adopts under the lock that excludes other adoptions in the family of stores.
fn adopt_locked(store: &Store, candidate: &Candidate, name: &ContainerName) -> Result<()> {
    let lock = family::lock_adoption(store)?;
    let rootfs = &candidate.rootfs;
    // Another process may have adopted it or started to use it since the inspection.
    let meta = std::fs::symlink_metadata(rootfs).map_err(|e| Error::at("adopt", rootfs, e))?;
    let done = if meta.ino() == candidate.inode {
        refuse_marker(rootfs)
            .and_then(|()| refuse_users(rootfs, rootfs, &store.session().command))
            .and_then(|()| adopt_claimed(store, candidate, name))
    } else {
        Err(Error::busy(format!(
            "cannot adopt {}: it was replaced by another directory",
            rootfs.shown()
        ))
        .hint("check whether it was adopted: cowl list"))
    };
    lock.remove()?;
    done
}

fn adopt_claimed(store: &Store, candidate: &Candidate, name: &ContainerName) -> Result<()> {
    let rootfs = &candidate.rootfs;
    let mut creation = Creation::begin(store)?;
    let base = creation.create_layer(LayerKind::Base, &[], &[])?;
    let head = creation.create_head(&[base], rootfs)?;
    let id = creation.create_container()?;
    let id_map = match &candidate.lxc {
        Some(link) => binding::readable_id_map(&link.config(), &link.written.0),
        None => IdMap::default(),
    };
    let manifest = ContainerManifest {
        adopted: Some(Adopted {
            rootfs: rootfs.clone(),
            inode: candidate.inode,
            extra: Map::new(),
        }),
        lxc: candidate.lxc.clone(),
        id_map: id_map.values().collect(),
        moving: Some(Moving::Adopting),
        ..ContainerManifest::new(name.clone(), head, &[base])
    };
    if let Some(link) = &manifest.lxc {
        // Detect errors in the config before anything is moved.
        binding::own_lines(store, id, name, (&link.config(), &link.written.0))?;
    }
    // The lock prevents another command from completing or rolling back this adoption.
    let lock = store.lock_container(id)?;
    external::write_marker(store, id, &Leftover::default())?;
    // No process writes to it any longer. From here on, the store guarantees its content.
    disk::sync_all(rootfs)?;
    creation.sync()?;
    let record = Record::first(manifest);
    if let Err(error) = disk::replace(&store.paths().container_file(id), &record) {
        // The file may already exist. Then the next command rolls the adoption back.
        creation.abandon();
        return Err(error);
    }
    creation.finish()?;
    let mut container = Container::from_locked(store, id, record, lock);
    if let Err(error) = moving::move_in(&container) {
        if moving::complete(container)?.is_some() {
            // Only the sync of the move failed.
            return Err(error.hint(format!(
                "{name} is adopted, but a power cut may roll that back: check the disk"
            )));
        }
        let hint = format!(
            "copy it instead: cowl create {name} --from {}",
            quoted(rootfs)
        );
        return Err(error.hint(hint));
    }
    // Race: a process that started to use it just before the move would write to a layer.
    let tree = store.paths().layer_tree(base);
    if let Err(error) = refuse_users(&tree, rootfs, &store.session().command) {
        disk::rename(&tree, rootfs)?;
        moving::roll_back_adoption(container)?;
        return Err(error);
    }
    moving::finish_adoption(&mut container)
}

impl Candidate {
    /// Returns the path of the root filesystem, for messages.
    pub fn rootfs(&self) -> String {
        self.rootfs.shown().to_string()
    }
}

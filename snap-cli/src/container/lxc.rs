//! A container that is one of LXC's: the lines of its config, the copy that a snapshot keeps, and new LXC
//! containers for clones.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use serde_json::Map;

use super::{Container, Swap, external};
use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::config::{CopyRewrite, attach, detach, rewrite_for_copy};
use crate::lxc::{self as tools, LxcContainer, binding};
use crate::store::Store;
use crate::store::bytes::Blob;
use crate::store::disk;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::outside::{Adopted, Lxc, Moving};
use cowl_layers::shown::Show as _;

/// What to type when a running LXC container is in the way; `None` when it is none, or does not run.
pub(crate) fn how_to_stop(container: &Container<'_>, who: &str) -> Option<String> {
    let lxc = binding::from_link(container.manifest().lxc.as_ref()?);
    if !matches!(lxc.state(), Ok(tools::LxcState::Running { .. })) {
        return None;
    }
    let takes = |verbs: &[&str]| who.split(' ').any(|word| verbs.contains(&word));
    let or = if takes(&["restore", "flatten"]) {
        format!("; or have cowl do all of it: {who} --stop --start")
    } else if takes(&["destroy"]) {
        format!("; or have cowl do both: {who} --stop")
    } else {
        String::new()
    };
    Some(format!(
        "stop it: lxc-stop {}; then type: {who}{or}",
        lxc.options()
    ))
}

/// The copy of the config that a snapshot keeps.
pub fn config_copy(container: &Container<'_>) -> Option<Blob> {
    let link = container.manifest().lxc.as_ref()?;
    match binding::read_config(link) {
        Ok(text) => Some(Blob(text)),
        Err(error) => {
            log::warn!("the snapshot keeps no copy of the LXC config: {error}");
            None
        }
    }
}

impl Container<'_> {
    /// Has the next change bring LXC's config back to what a snapshot kept, with cowl's lines as they are
    /// today.
    pub fn with_config_of(&mut self, name: &SnapshotName) -> Result<()> {
        let (_, snapshot) = self.snapshot(name)?;
        let Some(link) = &self.manifest().lxc else {
            return Err(Error::usage(format!("{} is no LXC container", self.name()))
                .hint("leave --with-config out"));
        };
        let Some(kept) = snapshot.config else {
            return Err(
                Error::failed(format!("{name} has no copy of the LXC config"))
                    .hint("leave --with-config out: the config stays as it is"),
            );
        };
        let ours = binding::own_lines(self.store, self.id, self.name(), (link, &kept.0))?;
        self.config = Some(Blob(attach(&kept.0, &ours)));
        Ok(())
    }
}

/// What makes a container's copy an LXC container too.
#[derive(Debug)]
pub struct Copy {
    from: Lxc,
    lxcpath: PathBuf,
    id: ContainerId,
    text: Vec<u8>,
    name: ContainerName,
    /// What people should know.
    pub notes: Vec<String>,
}

impl Copy {
    /// Looks at what is to be copied; `None` when it is no LXC container. `kept` is the config that the
    /// state had; else the copy gets that of today.
    pub fn of(
        (id, manifest): (ContainerId, &ContainerManifest),
        kept: Option<&Blob>,
        name: &ContainerName,
    ) -> Result<Option<Self>> {
        let Some(from) = &manifest.lxc else {
            return Ok(None);
        };
        check_free(&from.lxcpath, name)?;
        let text = match kept {
            Some(kept) => kept.0.clone(),
            None => binding::read_config(from)?,
        };
        Ok(Some(Self {
            from: from.clone(),
            lxcpath: from.lxcpath.clone(),
            id,
            text,
            name: name.clone(),
            notes: Vec::new(),
        }))
    }

    /// The same by the config of any LXC container, for the container `name` in `lxcpath`.
    pub fn by_config(path: &Path, lxcpath: PathBuf, name: &ContainerName) -> Result<Self> {
        check_free(&lxcpath, name)?;
        let path = std::path::absolute(path).map_err(|e| Error::at("read", path, e))?;
        let text = files::read(&path)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let folder = dir.file_name().and_then(|name| name.to_str());
        Ok(Self {
            from: Lxc {
                lxcpath: dir.parent().unwrap_or(dir).to_path_buf(),
                name: folder.unwrap_or_default().to_owned(),
                original: None,
                written: Blob::default(),
                extra: Map::new(),
            },
            lxcpath,
            // No line of it is cowl's.
            id: ContainerId::fresh(),
            text,
            name: name.clone(),
            notes: Vec::new(),
        })
    }

    /// The same in another folder of containers.
    pub fn into_lxcpath(self, lxcpath: PathBuf) -> Result<Self> {
        check_free(&lxcpath, &self.name)?;
        Ok(Self { lxcpath, ..self })
    }

    /// The options by which LXC's tools will find it.
    pub fn options(&self) -> String {
        let container = LxcContainer {
            lxcpath: self.lxcpath.clone(),
            name: self.name.to_string(),
        };
        container.options()
    }

    /// Makes the container that it was prepared for one of LXC's. The caller completes the change outside the store
    /// (`recover::complete_outside`).
    pub fn join(mut self, container: &mut Container<'_>) -> Result<Vec<String>> {
        let mut next = container.manifest().clone();
        if let Some(link) = &next.lxc {
            return Err(Error::failed(format!(
                "{} is an LXC container already: {}",
                container.name(),
                link.dir().shown()
            )));
        }
        if next.adopted.is_some() {
            return Err(Error::failed(format!(
                "{} was taken over from a folder, to which it may go back",
                container.name()
            ))
            .hint(format!(
                "make a copy one of LXC's: cowl clone {} NEW",
                container.name()
            )));
        }
        self.fill(container.store, container.id, &mut next)?;
        container.commit(next, None, |_| Ok(Swap::Done))?;
        Ok(self.notes)
    }

    /// Fills in the manifest of the copy: who opens it first makes its LXC container.
    pub fn fill(
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
            extra: Map::new(),
        };
        let (from, to) = (self.from.dir(), link.dir());
        let how = CopyRewrite {
            from: from.as_os_str().as_bytes(),
            to: to.as_os_str().as_bytes(),
            name: &link.name,
        };
        let rootfs = link.dir().join("rootfs");
        let line = [
            b"lxc.rootfs.path = dir:",
            rootfs.as_os_str().as_bytes(),
            b"\n",
        ]
        .concat();
        let plain = detach(&self.text, Some(&line), &self.id.to_string());
        let (plain, notes) = rewrite_for_copy(&plain, &how, tools::random_address);
        self.notes = notes;
        let ours = binding::own_lines(store, id, &self.name, (&self.from, &plain))?;
        let config = Blob(attach(&plain, &ours));
        link.original = Some(Blob(plain));
        link.written = config.clone();
        external::mark(store, id, &external::Leftover::default())?;
        manifest.adopted = Some(Adopted {
            rootfs,
            // It never was there.
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

/// Refuses when LXC has a container of this name already, or something else in its place.
fn check_free(lxcpath: &Path, name: &ContainerName) -> Result<()> {
    let dir = lxcpath.join(name.as_str());
    if !disk::is_there(&dir)? {
        return Ok(());
    }
    Err(Error::failed(format!("{} exists already", dir.shown()))
        .hint("choose another name, or remove what is there"))
}

/// What brings the LXC container of a destroyed container back; `None` when it is none, or never went.
pub(crate) fn back(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
) -> Result<Option<Moving>> {
    let Some(link) = &manifest.lxc else {
        return Ok(None);
    };
    let path = link.config();
    if disk::is_there(&path)? {
        if tools::config::has_own_lines(&binding::read_config(link)?, &id.to_string()) {
            return Ok(None);
        }
        return Err(Error::failed(format!(
            "{} is another LXC container's now",
            link.dir().shown()
        ))
        .hint("move that one away first (lxc-copy -R)"));
    }
    external::begin_writing(store, id, link.written.clone()).map(Some)
}

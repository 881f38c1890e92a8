//! The context of one run of `lxc-snapshot`: the container that was named, and where messages go.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::said::Said;
use crate::cli::Context;
use crate::error::{Error, Result};
use crate::lxc::locked::{LockedSnapshots, no_container};
use crate::lxc::{LxcContainer, lxcpath, snapshots};
use crate::store::disk;

/// The context of one run.
pub(super) struct Front<'a> {
    pub(super) context: &'a Context,
    pub(super) container: LxcContainer,
    /// The folder of its snapshots, as the original would print it.
    pub(super) shown_folder: PathBuf,
    pub(super) said: &'a Said,
}

impl<'a> Front<'a> {
    /// Finds the container `name`; `asked` is the value of `-P`.
    pub(super) fn new(
        context: &'a Context,
        name: &OsStr,
        asked: Option<&Path>,
        said: &'a Said,
    ) -> Result<Self> {
        let lxcpath = lxcpath(asked)?;
        // Without a slash at its end, which would name another old folder.
        let lxcpath: PathBuf = lxcpath.components().collect();
        let plain = name.to_str().filter(|name| {
            !matches!(*name, "" | "." | "..")
                && !name.contains('/')
                && !name.chars().any(char::is_control)
        });
        let Some(name) = plain else {
            return Err(Error::usage(format!(
                "\"{}\" can't be a container's name",
                name.as_encoded_bytes().escape_ascii()
            )));
        };
        let container = LxcContainer {
            lxcpath,
            name: name.to_owned(),
        };
        if !disk::exists(&container.config())? {
            return Err(no_container(&container));
        }
        let folder = snapshots::snapshots_dir(&container)?;
        let shown_folder = match (asked, folder.strip_prefix(&container.lxcpath)) {
            (Some(asked), Ok(inside)) => asked.join(inside),
            _ => folder,
        };
        Ok(Self {
            context,
            container,
            shown_folder,
            said,
        })
    }

    pub(super) fn place(&self) -> Result<LockedSnapshots> {
        LockedSnapshots::open(self.container.clone(), self.context.session.patience)
    }

    pub(super) fn notes(&self, notes: Vec<String>) {
        for note in notes {
            self.said.note(&note);
        }
    }
}

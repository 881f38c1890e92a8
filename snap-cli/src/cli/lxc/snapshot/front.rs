//! The context of one run of `lxc-snapshot`: the container, and the destinations of messages.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::messages::Messages;
use crate::cli::Context;
use crate::error::{Error, Result};
use crate::lxc::locked::{LockedSnapshots, no_container};
use crate::lxc::{LxcContainer, lxcpath, snapshots};
use crate::store::disk;
use cowl_layers::shown::Show as _;

/// The context of one run.
pub(super) struct Front<'a> {
    pub(super) context: &'a Context,
    pub(super) container: LxcContainer,
    /// The directory of its snapshots, as LXC's own program prints it.
    pub(super) listed_dir: PathBuf,
    pub(super) messages: &'a Messages,
}

impl<'a> Front<'a> {
    /// Finds the container `name`; `option` is the value of `-P`.
    pub(super) fn new(
        context: &'a Context,
        name: &OsStr,
        option: Option<&Path>,
        messages: &'a Messages,
    ) -> Result<Self> {
        let lxcpath = lxcpath(option)?;
        // Removes a slash at the end: LXC derives the name of its old snapshot directory from this string.
        let lxcpath: PathBuf = lxcpath.components().collect();
        let plain = name.to_str().filter(|name| {
            !matches!(*name, "" | "." | "..")
                && !name.contains('/')
                && !name.chars().any(char::is_control)
        });
        let Some(name) = plain else {
            return Err(Error::usage(format!(
                "invalid container name: \"{}\"",
                name.shown()
            )));
        };
        let container = LxcContainer {
            lxcpath,
            name: name.to_owned(),
        };
        if !disk::exists(&container.config())? {
            return Err(no_container(&container));
        }
        let dir = snapshots::snapshots_dir(&container)?;
        let listed_dir = match (option, dir.strip_prefix(&container.lxcpath)) {
            (Some(lxcpath), Ok(inside)) => lxcpath.join(inside),
            _ => dir,
        };
        Ok(Self {
            context,
            container,
            listed_dir,
            messages,
        })
    }

    /// Locks LXC's snapshots of the container.
    pub(super) fn lock(&self) -> Result<LockedSnapshots> {
        LockedSnapshots::open(self.container.clone(), self.context.session.patience)
    }

    pub(super) fn print_notes(&self, notes: Vec<String>) {
        for note in notes {
            self.messages.note(&note);
        }
    }
}

//! The mount that a daemon serves, as the process that replaces the daemon needs it.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowlfs::config::Successor;
use cowlfs::{Event, Takeover};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::manifest::ContainerId;

/// The mount that a daemon serves, for the process that replaces the daemon.
///
/// Programs of other versions read it, so a field that is added must have a default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "mount")]
pub enum ServedMount {
    /// A container.
    Container {
        /// The container.
        container: ContainerId,
        /// The id in the state of the mount, which the successor retains.
        daemon: Uuid,
    },
    /// A snapshot, read-only.
    Snapshot {
        /// The container.
        container: ContainerId,
        /// The id of the mount.
        id: Uuid,
    },
}

/// The process that a mount belongs to, with its lock and its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The daemon that has started this process, or its keeper. It continues if this process fails, so this process
    /// must remove nothing: the mount would appear to be dead, and the next command would detach it.
    Predecessor,
    /// This process.
    Successor,
}

impl Owner {
    /// Notes that this process serves the mount.
    pub fn note(&mut self, event: &Event) {
        if let Event::TakenOver(_) | Event::Continued(_) = event {
            *self = Owner::Successor;
        }
    }
}

impl ServedMount {
    /// Returns how the process is started that takes over this mount, with these descriptors.
    pub fn successor(&self, store: &Store, descriptors: Vec<OwnedFd>) -> Result<Successor> {
        let state = serde_json::to_vec(self)
            .map_err(|error| Error::failed("cannot record the daemon's mount").because(error))?;
        let mut arguments: Vec<OsString> = vec!["--store".into()];
        arguments.push(store.root().as_os_str().to_owned());
        arguments.extend(["serve".into(), "--take-over".into()]);
        Ok(Successor {
            arguments,
            state,
            descriptors: descriptors.into_iter().map(Arc::new).collect(),
        })
    }

    /// Returns the mount that a predecessor serves.
    pub fn of_predecessor(takeover: &Takeover) -> Result<Self> {
        serde_json::from_slice(takeover.state()).map_err(|error| {
            Error::failed("the state of the running daemon is of another version").because(error)
        })
    }
}

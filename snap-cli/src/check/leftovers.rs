//! What lies about that nothing needs, and what was left by daemons that died.

use std::path::{Path, PathBuf};

use super::report::{Fix, Known, Level, Report};
use crate::container::state;
use crate::error::Result;
use crate::host;
use crate::store::deleted;
use crate::store::family;
use crate::store::leftovers::{self, Expiry};
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, LayerId};
use crate::store::survey;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

const LEFT: &str = "leftover";

pub(super) fn look(store: &Store, known: &[Known], report: &mut Report) -> Result<()> {
    deleted(store, report)?;
    for id in survey::containers_without_manifest(store)? {
        let what = "the file of a container is missing: bring it back from a backup (what the container was \
                    made of is still there, and is not collected)";
        report.add(
            Level::Damaged,
            "container",
            store.paths().container_file(id),
            what,
            None,
        );
    }
    match leftovers::find(store, Expiry::Respected) {
        Ok(left) => {
            let mut add = |paths: Vec<PathBuf>, what: &str| {
                for path in paths {
                    report.add(Level::Loose, LEFT, path, what, Some(Fix::Collect));
                }
            };
            let expired = left.expired.into_iter().map(|deleted| deleted.dir);
            add(
                expired.collect(),
                "a destroyed container whose time is over",
            );
            let layers = left.layers.iter().map(|id| store.paths().layer_dir(*id));
            add(layers.collect(), "a layer that nothing names");
            let half = left
                .unfinished
                .iter()
                .map(|id| store.paths().container_dir(*id));
            add(half.collect(), "a container whose making was cut off");
            add(left.files, "a file that nothing names");
            add(left.dirs, "of a container that is gone");
            add(left.locks, "a lock that nobody needs");
            add(left.trash, "on its way out");
            for id in left.held {
                let what = "a layer that nothing names, but that is mounted";
                report.add(Level::Loose, LEFT, store.paths().layer_dir(id), what, None);
            }
        }
        // What that is was told with the container.
        Err(error) => {
            let what = format!("nothing can be collected before this is put in order: {error}");
            report.add(Level::Loose, LEFT, store.root().to_path_buf(), what, None);
        }
    }
    // A list that can not be read was told by whoever looked for the stores.
    for (path, why) in family::list_problems(store).unwrap_or_default() {
        // Its disk may only not be mounted.
        report.add(Level::Loose, "family", path, why, None);
    }
    strangers(store, report)?;
    for known in known {
        daemon(store, known, report)?;
    }
    Ok(())
}

/// Destroyed containers that could not be brought back.
fn deleted(store: &Store, report: &mut Report) -> Result<()> {
    for deleted in deleted::list(store)? {
        let whole = || -> Result<()> {
            let manifest = deleted::manifest(store, &deleted)?.body;
            store.open_layers(&manifest.stack)?;
            for snapshot in &manifest.snapshots {
                store.open_layers(&store.snapshot_in(&deleted.dir, snapshot.id)?.stack)?;
            }
            Ok(())
        };
        if let Err(error) = whole() {
            let what = format!("a container in the trash can't come back: {error}");
            report.add(Level::Damaged, "deleted", deleted.dir.clone(), what, None);
        }
    }
    Ok(())
}

/// What cowl did not put there is told and left alone.
fn strangers(store: &Store, report: &mut Report) -> Result<()> {
    let mut stranger = |folder: &str, ours: &dyn Fn(&str) -> bool| -> Result<()> {
        let folder = store.root().join(folder);
        for name in disk::names(&folder)? {
            if !ours(&name) {
                let path = folder.join(name);
                report.add(
                    Level::Loose,
                    "stranger",
                    path,
                    "cowl did not make this",
                    None,
                );
            }
        }
        Ok(())
    };
    stranger("layers", &|name| LayerId::parse(name).is_some())?;
    stranger("containers", &|name| ContainerId::parse(name).is_some())
}

/// State of a mount without a daemon.
fn daemon(store: &Store, known: &Known, report: &mut Report) -> Result<()> {
    let dir = store.run().dir(known.id);
    let path = dir.join("state.json");
    if !disk::exists(&path)? {
        return Ok(());
    }
    let name = &known.manifest.name;
    let what = match peek(&path) {
        None => format!("what is noted of the mount of {name} can't be read"),
        Some(state) if state.boot != host::boot_id()? => {
            format!("{name} was mounted before the machine was started anew")
        }
        Some(state) if !Lock::is_held(&state::daemon_lock(store, known.id, state.daemon))? => {
            format!("the daemon of {name} (pid {}) had died", state.pid)
        }
        Some(_) => return Ok(()),
    };
    let fix = Some(Fix::Settle(name.clone()));
    report.add(Level::Loose, "mount", path, what, fix);
    Ok(())
}

/// Reads it as it is: [`state::read`] takes away what can't be read.
fn peek(path: &Path) -> Option<state::RunState> {
    match disk::read_bytes(path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(state) => Some(state),
            Err(error) => {
                log::debug!("{}: {error}", path.shown());
                None
            }
        },
        Err(error) => {
            log::debug!("{}: {error}", path.shown());
            None
        }
    }
}

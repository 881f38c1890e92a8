//! Detection of leftovers: unreferenced objects, unknown files, and the state of dead daemons.

use std::path::{Path, PathBuf};

use super::report::{CheckReport, Fix, ReadableContainer, Severity};
use crate::container::state;
use crate::error::Result;
use crate::host;
use crate::store::deleted;
use crate::store::family;
use crate::store::leftovers::{self, Retention};
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, LayerId};
use crate::store::survey;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

const LEFTOVER: &str = "leftover";

/// Reports the leftovers in a store.
pub(super) fn check(
    store: &Store,
    containers: &[ReadableContainer],
    report: &mut CheckReport,
) -> Result<()> {
    check_deleted(store, report)?;
    for id in survey::containers_without_manifest(store)? {
        let what = "the manifest of a container is missing: restore it from a backup (the layers of the \
                    container still exist, and are not collected)";
        report.add(
            Severity::Damaged,
            "container",
            store.paths().container_file(id),
            what,
            None,
        );
    }
    match leftovers::find(store, Retention::RESPECTED) {
        Ok(left) => {
            let mut add = |paths: Vec<PathBuf>, what: &str| {
                for path in paths {
                    report.add(Severity::Loose, LEFTOVER, path, what, Some(Fix::Collect));
                }
            };
            let expired = left.expired.into_iter().map(|deleted| deleted.dir);
            add(expired.collect(), "an expired destroyed container");
            let layers = left.layers.iter().map(|id| store.paths().layer_dir(*id));
            add(layers.collect(), "a layer that is not referenced");
            let half = left
                .unfinished
                .iter()
                .map(|id| store.paths().container_dir(*id));
            add(half.collect(), "a container whose creation was interrupted");
            add(left.files, "a file that is not referenced");
            add(left.dirs, "a directory of a removed container");
            add(left.transfers, "an interrupted download or upload");
            add(left.locks, "an unused lock file");
            add(left.trash, "an object in the trash");
            for id in left.held {
                let what = "a layer that a mount or a transfer uses, but no manifest references";
                report.add(
                    Severity::Loose,
                    LEFTOVER,
                    store.paths().layer_dir(id),
                    what,
                    None,
                );
            }
        }
        // The cause is reported with the container.
        Err(error) => {
            let what = format!("garbage cannot be collected before this is repaired: {error}");
            report.add(
                Severity::Loose,
                LEFTOVER,
                store.root().to_path_buf(),
                what,
                None,
            );
        }
    }
    // An unreadable list was reported by the search for stores.
    for (path, why) in family::list_problems(store).unwrap_or_default() {
        // Not damage: the disk of the store may just not be mounted.
        report.add(Severity::Loose, "family", path, why, None);
    }
    check_unknown_files(store, report)?;
    for container in containers {
        check_daemon(store, container, report)?;
    }
    Ok(())
}

/// Reports destroyed containers that cannot be restored.
fn check_deleted(store: &Store, report: &mut CheckReport) -> Result<()> {
    for deleted in deleted::list(store)? {
        let open_all = || -> Result<()> {
            let manifest = deleted::manifest(store, &deleted)?.body;
            store.open_layers(&manifest.stack)?;
            for snapshot in &manifest.snapshots {
                store.open_layers(&store.snapshot_in(&deleted.dir, snapshot.id)?.stack)?;
            }
            Ok(())
        };
        if let Err(error) = open_all() {
            let what = format!("a container in the trash cannot be restored: {error}");
            report.add(
                Severity::Damaged,
                "deleted",
                deleted.dir.clone(),
                what,
                None,
            );
        }
    }
    Ok(())
}

/// Reports files that cowl did not create. They are never removed.
fn check_unknown_files(store: &Store, report: &mut CheckReport) -> Result<()> {
    let mut check_dir = |dir: &str, is_valid: &dyn Fn(&str) -> bool| -> Result<()> {
        let dir = store.root().join(dir);
        for name in disk::names(&dir)? {
            if !is_valid(&name) {
                let path = dir.join(name);
                report.add(
                    Severity::Loose,
                    "stranger",
                    path,
                    "not created by cowl",
                    None,
                );
            }
        }
        Ok(())
    };
    check_dir("layers", &|name| LayerId::parse(name).is_some())?;
    check_dir("containers", &|name| ContainerId::parse(name).is_some())
}

/// Reports the state of a mount whose daemon is dead.
fn check_daemon(
    store: &Store,
    container: &ReadableContainer,
    report: &mut CheckReport,
) -> Result<()> {
    let dir = store.run().dir(container.id);
    let path = dir.join("state.json");
    if !disk::exists(&path)? {
        return Ok(());
    }
    let name = &container.manifest.name;
    let what = match read_state(&path) {
        None => format!("the state of the mount of {name} is unreadable"),
        Some(state) if state.boot != host::boot_id()? => {
            format!("{name} was mounted before the machine was rebooted")
        }
        Some(state) if !Lock::is_held(&state::daemon_lock(store, container.id, state.daemon))? => {
            format!("the daemon of {name} (pid {}) died", state.pid)
        }
        Some(_) => return Ok(()),
    };
    let fix = Some(Fix::Settle(name.clone()));
    report.add(Severity::Loose, "mount", path, what, fix);
    Ok(())
}

/// Reads the state of a mount without a side effect, whereas [`state::read`] removes an unreadable file.
fn read_state(path: &Path) -> Option<state::RunState> {
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

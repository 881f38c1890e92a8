//! Verification of the referenced layers: each exists, is unchanged, and is not written by a mount unless it is a head.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::AsFd;

use cowl_layers::sys;

use super::report::{CheckReport, Depth, Fix, Options, ReadableContainer, Severity};
use crate::container::durability::epoch;
use crate::error::{Error, Result};
use crate::store::manifest::{LayerId, LayerKind, LayerManifest, Settling};
use crate::store::measure;
use crate::store::name::ContainerName;
use crate::store::record::Record;
use crate::store::{Store, disk, image_layers};
use crate::tree::digest_layer;
use crate::tree::error::OnProgress;

const LAYER: &str = "layer";

/// The references of the manifests to layers.
#[derive(Default)]
struct LayerReferences {
    /// The layers that are written, each with its container.
    heads: HashMap<LayerId, ContainerName>,
    /// The immutable layers, each with the layers below it in some stack.
    frozen: BTreeMap<LayerId, Vec<LayerId>>,
    /// The containers that depend on each layer.
    users: HashMap<LayerId, BTreeSet<ContainerName>>,
    /// The layers that a power cut may have left incomplete.
    incomplete: HashSet<LayerId>,
}

impl LayerReferences {
    fn add_stack(&mut self, stack: &[LayerId], user: &ContainerName) {
        for (at, layer) in stack.iter().enumerate() {
            let below = stack.get(at + 1..).unwrap_or_default();
            self.frozen.entry(*layer).or_insert_with(|| below.to_vec());
            self.users.entry(*layer).or_default().insert(user.clone());
        }
    }

    fn from_containers(containers: &[ReadableContainer], epoch: &str) -> Self {
        let is_incomplete =
            |marker: Option<&Settling>| marker.is_some_and(|marker| !marker.is_pending(epoch));
        let mut references = Self::default();
        for container in containers {
            let manifest = &container.manifest;
            let name = &manifest.name;
            if let Some(head) = manifest.written_head() {
                references.heads.insert(head, manifest.name.clone());
            }
            references
                .users
                .entry(manifest.head)
                .or_default()
                .insert(name.clone());
            references.add_stack(manifest.frozen_stack(), name);
            references.add_stack(&manifest.origin, name);
            if is_incomplete(manifest.settling.as_ref()) {
                references.incomplete.extend(manifest.below_head().first());
                references.incomplete.extend(manifest.origin.first());
            }
            for snapshot in &manifest.snapshots {
                if is_incomplete(snapshot.settling.as_ref()) {
                    references.incomplete.insert(snapshot.layer);
                }
                if let Some(state) = container.snapshots.get(&snapshot.id) {
                    references.add_stack(&state.stack, name);
                }
            }
        }
        references
    }

    /// Returns the beginning of a clause, such as "db, web depend".
    fn describe_users(&self, layer: LayerId) -> String {
        let users: Vec<_> = self.users.get(&layer).into_iter().flatten().collect();
        let verb = if users.len() == 1 {
            "depends"
        } else {
            "depend"
        };
        let names: Vec<_> = users.iter().take(5).map(|name| name.as_str()).collect();
        match users.len().saturating_sub(names.len()) {
            0 => format!("{} {verb}", names.join(", ")),
            more => format!("{} and {more} more {verb}", names.join(", ")),
        }
    }
}

/// Verifies the layers that the containers reference.
pub(super) fn check(
    store: &Store,
    options: &Options,
    containers: &[ReadableContainer],
    report: &mut CheckReport,
    progress: OnProgress<'_>,
) -> Result<()> {
    let references = LayerReferences::from_containers(containers, &epoch(store)?);
    for (head, container) in &references.heads {
        if references.frozen.contains_key(head) {
            let what = format!(
                "{container} writes to the layer {head}, on which {}",
                references.describe_users(*head)
            );
            report.add(
                Severity::Damaged,
                LAYER,
                store.paths().layer_dir(*head),
                what,
                None,
            );
        }
        if let Err(error) = check_head(store, *head, container, report) {
            report_unreadable(store, *head, &error, report);
        }
    }
    for (layer, below) in &references.frozen {
        report.layers += 1;
        let checked = check_frozen(
            store,
            options,
            (*layer, below),
            &references,
            report,
            progress,
        );
        // An unreadable layer must not hide problems of the others.
        if let Err(error) = checked {
            report_unreadable(store, *layer, &error, report);
        }
    }
    let frozen: BTreeSet<_> = references.frozen.keys().collect();
    for head in references
        .heads
        .keys()
        .filter(|head| !frozen.contains(head))
    {
        report.layers += 1;
        if let Err(error) = check_exists(store, *head, &references, report) {
            report_unreadable(store, *head, &error, report);
        }
    }
    Ok(())
}

fn report_unreadable(store: &Store, id: LayerId, error: &Error, report: &mut CheckReport) {
    report.add(
        Severity::Damaged,
        LAYER,
        store.paths().layer_dir(id),
        error.to_string(),
        None,
    );
}

fn check_frozen(
    store: &Store,
    options: &Options,
    (layer, below): (LayerId, &[LayerId]),
    references: &LayerReferences,
    report: &mut CheckReport,
    progress: OnProgress<'_>,
) -> Result<()> {
    if check_exists(store, layer, references, report)? && !references.heads.contains_key(&layer) {
        check_not_written(store, layer, references, report)?;
        if check_file(store, layer, below, report)? {
            check_content(store, options, layer, references, report, progress)?;
        }
    }
    Ok(())
}

fn check_exists(
    store: &Store,
    id: LayerId,
    references: &LayerReferences,
    report: &mut CheckReport,
) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    if disk::is_dir(&tree)? {
        return Ok(true);
    }
    let what = format!(
        "the layer {id} is missing; {} on it",
        references.describe_users(id)
    );
    report.add(Severity::Damaged, LAYER, tree, what, None);
    Ok(false)
}

fn check_head(
    store: &Store,
    id: LayerId,
    container: &ContainerName,
    report: &mut CheckReport,
) -> Result<()> {
    let work = store.paths().layer_work(id);
    if disk::exists(&store.paths().layer_tree(id))? && !disk::exists(&work)? {
        let what = format!("the work directory of {container} is missing");
        report.add(Severity::Damaged, LAYER, work, what, Some(Fix::Work(id)));
    }
    Ok(())
}

/// Verifies that no mount writes to a frozen layer. A mount that does holds an exclusive lock on it.
fn check_not_written(
    store: &Store,
    id: LayerId,
    references: &LayerReferences,
    report: &mut CheckReport,
) -> Result<()> {
    let tree = store.paths().layer_tree(id);
    let shared = sys::dir::open_root(&tree)
        .and_then(|root| Ok(sys::dir::lock_shared(root.as_fd())?.is_some()))
        .map_err(|error| Error::at("check the lock of", &tree, error))?;
    if !shared {
        let what = format!(
            "a mount writes to the layer {id}, on which {}",
            references.describe_users(id)
        );
        report.add(Severity::Damaged, LAYER, tree, what, None);
    }
    Ok(())
}

/// Verifies that the file of a layer is readable, and returns whether it is.
fn check_file(
    store: &Store,
    id: LayerId,
    below: &[LayerId],
    report: &mut CheckReport,
) -> Result<bool> {
    let path = store.paths().layer_file(id);
    let Err(error) = disk::read::<LayerManifest>(&path) else {
        return Ok(true);
    };
    // A file in a newer format is not damaged, and must not be repaired.
    if error.kind != crate::error::Kind::Damaged {
        return Err(error);
    }
    let kind = match below {
        [] => LayerKind::Base,
        _ => LayerKind::Delta,
    };
    let fix = Some(Fix::Layer(id, kind, below.to_vec()));
    report.add(Severity::Damaged, LAYER, path, error.to_string(), fix);
    Ok(false)
}

/// Compares a layer with its recorded measurements, and with its recorded digest if `options` request that.
///
/// Values that are not recorded yet are recorded.
fn check_content(
    store: &Store,
    options: &Options,
    id: LayerId,
    references: &LayerReferences,
    report: &mut CheckReport,
    progress: OnProgress<'_>,
) -> Result<()> {
    let path = store.paths().layer_file(id);
    let tree = store.paths().layer_tree(id);
    let record = disk::read::<LayerManifest>(&path)?;
    // The loss is reported with the snapshot. The measurements are recorded when the loss is accepted.
    if record.body.unsynced || references.incomplete.contains(&id) {
        return Ok(());
    }
    let changed = |what: &str| {
        format!(
            "the layer {id}, on which {}, was modified by another program: {what}",
            references.describe_users(id)
        )
    };
    let (measured, looks) = measure::measure_like(store, id, record.body.looks.as_deref())?;
    let mut next = record.body.clone();
    match &record.body.looks {
        Some(known) if *known != looks => {
            let what = changed("sizes, modes, owners or times of its files differ");
            stop_sharing(store, id);
            report.add(Severity::Damaged, LAYER, tree, what, None);
            return Ok(());
        }
        Some(_) => {}
        None => {
            (next.measured, next.looks) = (Some(measured), Some(looks));
        }
    }
    if options.depth == Depth::Content {
        let known = record.body.digest.as_deref();
        let found = digest_layer(&tree, known, progress)?.to_string();
        match &record.body.digest {
            Some(known) if *known != found => {
                let what = changed("its content differs");
                stop_sharing(store, id);
                report.add(Severity::Damaged, LAYER, tree, what, None);
                return Ok(());
            }
            Some(_) => {}
            None => next.digest = Some(found),
        }
        let image = record.body.image.as_ref();
        if let Some(blob) = image.and_then(|image| image.blob.as_ref())
            && let Err(error) = image_layers::check_blob(store, id, blob)
        {
            let path = store.paths().layer_blob(id);
            let what = format!("the retained blob of the layer {id} is damaged: {error}");
            report.add(Severity::Damaged, LAYER, path, what, Some(Fix::Blob(id)));
        }
    }
    if next != record.body {
        report.new += 1;
        record_values(store, &record, next, id);
    }
    Ok(())
}

/// Prevents new containers from using a damaged layer of an image.
fn stop_sharing(store: &Store, id: LayerId) {
    if let Err(error) = image_layers::mark_changed(store, id) {
        log::warn!("{error}; new containers may share the damaged layer");
    }
}

fn record_values(store: &Store, record: &Record<LayerManifest>, next: LayerManifest, id: LayerId) {
    if let Err(error) = disk::replace(&store.paths().layer_file(id), &record.next(next)) {
        log::warn!("{error}; the next check has no values to compare with");
    }
}

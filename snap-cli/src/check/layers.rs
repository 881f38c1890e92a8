//! Whether the layers that are named are there, are written by nobody, and are what they were.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::AsFd;

use cowl_layers::sys;

use super::report::{Depth, Fix, Known, Level, Options, Report};
use crate::container::durability::epoch;
use crate::error::{Error, Result};
use crate::store::manifest::{LayerId, LayerKind, LayerManifest, Settling};
use crate::store::measure;
use crate::store::name::ContainerName;
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::tree::digest_layer;
use crate::tree::error::OnProgress;

const LAYER: &str = "layer";

/// What the manifests say of layers.
#[derive(Default)]
struct Named {
    /// Those that are written, with the container that does.
    heads: HashMap<LayerId, ContainerName>,
    /// Those that never change any more, each with what lies below it in some stack.
    frozen: BTreeMap<LayerId, Vec<LayerId>>,
    /// The containers that stand on each.
    by: HashMap<LayerId, BTreeSet<ContainerName>>,
    /// Those of which a power cut may have taken a part.
    lost: HashSet<LayerId>,
}

impl Named {
    fn add(&mut self, stack: &[LayerId], by: &ContainerName) {
        for (at, layer) in stack.iter().enumerate() {
            let below = stack.get(at + 1..).unwrap_or_default();
            self.frozen.entry(*layer).or_insert_with(|| below.to_vec());
            self.by.entry(*layer).or_default().insert(by.clone());
        }
    }

    fn of(known: &[Known], epoch: &str) -> Self {
        let loses = |mark: Option<&Settling>| mark.is_some_and(|mark| !mark.is_pending(epoch));
        let mut named = Self::default();
        for known in known {
            let manifest = &known.manifest;
            let name = &manifest.name;
            named.heads.insert(manifest.head, manifest.name.clone());
            named
                .by
                .entry(manifest.head)
                .or_default()
                .insert(name.clone());
            named.add(manifest.below_head(), name);
            named.add(&manifest.origin, name);
            if loses(manifest.settling.as_ref()) {
                named.lost.extend(manifest.below_head().first());
                named.lost.extend(manifest.origin.first());
            }
            for snapshot in &manifest.snapshots {
                if loses(snapshot.settling.as_ref()) {
                    named.lost.insert(snapshot.layer);
                }
                if let Some(state) = known.snapshots.get(&snapshot.id) {
                    named.add(&state.stack, name);
                }
            }
        }
        named
    }

    /// "db, web stand"
    fn by(&self, layer: LayerId) -> String {
        let by: Vec<_> = self.by.get(&layer).into_iter().flatten().collect();
        let verb = if by.len() == 1 { "stands" } else { "stand" };
        let names: Vec<_> = by.iter().take(5).map(|name| name.as_str()).collect();
        match by.len().saturating_sub(names.len()) {
            0 => format!("{} {verb}", names.join(", ")),
            more => format!("{} and {more} more {verb}", names.join(", ")),
        }
    }
}

pub(super) fn look(
    store: &Store,
    options: &Options,
    known: &[Known],
    report: &mut Report,
    progress: OnProgress<'_>,
) -> Result<()> {
    let named = Named::of(known, &epoch(store)?);
    for (head, container) in &named.heads {
        if named.frozen.contains_key(head) {
            let what = format!(
                "{container} writes to the layer {head}, on which {}",
                named.by(*head)
            );
            report.add(
                Level::Damaged,
                LAYER,
                store.paths().layer_dir(*head),
                what,
                None,
            );
        }
        if let Err(error) = self::head(store, *head, container, report) {
            unreadable(store, *head, &error, report);
        }
    }
    for (layer, below) in &named.frozen {
        report.layers += 1;
        let checked = frozen(store, options, (*layer, below), &named, report, progress);
        // One that cannot be read hides nothing of the others.
        if let Err(error) = checked {
            unreadable(store, *layer, &error, report);
        }
    }
    let frozen: BTreeSet<_> = named.frozen.keys().collect();
    for head in named.heads.keys().filter(|head| !frozen.contains(head)) {
        report.layers += 1;
        if let Err(error) = is_there(store, *head, &named, report) {
            unreadable(store, *head, &error, report);
        }
    }
    Ok(())
}

fn unreadable(store: &Store, id: LayerId, error: &Error, report: &mut Report) {
    report.add(
        Level::Damaged,
        LAYER,
        store.paths().layer_dir(id),
        error.to_string(),
        None,
    );
}

fn frozen(
    store: &Store,
    options: &Options,
    (layer, below): (LayerId, &[LayerId]),
    named: &Named,
    report: &mut Report,
    progress: OnProgress<'_>,
) -> Result<()> {
    if is_there(store, layer, named, report)? && !named.heads.contains_key(&layer) {
        sealed(store, layer, named, report)?;
        if file(store, layer, below, report)? {
            compare(store, options, layer, named, report, progress)?;
        }
    }
    Ok(())
}

fn is_there(store: &Store, id: LayerId, named: &Named, report: &mut Report) -> Result<bool> {
    let tree = store.paths().layer_tree(id);
    if disk::is_dir(&tree)? {
        return Ok(true);
    }
    let what = format!("the layer {id} is missing; {} on it", named.by(id));
    report.add(Level::Damaged, LAYER, tree, what, None);
    Ok(false)
}

fn head(store: &Store, id: LayerId, of: &ContainerName, report: &mut Report) -> Result<()> {
    let work = store.paths().layer_work(id);
    if disk::exists(&store.paths().layer_tree(id))? && !disk::exists(&work)? {
        let what = format!("the work folder of {of} is missing");
        report.add(Level::Damaged, LAYER, work, what, Some(Fix::Work(id)));
    }
    Ok(())
}

/// Nobody writes to it: a mount that does has it locked alone.
fn sealed(store: &Store, id: LayerId, named: &Named, report: &mut Report) -> Result<()> {
    let tree = store.paths().layer_tree(id);
    let shared = sys::dir::open_root(&tree)
        .and_then(|root| Ok(sys::dir::lock_shared(root.as_fd())?.is_some()))
        .map_err(|error| Error::at("look at the lock of", &tree, error))?;
    if !shared {
        let what = format!(
            "some mount writes to the layer {id}, on which {}",
            named.by(id)
        );
        report.add(Level::Damaged, LAYER, tree, what, None);
    }
    Ok(())
}

/// Its own file can be read.
fn file(store: &Store, id: LayerId, below: &[LayerId], report: &mut Report) -> Result<bool> {
    let path = store.paths().layer_file(id);
    let Err(error) = disk::read::<LayerManifest>(&path) else {
        return Ok(true);
    };
    // Of a newer version it is no damage, and nothing is to be done about it.
    if error.kind != crate::error::Kind::Damaged {
        return Err(error);
    }
    let kind = match below {
        [] => LayerKind::Base,
        _ => LayerKind::Delta,
    };
    let fix = Some(Fix::Layer(id, kind, below.to_vec()));
    report.add(Level::Damaged, LAYER, path, error.to_string(), fix);
    Ok(false)
}

/// It is what it was when it was measured; its content as well if that is asked for.
fn compare(
    store: &Store,
    options: &Options,
    id: LayerId,
    named: &Named,
    report: &mut Report,
    progress: OnProgress<'_>,
) -> Result<()> {
    let path = store.paths().layer_file(id);
    let tree = store.paths().layer_tree(id);
    let record = disk::read::<LayerManifest>(&path)?;
    // What it lost is reported with the snapshot. It is recorded as it is once that is accepted.
    if record.body.unsynced || named.lost.contains(&id) {
        return Ok(());
    }
    let changed = |what: &str| {
        format!(
            "the layer {id}, on which {}, was written behind cowl's back: {what}",
            named.by(id)
        )
    };
    let (measured, looks) = measure::measure_like(store, id, record.body.looks.as_deref())?;
    let mut next = record.body.clone();
    match &record.body.looks {
        Some(known) if *known != looks => {
            let what = changed("its files have other sizes, modes, owners or times");
            report.add(Level::Damaged, LAYER, tree, what, None);
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
                let what = changed("it has another content");
                report.add(Level::Damaged, LAYER, tree, what, None);
                return Ok(());
            }
            Some(_) => {}
            None => next.digest = Some(found),
        }
    }
    if next != record.body {
        report.new += 1;
        note(store, &record, next, id);
    }
    Ok(())
}

fn note(store: &Store, record: &Record<LayerManifest>, next: LayerManifest, id: LayerId) {
    if let Err(error) = disk::replace(&store.paths().layer_file(id), &record.next(next)) {
        log::warn!("{error}; the next check knows nothing to compare with");
    }
}

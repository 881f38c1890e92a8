//! `cowl destroy --containerd`: removes what containerd has left after it was uninstalled.

use super::{Context, RunMode, confirm, output};
use crate::error::{Error, Kind, Result};
use crate::host::hooks::Event;
use crate::lifecycle::containerd::{
    self as snapshots, Abandoned, LoadedSnapshot, lock_without_containerd, select_abandoned,
};
use crate::snapshot::remove::Protected;
use crate::store::name::ContainerName;
use crate::store::{Store, collect, containerd::ContainerdKind, family};

/// The number of names in a question.
const MAX_NAMES: usize = 10;

/// Whether to ask for confirmation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Confirmation {
    Ask,
    Given,
}

/// Removes snapshots of containerd permanently: those of the containers `names`, or all.
pub(super) fn destroy(
    context: &Context,
    names: Option<&[ContainerName]>,
    (mode, confirmation, protected): (RunMode, Confirmation, Protected),
) -> Result<()> {
    let mut parts = find_parts(context, names)?;
    let mut selected = Vec::new();
    for part in &parts {
        selected.push(part.select()?);
    }
    // In the others, no program has to be excluded.
    let mut is_used = selected.iter().map(|found| !found.is_empty());
    parts.retain(|_| is_used.next().unwrap_or_default());
    if parts.is_empty() {
        output::print_note("containerd has no snapshots");
        return Ok(());
    }
    let what = describe(&selected.concat());
    if mode == RunMode::DryRun {
        output::print_note(&format!("would remove {what} permanently"));
        return Ok(());
    }
    // Fails early. The programs may be started during the question.
    for part in &parts {
        drop(lock_without_containerd(&part.store)?);
    }
    if confirmation == Confirmation::Ask {
        confirm(&format!("Remove {what} permanently?"))?;
    }
    let mut result = Ok(());
    for part in &parts {
        result = result.and(part.remove(context, protected));
    }
    result
}

/// A store, and the containers to remove in it.
struct Part {
    store: Store,
    /// `None` for all.
    names: Option<Vec<ContainerName>>,
}

impl Part {
    fn select(&self) -> Result<Vec<LoadedSnapshot>> {
        let names = self.names.as_deref();
        select_abandoned(&self.store, names.map_or(Abandoned::All, Abandoned::Named))
    }

    fn remove(&self, context: &Context, protected: Protected) -> Result<()> {
        let lock = lock_without_containerd(&self.store)?;
        let removed = remove_all(context, &self.store, &self.select()?, protected);
        drop(lock);
        collect::collect_or_warn(&self.store);
        removed
    }
}

/// Returns the stores of the family that contain the containers, or all stores.
fn find_parts(context: &Context, names: Option<&[ContainerName]>) -> Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    let Some(names) = names else {
        for store in family::stores(&context.root, &context.session)? {
            parts.push(Part {
                store: context.clean_up(store)?,
                names: None,
            });
        }
        return Ok(parts);
    };
    for name in names {
        let store = context.store_for(name)?;
        let is_same = |part: &&mut Part| part.store.root() == store.root();
        match parts.iter_mut().find(is_same) {
            Some(part) => part.names.get_or_insert_default().push(name.clone()),
            None => parts.push(Part {
                store,
                names: Some(vec![name.clone()]),
            }),
        }
    }
    Ok(parts)
}

/// Removes the snapshots, children first. If one remains, its parents remain as well.
fn remove_all(
    context: &Context,
    store: &Store,
    selected: &[LoadedSnapshot],
    protected: Protected,
) -> Result<()> {
    let mut needed: Vec<&str> = Vec::new();
    let mut failed: Vec<Error> = Vec::new();
    for one in selected {
        let removed = match needed.contains(&one.record.key.as_str()) {
            true => Ok(false),
            false => remove_one(context, store, one, protected).map(|()| true),
        };
        if let Err(error) = &removed {
            log::error!("{error}");
        }
        if !matches!(removed, Ok(true)) {
            needed.extend(one.record.parent.as_deref());
        }
        failed.extend(removed.err());
    }
    let count = failed.len();
    match failed.into_iter().next() {
        None => Ok(()),
        Some(first) => {
            let kind = first.kind;
            let error = Error::new(
                kind,
                format!(
                    "{} could not be removed; the snapshots below {} remain as well",
                    output::counted(count, "snapshot"),
                    if count == 1 { "it" } else { "them" }
                ),
            );
            Err(match first.hint {
                Some(hint) => error.hint(hint),
                None => error,
            })
        }
    }
}

fn remove_one(
    context: &Context,
    store: &Store,
    one: &LoadedSnapshot,
    protected: Protected,
) -> Result<()> {
    let remove = || match snapshots::remove(store, one.id, protected) {
        // Another command has removed it.
        Err(error) if error.kind == Kind::NotFound => Ok(()),
        done => done,
    };
    match one.record.is_open() {
        true => context.run_with_hooks(Event::Destroy, store, &one.name, None, |_| remove()),
        false => remove(),
    }
}

/// Describes the selection: "ctr.default.web, ctr.default.db and 12 layers and views of images".
fn describe(selected: &[LoadedSnapshot]) -> String {
    let is_container =
        |one: &&LoadedSnapshot| one.record.kind == ContainerdKind::Active && one.record.is_open();
    let containers: Vec<_> = selected.iter().filter(is_container).collect();
    let others = selected.len() - containers.len();
    let mut parts: Vec<_> = containers
        .iter()
        .take(MAX_NAMES)
        .map(|one| one.name.to_string())
        .collect();
    if containers.len() > MAX_NAMES {
        parts.push(format!("{} more containers", containers.len() - MAX_NAMES));
    }
    if others > 0 {
        parts.push(output::counted(others, "other snapshot"));
    }
    match parts.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, first)) => format!("{} and {last}", first.join(", ")),
        None => String::new(),
    }
}

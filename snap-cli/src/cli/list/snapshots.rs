//! The list and the tree of one container's snapshots.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::super::output;
use super::Args;
use super::columns::Template;
use crate::error::Result;
use crate::recover;
use crate::snapshot::list::{SnapshotEntry, list_snapshots};
use crate::snapshot::select::{Filter, sort};
use crate::snapshot::tree::draw_tree;
use crate::store::Store;
use crate::store::manifest::{ContainerManifest, Durability};
use crate::store::name::ContainerName;

const HEADER: [&str; 5] = ["NAME", "TIME", "SIZE", "AFTER", "COMMENT"];

pub(super) fn print(
    args: &Args,
    store: &Store,
    name: &ContainerName,
    filter: &Filter,
    template: Option<&Template>,
) -> Result<()> {
    let (id, manifest) = {
        // Opened, and so locked, only for a moment: to complete or roll back interrupted operations.
        let container = recover::open(store, name)?;
        (container.id(), container.manifest().clone())
    };
    let _reading = store.lock_shared()?;
    let mut entries = list_snapshots(store, id, &manifest)?;
    if args.tree {
        return draw(args, &manifest, &entries, filter);
    }
    entries.retain(|entry| filter.matches(entry));
    sort(&mut entries, args.order());
    if args.reverse {
        entries.reverse();
    }
    if let Some(template) = template {
        return entries
            .iter()
            .try_for_each(|entry| output::print_text(&template.fill(&as_json(entry))?));
    }
    if args.json {
        let list: Vec<Value> = entries.iter().map(as_json).collect();
        return output::print_json(&json!({ "name": manifest.name, "id": id, "snapshots": list }));
    }
    let rows = entries.iter().map(|entry| row(entry, String::new()));
    output::print_table(args.header(&HEADER), rows.collect(), &[2])
}

/// Prints the whole tree; of a snapshot that the filter rejects, only the name.
fn draw(
    args: &Args,
    manifest: &ContainerManifest,
    entries: &[SnapshotEntry],
    filter: &Filter,
) -> Result<()> {
    let by_id: HashMap<_, _> = entries.iter().map(|e| (e.snapshot.id, e)).collect();
    let list: Vec<_> = entries
        .iter()
        .map(|e| (e.snapshot.id, e.snapshot.parent))
        .collect();
    let rows = draw_tree(&list, manifest.parent).into_iter().map(|line| {
        match line.id.and_then(|id| by_id.get(&id)) {
            Some(entry) => {
                let mut cells = row(entry, line.prefix);
                // The tree shows the parent.
                cells.remove(3);
                if !filter.matches(entry) {
                    cells.truncate(1);
                    cells.resize(4, String::new());
                }
                cells
            }
            None => {
                let mut cells = vec![format!("{}now", line.prefix)];
                cells.resize(4, String::new());
                cells
            }
        }
    });
    let [name, time, size, _, comment] = HEADER;
    output::print_table(
        args.header(&[name, time, size, comment]),
        rows.collect(),
        &[2],
    )
}

fn row(entry: &SnapshotEntry, prefix: String) -> Vec<String> {
    let snapshot = &entry.snapshot;
    let mut comment = output::shown(snapshot.comment.as_bytes());
    for (key, value) in &snapshot.tags {
        let tag = if value.is_empty() {
            format!("[{key}]")
        } else {
            format!("[{key}={value}]")
        };
        comment = format!("{comment} {tag}");
    }
    if snapshot.protected {
        comment = format!("{comment} (protected)");
    }
    if entry.durability != Durability::Durable {
        let failed = snapshot
            .settling
            .as_ref()
            .is_some_and(|s| s.failed.is_some());
        let failed = if failed { ", sync failed" } else { "" };
        comment = format!("{comment} ({}{failed})", entry.durability.name());
    }
    vec![
        prefix + snapshot.name.as_str(),
        output::format_local_time(&snapshot.created),
        output::format_size(entry.bytes),
        entry.parent.clone().unwrap_or_default(),
        comment.trim_start().to_owned(),
    ]
}

/// Returns the details of a snapshot for JSON and for `--format`.
pub(super) fn as_json(entry: &SnapshotEntry) -> Value {
    let snapshot = &entry.snapshot;
    json!({
        "name": snapshot.name,
        "id": snapshot.id,
        "kind": snapshot.kind,
        "created": snapshot.created,
        "time": output::format_local_time(&snapshot.created),
        "size": entry.bytes,
        "comment": snapshot.comment,
        "parent": entry.parent,
        "tags": snapshot.tags,
        "protected": snapshot.protected,
        "state": entry.durability.name(),
        "sync_error": snapshot.settling.as_ref().and_then(|s| s.failed.as_deref()),
    })
}

//! The command `cowl show`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::{CliCommand, Context, Namespace, output, read_state};
use crate::container::durability::epoch;
use crate::container::state::{Mounted, probe};
use crate::error::Result;
use crate::snapshot::ResolvedState;
use crate::store::Store;
use crate::store::manifest::{Durability, SnapshotManifest, SnapshotRef};
use crate::store::measure;
use crate::store::name::Address;

/// Show all details of a container or a snapshot
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container or the snapshot
    #[arg(value_name = "NAME[@SNAP]")]
    address: OsString,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The fields of the text output, the most useful first.
const CONTAINER: &[&str] = &[
    "name",
    "created",
    "state",
    "sync_error",
    "cloned_from",
    "made_from",
    "snapshots",
    "next_number",
    "mountpoint",
    "settings",
    "head",
    "layers",
    "id",
    "store",
];
const SNAPSHOT: &[&str] = &[
    "name",
    "container",
    "comment",
    "created",
    "kind",
    "state",
    "sync_error",
    "parent",
    "tags",
    "protected",
    "size",
    "files",
    "settings",
    "config",
    "layers",
    "id",
    "store",
];

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let address = Address::parse(&self.address)?;
        let (store, state, _reading) = read_state(context, &address)?;
        let (details, order) = match &state.snapshot {
            Some((entry, snapshot)) => (snapshot_json(&store, &state, entry, snapshot)?, SNAPSHOT),
            None => (container_json(&store, &state)?, CONTAINER),
        };
        if self.json {
            output::print_json(&details)?;
            return Ok(0);
        }
        let rows = order.iter().filter_map(|key| {
            let value = details
                .get(*key)
                .filter(|value| !value.is_null() && **value != "")?;
            Some(vec![key.replace('_', " "), text(key, value)])
        });
        output::print_table(&[], rows.collect(), &[])?;
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

fn text(key: &str, value: &Value) -> String {
    match (key, value) {
        ("created", Value::String(time)) => output::format_local_time(time),
        ("size", Value::Number(bytes)) => output::format_size(bytes.as_u64().unwrap_or_default()),
        (_, Value::String(text)) => output::shown(text.as_bytes()),
        (_, Value::Array(list)) => {
            let list: Vec<_> = list.iter().map(|one| text("", one)).collect();
            list.join(" ")
        }
        (_, Value::Object(map)) => {
            let pairs: Vec<_> = map
                .iter()
                .map(|(key, value)| format!("{key}={}", text("", value)))
                .collect();
            pairs.join(" ")
        }
        (_, value) => value.to_string(),
    }
}

fn container_json(store: &Store, state: &ResolvedState) -> Result<Value> {
    let manifest = &state.manifest;
    let name_of = |id| {
        manifest
            .snapshots
            .iter()
            .find(|s| s.id == id)
            .map(|s| &s.name)
    };
    let (mark, epoch) = (manifest.settling.as_ref(), epoch(store)?);
    let mountpoint = match probe(store, state.container)? {
        Mounted::Alive(run) => Some(output::json_path(run.mountpoint.as_os_str().as_bytes())),
        Mounted::No | Mounted::Dead(_) => None,
    };
    Ok(json!({
        "name": manifest.name,
        "id": state.container,
        "created": manifest.created,
        // The durability of the frozen layers. The file system writes back the top layer, as any other files.
        "state": mark.map(|mark| Durability::from_settling(Some(mark), &epoch).name()),
        "sync_error": mark.and_then(|mark| mark.failed.as_deref()),
        "cloned_from": mark.and_then(|mark| mark.source.as_deref()),
        "made_from": manifest.parent.and_then(name_of),
        "snapshots": manifest.snapshots.len(),
        "next_number": manifest.next_snap,
        "mountpoint": mountpoint,
        "settings": (!manifest.settings.is_empty()).then_some(&manifest.settings),
        "layers": state.stack,
        "head": store.paths().layer_tree(manifest.head),
        "store": store.root(),
    }))
}

fn snapshot_json(
    store: &Store,
    state: &ResolvedState,
    entry: &SnapshotRef,
    snapshot: &SnapshotManifest,
) -> Result<Value> {
    let parent = entry.parent.and_then(|id| {
        let found = state.manifest.snapshots.iter().find(|s| s.id == id)?;
        Some(&found.name)
    });
    let (_, measured) = measure::measured(store, entry.layer)?;
    let mark = entry.settling.as_ref();
    Ok(json!({
        "state": Durability::from_settling(mark, &epoch(store)?).name(),
        "sync_error": mark.and_then(|mark| mark.failed.as_deref()),
        "name": entry.name,
        "container": state.manifest.name,
        "id": entry.id,
        "kind": entry.kind,
        "created": entry.created,
        "parent": parent,
        "comment": entry.comment,
        "tags": (!entry.tags.is_empty()).then_some(&entry.tags),
        "protected": entry.protected,
        "size": measured.bytes,
        "files": measured.files,
        "layers": state.stack,
        "settings": (!snapshot.settings.is_empty()).then_some(&snapshot.settings),
        "config": snapshot.config,
        "store": store.root(),
    }))
}

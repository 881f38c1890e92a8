//! `cowl show`

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::{Context, Verb, output, read_state};
use crate::container::durability::epoch;
use crate::container::state::{Mounted, probe};
use crate::error::Result;
use crate::snapshot::ResolvedState;
use crate::store::Store;
use crate::store::manifest::{Durability, SnapshotManifest, SnapshotRef};
use crate::store::measure;
use crate::store::name::Address;

/// Show everything that is known of a container or a snapshot
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, or the snapshot
    #[arg(value_name = "NAME[@SNAP]")]
    address: OsString,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The fields as people want them: what they ask for most comes first.
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

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let address = Address::parse(&self.address)?;
        let (store, state, _reading) = read_state(context, &address)?;
        let (shown, order) = match &state.snapshot {
            Some((known, snapshot)) => (of_snapshot(&store, &state, known, snapshot)?, SNAPSHOT),
            None => (of_container(&store, &state)?, CONTAINER),
        };
        if self.json {
            output::data(&shown)?;
            return Ok(0);
        }
        let rows = order.iter().filter_map(|key| {
            let value = shown
                .get(*key)
                .filter(|value| !value.is_null() && **value != "")?;
            Some(vec![key.replace('_', " "), text(key, value)])
        });
        output::table(&[], rows.collect(), &[])?;
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

fn text(key: &str, value: &Value) -> String {
    match (key, value) {
        ("created", Value::String(time)) => output::local_time(time),
        ("size", Value::Number(bytes)) => output::size(bytes.as_u64().unwrap_or_default()),
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

fn of_container(store: &Store, state: &ResolvedState) -> Result<Value> {
    let manifest = &state.manifest;
    let name_of = |id| {
        manifest
            .snapshots
            .iter()
            .find(|s| s.id == id)
            .map(|s| &s.name)
    };
    let (mark, epoch) = (manifest.settling.as_ref(), epoch(store)?);
    let place = match probe(store, state.container)? {
        Mounted::Alive(run) => Some(output::json_path(run.mountpoint.as_os_str().as_bytes())),
        Mounted::No | Mounted::Dead(_) => None,
    };
    Ok(json!({
        "name": manifest.name,
        "id": state.container,
        "created": manifest.created,
        // Of what it stands on; what was written since is the file system's to keep.
        "state": mark.map(|mark| Durability::from_settling(Some(mark), &epoch).name()),
        "sync_error": mark.and_then(|mark| mark.failed.as_deref()),
        "cloned_from": mark.and_then(|mark| mark.source.as_deref()),
        "made_from": manifest.parent.and_then(name_of),
        "snapshots": manifest.snapshots.len(),
        "next_number": manifest.next_snap,
        "mountpoint": place,
        "settings": (!manifest.settings.is_empty()).then_some(&manifest.settings),
        "layers": state.stack,
        "head": store.paths().layer_tree(manifest.head),
        "store": store.root(),
    }))
}

fn of_snapshot(
    store: &Store,
    state: &ResolvedState,
    known: &SnapshotRef,
    snapshot: &SnapshotManifest,
) -> Result<Value> {
    let parent = known.parent.and_then(|id| {
        let found = state.manifest.snapshots.iter().find(|s| s.id == id)?;
        Some(&found.name)
    });
    let (_, measured) = measure::measured(store, known.layer)?;
    let mark = known.settling.as_ref();
    Ok(json!({
        "state": Durability::from_settling(mark, &epoch(store)?).name(),
        "sync_error": mark.and_then(|mark| mark.failed.as_deref()),
        "name": known.name,
        "container": state.manifest.name,
        "id": known.id,
        "kind": known.kind,
        "created": known.created,
        "parent": parent,
        "comment": known.comment,
        "tags": (!known.tags.is_empty()).then_some(&known.tags),
        "protected": known.protected,
        "size": measured.bytes,
        "files": measured.files,
        "layers": state.stack,
        "settings": (!snapshot.settings.is_empty()).then_some(&snapshot.settings),
        "config": snapshot.config,
        "store": store.root(),
    }))
}

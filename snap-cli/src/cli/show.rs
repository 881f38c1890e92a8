//! The command `cowl show`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Map, Value, json};

use super::{CliCommand, Context, Namespace, output, read_state};
use crate::container::durability::epoch;
use crate::container::state::{Mounted, probe};
use crate::error::Result;
use crate::snapshot::ResolvedState;
use crate::store::Store;
use crate::store::image_record::ImageRecord;
use crate::store::manifest::{Durability, SnapshotManifest, SnapshotRef};
use crate::store::measure;

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
    "image",
    "image_digest",
    "platform",
    "command",
    "environment",
    "user",
    "directory",
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
    "received_config",
    "layers",
    "id",
    "store",
];

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let address = context.address(&self.address)?;
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
    let mut details = json!({
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
    });
    if let (Some(image), Some(object)) = (&manifest.image, details.as_object_mut()) {
        object.extend(image_fields(image));
    }
    Ok(details)
}

/// Returns the fields on the image that a container was created from.
pub(super) fn image_fields(image: &ImageRecord) -> Map<String, Value> {
    let name = image.name.clone();
    let digest = || image.digest.as_ref().map(ToString::to_string);
    let setting = |key: &str| image.config.get(key).filter(|value| !value.is_null());
    let lists = ["Entrypoint", "Cmd"].map(|key| setting(key).and_then(Value::as_array));
    let command: Vec<_> = lists.into_iter().flatten().flatten().collect();
    let fields = [
        ("image", name.or_else(digest).into()),
        ("image_digest", digest().into()),
        ("platform", image.platform.to_string().into()),
        (
            "command",
            (!command.is_empty()).then_some(json!(command)).into(),
        ),
        ("environment", setting("Env").cloned().into()),
        ("user", setting("User").cloned().into()),
        ("directory", setting("WorkingDir").cloned().into()),
    ];
    let named = fields.map(|(key, value): (&str, Value)| (key.to_owned(), value));
    named.into_iter().collect()
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
        "received_config": snapshot.received_config,
        "store": store.root(),
    }))
}

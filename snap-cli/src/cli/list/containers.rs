//! The list of containers.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::super::output;
use super::columns::Template;
use super::{Args, ContainerdScope, OrderWord};
use crate::container::dead;
use crate::container::state::{Mounted, end_reason, probe};
use crate::error::{Error, Result};
use crate::snapshot::select::{Filter, natural_key};
use crate::store::Store;
use crate::store::containerd::ContainerdRecord;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId};
use crate::store::sizes::Sizes;

/// A container in a list.
struct Row {
    manifest: ContainerManifest,
    mounted: Mounted,
    /// The reason why its mount has ended, if its keeper gave it up.
    ended: Option<String>,
    /// The size of its frozen layers; `None` if it cannot be determined.
    size: Option<u64>,
    store: String,
}

pub(super) fn print(
    args: &Args,
    stores: &[Store],
    filter: &Filter,
    template: Option<&Template>,
) -> Result<()> {
    let (mut rows, mut broken) = (Vec::new(), None);
    for store in stores {
        let _reading = store.lock_shared()?;
        for (id, record) in store.containers()? {
            match record {
                Ok(record) if is_in_scope(args, &record.body) && matches(filter, &record.body) => {
                    let (mounted, ended) = match find_mount(store, id) {
                        Ok(found) => found,
                        Err(error) => {
                            output::print_error(&error, output::Format::from_option(args.json));
                            broken = Some(error);
                            (Mounted::No, None)
                        }
                    };
                    if let Mounted::Dead(state) = &mounted {
                        let name = &record.body.name;
                        let died = dead::describe_end(name, state.pid, ended.as_deref());
                        output::print_note(&format!("{died}; {}", dead::commands(name)));
                    }
                    rows.push(Row {
                        mounted,
                        ended,
                        size: size(store, id, &record.body),
                        manifest: record.body,
                        store: output::shown(store.root().as_os_str().as_bytes()),
                    });
                }
                Ok(_) => {}
                Err(error) => {
                    output::print_error(&error, output::Format::from_option(args.json));
                    broken = Some(error);
                }
            }
        }
    }
    sort(&mut rows, args)?;
    show(args, &rows, template)?;
    broken.map_or(Ok(()), Err)
}

/// Returns the state of a container's mount, and why it has ended, if its keeper gave it up.
fn find_mount(store: &Store, id: ContainerId) -> Result<(Mounted, Option<String>)> {
    let mounted = probe(store, id)?;
    let ended = match &mounted {
        Mounted::Dead(state) => end_reason(store, id, state)?,
        Mounted::No | Mounted::Alive(_) => None,
    };
    Ok((mounted, ended))
}

/// Whether a container belongs to containerd if the user has requested these, and does not otherwise.
fn is_in_scope(args: &Args, manifest: &ContainerManifest) -> bool {
    match (args.containerd, manifest.containerd.as_deref()) {
        (None, record) => record.is_none(),
        (Some(_), None) => false,
        (Some(ContainerdScope::Containers), Some(record)) => record.is_open(),
        (Some(ContainerdScope::All), Some(_)) => true,
    }
}

fn matches(filter: &Filter, manifest: &ContainerManifest) -> bool {
    let time = || manifest.created.parse::<jiff::Timestamp>();
    filter
        .since
        .is_none_or(|since| time().is_ok_and(|time| time >= since))
        && filter
            .until
            .is_none_or(|until| time().is_ok_and(|time| time < until))
        && filter
            .pattern
            .as_ref()
            .is_none_or(|pattern| pattern.matches(manifest.name.as_str()))
}

/// Returns the size of a container's frozen layers, each counted once. The list is printed even if it is unknown.
fn size(store: &Store, id: ContainerId, manifest: &ContainerManifest) -> Option<u64> {
    let mut sizes = Sizes::read(store, id);
    let below = manifest.frozen_stack().iter().copied();
    let taken = manifest.snapshots.iter().map(|s| s.layer);
    let layers: BTreeSet<LayerId> = below.chain(taken).collect();
    let mut sum = 0;
    for layer in layers {
        match sizes.measured(layer) {
            Ok((_, measured)) => sum += measured.bytes,
            Err(error) => {
                log::info!("{}: {error}", manifest.name);
                return None;
            }
        }
    }
    sizes.save();
    Some(sum)
}

fn sort(rows: &mut [Row], args: &Args) -> Result<()> {
    match args.sort {
        // Containers of several stores have no common order of creation except by time.
        OrderWord::Taken | OrderWord::Name => {
            rows.sort_by_cached_key(|row| natural_key(row.manifest.name.as_str()));
        }
        OrderWord::Time => {
            rows.sort_by_key(|row| row.manifest.created.parse::<jiff::Timestamp>().ok());
        }
        OrderWord::Size => rows.sort_by_key(|row| Reverse(row.size)),
        OrderWord::Comment => {
            return Err(
                Error::usage("cannot sort containers by comment: they have none")
                    .hint("sort them by name, time or size"),
            );
        }
    }
    if args.reverse {
        rows.reverse();
    }
    Ok(())
}

fn show(args: &Args, rows: &[Row], template: Option<&Template>) -> Result<()> {
    if let Some(template) = template {
        return rows
            .iter()
            .try_for_each(|row| output::print_text(&template.fill(&row.as_json())?));
    }
    if args.json {
        let list: Vec<Value> = rows.iter().map(Row::as_json).collect();
        return output::print_json(&json!({ "containers": list }));
    }
    let cells = rows.iter().map(|row| {
        let mut cells = vec![
            row.manifest.name.to_string(),
            row.manifest.snapshots.len().to_string(),
            row.size.map_or_else(|| "?".to_owned(), output::format_size),
            output::format_local_time(&row.manifest.created),
            match row.state() {
                "dead" => "(dead)".to_owned(),
                _ => row.mountpoint().map_or_else(String::new, output::shown),
            },
        ];
        if let Some(record) = row.manifest.containerd.as_deref() {
            let key = output::shown(record.key.as_bytes());
            cells.splice(1..1, [record.kind.name().to_owned(), key]);
        }
        cells
    });
    let cells = cells.collect();
    match args.containerd {
        Some(_) => {
            let header = [
                "NAME",
                "KIND",
                "KEY",
                "SNAPSHOTS",
                "SIZE",
                "CREATED",
                "MOUNTED AT",
            ];
            output::print_table(args.header(&header), cells, &[3, 4])
        }
        None => {
            let header = ["NAME", "SNAPSHOTS", "SIZE", "CREATED", "MOUNTED AT"];
            output::print_table(args.header(&header), cells, &[1, 2])
        }
    }
}

/// Returns the properties of a snapshot of containerd for `--json`.
fn containerd_json(record: &ContainerdRecord) -> Value {
    let address = record.address();
    json!({
        "key": record.key,
        "namespace": address.map(|(namespace, _)| namespace),
        "id": address.map(|(_, id)| id),
        "kind": record.kind.name(),
        "parent": record.parent,
        "labels": record.labels,
    })
}

impl Row {
    fn mountpoint(&self) -> Option<&[u8]> {
        match &self.mounted {
            Mounted::Alive(state) => Some(state.mountpoint.as_os_str().as_bytes()),
            Mounted::No | Mounted::Dead(_) => None,
        }
    }

    fn state(&self) -> &'static str {
        match &self.mounted {
            Mounted::Alive(_) => "mounted",
            Mounted::Dead(_) => "dead",
            Mounted::No => "not-mounted",
        }
    }

    fn as_json(&self) -> Value {
        let mut value = json!({
            "name": self.manifest.name,
            "created": self.manifest.created,
            "snapshots": self.manifest.snapshots.len(),
            "layers": self.manifest.stack.len(),
            "size": self.size,
            "mountpoint": self.mountpoint().map(output::json_path),
            "state": self.state(),
            "ended": self.ended,
            "store": self.store,
        });
        if let (Some(record), Some(fields)) =
            (self.manifest.containerd.as_deref(), value.as_object_mut())
        {
            fields.insert("containerd".to_owned(), containerd_json(record));
        }
        value
    }
}

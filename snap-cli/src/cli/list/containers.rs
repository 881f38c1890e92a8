//! The list of containers.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::super::output;
use super::columns::Template;
use super::{Args, OrderWord};
use crate::container::state::{Mounted, probe};
use crate::error::{Error, Result};
use crate::snapshot::select::{Filter, natural_key};
use crate::store::Store;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId};
use crate::store::sizes::Sizes;

/// A container in a list.
struct Row {
    manifest: ContainerManifest,
    mounted: Mounted,
    /// What its layers take; `None` where that can't be told.
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
                Ok(record) if takes(filter, &record.body) => rows.push(Row {
                    mounted: probe(store, id).unwrap_or_else(|error| {
                        output::complain(&error, args.json);
                        broken = Some(error);
                        Mounted::No
                    }),
                    size: size(store, id, &record.body),
                    manifest: record.body,
                    store: output::shown(store.root().as_os_str().as_bytes()),
                }),
                Ok(_) => {}
                Err(error) => {
                    output::complain(&error, args.json);
                    broken = Some(error);
                }
            }
        }
    }
    sort(&mut rows, args)?;
    show(args, &rows, template)?;
    broken.map_or(Ok(()), Err)
}

fn takes(filter: &Filter, manifest: &ContainerManifest) -> bool {
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

/// What the frozen layers of a container take, each once. A list is no place to fail for want of it.
fn size(store: &Store, id: ContainerId, manifest: &ContainerManifest) -> Option<u64> {
    let mut sizes = Sizes::read(store, id);
    let below = manifest.below_head().iter().copied();
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
        // By name, since containers come from several stores.
        OrderWord::Taken | OrderWord::Name => {
            rows.sort_by_cached_key(|row| natural_key(row.manifest.name.as_str()));
        }
        OrderWord::Time => rows.sort_by_key(|row| row.manifest.created.clone()),
        OrderWord::Size => rows.sort_by_key(|row| Reverse(row.size)),
        OrderWord::Comment => {
            return Err(Error::usage("containers have no remark to sort by")
                .hint("sort them by name, time or size"));
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
            .try_for_each(|row| output::text(&template.fill(&row.as_json())?));
    }
    if args.json {
        let list: Vec<Value> = rows.iter().map(Row::as_json).collect();
        return output::data(&json!({ "containers": list }));
    }
    let cells = rows.iter().map(|row| {
        vec![
            row.manifest.name.to_string(),
            row.manifest.snapshots.len().to_string(),
            row.size.map_or_else(|| "?".to_owned(), output::size),
            output::local_time(&row.manifest.created),
            row.place().map_or_else(String::new, output::shown),
        ]
    });
    let heads = ["NAME", "SNAPSHOTS", "SIZE", "CREATED", "MOUNTED AT"];
    output::table(args.heads(&heads), cells.collect(), &[1, 2])
}

impl Row {
    fn place(&self) -> Option<&[u8]> {
        match &self.mounted {
            Mounted::Alive(state) => Some(state.mountpoint.as_os_str().as_bytes()),
            Mounted::No | Mounted::Dead(_) => None,
        }
    }

    fn as_json(&self) -> Value {
        json!({
            "name": self.manifest.name,
            "created": self.manifest.created,
            "snapshots": self.manifest.snapshots.len(),
            "layers": self.manifest.stack.len(),
            "size": self.size,
            "mountpoint": self.place().map(output::json_path),
            "store": self.store,
        })
    }
}

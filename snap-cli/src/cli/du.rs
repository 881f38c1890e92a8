//! The command `cowl du`.

use std::ffi::OsString;

use serde_json::{Value, json};

use super::rm::{describe_freed, space_json};
use super::table::Style;
use super::{CliCommand, Context, Namespace, output};
use crate::error::Result;
use crate::recover;
use crate::snapshot::du::{self, ContainerSpace};
use crate::snapshot::remove;
use crate::store::Store;
use crate::store::name::{ContainerName, SnapshotChoice};
use crate::store::usage::{References, Space};

/// Show the disk usage of containers, or of the states of one
///
/// UNIQUE is space that nothing else uses; it is freed when the container or snapshot is removed. SHARED
/// is space that others use as well. Both are given in bytes and in inodes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Show only this container, state by state
    name: Option<OsString>,
    /// Show how much space removing these snapshots together would free
    #[arg(long, value_name = "SNAP|A..B", num_args = 1.., requires = "name")]
    remove: Vec<OsString>,
    #[command(flatten)]
    style: Style,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        match &self.name {
            None => return self.all(context),
            Some(name) => {
                let name = context.container(name)?;
                let store = context.store_for(&name)?;
                match self.remove.is_empty() {
                    true => self.one(&store, &name)?,
                    false => self.removal(&store, &name)?,
                }
            }
        }
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

impl Args {
    fn all(&self, context: &Context) -> Result<u8> {
        let (mut broken, mut rows) = (None, Vec::new());
        let mut list = Vec::new();
        for store in context.stores()? {
            let _reading = store.lock_shared()?;
            let references = self.references(&store)?;
            for (id, record) in store.containers()? {
                let counted = record.and_then(|record| {
                    let manifest = record.body;
                    let space = du::measure_container(&store, id, &manifest, &references)?;
                    Ok((manifest, space))
                });
                let (manifest, space) = match counted {
                    Ok(counted) => counted,
                    // The other containers are shown even if one cannot be measured.
                    Err(error) => {
                        output::print_error(&error, output::Format::from_option(self.json));
                        broken = Some(error);
                        continue;
                    }
                };
                list.push(json!({
                    "name": manifest.name,
                    "snapshots": manifest.snapshots.len(),
                    "unique": space_json(space.unique),
                    "total": space_json(space.total),
                }));
                let name = manifest.name.to_string();
                let shared = subtract(space.total, space.unique);
                rows.push(row(name, space.unique, shared));
            }
        }
        self.print("CONTAINER", rows, &json!({ "containers": list }))?;
        broken.map_or(Ok(0), Err)
    }

    /// Returns the references to each layer, from all manifests that can be read.
    fn references(&self, store: &Store) -> Result<References> {
        let (references, unread) = References::from_readable(store)?;
        for error in unread {
            log::warn!("{error}; layers that only this container shares count as unique");
        }
        Ok(references)
    }

    fn one(&self, store: &Store, name: &ContainerName) -> Result<()> {
        let container = recover::open(store, name)?;
        let (id, manifest) = (container.id(), container.manifest().clone());
        drop(container);
        let _reading = store.lock_shared()?;
        let references = self.references(store)?;
        let found = du::measure_container(store, id, &manifest, &references)?;
        let mut rows = Vec::new();
        for state in &found.states {
            let name = match &state.snapshot {
                Some(name) => name.to_string(),
                None => "(now)".to_owned(),
            };
            rows.push(row(name, state.unique, state.shared));
        }
        let shared = subtract(found.total, found.unique);
        rows.push(row("(all)".to_owned(), found.unique, shared));
        self.print("STATE", rows, &one_json(name, &found))
    }

    fn removal(&self, store: &Store, name: &ContainerName) -> Result<()> {
        let choice = self.remove.iter().map(SnapshotChoice::parse);
        let choice = choice.collect::<Result<Vec<_>>>()?;
        let container = recover::open(store, name)?;
        let going = remove::select_snapshots(container.manifest(), &choice)?;
        let _reading = store.lock_shared()?;
        let mut stacks = Vec::new();
        for snapshot in &going {
            stacks.push(store.snapshot(container.id(), snapshot.id)?.stack);
        }
        let space = remove::measure_freed(store, container.id(), &stacks)?;
        if self.json {
            let names: Vec<_> = going.iter().map(|snapshot| &snapshot.name).collect();
            let freed = space_json(space);
            return output::print_json(
                &json!({ "name": name, "snapshots": names, "freed": freed }),
            );
        }
        let count = match going.len() {
            1 => "removing 1 snapshot".to_owned(),
            count => format!("removing {count} snapshots"),
        };
        output::print_line(&format!("{count} {}", describe_freed(space)))
    }

    fn print(&self, first_column: &str, rows: Vec<Vec<String>>, value: &Value) -> Result<()> {
        if self.json {
            return output::print_json(value);
        }
        let header = [first_column, "UNIQUE", "INODES", "SHARED", "INODES"];
        self.style.print(&header, rows, &[1, 2, 3, 4])
    }
}

fn row(name: String, unique: Space, shared: Space) -> Vec<String> {
    vec![
        name,
        output::format_size(unique.bytes),
        unique.inodes.to_string(),
        output::format_size(shared.bytes),
        shared.inodes.to_string(),
    ]
}

fn subtract(all: Space, part: Space) -> Space {
    Space {
        bytes: all.bytes.saturating_sub(part.bytes),
        inodes: all.inodes.saturating_sub(part.inodes),
        layers: all.layers.saturating_sub(part.layers),
    }
}

fn one_json(name: &ContainerName, found: &ContainerSpace) -> Value {
    let states: Vec<_> = found
        .states
        .iter()
        .map(|state| {
            json!({
                "snapshot": state.snapshot,
                "unique": space_json(state.unique),
                "shared": space_json(state.shared),
            })
        })
        .collect();
    json!({
        "name": name,
        "states": states,
        "base": space_json(found.base),
        "unique": space_json(found.unique),
        "total": space_json(found.total),
    })
}

//! `cowl list`

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{Context, Verb, output};
use crate::container::Container;
use crate::container::state::{Mounted, look};
use crate::error::Result;
use crate::snapshot::list::snapshots;
use crate::store::Store;
use crate::store::manifest::ContainerManifest;
use crate::store::name::ContainerName;

/// List the containers, or the snapshots of one, oldest first
///
/// The size of a snapshot is what was written to the disk since the one before it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container whose snapshots to list
    name: Option<OsString>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        match &self.name {
            Some(name) => {
                let name = ContainerName::parse(name)?;
                self.one(&context.store_of(&name)?, &name)?;
            }
            None => self.all(&context.stores()?)?,
        }
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn all(&self, stores: &[Store]) -> Result<()> {
        let mut found = Vec::new();
        let mut broken = None;
        for store in stores {
            for (id, record) in store.containers()? {
                match record {
                    Ok(record) => found.push((record.body, look(store, id)?)),
                    Err(error) => {
                        output::complain(&error, self.json);
                        broken = Some(error);
                    }
                }
            }
        }
        self.print_all(found)?;
        broken.map_or(Ok(()), Err)
    }

    fn print_all(&self, found: Vec<(ContainerManifest, Mounted)>) -> Result<()> {
        if self.json {
            let list: Vec<Value> = found
                .iter()
                .map(|(m, mounted)| all_json(m, mounted))
                .collect();
            return output::data(&json!({ "containers": list }));
        }
        let rows = found
            .into_iter()
            .map(|(manifest, mounted)| {
                let place = place(&mounted).map_or_else(String::new, output::shown);
                vec![
                    manifest.name.to_string(),
                    manifest.snapshots.len().to_string(),
                    output::local_time(&manifest.created),
                    place,
                ]
            })
            .collect();
        output::table(&["NAME", "SNAPSHOTS", "CREATED", "MOUNTED AT"], rows, &[1])
    }

    fn one(&self, store: &Store, name: &ContainerName) -> Result<()> {
        let (id, manifest) = {
            // Locked for a moment: what a killed command left is put in order first.
            let container = Container::open(store, name)?;
            (container.id(), container.manifest().clone())
        };
        let _reading = store.share()?;
        let entries = snapshots(store, &manifest)?;
        if self.json {
            let list: Vec<Value> = entries
                .iter()
                .map(|entry| {
                    json!({
                        "name": entry.snapshot.name,
                        "id": entry.snapshot.id,
                        "kind": entry.snapshot.kind,
                        "created": entry.snapshot.created,
                        "size": entry.bytes,
                        "comment": entry.snapshot.comment,
                        "parent": entry.parent,
                        "tags": entry.snapshot.tags,
                        "protected": entry.snapshot.protected,
                    })
                })
                .collect();
            return output::data(&json!({ "name": manifest.name, "id": id, "snapshots": list }));
        }
        let rows = entries
            .into_iter()
            .map(|entry| {
                vec![
                    entry.snapshot.name.to_string(),
                    output::local_time(&entry.snapshot.created),
                    output::size(entry.bytes),
                    entry.parent.unwrap_or_default(),
                    output::shown(entry.snapshot.comment.as_bytes()),
                ]
            })
            .collect();
        output::table(&["NAME", "TIME", "SIZE", "AFTER", "COMMENT"], rows, &[2])
    }
}

fn all_json(manifest: &ContainerManifest, mounted: &Mounted) -> Value {
    json!({
        "name": manifest.name,
        "created": manifest.created,
        "snapshots": manifest.snapshots.len(),
        "layers": manifest.stack.len(),
        "mountpoint": place(mounted).map(output::json_path),
    })
}

fn place(mounted: &Mounted) -> Option<&[u8]> {
    use std::os::unix::ffi::OsStrExt;
    match mounted {
        Mounted::Alive(state) => Some(state.mountpoint.as_os_str().as_bytes()),
        Mounted::No | Mounted::Dead(_) => None,
    }
}

//! `cowl list`

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{Context, output};
use crate::container::Container;
use crate::container::state::{Mounted, look};
use crate::error::{Kind, Result};
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
    pub(super) json: bool,
}

impl Args {
    pub(super) fn run(&self, context: &Context) -> Result<()> {
        match &self.name {
            Some(name) => self.one(&context.store()?, &ContainerName::parse(name)?),
            None => match context.store() {
                Ok(store) => self.all(&store),
                Err(error) if error.kind == Kind::NotFound => {
                    output::note(&error.to_string());
                    self.print_all(Vec::new())
                }
                Err(error) => Err(error),
            },
        }
    }

    fn all(&self, store: &Store) -> Result<()> {
        let mut found = Vec::new();
        let mut broken = None;
        for (id, record) in store.containers()? {
            match record {
                Ok(record) => found.push((record.body, look(store, id)?)),
                Err(error) => {
                    output::complain(&error, self.json);
                    broken = Some(error);
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
        let entries = snapshots(store, id, &manifest)?;
        if self.json {
            let list: Vec<Value> = entries
                .iter()
                .map(|entry| {
                    json!({
                        "name": entry.name,
                        "id": entry.id,
                        "kind": entry.kind,
                        "created": entry.created,
                        "size": entry.bytes,
                        "comment": entry.comment,
                        "parent": entry.parent,
                    })
                })
                .collect();
            return output::data(&json!({ "name": manifest.name, "id": id, "snapshots": list }));
        }
        let rows = entries
            .into_iter()
            .map(|entry| {
                vec![
                    entry.name,
                    output::local_time(&entry.created),
                    output::size(entry.bytes),
                    entry.parent.unwrap_or_default(),
                    output::shown(entry.comment.as_bytes()),
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

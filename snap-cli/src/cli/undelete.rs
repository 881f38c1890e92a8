//! The command `cowl undelete`.

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{CliCommand, Context, output};
use crate::error::{Error, Result};
use crate::lifecycle::undelete::undelete;
use crate::store::Store;
use crate::store::deleted;
use crate::store::deleted::Deleted;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::{ContainerName, nearest};

/// Recover a destroyed container with all its snapshots
///
/// Of several containers with the same name, the one destroyed last is recovered; use an id from `--list`
/// to select another one.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container's name, or its id
    #[arg(required_unless_present = "list", conflicts_with = "list")]
    name: Option<OsString>,
    /// A new name, if another container has the old one
    #[arg(value_name = "NEW")]
    new: Option<OsString>,
    /// List the containers that can be recovered
    #[arg(long, short)]
    list: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A destroyed container with its store, and its manifest if that can be read.
type Candidate = (std::rc::Rc<Store>, Deleted, Result<ContainerManifest>);

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let mut candidates = Vec::new();
        for store in context.stores()? {
            let store = std::rc::Rc::new(store);
            for deleted in deleted::list(&store)? {
                let manifest = deleted::manifest(&store, &deleted).map(|record| record.body);
                candidates.push((store.clone(), deleted, manifest));
            }
        }
        let Some(name) = &self.name else {
            self.print(&candidates)?;
            return Ok(0);
        };
        let new = self.new.as_ref().map(ContainerName::parse).transpose()?;
        let id = name.to_str().and_then(ContainerId::parse);
        let wanted = match id {
            Some(_) => None,
            None => Some(ContainerName::parse(name)?),
        };
        let is_wanted = |(_, deleted, manifest): &&Candidate| match &wanted {
            None => Some(deleted.id) == id,
            Some(wanted) => manifest.as_ref().is_ok_and(|m| m.name == *wanted),
        };
        let Some((store, deleted, manifest)) = candidates.iter().rfind(is_wanted) else {
            let names = candidates.iter().filter_map(|(_, _, m)| m.as_ref().ok());
            let near = wanted
                .as_ref()
                .and_then(|wanted| nearest(wanted.as_str(), names.map(|m| m.name.as_str())));
            let shown = output::shown(name.as_encoded_bytes());
            return Err(
                Error::not_found(format!("there is no container {shown} in the trash")).hint(
                    match near {
                        Some(near) => format!("did you mean {near}?"),
                        None => "list the trash: cowl undelete --list".to_owned(),
                    },
                ),
            );
        };
        undelete(store, deleted, new.as_ref())?;
        let name = match (&new, manifest) {
            (Some(new), _) => new.to_string(),
            (None, Ok(manifest)) => manifest.name.to_string(),
            (None, Err(_)) => String::new(),
        };
        output::print_note(&format!("recovered {name}"));
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn print(&self, candidates: &[Candidate]) -> Result<()> {
        if self.json {
            let list: Vec<Value> = candidates
                .iter()
                .map(|(_, deleted, manifest)| {
                    json!({
                        "id": deleted.id,
                        "name": manifest.as_ref().ok().map(|m| &m.name),
                        "snapshots": manifest.as_ref().ok().map(|m| m.snapshots.len()),
                        "destroyed": output::format_utc(deleted.since),
                        "until": output::format_utc(deleted.until),
                    })
                })
                .collect();
            return output::print_json(&json!({ "containers": list }));
        }
        let mut rows = Vec::new();
        for (_, deleted, manifest) in candidates {
            let (name, snapshots) = match manifest {
                Ok(manifest) => (
                    manifest.name.to_string(),
                    manifest.snapshots.len().to_string(),
                ),
                Err(error) => {
                    output::print_error(error, output::Format::Text);
                    ("?".to_owned(), "?".to_owned())
                }
            };
            rows.push(vec![
                name,
                snapshots,
                output::format_local_second(deleted.since),
                output::format_local_second(deleted.until),
                deleted.id.to_string(),
            ]);
        }
        output::print_table(
            &["NAME", "SNAPSHOTS", "DESTROYED", "KEPT UNTIL", "ID"],
            rows,
            &[1],
        )
    }
}

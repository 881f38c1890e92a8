//! `cowl undelete`

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{Context, Verb, output};
use crate::error::{Error, Result};
use crate::lifecycle::undelete::undelete;
use crate::store::Store;
use crate::store::deleted;
use crate::store::deleted::Deleted;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::{ContainerName, nearest};

/// Bring a destroyed container back, with all its snapshots
///
/// Of several with the same name, the one that was destroyed last; an id from `--list` names another.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The name that it had, or its id
    #[arg(required_unless_present = "list", conflicts_with = "list")]
    name: Option<OsString>,
    /// Another name for it, when that one is taken
    #[arg(value_name = "NEW")]
    new: Option<OsString>,
    /// Show what can be brought back
    #[arg(long, short)]
    list: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A destroyed container with its store and what its manifest says.
type Gone = (std::rc::Rc<Store>, Deleted, Result<ContainerManifest>);

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let mut gone = Vec::new();
        for store in context.stores()? {
            let store = std::rc::Rc::new(store);
            for deleted in deleted::list(&store)? {
                let manifest = deleted::manifest(&store, &deleted).map(|record| record.body);
                gone.push((store.clone(), deleted, manifest));
            }
        }
        let Some(name) = &self.name else {
            self.print(&gone)?;
            return Ok(0);
        };
        let new = self.new.as_ref().map(ContainerName::parse).transpose()?;
        let id = name.to_str().and_then(ContainerId::parse);
        let wanted = match id {
            Some(_) => None,
            None => Some(ContainerName::parse(name)?),
        };
        let is_it = |(_, deleted, manifest): &&Gone| match &wanted {
            None => Some(deleted.id) == id,
            Some(wanted) => manifest.as_ref().is_ok_and(|m| m.name == *wanted),
        };
        let Some((store, deleted, manifest)) = gone.iter().rfind(is_it) else {
            let known = gone.iter().filter_map(|(_, _, m)| m.as_ref().ok());
            let near = wanted
                .as_ref()
                .and_then(|wanted| nearest(wanted.as_str(), known.map(|m| m.name.as_str())));
            let shown = output::shown(name.as_encoded_bytes());
            return Err(
                Error::not_found(format!("no {shown} is in the trash")).hint(match near {
                    Some(near) => format!("did you mean {near}?"),
                    None => "`cowl undelete --list` shows what is".to_owned(),
                }),
            );
        };
        undelete(store, deleted, new.as_ref())?;
        let now = match (&new, manifest) {
            (Some(new), _) => new.to_string(),
            (None, Ok(manifest)) => manifest.name.to_string(),
            (None, Err(_)) => String::new(),
        };
        output::note(&format!("{now} is back"));
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn print(&self, gone: &[Gone]) -> Result<()> {
        if self.json {
            let list: Vec<Value> = gone
                .iter()
                .map(|(_, deleted, manifest)| {
                    json!({
                        "id": deleted.id,
                        "name": manifest.as_ref().ok().map(|m| &m.name),
                        "snapshots": manifest.as_ref().ok().map(|m| m.snapshots.len()),
                        "destroyed": output::utc_second(deleted.since),
                        "until": output::utc_second(deleted.until),
                    })
                })
                .collect();
            return output::data(&json!({ "containers": list }));
        }
        let mut rows = Vec::new();
        for (_, deleted, manifest) in gone {
            let (name, snapshots) = match manifest {
                Ok(manifest) => (
                    manifest.name.to_string(),
                    manifest.snapshots.len().to_string(),
                ),
                Err(error) => {
                    output::complain(error, false);
                    ("?".to_owned(), "?".to_owned())
                }
            };
            rows.push(vec![
                name,
                snapshots,
                output::local_second(deleted.since),
                output::local_second(deleted.until),
                deleted.id.to_string(),
            ]);
        }
        output::table(
            &["NAME", "SNAPSHOTS", "DESTROYED", "KEPT UNTIL", "ID"],
            rows,
            &[1],
        )
    }
}

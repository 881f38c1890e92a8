//! `cowl diff`

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{Context, output};
use crate::container::Container;
use crate::delta::{Change, diff};
use crate::error::Result;
use crate::snapshot::resolve;
use crate::store::name::Address;

/// Show what differs between two states, path by path
///
/// A: added, M: modified, D: deleted, T: became something of another type, R: renamed. With one
/// state: what was changed in it since the snapshot that it was made from, or since the container
/// began.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The state to look at; with a second one, the older of the two
    #[arg(value_name = "NAME[@SNAP]")]
    from: OsString,
    /// The state to compare it with
    #[arg(value_name = "NAME[@SNAP]")]
    to: Option<OsString>,
    /// Print JSON; a path that is not UTF-8 is an array of bytes
    #[arg(long)]
    pub(super) json: bool,
}

impl Args {
    pub(super) fn run(&self, context: &Context) -> Result<()> {
        let from = Address::parse(&self.from)?;
        let to = self.to.as_ref().map(Address::parse).transpose()?;
        let store = context.store()?;
        for address in std::iter::once(&from).chain(&to) {
            // Puts in order what a killed command or a dead daemon left.
            drop(Container::open(&store, &address.container)?);
        }
        let _reading = store.share()?;
        let from = resolve(&store, &from)?;
        from.flush(&store)?;
        let (old, new) = match &to {
            Some(to) => {
                let to = resolve(&store, to)?;
                to.flush(&store)?;
                (from.stack, to.stack)
            }
            None => (from.parent_stack(&store)?, from.stack),
        };
        let changes = diff(&store.view(&old)?, &store.view(&new)?)?;
        if self.json {
            let list: Vec<Value> = changes.iter().map(as_json).collect();
            return output::data(&json!({ "changes": list }));
        }
        changes
            .iter()
            .try_for_each(|change| output::line(text(change).as_bytes()))
    }
}

fn as_json(change: &Change) -> Value {
    let mut value = json!({
        "status": change.status.letter().to_string(),
        "path": output::json_path(&change.path),
    });
    if let (Some(from), Some(object)) = (&change.from, value.as_object_mut()) {
        object.insert("from".to_owned(), output::json_path(from));
    }
    value
}

fn text(change: &Change) -> String {
    let letter = change.status.letter();
    // The root itself has the empty path.
    let path = format!("/{}", output::shown(&change.path));
    match &change.from {
        Some(from) => format!("{letter} /{} -> {path}", output::shown(from)),
        None => format!("{letter} {path}"),
    }
}

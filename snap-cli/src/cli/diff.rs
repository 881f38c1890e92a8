//! `cowl diff`

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{Context, Verb, output, read_state};
use crate::delta::{Change, diff};
use crate::error::Result;
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
    json: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let from = Address::parse(&self.from)?;
        let to = self.to.as_ref().map(Address::parse).transpose()?;
        let (store, from, _reading) = read_state(context, &from)?;
        let (old, new, _other) = match &to {
            Some(to) => {
                let (other, to, reading) = read_state(context, to)?;
                (
                    store.view(&from.stack)?,
                    other.view(&to.stack)?,
                    Some(reading),
                )
            }
            None => {
                let parent = from.parent_stack(&store)?;
                (store.view(&parent)?, store.view(&from.stack)?, None)
            }
        };
        let changes = diff(&old, &new)?;
        if self.json {
            let list: Vec<Value> = changes.iter().map(as_json).collect();
            output::data(&json!({ "changes": list }))?;
            return Ok(0);
        }
        changes
            .iter()
            .try_for_each(|change| output::line(text(change).as_bytes()))?;
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
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

//! `cowl gc`

use serde_json::{Value, json};

use super::rm::space_json;
use super::{Context, Verb, output};
use crate::container::durability::make_all_durable;
use crate::error::{Error, Result};
use crate::store::collect;
use crate::store::family;
use crate::store::leftovers::{self, Expiry, Leftovers};
use crate::store::measure;
use crate::store::{Store, usage::Space};
use cowl_layers::shown::Show as _;

/// Remove what nothing needs any more
///
/// Commands do this by themselves. Here it waits for others that are at work, and says what it did.
/// What a mount still holds stays until it is unmounted. Also frees the space of destroyed containers
/// whose time is over (`cowl undelete --list` shows them).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Destroyed containers go for good now, whatever their time
    #[arg(long)]
    empty_trash: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is done in one store.
struct Found {
    left: Leftovers,
    space: Space,
}

impl Verb for Args {
    fn frees(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let mut list = Vec::new();
        let mut broken = None;
        // As they are: others clean up when they open a store.
        for store in family::stores(&context.root, &context.session)? {
            match self.one(&store) {
                Ok(found) => list.push(self.tell(&store, &found)),
                Err(error) => {
                    output::complain(&error, self.json);
                    broken = Some(error);
                }
            }
        }
        if self.json {
            output::data(&json!({ "stores": list, "dry_run": self.dry_run }))?;
        }
        broken.map_or(Ok(0), Err)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn one(&self, store: &Store) -> Result<Found> {
        if !self.dry_run
            && let Err(error) = make_all_durable(store, None)
        {
            log::warn!("snapshots stay settling: {error}");
        }
        let alone = store.lock_exclusive()?;
        let expiry = match self.empty_trash {
            true => Expiry::Ignored,
            false => Expiry::Respected,
        };
        let left = leftovers::find(store, expiry).map_err(|error| {
            if !self.dry_run {
                collect::empty_trash_only(store, &error);
            }
            let hint = "nothing is collected while a file of the store can't be read: \
                        `cowl check` tells more";
            Error {
                hint: error.hint.or_else(|| Some(hint.to_owned())),
                ..error
            }
        })?;
        let space = measure::total_space(store, &left.layers);
        if !self.dry_run {
            collect::remove_leftovers(store, alone, &left)?;
        }
        Ok(Found { left, space })
    }

    fn tell(&self, store: &Store, found: &Found) -> Value {
        let Found { left, space } = found;
        if !self.json {
            let would = if self.dry_run { "would free" } else { "freed" };
            let said = match (left.is_empty(), self.dry_run) {
                (true, _) => "nothing to remove".to_owned(),
                (false, _) => format!(
                    "{would} {} in {} inodes: {} layers, {} containers, {} files",
                    output::size(space.bytes),
                    space.inodes,
                    left.layers.len(),
                    left.expired.len() + left.unfinished.len(),
                    left.files.len() + left.dirs.len() + left.locks.len() + left.trash.len(),
                ),
            };
            output::note(&format!("{}: {said}", store.root().shown()));
            if !left.held.is_empty() {
                output::note(&format!(
                    "{} more layers go once they are not mounted any more",
                    left.held.len()
                ));
            }
        }
        json!({
            "store": output::json_path(store.root().as_os_str().as_encoded_bytes()),
            "freed": space_json(*space),
            "containers": left.expired.len() + left.unfinished.len(),
            "files": left.files.len() + left.dirs.len() + left.locks.len() + left.trash.len(),
            "held_layers": left.held.len(),
        })
    }
}

//! The command `cowl gc`.

use serde_json::{Value, json};

use super::rm::space_json;
use super::{CliCommand, Context, output};
use crate::container::durability::make_all_durable;
use crate::error::{Error, Result};
use crate::store::collect;
use crate::store::family;
use crate::store::leftovers::{self, Expiry, Leftovers, Retention};
use crate::store::measure;
use crate::store::received;
use crate::store::transfers;
use crate::store::{Store, usage::Space};
use cowl_layers::shown::Show as _;

/// Collect garbage: remove layers and files that nothing refers to
///
/// Other commands do this automatically; this one waits for running commands and reports what it
/// removed. Layers that a mount or a transfer uses remain until it ends. Also frees the space of destroyed
/// containers whose time in the trash has expired (`cowl undelete --list` shows them). What an interrupted
/// `cowl receive` has stored remains for 7 days, and an interrupted download for a day, for the next attempt.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Remove all destroyed containers permanently, even before their time in the trash has expired
    #[arg(long)]
    empty_trash: bool,
    /// Remove what interrupted transfers have received, with which the next attempt would continue
    #[arg(long)]
    empty_transfers: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The garbage of one store, and the space that it takes.
struct Garbage {
    left: Leftovers,
    space: Space,
    /// The number of layers of interrupted transfers that are retained.
    waiting: usize,
}

impl CliCommand for Args {
    fn frees_space(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let mut list = Vec::new();
        let mut broken = None;
        // Opened without the cleanup of other commands, so that all garbage is reported here.
        for store in family::stores(&context.root, &context.session)? {
            match self.collect(&store) {
                Ok(garbage) => list.push(self.report(&store, &garbage)),
                Err(error) => {
                    output::print_error(&error, output::Format::from_option(self.json));
                    broken = Some(error);
                }
            }
        }
        if self.json {
            output::print_json(&json!({ "stores": list, "dry_run": self.dry_run }))?;
        }
        broken.map_or(Ok(0), Err)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn collect(&self, store: &Store) -> Result<Garbage> {
        if !self.dry_run
            && let Err(error) = make_all_durable(store, None)
        {
            log::warn!("cannot sync settling snapshots: {error}");
        }
        let alone = store.lock_exclusive()?;
        let expiry = |is_ignored| match is_ignored {
            true => Expiry::Ignored,
            false => Expiry::Respected,
        };
        let retention = Retention {
            trash: expiry(self.empty_trash),
            transfers: expiry(self.empty_transfers),
        };
        let left = leftovers::find(store, retention).map_err(|error| {
            if !self.dry_run {
                collect::empty_trash_only(store, &error);
            }
            let hint = "nothing is collected while a file of the store cannot be read; \
                        inspect the store: cowl check";
            Error {
                hint: error.hint.or_else(|| Some(hint.to_owned())),
                ..error
            }
        })?;
        let mut space = measure::total_space(store, &left.layers);
        let (bytes, inodes) = transfers::size(&left.transfers);
        space.bytes += bytes;
        space.inodes += inodes;
        if !self.dry_run {
            collect::remove_leftovers(store, alone, &left)?;
        }
        let waiting = match retention.transfers {
            Expiry::Respected => received::list(store)?,
            Expiry::Ignored => Vec::new(),
        };
        let waiting = waiting.iter().filter(|layer| !layer.is_expired()).count();
        Ok(Garbage {
            left,
            space,
            waiting,
        })
    }

    /// Prints a note unless `--json` is given, and returns the report for JSON.
    fn report(&self, store: &Store, garbage: &Garbage) -> Value {
        let Garbage {
            left,
            space,
            waiting,
        } = garbage;
        if !self.json {
            let verb = if self.dry_run { "would free" } else { "freed" };
            let summary = match left.is_empty() {
                true => "nothing to remove".to_owned(),
                false => format!(
                    "{verb} {} in {}: {}, {}, {}",
                    output::format_size(space.bytes),
                    output::counted(usize::try_from(space.inodes).unwrap_or(usize::MAX), "inode"),
                    output::counted(left.layers.len(), "layer"),
                    output::counted(left.expired.len() + left.unfinished.len(), "container"),
                    output::counted(other_count(left), "file"),
                ),
            };
            output::print_note(&format!("{}: {summary}", store.root().shown()));
            if !left.held.is_empty() {
                let verb = if left.held.len() == 1 { "is" } else { "are" };
                output::print_note(&format!(
                    "{} {verb} still used by mounts or transfers",
                    output::counted(left.held.len(), "other layer")
                ));
            }
            if *waiting > 0 {
                output::print_note(&format!(
                    "{} of interrupted transfers: retained for up to {} days; --empty-transfers removes them",
                    output::counted(*waiting, "layer"),
                    received::RETENTION_DAYS
                ));
            }
        }
        json!({
            "store": output::json_path(store.root().as_os_str().as_encoded_bytes()),
            "freed": space_json(*space),
            "containers": left.expired.len() + left.unfinished.len(),
            "files": other_count(left),
            "held_layers": left.held.len(),
            "received_layers": waiting,
        })
    }
}

/// Returns the number of leftovers that are neither layers nor containers.
fn other_count(left: &Leftovers) -> usize {
    let parts = [
        &left.files,
        &left.dirs,
        &left.transfers,
        &left.locks,
        &left.trash,
    ];
    parts.into_iter().map(Vec::len).sum()
}

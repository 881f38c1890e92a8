//! The command `cowl rm`.

use std::ffi::{OsStr, OsString};

use serde_json::{Value, json};

use super::{CliCommand, Context, RunMode, confirm, output};
use crate::container::Container;
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::recover;
use crate::snapshot::remove::{Protected, Removal, plan, remove, select_snapshots};
use crate::store::Store;
use crate::store::name::{ContainerName, SnapshotChoice};
use crate::store::usage::Space;

/// Remove snapshots
///
/// `cowl rm web snap1 snap4..snap6`, or `cowl rm web@snap1 web@snap4`. A range includes both ends and
/// all snapshots between them in the list. The container's current state and its other snapshots do
/// not change. If one of the snapshots cannot be removed (it is protected or mounted), none is.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container and its snapshots, or addresses
    #[arg(value_name = "NAME SNAP|NAME@SNAP", required = true)]
    targets: Vec<OsString>,
    /// Remove all snapshots of the container; asks for confirmation
    #[arg(long)]
    all: bool,
    /// Skip snapshots that cannot be removed, and remove the others
    #[arg(long)]
    skip_refused: bool,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn frees_space(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let (name, choice) = self.parse(context)?;
        let store = context.store_for(&name)?;
        let open_and_plan = || -> Result<(Container<'_>, Removal)> {
            let container = recover::open(&store, &name)?;
            let manifest = container.manifest();
            let found = match self.all {
                true => manifest.snapshots.iter().collect(),
                false => select_snapshots(manifest, &choice)?,
            };
            let ids: Vec<_> = found.iter().map(|snapshot| snapshot.id).collect();
            let removal = plan(&container, &ids, Protected::Refuse)?;
            Ok((container, removal))
        };
        let (mut container, mut removal) = open_and_plan()?;
        self.check_refused(&removal)?;
        if self.all && !self.yes && !self.dry_run && !removal.going.is_empty() {
            // The container is not locked here: other commands must not wait for an answer at a terminal.
            drop(container);
            confirm(&format!("{}?", summarize("Remove", &removal)))?;
            (container, removal) = open_and_plan()?;
            self.check_refused(&removal)?;
        }
        if !self.json {
            let verb = if self.dry_run {
                "would remove"
            } else {
                "removing"
            };
            output::print_note(&summarize(verb, &removal));
        }
        if !self.dry_run && !removal.going.is_empty() {
            drop(container);
            remove_with_hooks(
                context,
                &store,
                &name,
                &mut removal,
                Protected::Refuse,
                |current| self.check_refused(current),
            )?;
        }
        if self.json {
            let mode = RunMode::from_option(self.dry_run);
            output::print_json(&removal_json(&name, &removal, mode))?;
        }
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    /// Parses the container and its snapshots. This is strict: an ambiguous list is a usage error.
    fn parse(&self, context: &Context) -> Result<(ContainerName, Vec<SnapshotChoice>)> {
        let Some((first, rest)) = self.targets.split_first() else {
            return Err(Error::usage("no container specified"));
        };
        let (name, mut choice) = match split(context, first)? {
            Some((name, one)) => (name, vec![one]),
            None => (context.container(first)?, Vec::new()),
        };
        for word in rest {
            match (split(context, word)?, split(context, first)?.is_some()) {
                (Some((other, one)), true) if other == name => choice.push(one),
                (Some((other, _)), true) => {
                    return Err(Error::usage(format!(
                        "cannot remove snapshots of {name} and of {other} in one command"
                    ))
                    .hint("run one command for each container"));
                }
                (None, false) => choice.push(SnapshotChoice::parse(word)?),
                (Some(_), false) | (None, true) => {
                    return Err(Error::usage("cannot mix addresses and names")
                        .hint("write `cowl rm NAME SNAP...` or `cowl rm NAME@SNAP NAME@SNAP...`"));
                }
            }
        }
        match (self.all, choice.is_empty()) {
            (true, false) => Err(Error::usage("cannot combine --all with names of snapshots")),
            (false, true) => Err(
                Error::usage(format!("no snapshot of {name} specified")).hint(format!(
                    "list them with `cowl list {name}`; --all removes all of them; \
                     `cowl destroy {name}` removes the container"
                )),
            ),
            _ => Ok((name, choice)),
        }
    }

    /// Fails if any snapshot cannot be removed; with `--skip-refused`, prints notes instead.
    fn check_refused(&self, removal: &Removal) -> Result<()> {
        if self.skip_refused {
            if !self.json {
                for refused in &removal.refused {
                    output::print_note(&format!("skipped {}: {}", refused.name, refused.reason));
                }
            }
            return Ok(());
        }
        match removal.refused.as_slice() {
            [] => Ok(()),
            [one] => Err(one.to_error()),
            [first, more @ ..] => {
                let mut error = first.to_error();
                for other in more {
                    error.what = format!("{}; {}: {}", error.what, other.name, other.reason);
                }
                Err(error.hint("nothing was removed; to remove the others, add --skip-refused"))
            }
        }
    }
}

/// Removes the snapshots of a plan, between hooks.
///
/// The plan is made again under the lock, for the same snapshots: others that were taken since are not removed. If
/// some can no longer be removed, `check` decides whether the rest is removed.
pub(super) fn remove_with_hooks(
    context: &Context,
    store: &Store,
    name: &ContainerName,
    removal: &mut Removal,
    protected: Protected,
    check: impl Fn(&Removal) -> Result<()>,
) -> Result<()> {
    let ids: Vec<_> = removal.going.iter().map(|snapshot| snapshot.id).collect();
    let names: Vec<_> = removal.going.iter().map(|s| s.name.as_str()).collect();
    let names = names.join(" ");
    let done = context.run_with_hooks(Event::Rm, store, name, Some(&names), |_| {
        let mut container = recover::open(store, name)?;
        let current = plan(&container, &ids, protected)?;
        check(&current)?;
        remove(&mut container, &current.going)?;
        Ok(current)
    })?;
    removal.going = done.going;
    removal.frees = done.frees;
    removal.refused.extend(done.refused);
    Ok(())
}

/// Parses `NAME@SNAP` or `NAME@A..B`; returns `None` if there is no `@`.
fn split(context: &Context, word: &OsStr) -> Result<Option<(ContainerName, SnapshotChoice)>> {
    let Some((name, chosen)) = word.to_str().and_then(|text| text.split_once('@')) else {
        return Ok(None);
    };
    Ok(Some((
        context.container(name)?,
        SnapshotChoice::parse(chosen)?,
    )))
}

/// Formats a removal: "removing snap1, snap2: frees 12 KiB in 3 inodes".
pub(super) fn summarize(verb: &str, removal: &Removal) -> String {
    const MAX_NAMES: usize = 10;
    let names: Vec<_> = removal.going.iter().map(|s| s.name.as_str()).collect();
    let list = match names.len() {
        0 => return "nothing to remove".to_owned(),
        count if count > MAX_NAMES => {
            let (first, last) = (names.first(), names.last());
            format!(
                "{count} snapshots, {} to {}",
                first.copied().unwrap_or_default(),
                last.copied().unwrap_or_default()
            )
        }
        _ => names.join(", "),
    };
    format!("{verb} {list}: {}", describe_freed(removal.frees))
}

/// Formats the space that a removal frees.
pub(super) fn describe_freed(space: Space) -> String {
    match space.layers {
        0 => "frees nothing, others use the same layers".to_owned(),
        _ => format!(
            "frees {} in {} inodes",
            output::format_size(space.bytes),
            space.inodes
        ),
    }
}

/// Returns space for JSON.
pub(super) fn space_json(space: Space) -> Value {
    json!({ "bytes": space.bytes, "inodes": space.inodes, "layers": space.layers })
}

/// Returns a removal for JSON.
pub(super) fn removal_json(name: &ContainerName, removal: &Removal, mode: RunMode) -> Value {
    let going: Vec<_> = removal.going.iter().map(|s| &s.name).collect();
    let refused: Vec<_> = removal
        .refused
        .iter()
        .map(|refused| json!({ "name": refused.name, "why": refused.reason }))
        .collect();
    json!({
        "name": name,
        "removed": going,
        "refused": refused,
        "freed": space_json(removal.frees),
        "dry_run": mode == RunMode::DryRun,
    })
}

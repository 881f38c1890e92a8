//! The command `cowl undo`, and `cowl restore` of single paths.

use std::ffi::OsString;

use serde_json::{Value, json};

use super::losses::losses;
use super::output::Format;
use super::{CliCommand, Context, RunMode, output};
use crate::delta::revert::{RevertAction, RevertStep};
use crate::error::Result;
use crate::host::hooks::Event;
use crate::recover;
use crate::snapshot::depth::MergeScope;
use crate::snapshot::paths::{self, AllowedPaths};
use crate::snapshot::undo::{UndoRequest, Undone, plan, undo};
use crate::snapshot::{Losses, resolve};
use crate::store::name::{Address, ContainerName, SnapshotName};

/// Revert the changes since a snapshot
///
/// Reverts additions, deletions, modifications and renames in the whole container, or only in the given
/// paths. Works while the container is mounted and in use; each file is replaced atomically. The current
/// state is retained as a snapshot first: `cowl restore NAME --undo` restores it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Revert the changes since this snapshot [default: the last one that was taken or restored]
    #[arg(value_name = "SNAP")]
    snapshot: Option<OsString>,
    /// Use the snapshot even if a crash may have lost part of it
    #[arg(long)]
    force: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON; a path that is not UTF-8 is an array of bytes
    #[arg(long)]
    json: bool,
    /// Revert only changes of these paths and below them
    #[arg(last = true, value_name = "PATH")]
    paths: Vec<OsString>,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = context.container(&self.name)?;
        let snapshot = self.snapshot.as_ref().map(SnapshotName::parse);
        let selection = Selection {
            losses: losses(self.force),
            name: &name,
            snapshot: snapshot.transpose()?,
            paths: &self.paths,
            allowed: AllowedPaths::InEither,
        };
        let mode = RunMode::from_option(self.dry_run);
        revert(context, selection, mode, Format::from_option(self.json))?;
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

/// The changes to revert.
pub(super) struct Selection<'a> {
    pub(super) losses: Losses,
    pub(super) name: &'a ContainerName,
    pub(super) snapshot: Option<SnapshotName>,
    pub(super) paths: &'a [OsString],
    pub(super) allowed: AllowedPaths,
}

/// Reverts the selected changes and prints them.
pub(super) fn revert(
    context: &Context,
    selection: Selection<'_>,
    mode: RunMode,
    format: Format,
) -> Result<()> {
    let name = selection.name;
    let request = UndoRequest {
        since: selection.snapshot,
        scope: paths::parse_scope(selection.paths)?,
        allowed: selection.allowed,
    };
    let store = context.store_for(name)?;
    if let Some(since) = &request.since {
        let address = Address {
            container: name.clone(),
            snapshot: Some(since.clone()),
        };
        resolve(&store, &address)?.refuse_loss(&store, selection.losses)?;
    }
    if mode == RunMode::DryRun {
        let planned = plan(&recover::open(&store, name)?, &request)?;
        return print(name, &planned, mode, format);
    }
    let to = request.since.as_ref().map(SnapshotName::as_str);
    let done = context.run_with_hooks(Event::Restore, &store, name, to, |_| {
        let mut container = recover::open(&store, name)?;
        let mut bar = output::Bar::new("restoring");
        let done = undo(&mut container, &request, &mut |done| bar.update(done))?;
        drop(bar);
        context.limit_depth(&mut container, MergeScope::Any);
        Ok(done)
    })?;
    context.settle(&store, name);
    print(name, &done, mode, format)
}

fn print(name: &ContainerName, done: &Undone, mode: RunMode, format: Format) -> Result<()> {
    let dry_run = mode == RunMode::DryRun;
    if format == Format::Json {
        let steps: Vec<Value> = done.steps.iter().map(as_json).collect();
        let kept = done.auto_snapshot.as_ref().map(SnapshotName::as_str);
        return output::print_json(
            &json!({ "changes": steps, "kept_as": kept, "dry_run": dry_run }),
        );
    }
    for step in &done.steps {
        output::print_line(&text(step))?;
    }
    if done.steps.is_empty() {
        output::print_note("nothing to revert: there are no changes since the snapshot");
    } else if !dry_run {
        let kept = done.auto_snapshot.as_ref().map(ToString::to_string);
        output::print_note(&format!(
            "the previous state of {name} is retained as {}; to undo: cowl restore {name} --undo",
            kept.unwrap_or_else(|| "a snapshot".to_owned())
        ));
    }
    Ok(())
}

/// Returns the name of an action in text and in JSON.
fn word(action: RevertAction) -> &'static str {
    match action {
        RevertAction::Remove => "remove",
        RevertAction::Recreate => "bring back",
        RevertAction::Revert => "put back",
        RevertAction::RenameBack => "rename back",
    }
}

fn text(step: &RevertStep) -> String {
    let (word, path) = (word(step.action), output::shown(&step.path));
    match &step.from {
        Some(from) => format!("{word} /{} -> /{path}", output::shown(from)),
        None => format!("{word} /{path}"),
    }
}

fn as_json(step: &RevertStep) -> Value {
    let mut value = json!({
        "action": word(step.action),
        "path": output::json_path(&step.path),
    });
    if let (Some(from), Some(object)) = (&step.from, value.as_object_mut()) {
        object.insert("from".to_owned(), output::json_path(from));
    }
    value
}

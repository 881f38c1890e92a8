//! `cowl undo`, and `cowl restore` of single paths

use std::ffi::OsString;

use serde_json::{Value, json};

use super::losses::losses;
use super::{Context, Verb, output};
use crate::delta::revert::{RevertAction, RevertStep};
use crate::error::Result;
use crate::host::hooks::Event;
use crate::recover;
use crate::snapshot::paths::{self, AllowedPaths};
use crate::snapshot::undo::{UndoRequest, Undone, plan, undo};
use crate::snapshot::{Losses, resolve};
use crate::store::name::{Address, ContainerName, SnapshotName};

/// Take back what changed since a snapshot
///
/// What was added goes, what was removed comes back, what was changed is again what it was, what was renamed
/// gets its old name; all of it, or only at the given paths and below. Works while the container is mounted
/// and programs run in it: each file is replaced at once. What the container was until now is kept by a
/// snapshot first: `cowl restore NAME --undo` brings it back.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Since when [default: the snapshot that was last taken or restored]
    #[arg(value_name = "SNAP")]
    snapshot: Option<OsString>,
    /// Use a snapshot of which a part may be lost, as it is
    #[arg(long)]
    force: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print JSON; a path that is not UTF-8 is an array of bytes
    #[arg(long)]
    json: bool,
    /// Only what changed at these paths and below
    #[arg(last = true, value_name = "PATH")]
    paths: Vec<OsString>,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let snapshot = self.snapshot.as_ref().map(SnapshotName::parse);
        let chosen = Chosen {
            losses: losses(self.force),
            name: &name,
            snapshot: snapshot.transpose()?,
            paths: &self.paths,
            allowed: AllowedPaths::InEither,
        };
        put_back(context, chosen, self.dry_run, self.json)?;
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

/// What is to be put back.
pub(super) struct Chosen<'a> {
    pub(super) losses: Losses,
    pub(super) name: &'a ContainerName,
    pub(super) snapshot: Option<SnapshotName>,
    pub(super) paths: &'a [OsString],
    pub(super) allowed: AllowedPaths,
}

/// Puts it back, or says what would be done.
pub(super) fn put_back(
    context: &Context,
    chosen: Chosen<'_>,
    dry_run: bool,
    json: bool,
) -> Result<()> {
    let name = chosen.name;
    let wish = UndoRequest {
        since: chosen.snapshot,
        scope: paths::parse_scope(chosen.paths)?,
        allowed: chosen.allowed,
    };
    let store = context.store_of(name)?;
    if let Some(since) = &wish.since {
        let address = Address {
            container: name.clone(),
            snapshot: Some(since.clone()),
        };
        resolve(&store, &address)?.refuse_loss(&store, chosen.losses)?;
    }
    if dry_run {
        let planned = plan(&recover::open(&store, name)?, &wish)?;
        return tell(name, &planned, true, json);
    }
    let to = wish.since.as_ref().map(SnapshotName::as_str);
    let done = context.hooked(Event::Restore, &store, name, to, |_| {
        let mut container = recover::open(&store, name)?;
        let mut bar = output::Bar::new("putting back");
        let done = undo(&mut container, &wish, &mut |done| bar.tell(done))?;
        drop(bar);
        context.keep_depth(&mut container);
        Ok(done)
    })?;
    context.settle(&store, name);
    tell(name, &done, false, json)
}

fn tell(name: &ContainerName, done: &Undone, planned: bool, json: bool) -> Result<()> {
    if json {
        let steps: Vec<Value> = done.steps.iter().map(as_json).collect();
        let kept = done.auto_snapshot.as_ref().map(SnapshotName::as_str);
        return output::data(&json!({ "changes": steps, "kept_as": kept, "dry_run": planned }));
    }
    for step in &done.steps {
        output::line(&text(step))?;
    }
    if done.steps.is_empty() {
        output::note("nothing changed there since then, so nothing is done");
    } else if !planned {
        let kept = done
            .auto_snapshot
            .as_ref()
            .map(|auto| format!(" stays as {auto}"));
        output::note(&format!(
            "what {name} was until now{}: cowl restore {name} --undo takes this back",
            kept.unwrap_or_else(|| " stays as a snapshot".to_owned())
        ));
    }
    Ok(())
}

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

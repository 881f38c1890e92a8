//! `cowl rm`

use std::ffi::{OsStr, OsString};

use serde_json::{Value, json};

use super::{Context, Verb, confirm, output};
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
/// `cowl rm web snap1 snap4..snap6`, or `cowl rm web@snap1 web@snap4`. A range holds both its ends
/// and all between them in the list. What the container is now and its other snapshots stay as they
/// are. If one of them may not be removed (it is protected, or mounted to be read), none is.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container and its snapshots, or addresses
    #[arg(value_name = "NAME SNAP|NAME@SNAP", required = true)]
    what: Vec<OsString>,
    /// All snapshots of the container; asks first
    #[arg(long)]
    all: bool,
    /// Leave out what may not be removed, and remove the rest
    #[arg(long)]
    skip_refused: bool,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Verb for Args {
    fn frees(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let (name, choice) = self.parse()?;
        let store = context.store_of(&name)?;
        let look = || -> Result<(Container<'_>, Removal)> {
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
        let (mut container, mut removal) = look()?;
        self.judge(&removal)?;
        if self.all && !self.yes && !self.dry_run && !removal.going.is_empty() {
            // Not locked meanwhile: nobody is to wait for an answer at a terminal.
            drop(container);
            confirm(&format!("{}?", sentence("Remove", &removal)))?;
            (container, removal) = look()?;
            self.judge(&removal)?;
        }
        if !self.json {
            let would = if self.dry_run {
                "would remove"
            } else {
                "removing"
            };
            output::note(&sentence(would, &removal));
        }
        if !self.dry_run && !removal.going.is_empty() {
            drop(container);
            remove_hooked(
                context,
                &store,
                &name,
                &mut removal,
                Protected::Refuse,
                |now| self.judge(now),
            )?;
        }
        if self.json {
            output::data(&removal_json(&name, &removal, self.dry_run))?;
        }
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    /// Nothing is guessed here: what is no plain name of a snapshot is wrong use.
    fn parse(&self) -> Result<(ContainerName, Vec<SnapshotChoice>)> {
        let Some((first, rest)) = self.what.split_first() else {
            return Err(Error::usage("which container?"));
        };
        let (name, mut choice) = match split(first)? {
            Some((name, one)) => (name, vec![one]),
            None => (ContainerName::parse(first)?, Vec::new()),
        };
        for word in rest {
            match (split(word)?, split(first)?.is_some()) {
                (Some((other, one)), true) if other == name => choice.push(one),
                (Some((other, _)), true) => {
                    return Err(Error::usage(format!(
                        "snapshots of {name} and of {other} can't be removed at once"
                    ))
                    .hint("type a command for each container"));
                }
                (None, false) => choice.push(SnapshotChoice::parse(word)?),
                (Some(_), false) | (None, true) => {
                    return Err(Error::usage("addresses and names are mixed")
                        .hint("type `cowl rm NAME SNAP...` or `cowl rm NAME@SNAP NAME@SNAP...`"));
                }
            }
        }
        match (self.all, choice.is_empty()) {
            (true, false) => Err(Error::usage("--all and names of snapshots can't go together")),
            (false, true) => Err(Error::usage(format!("which snapshots of {name}?")).hint(
                format!("`cowl list {name}` shows them; --all removes them all; `cowl destroy {name}` removes the container"),
            )),
            _ => Ok((name, choice)),
        }
    }

    fn judge(&self, removal: &Removal) -> Result<()> {
        if self.skip_refused {
            if !self.json {
                for refused in &removal.refused {
                    output::note(&format!("{} stays: {}", refused.name, refused.reason));
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
                Err(error.hint("nothing was removed; --skip-refused removes the others"))
            }
        }
    }
}

/// Removes what was planned, with hooks around it: those snapshots and no others, whatever came or went
/// since. `judge` says whether the rest may go when some of them may not any more.
pub(super) fn remove_hooked(
    context: &Context,
    store: &Store,
    name: &ContainerName,
    removal: &mut Removal,
    protected: Protected,
    judge: impl Fn(&Removal) -> Result<()>,
) -> Result<()> {
    let ids: Vec<_> = removal.going.iter().map(|snapshot| snapshot.id).collect();
    let names: Vec<_> = removal.going.iter().map(|s| s.name.as_str()).collect();
    let names = names.join(" ");
    let now = context.hooked(Event::Rm, store, name, Some(&names), |_| {
        let mut container = recover::open(store, name)?;
        let now = plan(&container, &ids, protected)?;
        judge(&now)?;
        remove(&mut container, &now.going)?;
        Ok(now)
    })?;
    removal.going = now.going;
    removal.frees = now.frees;
    removal.refused.extend(now.refused);
    Ok(())
}

/// `NAME@SNAP` or `NAME@A..B`.
fn split(word: &OsStr) -> Result<Option<(ContainerName, SnapshotChoice)>> {
    let Some((name, chosen)) = word.to_str().and_then(|text| text.split_once('@')) else {
        return Ok(None);
    };
    Ok(Some((
        ContainerName::parse(name)?,
        SnapshotChoice::parse(chosen)?,
    )))
}

/// "removing snap1, snap2: frees 12 KiB in 3 inodes"
pub(super) fn sentence(doing: &str, removal: &Removal) -> String {
    const SHOWN: usize = 10;
    let names: Vec<_> = removal.going.iter().map(|s| s.name.as_str()).collect();
    let what = match names.len() {
        0 => return "nothing to remove".to_owned(),
        count if count > SHOWN => {
            let (first, last) = (names.first(), names.last());
            format!(
                "{count} snapshots, {} to {}",
                first.copied().unwrap_or_default(),
                last.copied().unwrap_or_default()
            )
        }
        _ => names.join(", "),
    };
    format!("{doing} {what}: {}", frees(removal.frees))
}

/// What becomes free, for people.
pub(super) fn frees(space: Space) -> String {
    match space.layers {
        0 => "frees nothing, others use the same layers".to_owned(),
        _ => format!(
            "frees {} in {} inodes",
            output::size(space.bytes),
            space.inodes
        ),
    }
}

/// The same for programs.
pub(super) fn space_json(space: Space) -> Value {
    json!({ "bytes": space.bytes, "inodes": space.inodes, "layers": space.layers })
}

/// A removal for programs.
pub(super) fn removal_json(name: &ContainerName, removal: &Removal, dry_run: bool) -> Value {
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
        "dry_run": dry_run,
    })
}

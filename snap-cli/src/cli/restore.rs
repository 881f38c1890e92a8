//! `cowl restore` and `cowl clone`

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::export::write_folder;
use super::losses::losses;
use super::pause::Pause;
use super::undo::{Chosen, put_back};
use super::{Context, Verb, output};
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::lifecycle::clone::{clone, clone_for_one_mount, copy};
use crate::recover;
use crate::snapshot::paths::AllowedPaths;
use crate::snapshot::restore::{find_before_last, plan, restore};
use crate::snapshot::{Losses, resolve};
use crate::store::Store;
use crate::store::family;
use crate::store::name::{Address, ContainerName, SnapshotName};
use cowl_layers::shown::Show as _;

/// Make a container what it was at a snapshot
///
/// What it is now stays as an automatic snapshot, so that a restore can itself be undone. A mounted
/// container is mounted anew at the same place; refused while somebody uses it. With a third name, a
/// new container is made from the snapshot instead, as by `cowl clone NAME@SNAP NEW`.
#[derive(Debug, clap::Args)]
pub(super) struct RestoreArgs {
    /// The container
    name: OsString,
    /// The snapshot to go back to
    #[arg(value_name = "SNAP", required_unless_present = "undo")]
    snapshot: Option<OsString>,
    /// A name for a new container; the old one is left as it is
    #[arg(value_name = "NEW")]
    new: Option<OsString>,
    /// Bring the LXC container's config back too, as it was at the snapshot
    #[arg(long, conflicts_with = "new")]
    with_config: bool,
    #[command(flatten)]
    pause: Pause,
    /// Copy everything: to a new folder DIR, or with NEW to a container that shares nothing with the
    /// old one
    #[arg(long, value_name = "DIR", num_args = 0..=1, conflicts_with_all = ["with_config", "undo"])]
    #[allow(
        clippy::option_option,
        reason = "clap's way of an option with a value or without"
    )]
    copy: Option<Option<PathBuf>>,
    /// Take the last restore back: make it what it was before. Undone once more, that is taken back
    #[arg(long, conflicts_with_all = ["snapshot", "new"])]
    undo: bool,
    /// With paths: those that the snapshot does not have are removed
    #[arg(long, requires = "paths")]
    delete: bool,
    /// Use a snapshot of which a part may be lost, as it is
    #[arg(long)]
    force: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Put only these paths back, into what the container is now: mounted or not, and while programs
    /// run in it
    #[arg(
        last = true,
        value_name = "PATH",
        conflicts_with_all = ["new", "undo", "copy", "with_config", "stop", "start"]
    )]
    paths: Vec<OsString>,
}

impl Verb for RestoreArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let snapshot = match &self.snapshot {
            Some(snapshot) => SnapshotName::parse(snapshot)?,
            None => find_before_last(&recover::open(&context.store_of(&name)?, &name)?)?,
        };
        if !self.paths.is_empty() {
            let chosen = Chosen {
                losses: losses(self.force),
                name: &name,
                snapshot: Some(snapshot),
                paths: &self.paths,
                allowed: match self.delete {
                    true => AllowedPaths::InEither,
                    false => AllowedPaths::InSnapshot,
                },
            };
            put_back(context, chosen, self.dry_run, false)?;
            return Ok(0);
        }
        if self.new.is_some() || self.copy.is_some() {
            let source = Address {
                container: name,
                snapshot: Some(snapshot),
            };
            self.elsewhere(context, &source)?;
            return Ok(0);
        }
        let store = context.store_of(&name)?;
        let target = Address {
            container: name.clone(),
            snapshot: Some(snapshot.clone()),
        };
        resolve(&store, &target)?.refuse_loss(&store, losses(self.force))?;
        if self.dry_run {
            let kept = plan(&recover::open(&store, &name)?, &snapshot)?;
            output::note(&format!("would make {name} what it was at {snapshot}"));
            output::note(&match kept {
                Some(auto) => format!("what it is now would stay as {auto}"),
                None => "nothing was written since, so nothing need be kept".to_owned(),
            });
            return Ok(0);
        }
        let to = Some(snapshot.as_str());
        let done = context.hooked(Event::Restore, &store, &name, to, |_| {
            self.pause.round(&store, &name, || {
                let mut container = recover::open(&store, &name)?;
                if self.undo && find_before_last(&container)? != snapshot {
                    return Err(Error::busy(format!("{name} was restored a moment ago"))
                        .hint("look what it is now, and undo that if you mean it"));
                }
                if self.with_config {
                    container.restore_config_from(&snapshot)?;
                }
                let restored = restore(&mut container, &snapshot)?;
                recover::complete_outside(container)?;
                Ok(restored)
            })
        })?;
        context.settle(&store, &name);
        if let Some(auto) = done.auto_snapshot {
            output::note(&format!(
                "what {name} was until now stays as {auto}: cowl restore {name} --undo takes this back"
            ));
        }
        Ok(0)
    }
}

impl RestoreArgs {
    /// The state somewhere else; the container stays as it is.
    fn elsewhere(&self, context: &Context, source: &Address) -> Result<()> {
        match (&self.new, &self.copy) {
            (Some(_), Some(Some(dir))) => Err(Error::usage(format!(
                "a container or a folder: NEW and --copy {} are two places",
                dir.shown()
            ))
            .hint("for a container write --copy last; for a folder leave NEW out")),
            (Some(new), copy) => {
                let new = ContainerName::parse(new)?;
                let how = How {
                    copies: copy.is_some(),
                    dry_run: self.dry_run,
                    losses: losses(self.force),
                };
                make(context, source, &new, &how)
            }
            (None, Some(Some(dir))) => self.folder(context, source, dir),
            (None, _) => Err(Error::usage("--copy needs to know where to")
                .hint("name a new folder, --copy DIR, or a new container: NAME SNAP NEW --copy")),
        }
    }

    fn folder(&self, context: &Context, source: &Address, dir: &Path) -> Result<()> {
        match std::fs::symlink_metadata(dir) {
            Ok(_) => {
                return Err(Error::failed(format!("{} is there already", dir.shown()))
                    .hint("name a folder that is not there yet"));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::at("look at", dir, error)),
        }
        if self.dry_run {
            let store = context.store_of(&source.container)?;
            resolve(&store, source)?.refuse_loss(&store, losses(self.force))?;
            output::note(&format!("would copy {source} to {}", dir.shown()));
            return Ok(());
        }
        write_folder(context, source, dir, ("copying", losses(self.force)))
    }
}

/// Make a new container that begins as another one, or as a snapshot, is
///
/// Copies nothing: both stand on the same layers, and neither sees what is written to the other.
#[derive(Debug, clap::Args)]
pub(super) struct CloneArgs {
    /// What the new container is to be
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// The new container's name
    new: OsString,
    /// Copy everything, so that the two share nothing
    #[arg(long)]
    copy: bool,
    /// The new container is there for one mount: when it is unmounted, or its daemon ends, it is removed
    /// for good, with what was written in it and with its snapshots. Not for LXC containers.
    #[arg(long, conflicts_with = "copy")]
    ephemeral: bool,
    /// Begin with a state of which a part may be lost, as it is
    #[arg(long)]
    force: bool,
}

impl Verb for CloneArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let source = Address::parse(&self.source)?;
        let new = ContainerName::parse(&self.new)?;
        if self.ephemeral {
            let store = context.store_of(&source.container)?;
            resolve(&store, &source)?.refuse_loss(&store, losses(self.force))?;
            clone_for_one_mount(&store, &source, &new)?;
            settle_both(context, &store, &source, &new);
            return Ok(0);
        }
        let how = How {
            copies: self.copy,
            dry_run: false,
            losses: losses(self.force),
        };
        make(context, &source, &new, &how)?;
        Ok(0)
    }
}

/// How a container is made from a state.
struct How {
    copies: bool,
    dry_run: bool,
    losses: Losses,
}

/// A clone of what a container is now froze that; the clone stands on it.
fn settle_both(context: &Context, store: &Store, source: &Address, new: &ContainerName) {
    if source.snapshot.is_none() {
        context.settle(store, &source.container);
    }
    context.settle(store, new);
}

fn make(context: &Context, source: &Address, new: &ContainerName, how: &How) -> Result<()> {
    let store = context.store_of(&source.container)?;
    let state = resolve(&store, source)?;
    state.refuse_loss(&store, how.losses)?;
    if how.dry_run {
        family::claim(&store, new)?.remove()?;
        output::note(&format!("would make {new} from {source}"));
        return Ok(());
    }
    if source.container == *new {
        // Found by the claim as well; this says it without waiting for the container's own lock.
        return Err(
            Error::failed(format!("a container named {new} exists already"))
                .hint("choose another name"),
        );
    }
    let notes = match how.copies {
        true => {
            let mut bar = output::Bar::new("copying");
            copy(&store, source, new, &mut |done| bar.tell(done))?
        }
        false => clone(&store, source, new)?,
    };
    settle_both(context, &store, source, new);
    if let Some(why) = state.describe_loss(&store)? {
        output::note(&format!("{new} is marked: {why}"));
    }
    for note in notes {
        output::note(&note);
    }
    Ok(())
}

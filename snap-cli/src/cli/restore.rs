//! The commands `cowl restore` and `cowl clone`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::export::write_directory;
use super::losses::losses;
use super::output::Format;
use super::pause::Pause;
use super::undo::{Selection, revert};
use super::{CliCommand, Context, RunMode, output};
use crate::container::lxc::ConfigTrust;
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::host::rootless::RunsOutside;
use crate::lifecycle::clone::{clone, clone_for_one_mount, copy};
use crate::recover;
use crate::snapshot::paths::AllowedPaths;
use crate::snapshot::restore::{find_before_last, plan, restore};
use crate::snapshot::{Losses, resolve};
use crate::store::Store;
use crate::store::family;
use crate::store::name::{Address, ContainerName, SnapshotName};
use cowl_layers::shown::Show as _;

/// Restore a container to a snapshot, under the same name
///
/// The previous state is retained as an automatic snapshot, so that a restore can be undone. A mounted
/// container is remounted at the same mount point; refused while a process uses it. With NEW, creates
/// a new container from the snapshot instead, as `cowl clone NAME@SNAP NEW` does.
#[derive(Debug, clap::Args)]
pub(super) struct RestoreArgs {
    /// The container
    name: OsString,
    /// The snapshot to restore
    #[arg(value_name = "SNAP", required_unless_present = "undo")]
    snapshot: Option<OsString>,
    /// Create a new container with this name, and do not change NAME
    #[arg(value_name = "NEW")]
    new: Option<OsString>,
    /// Also restore the LXC container's config from the snapshot
    #[arg(long, conflicts_with = "new")]
    with_config: bool,
    /// With --with-config: also if another host sent the config, which can name programs that LXC runs as root
    #[arg(long, requires = "with_config")]
    trust_config: bool,
    #[command(flatten)]
    pause: Pause,
    /// Copy all data: to a new directory DIR, or with NEW to a container that shares no layers
    #[arg(long, value_name = "DIR", num_args = 0..=1, conflicts_with_all = ["with_config", "undo"])]
    #[allow(
        clippy::option_option,
        reason = "clap's type for an option with an optional value"
    )]
    copy: Option<Option<PathBuf>>,
    /// Undo the last restore; a second --undo reverts the first
    #[arg(long, conflicts_with_all = ["snapshot", "new"])]
    undo: bool,
    /// With paths: remove those that do not exist in the snapshot
    #[arg(long, requires = "paths")]
    delete: bool,
    /// Use the snapshot even if a crash may have lost part of it
    #[arg(long)]
    force: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Restore only these paths in the current state; works while the container is mounted and in use
    #[arg(
        last = true,
        value_name = "PATH",
        conflicts_with_all = ["new", "undo", "copy", "with_config", "stop", "start"]
    )]
    paths: Vec<OsString>,
}

impl CliCommand for RestoreArgs {
    fn runs_outside(&self) -> RunsOutside {
        self.pause.runs_outside()
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let name = context.container(&self.name)?;
        let snapshot = match &self.snapshot {
            Some(snapshot) => SnapshotName::parse(snapshot)?,
            None => find_before_last(&recover::open(&context.store_for(&name)?, &name)?)?,
        };
        if !self.paths.is_empty() {
            let selection = Selection {
                losses: losses(self.force),
                name: &name,
                snapshot: Some(snapshot),
                paths: &self.paths,
                allowed: match self.delete {
                    true => AllowedPaths::InEither,
                    false => AllowedPaths::InSnapshot,
                },
            };
            let mode = RunMode::from_option(self.dry_run);
            revert(context, selection, mode, Format::Text)?;
            return Ok(0);
        }
        if self.new.is_some() || self.copy.is_some() {
            let source = Address {
                container: name,
                snapshot: Some(snapshot),
            };
            self.restore_elsewhere(context, &source)?;
            return Ok(0);
        }
        let store = context.store_for(&name)?;
        let target = Address {
            container: name.clone(),
            snapshot: Some(snapshot.clone()),
        };
        resolve(&store, &target)?.refuse_loss(&store, losses(self.force))?;
        if self.dry_run {
            let kept = plan(&recover::open(&store, &name)?, &snapshot)?;
            output::print_note(&format!("would restore {name} to {snapshot}"));
            output::print_note(&match kept {
                Some(auto) => format!("the current state would be retained as {auto}"),
                None => "nothing was written since, so no state would be retained".to_owned(),
            });
            return Ok(0);
        }
        let to = Some(snapshot.as_str());
        let done = context.run_with_hooks(Event::Restore, &store, &name, to, |_| {
            self.pause.around(&store, &name, || {
                let mut container = recover::open(&store, &name)?;
                if self.undo && find_before_last(&container)? != snapshot {
                    return Err(Error::busy(format!(
                        "cannot undo the last restore of {name}: another command restored it meanwhile"
                    ))
                    .hint("inspect its current state, and run the command again to undo that restore"));
                }
                if self.with_config {
                    let trust = match self.trust_config {
                        true => ConfigTrust::AnyHost,
                        false => ConfigTrust::ThisHost,
                    };
                    container.restore_config_from(&snapshot, trust)?;
                }
                let restored = restore(&mut container, &snapshot)?;
                recover::complete_outside(container)?;
                Ok(restored)
            })
        })?;
        context.settle(&store, &name);
        if let Some(auto) = done.auto_snapshot {
            output::print_note(&format!(
                "the previous state of {name} is retained as {auto}; to undo: cowl restore {name} --undo"
            ));
        }
        Ok(0)
    }
}

impl RestoreArgs {
    /// Creates a container or a directory from a snapshot; the source container does not change.
    fn restore_elsewhere(&self, context: &Context, source: &Address) -> Result<()> {
        match (&self.new, &self.copy) {
            (Some(_), Some(Some(dir))) => Err(Error::usage(format!(
                "cannot restore to a container and a directory at once: NEW and --copy {}",
                dir.shown()
            ))
            .hint("for a container, write --copy last; for a directory, omit NEW")),
            (Some(new), copy) => {
                let new = ContainerName::parse(new)?;
                let options = CloneOptions {
                    data: match copy {
                        Some(_) => CloneData::Copied,
                        None => CloneData::Shared,
                    },
                    dry_run: self.dry_run,
                    losses: losses(self.force),
                };
                clone_state(context, source, &new, &options)
            }
            (None, Some(Some(dir))) => self.copy_to_directory(context, source, dir),
            (None, _) => Err(Error::usage("--copy needs a destination").hint(
                "specify a new directory, --copy DIR, or a new container: NAME SNAP NEW --copy",
            )),
        }
    }

    fn copy_to_directory(&self, context: &Context, source: &Address, dir: &Path) -> Result<()> {
        match std::fs::symlink_metadata(dir) {
            Ok(_) => {
                return Err(Error::failed(format!("{} already exists", dir.shown()))
                    .hint("specify a directory that does not exist"));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::at("stat", dir, error)),
        }
        if self.dry_run {
            let store = context.store_for(&source.container)?;
            resolve(&store, source)?.refuse_loss(&store, losses(self.force))?;
            output::print_note(&format!("would copy {source} to {}", dir.shown()));
            return Ok(());
        }
        write_directory(context, source, dir, ("copying", losses(self.force)))
    }
}

/// Create a container from another container or a snapshot
///
/// Copies nothing: both use the same layers, and a write to one does not appear in the other.
#[derive(Debug, clap::Args)]
pub(super) struct CloneArgs {
    /// The state to clone
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// The new container's name
    new: OsString,
    /// Copy all data, so that the two share no layers
    #[arg(long)]
    copy: bool,
    /// Remove the new container permanently, with its snapshots, when it is unmounted or its daemon ends.
    /// Not for LXC containers
    #[arg(long, conflicts_with = "copy")]
    ephemeral: bool,
    /// Use the state even if a crash may have lost part of it
    #[arg(long)]
    force: bool,
}

impl CliCommand for CloneArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let source = context.address(&self.source)?;
        let new = ContainerName::parse(&self.new)?;
        if self.ephemeral {
            let store = context.store_for(&source.container)?;
            resolve(&store, &source)?.refuse_loss(&store, losses(self.force))?;
            clone_for_one_mount(&store, &source, &new)?;
            settle_both(context, &store, &source, &new);
            return Ok(0);
        }
        let options = CloneOptions {
            data: match self.copy {
                true => CloneData::Copied,
                false => CloneData::Shared,
            },
            dry_run: false,
            losses: losses(self.force),
        };
        clone_state(context, &source, &new, &options)?;
        Ok(0)
    }
}

/// Whether a clone uses the layers of its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CloneData {
    Copied,
    Shared,
}

/// Options for creating a container from a state.
struct CloneOptions {
    data: CloneData,
    dry_run: bool,
    losses: Losses,
}

/// Starts background syncs of a clone, and of its source if the clone froze the source's current state.
fn settle_both(context: &Context, store: &Store, source: &Address, new: &ContainerName) {
    if source.snapshot.is_none() {
        context.settle(store, &source.container);
    }
    context.settle(store, new);
}

fn clone_state(
    context: &Context,
    source: &Address,
    new: &ContainerName,
    options: &CloneOptions,
) -> Result<()> {
    let store = context.store_for(&source.container)?;
    let state = resolve(&store, source)?;
    state.refuse_loss(&store, options.losses)?;
    if options.dry_run {
        family::claim(&store, new)?.remove()?;
        output::print_note(&format!("would create {new} from {source}"));
        return Ok(());
    }
    if source.container == *new {
        // The claim of the name would find this, too, but only after waiting for the container's own lock.
        return Err(
            Error::failed(format!("a container named {new} already exists"))
                .hint("choose another name"),
        );
    }
    let notes = match options.data {
        CloneData::Copied => {
            let mut bar = output::Bar::new("copying");
            copy(&store, source, new, &mut |done| bar.update(done))?
        }
        CloneData::Shared => clone(&store, source, new)?,
    };
    settle_both(context, &store, source, new);
    if let Some(why) = state.describe_loss(&store)? {
        output::print_note(&format!("{new} inherits the loss of its source: {why}"));
    }
    for note in notes {
        output::print_note(&note);
    }
    Ok(())
}

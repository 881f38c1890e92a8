//! `cowl restore` and `cowl clone`

use std::ffi::OsString;

use super::pause::Pause;
use super::{Context, Verb, output};
use crate::container::Container;
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::snapshot::restore::{clone, plan, restore};
use crate::store::name::{Address, ContainerName, SnapshotName};

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
    #[arg(value_name = "SNAP")]
    snapshot: OsString,
    /// A name for a new container; the old one is left as it is
    #[arg(value_name = "NEW")]
    new: Option<OsString>,
    /// Bring the LXC container's config back too, as it was at the snapshot
    #[arg(long, conflicts_with = "new")]
    with_config: bool,
    #[command(flatten)]
    pause: Pause,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Verb for RestoreArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let snapshot = SnapshotName::parse(&self.snapshot)?;
        if let Some(new) = &self.new {
            let source = Address {
                container: name,
                snapshot: Some(snapshot),
            };
            make(context, &source, &ContainerName::parse(new)?, self.dry_run)?;
            return Ok(0);
        }
        let store = context.store_of(&name)?;
        if self.dry_run {
            let kept = plan(&Container::open(&store, &name)?, &snapshot)?;
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
                let mut container = Container::open(&store, &name)?;
                if self.with_config {
                    container.with_config_of(&snapshot)?;
                }
                let restored = restore(&mut container, &snapshot)?;
                container.finish_outside()?;
                Ok(restored)
            })
        })?;
        if let Some(auto) = done.kept_as {
            output::note(&format!(
                "what {name} was until now stays as {auto}: cowl restore {name} {auto} undoes this"
            ));
        }
        Ok(0)
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
}

impl Verb for CloneArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let source = Address::parse(&self.source)?;
        make(context, &source, &ContainerName::parse(&self.new)?, false)?;
        Ok(0)
    }
}

fn make(context: &Context, source: &Address, new: &ContainerName, dry_run: bool) -> Result<()> {
    let store = context.store_of(&source.container)?;
    if dry_run {
        crate::snapshot::resolve(&store, source)?;
        store.claim(new)?.remove()?;
        output::note(&format!("would make {new} from {source}"));
        return Ok(());
    }
    if source.container == *new {
        // Found by the claim as well; this says it without waiting for the container's own lock.
        crate::snapshot::resolve(&store, source)?;
        return Err(
            Error::failed(format!("a container named {new} exists already"))
                .hint("choose another name"),
        );
    }
    for note in clone(&store, source, new)? {
        output::note(&note);
    }
    Ok(())
}

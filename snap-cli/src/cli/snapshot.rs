//! `cowl snapshot`

use std::ffi::OsString;
use std::path::PathBuf;

use super::meta::remark;
use super::{Context, Verb, output, tags};
use crate::container::durability::{make_durable, open_filesystem};
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::recover;
use crate::snapshot::resolve;
use crate::snapshot::take::{SnapshotRequest, take};
use crate::store::Store;
use crate::store::disk::Filesystem;
use crate::store::name::{Address, ContainerName, SnapshotName};

/// Take a snapshot of what a container is now, and print its name
///
/// Copies nothing, and works while programs run in the container: a file that one of them is writing is in
/// the snapshot as it is at that moment.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// A remark, shown by `cowl list`
    #[arg(short, long, value_name = "TEXT")]
    message: Option<OsString>,
    /// Take the remark from a file, or from standard input
    #[arg(
        short = 'c',
        long = "comment-file",
        value_name = "FILE|-",
        conflicts_with = "message"
    )]
    comment_file: Option<PathBuf>,
    /// A name of your own [default: snap0, snap1, ...; no number is used twice]
    #[arg(long = "name", value_name = "SNAP")]
    snapshot: Option<OsString>,
    /// Something to sort it by; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<OsString>,
    /// Have it kept until `cowl protect --off` says otherwise
    #[arg(long)]
    protect: bool,
    /// A timer or a hook takes it: `cowl prune` may remove it
    #[arg(long)]
    scheduled: bool,
    /// Print the name only when the snapshot is durable: a power cut takes nothing of it. Else it settles
    /// in the background, within seconds, and is incomplete when the machine goes down before
    #[arg(long)]
    sync: bool,
    /// Leave the writing to the kernel: the snapshot stays settling until another command syncs it
    #[arg(long, conflicts_with = "sync")]
    no_sync: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let comment = remark(self.message.as_ref(), self.comment_file.as_deref())?;
        let wish = SnapshotRequest {
            name: self
                .snapshot
                .as_ref()
                .map(SnapshotName::parse)
                .transpose()?,
            comment,
            tags: tags(&self.tag)?,
            protected: self.protect,
            scheduled: self.scheduled,
        };
        let sync = match (self.sync, self.no_sync) {
            (true, _) => Sync::Wait,
            (_, true) => Sync::Leave,
            _ => Sync::Background,
        };
        let store = context.store_of(&name)?;
        take_hooked(context, &store, &name, (&wish, sync), |taken| {
            output::line(taken.as_str())
        })?;
        Ok(0)
    }
}

/// When the data of a snapshot is synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// Before it is acknowledged.
    Wait,
    /// In the background.
    Background,
    /// When the kernel, or another command, does it.
    Leave,
}

/// Takes a snapshot with its hooks around it, and keeps the number of layers low afterwards: when those that
/// the hooks may have stopped run again.
pub(super) fn take_hooked(
    context: &Context,
    store: &Store,
    name: &ContainerName,
    (wish, sync): (&SnapshotRequest, Sync),
    told: impl FnOnce(&SnapshotName) -> Result<()>,
) -> Result<()> {
    let chosen = wish.name.as_ref().map(SnapshotName::as_str);
    context.hooked(Event::Snapshot, store, name, chosen, |env| {
        // Before the freeze: its sync reports every error of writing since.
        let filesystem = open_filesystem(store)?;
        let taken = take(&mut recover::open(store, name)?, wish)?;
        env.set("COWL_SNAPSHOT", taken.as_str());
        if sync == Sync::Wait {
            wait(store, name, &taken, &filesystem)?;
        }
        told(&taken)
    })?;
    if sync == Sync::Background {
        context.settle(store, name);
    }
    // Opened again only if layers are to be merged: no lock is held while hooks run.
    let deep = store
        .find(name)
        .and_then(|(_, found)| match context.is_too_deep(&found.body) {
            true => recover::open(store, name).map(Some),
            false => Ok(None),
        });
    match deep {
        Ok(Some(mut container)) => context.keep_depth(&mut container),
        Ok(None) => {}
        // The next snapshot does it.
        Err(error) => log::info!("the layers are not counted now: {error}"),
    }
    Ok(())
}

/// Makes a snapshot durable that was taken a moment ago.
fn wait(
    store: &Store,
    name: &ContainerName,
    taken: &SnapshotName,
    filesystem: &Filesystem,
) -> Result<()> {
    let address = Address {
        container: name.clone(),
        snapshot: Some(taken.clone()),
    };
    let failed = |why: &dyn std::fmt::Display| {
        Error::failed(format!("{address} was taken, but is not durable: {why}")).hint(format!(
            "it stays, and is listed as settling; cowl check {name} syncs it again"
        ))
    };
    let id = store.find_id(name)?;
    make_durable(store, id, filesystem).map_err(|error| failed(&error))?;
    // On layers of which an earlier sync lost a part, it stays.
    match resolve(store, &address)?.describe_loss(store)? {
        Some(why) => Err(failed(&why)),
        None => Ok(()),
    }
}

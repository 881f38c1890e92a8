//! The command `cowl snapshot`.

use std::ffi::OsString;
use std::path::PathBuf;

use super::meta::read_comment;
use super::{CliCommand, Context, output, parse_tags};
use crate::container::durability::{make_durable, open_filesystem};
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::recover;
use crate::snapshot::depth::MergeScope;
use crate::snapshot::resolve;
use crate::snapshot::take::{SnapshotRequest, take};
use crate::store::Store;
use crate::store::disk::Filesystem;
use crate::store::name::{Address, ContainerName, SnapshotName};

/// Take a snapshot of a container's current state, and print its name
///
/// Copies nothing, and works while programs run in the container: the snapshot has the content of each
/// file at that moment, even if a program is writing it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Set the comment that `cowl list` shows
    #[arg(short, long, value_name = "TEXT")]
    message: Option<OsString>,
    /// Read the comment from a file, or from standard input
    #[arg(
        short = 'c',
        long = "comment-file",
        value_name = "FILE|-",
        conflicts_with = "message"
    )]
    comment_file: Option<PathBuf>,
    /// Set the snapshot's name [default: snap0, snap1, ...; no number is used twice]
    #[arg(long = "name", value_name = "SNAP")]
    snapshot: Option<OsString>,
    /// Attach a tag; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<OsString>,
    /// Protect the snapshot from removal until `cowl protect --off`
    #[arg(long)]
    protect: bool,
    /// Mark it as taken by a timer or a hook, so that `cowl prune` may remove it
    #[arg(long)]
    scheduled: bool,
    /// Wait until the snapshot is durable, so that a power cut loses nothing of it. By default it is
    /// synced in the background within seconds, and is incomplete if the machine crashes before
    #[arg(long)]
    sync: bool,
    /// Leave the writeback to the kernel: the snapshot is settling until another command syncs it
    #[arg(long, conflicts_with = "sync")]
    no_sync: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = match self.scheduled {
            true => context.container_exactly(&self.name)?,
            false => context.container(&self.name)?,
        };
        let comment = read_comment(self.message.as_ref(), self.comment_file.as_deref())?;
        let options = SnapshotRequest {
            name: self
                .snapshot
                .as_ref()
                .map(SnapshotName::parse)
                .transpose()?,
            comment,
            tags: parse_tags(&self.tag)?,
            protected: self.protect,
            scheduled: self.scheduled,
        };
        let sync = match (self.sync, self.no_sync) {
            (true, _) => Sync::Wait,
            (_, true) => Sync::Leave,
            _ => Sync::Background,
        };
        let store = context.store_for(&name)?;
        take_with_hooks(context, &store, &name, (&options, sync), |taken| {
            output::print_line(taken.as_str())
        })?;
        Ok(0)
    }
}

/// The time at which a snapshot is synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// Before the snapshot is acknowledged.
    Wait,
    /// In the background.
    Background,
    /// When the kernel, or another command, syncs it.
    Leave,
}

/// Takes a snapshot between hooks, calls `report` with its name, and limits the number of layers.
///
/// Layers are merged after the last hook, because hooks may have stopped programs until then.
pub(super) fn take_with_hooks(
    context: &Context,
    store: &Store,
    name: &ContainerName,
    (options, sync): (&SnapshotRequest, Sync),
    report: impl FnOnce(&SnapshotName) -> Result<()>,
) -> Result<()> {
    let chosen = options.name.as_ref().map(SnapshotName::as_str);
    context.run_with_hooks(Event::Snapshot, store, name, chosen, |env| {
        // Opened before the freeze, so that its sync reports all write errors since then.
        let filesystem = open_filesystem(store)?;
        let taken = take(&mut recover::open(store, name)?, options)?;
        env.set("COWL_SNAPSHOT", taken.as_str());
        if sync == Sync::Wait {
            sync_now(store, name, &taken, &filesystem)?;
        }
        report(&taken)
    })?;
    if sync == Sync::Background {
        context.settle(store, name);
    }
    // No lock is held while hooks run, so the container is opened again, but only if it has too many layers.
    let deep = store
        .find(name)
        .and_then(|(_, found)| match context.is_too_deep(&found.body) {
            true => recover::open(store, name).map(Some),
            false => Ok(None),
        });
    match deep {
        Ok(Some(mut container)) => context.limit_depth(&mut container, MergeScope::Any),
        Ok(None) => {}
        // The next snapshot merges the layers.
        Err(error) => log::info!("cannot check the number of layers: {error}"),
    }
    Ok(())
}

/// Syncs a snapshot that was just taken.
fn sync_now(
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
            "the snapshot is retained, and listed as settling; to sync it again: cowl check {name}"
        ))
    };
    let id = store.find_id(name)?;
    make_durable(store, id, filesystem).map_err(|error| failed(&error))?;
    // An earlier sync may have lost a part of lower layers; this sync cannot restore it.
    match resolve(store, &address)?.describe_loss(store)? {
        Some(why) => Err(failed(&why)),
        None => Ok(()),
    }
}

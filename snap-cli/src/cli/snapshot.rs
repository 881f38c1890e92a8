//! `cowl snapshot`

use std::ffi::OsString;
use std::path::PathBuf;

use super::meta::remark;
use super::{Context, Verb, output, tags};
use crate::container::Container;
use crate::error::Result;
use crate::host::hooks::Event;
use crate::snapshot::take::{Wish, take};
use crate::store::Store;
use crate::store::name::{ContainerName, SnapshotName};

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
    /// Put everything on the disk first, so that the snapshot is whole even after a power cut
    #[arg(long)]
    sync: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let comment = remark(self.message.as_ref(), self.comment_file.as_deref())?;
        let wish = Wish {
            name: self
                .snapshot
                .as_ref()
                .map(SnapshotName::parse)
                .transpose()?,
            comment,
            tags: tags(&self.tag)?,
            protected: self.protect,
            scheduled: self.scheduled,
            sync: self.sync,
        };
        let store = context.store_of(&name)?;
        take_hooked(context, &store, &name, &wish, |taken| {
            output::line(taken.as_str())
        })?;
        Ok(0)
    }
}

/// Takes a snapshot with its hooks around it, and keeps the number of layers low afterwards: when those that
/// the hooks may have stopped run again.
pub(super) fn take_hooked(
    context: &Context,
    store: &Store,
    name: &ContainerName,
    wish: &Wish,
    told: impl FnOnce(&SnapshotName) -> Result<()>,
) -> Result<()> {
    let chosen = wish.name.as_ref().map(SnapshotName::as_str);
    context.hooked(Event::Snapshot, store, name, chosen, |facts| {
        let taken = take(&mut Container::open(store, name)?, wish)?;
        facts.tell("COWL_SNAPSHOT", taken.as_str());
        told(&taken)
    })?;
    match Container::open(store, name) {
        Ok(mut container) => context.keep_depth(&mut container),
        // The next snapshot does it.
        Err(error) => log::info!("the layers are not counted now: {error}"),
    }
    Ok(())
}

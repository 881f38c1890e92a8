//! `cowl snapshot`

use std::ffi::OsString;
use std::path::PathBuf;

use super::meta::remark;
use super::{Context, Verb, output, tags};
use crate::container::Container;
use crate::error::Result;
use crate::host::hooks::Event;
use crate::snapshot::take::{Wish, take};
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
        let chosen = wish.name.as_ref().map(SnapshotName::as_str);
        context.hooked(Event::Snapshot, &store, &name, chosen, |facts| {
            let mut container = Container::open(&store, &name)?;
            let taken = take(&mut container, &wish)?;
            facts.tell("COWL_SNAPSHOT", taken.as_str());
            output::line(taken.as_str().as_bytes())?;
            context.keep_depth(&mut container);
            Ok(())
        })?;
        Ok(0)
    }
}

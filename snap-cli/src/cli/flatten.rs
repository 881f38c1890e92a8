//! `cowl flatten`

use std::ffi::OsString;

use super::pause::Pause;
use super::{Context, Verb, output};
use crate::container::Container;
use crate::error::Result;
use crate::snapshot::flatten::{flatten, plan};
use crate::store::name::{ContainerName, Range};

/// Merge the layers of a container into one
///
/// Without a range everything between the base and what is being written now. A..B: what was
/// written after snapshot A was taken, up to B; either may be left out. What the container and its
/// snapshots show stays the same. A mounted container is mounted anew at the same place; refused
/// while somebody uses it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Which layers
    #[arg(value_name = "A..B")]
    range: Option<OsString>,
    #[command(flatten)]
    pause: Pause,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let range = match &self.range {
            Some(range) => Range::parse(range)?,
            None => Range::default(),
        };
        let store = context.store_of(&name)?;
        let done = if self.dry_run {
            plan(&Container::open(&store, &name)?, &range)?
        } else {
            self.pause.round(&store, &name, || {
                let mut container = Container::open(&store, &name)?;
                let mut bar = output::Bar::new("merging");
                flatten(&mut container, &range, &mut |done| bar.tell(done))
            })?
        };
        let would = if self.dry_run { "would be " } else { "" };
        output::note(&if done.merged < 2 {
            format!("nothing to merge: {} layers in all", done.depth)
        } else {
            format!(
                "{} layers {would}merged; {} in all now",
                done.merged, done.depth
            )
        });
        Ok(0)
    }
}

//! The command `cowl flatten`.

use std::ffi::OsString;

use super::{CliCommand, Context, output};
use crate::error::Result;
use crate::recover;
use crate::snapshot::depth::shrink;
use crate::snapshot::flatten::{FlattenRequest, flatten, plan};
use crate::store::name::Range;

/// Merge the layers of a container into one
///
/// Without a range, merges all layers between the base and the top layer. A..B: the layers written
/// after snapshot A up to snapshot B; either may be omitted. The content of the container, of its
/// snapshots and of other containers on these layers does not change. A mounted container stays
/// mounted, and processes can continue to use it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// The layers to merge
    #[arg(value_name = "A..B")]
    range: Option<OsString>,
    /// Also merge the base; the result is a new base
    #[arg(long)]
    base: bool,
    /// Merge the cheapest layers until this number is left. (Snapshots and mounts do this automatically:
    /// see depth_limit in the configuration file)
    #[arg(long, value_name = "LAYERS", conflicts_with_all = ["range", "base", "dry_run"])]
    depth: Option<usize>,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = context.container(&self.name)?;
        let range = match &self.range {
            Some(range) => Range::parse(range)?,
            None => Range::default(),
        };
        let which = FlattenRequest {
            range,
            base: self.base,
        };
        let store = context.store_for(&name)?;
        let mut bar = output::Bar::new("merging");
        let (merged, depth) = if self.dry_run {
            let done = plan(&recover::open(&store, &name)?, &which)?;
            (done.merged, done.depth)
        } else {
            let mut container = recover::open(&store, &name)?;
            let mut update = |done| bar.update(done);
            match self.depth {
                Some(limit) => {
                    let merged = shrink(&mut container, limit, &mut update)?;
                    (merged, container.manifest().stack.len())
                }
                None => {
                    let done = flatten(&mut container, &which, &mut update)?;
                    (done.merged, done.depth)
                }
            }
        };
        drop(bar);
        output::print_note(&match (merged, self.dry_run) {
            (0..2, _) => format!("nothing to merge: {depth} layers in total"),
            (_, true) => format!("would merge {merged} layers; {depth} would remain"),
            (_, false) => format!("merged {merged} layers; {depth} remain"),
        });
        Ok(0)
    }
}

//! `cowl flatten`

use std::ffi::OsString;

use super::pause::Pause;
use super::{Context, Verb, output};
use crate::error::Result;
use crate::recover;
use crate::snapshot::depth::shrink;
use crate::snapshot::flatten::{FlattenRequest, flatten, plan};
use crate::store::name::{ContainerName, Range};

/// Merge the layers of a container into one
///
/// Without a range everything between the base and what is being written now. A..B: what was
/// written after snapshot A was taken, up to B; either may be left out. What the container and its
/// snapshots show stays the same, and so do other containers that use the merged layers. A mounted
/// container is mounted anew at the same place; refused while somebody uses it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Which layers
    #[arg(value_name = "A..B")]
    range: Option<OsString>,
    /// Merge the base too: what comes out is a new base
    #[arg(long)]
    base: bool,
    /// Merge only as much as brings the stack down to so many layers, the cheapest first. (Snapshots and
    /// mounts do so by themselves: see depth_limit in the configuration file)
    #[arg(long, value_name = "LAYERS", conflicts_with_all = ["range", "base", "dry_run"])]
    depth: Option<usize>,
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
        let which = FlattenRequest {
            range,
            base: self.base,
        };
        let store = context.store_of(&name)?;
        let mut bar = output::Bar::new("merging");
        let (merged, depth) = if self.dry_run {
            let done = plan(&recover::open(&store, &name)?, &which)?;
            (done.merged, done.depth)
        } else {
            self.pause.round(&store, &name, || {
                let mut container = recover::open(&store, &name)?;
                let mut tell = |done| bar.tell(done);
                if let Some(limit) = self.depth {
                    let merged = shrink(&mut container, limit, &mut tell)?;
                    return Ok((merged, container.manifest().stack.len()));
                }
                let done = flatten(&mut container, &which, &mut tell)?;
                Ok((done.merged, done.depth))
            })?
        };
        drop(bar);
        let would = if self.dry_run { "would be " } else { "" };
        output::note(&if merged < 2 {
            format!("nothing to merge: {depth} layers in all")
        } else {
            format!("{merged} layers {would}merged; {depth} in all now")
        });
        Ok(0)
    }
}

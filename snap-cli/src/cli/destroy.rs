//! `cowl destroy`

use std::ffi::OsString;

use super::{Context, Verb, confirm, output};
use crate::container::Container;
use crate::container::lxc;
use crate::error::Result;
use crate::store::name::ContainerName;

/// Remove a container with all its snapshots
///
/// Asks first. Containers cloned from it stay whole. Refused while somebody uses it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
    /// Stop the LXC container first, if it runs
    #[arg(long)]
    stop: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_of(&name)?;
        let (_, record) = store.find(&name)?;
        let snapshots = match record.body.snapshots.len() {
            0 => String::new(),
            1 => " and its snapshot".to_owned(),
            n => format!(" and its {n} snapshots"),
        };
        if self.dry_run {
            output::note(&format!("would remove {name}{snapshots}"));
            return Ok(0);
        }
        if !self.yes {
            // Not locked meanwhile: nobody is to wait for an answer at a terminal.
            confirm(&format!("Remove {name}{snapshots}?"))?;
        }
        if self.stop {
            lxc::stop(&store, &name)?;
        }
        let (container, _) = Container::open_to_unmount(&store, &name)?;
        container.destroy()?;
        Ok(0)
    }
}

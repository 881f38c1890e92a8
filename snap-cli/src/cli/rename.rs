//! The command `cowl rename`.

use std::ffi::OsString;

use super::{CliCommand, Context, output};
use crate::error::Result;
use crate::lifecycle::adopt;
use crate::lifecycle::rename::rename;
use crate::lxc::binding;
use crate::recover;
use crate::snapshot::meta;
use crate::store::name::{ContainerName, SnapshotName};

/// Rename a container or a snapshot
///
/// A mounted container remains mounted at the same mount point. A container that LXC runs keeps its name
/// in LXC.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container or snapshot
    #[arg(value_name = "NAME[@SNAP]")]
    old: OsString,
    /// The new name; for a snapshot, only the part after the @
    new: OsString,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let old = context.address(&self.old)?;
        match &old.snapshot {
            Some(snapshot) => {
                let new = SnapshotName::parse(&self.new)?;
                let store = context.store_for(&old.container)?;
                let mut container = recover::open(&store, &old.container)?;
                meta::rename(&mut container, snapshot, &new)?;
            }
            None => {
                let new = ContainerName::parse(&self.new)?;
                let store = context.store_for(&old.container)?;
                rename(&store, &old.container, &new)?;
                // A comment in LXC's config names the container. The container has its new name in any case.
                if let Err(error) = adopt::update_config(&store, &new) {
                    log::warn!("LXC's config still has the name {}: {error}", old.container);
                }
                let (_, record) = store.find(&new)?;
                if let Some(link) = &record.body.lxc {
                    output::print_note(&format!(
                        "LXC's container keeps its name: lxc-start {}",
                        binding::from_link(link).options()
                    ));
                }
            }
        }
        Ok(0)
    }
}

//! `cowl rename`

use std::ffi::OsString;

use super::{Context, Verb};
use crate::error::Result;
use crate::lifecycle::rename::rename;
use crate::recover;
use crate::snapshot::meta;
use crate::store::name::{Address, ContainerName, SnapshotName};

/// Give a container, or a snapshot, another name
///
/// A mounted container stays mounted where it is.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container or snapshot
    #[arg(value_name = "NAME[@SNAP]")]
    old: OsString,
    /// Its new name: for a snapshot the part after the @
    new: OsString,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let old = Address::parse(&self.old)?;
        match &old.snapshot {
            Some(snapshot) => {
                let new = SnapshotName::parse(&self.new)?;
                let store = context.store_of(&old.container)?;
                let mut container = recover::open(&store, &old.container)?;
                meta::rename(&mut container, snapshot, &new)?;
            }
            None => {
                let new = ContainerName::parse(&self.new)?;
                rename(&context.store_of(&old.container)?, &old.container, &new)?;
            }
        }
        Ok(0)
    }
}

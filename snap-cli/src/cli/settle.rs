//! `cowl settle`: the process that makes the snapshots of an unmounted container durable

use std::time::Duration;

use super::{Context, Verb, output};
use crate::container::durability::{make_durable_patiently, open_filesystem};
use crate::error::{Error, Result};
use crate::lifecycle::serve::detach_from_shell;
use crate::store::manifest::ContainerId;
use crate::store::{Session, Store};

/// How long a process waits for another one that syncs the same container.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Sync a container's snapshots and mark them durable (internal: started by `snapshot`)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container's id
    id: String,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        output::log_everything();
        detach_from_shell()?;
        let id = ContainerId::parse(&self.id)
            .ok_or_else(|| Error::usage(format!("invalid container id: {:?}", self.id)))?;
        let store = Store::open(&context.root, context.session.clone())?;
        let filesystem = open_filesystem(&store)?;
        // Only one at a time. The next process finds its work done.
        let patient = Session {
            patience: PATIENCE,
            ..context.session.clone()
        };
        let alone = Store::open(&context.root, patient)?.lock_settling(id)?;
        make_durable_patiently(&store, id, &filesystem);
        alone.remove()?;
        Ok(0)
    }

    fn configured(&self) -> bool {
        false
    }
}

//! The command `cowl settle`, the process that syncs the snapshots of an unmounted container.

use std::time::Duration;

use super::{CliCommand, Context, Namespace, output};
use crate::container::durability::{make_durable_patiently, open_filesystem};
use crate::error::{Error, Result};
use crate::lifecycle::serve::detach_from_shell;
use crate::store::manifest::ContainerId;
use crate::store::{Session, Store};

/// The time to wait for another process that syncs the same container.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Sync a container's snapshots and mark them durable (internal: started by `snapshot`)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container's id
    id: String,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        output::log_as_daemon();
        detach_from_shell()?;
        let id = ContainerId::parse(&self.id)
            .ok_or_else(|| Error::usage(format!("invalid container id: {:?}", self.id)))?;
        let store = Store::open(&context.root, context.session.clone())?;
        let filesystem = open_filesystem(&store)?;
        // One process at a time. The next one finds that the work is done.
        let patient = Session {
            patience: PATIENCE,
            ..context.session.clone()
        };
        let alone = Store::open(&context.root, patient)?.lock_settling(id)?;
        make_durable_patiently(&store, id, &filesystem);
        alone.remove()?;
        Ok(0)
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

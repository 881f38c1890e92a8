//! The command `cowl serve`, the daemon that `cowl mount` starts.

use std::path::PathBuf;

use serde_json::json;

use super::mount::PassthroughChoice;
use super::{CliCommand, Context, Namespace, output};
use crate::container::browse;
use crate::error::{Error, Result};
use crate::lifecycle::serve::{ServeOptions, detach_from_shell, serve, take_over};
use crate::store::Store;
use crate::store::manifest::{ContainerId, SnapshotId};

/// Mount a container and serve it until it is unmounted (internal: started by `mount`)
///
/// Prints "ready" when the container is mounted, otherwise an error as JSON.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container's id
    #[arg(required_unless_present = "take_over")]
    id: Option<String>,
    /// The mount point; an absolute path
    #[arg(required_unless_present = "take_over")]
    mountpoint: Option<PathBuf>,
    /// Take over a mount from the daemon that has started this process
    #[arg(long, conflicts_with_all = ["transient", "nosuid", "snapshot"])]
    take_over: bool,
    /// The mount is only for `exec`
    #[arg(long)]
    transient: bool,
    /// Disable set-user-ID programs and device nodes
    #[arg(long)]
    nosuid: bool,
    /// Select the files that the kernel reads and writes without the daemon
    #[arg(long, value_enum, value_name = "FILES", conflicts_with = "snapshot")]
    passthrough: Option<PassthroughChoice>,
    /// Serve the mount that LXC's pre-mount hook makes at the mount point, in the namespaces of the container
    #[arg(long, conflicts_with_all = ["transient", "nosuid", "snapshot"])]
    in_lxc: bool,
    /// Mount the snapshot with this id instead, read-only
    #[arg(long, requires = "mount")]
    snapshot: Option<String>,
    /// The id of this mount of the snapshot
    #[arg(long)]
    mount: Option<String>,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        output::log_as_daemon();
        let Err(error) = self.serve(context) else {
            return Ok(0);
        };
        log::error!("{error}");
        let report = json!({
            "kind": error.kind.name(),
            "what": error.to_string(),
            "hint": error.hint,
        });
        // After "ready" the parent process no longer reads this; then the error is only in the log.
        output::write_line(report.to_string().as_bytes())?;
        Ok(error.kind.code())
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

impl Args {
    fn serve(&self, context: &Context) -> Result<()> {
        let (id, mountpoint) = match (&self.id, &self.mountpoint) {
            (Some(id), Some(mountpoint)) => (id, mountpoint),
            _ => return take_over(&Store::open(&context.root, context.session.clone())?),
        };
        detach_from_shell()?;
        let id = ContainerId::parse(id)
            .ok_or_else(|| Error::usage(format!("invalid container id: {id:?}")))?;
        let store = Store::open(&context.root, context.session.clone())?;
        let Some((snapshot, mount)) = self.snapshot.as_ref().zip(self.mount.as_ref()) else {
            let options = ServeOptions {
                transient: self.transient,
                nosuid: self.nosuid,
                in_lxc: self.in_lxc,
                passthrough: self.passthrough.map(PassthroughChoice::passthrough),
            };
            return serve(&store, id, mountpoint, options);
        };
        let invalid = || Error::usage(format!("invalid ids: {snapshot:?}, {mount:?}"));
        let snapshot = SnapshotId::parse(snapshot).ok_or_else(invalid)?;
        let mount = uuid::Uuid::try_parse(mount).map_err(|error| invalid().because(error))?;
        browse::serve(&store, id, (snapshot, mount), mountpoint)
    }
}

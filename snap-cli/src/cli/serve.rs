//! `cowl serve`: the daemon that `cowl mount` starts

use std::path::PathBuf;

use serde_json::json;

use super::{Context, Verb, output};
use crate::container::browse;
use crate::error::{Error, Result};
use crate::lifecycle::serve::{ServeOptions, detach_from_shell, serve};
use crate::store::Store;
use crate::store::manifest::{ContainerId, SnapshotId};

/// Mount a container and serve it until it is unmounted (for cowl's own use: `mount` starts it)
///
/// Prints "ready" when the mount is there, or else an error as JSON.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container's id
    id: String,
    /// Where to mount it; an absolute path
    place: PathBuf,
    /// Nobody but `exec` needs the mount
    #[arg(long)]
    transient: bool,
    /// Set-user-ID programs and device nodes have no effect
    #[arg(long)]
    nosuid: bool,
    /// The id of a snapshot to be mounted instead, read-only
    #[arg(long, requires = "mount")]
    snapshot: Option<String>,
    /// The id of this mount of it
    #[arg(long)]
    mount: Option<String>,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        output::log_everything();
        let Err(error) = self.serve(context) else {
            return Ok(0);
        };
        log::error!("{error}");
        let said = json!({
            "kind": error.kind.name(),
            "what": error.to_string(),
            "hint": error.hint,
        });
        // Nobody reads it any more once the mount was there: then the log has to do.
        output::result(said.to_string().as_bytes())?;
        Ok(error.kind.code())
    }

    fn configured(&self) -> bool {
        false
    }
}

impl Args {
    fn serve(&self, context: &Context) -> Result<()> {
        detach_from_shell()?;
        let id = ContainerId::parse(&self.id)
            .ok_or_else(|| Error::usage(format!("{:?} is no container's id", self.id)))?;
        let store = Store::open(&context.root, context.session.clone())?;
        let Some((snapshot, mount)) = self.snapshot.as_ref().zip(self.mount.as_ref()) else {
            let options = ServeOptions {
                transient: self.transient,
                nosuid: self.nosuid,
            };
            return serve(&store, id, &self.place, options);
        };
        let wrong = || Error::usage(format!("{snapshot:?} and {mount:?} are no ids"));
        let snapshot = SnapshotId::parse(snapshot).ok_or_else(wrong)?;
        let mount = uuid::Uuid::try_parse(mount).map_err(|error| wrong().because(error))?;
        browse::serve(&store, id, (snapshot, mount), &self.place)
    }
}

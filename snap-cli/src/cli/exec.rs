//! `cowl exec`, and `cowl enter`, its inner half

use std::ffi::OsString;
use std::path::PathBuf;

use super::snapshot::{Sync, take_hooked};
use super::{Context, Verb, output};
use crate::error::{Kind, Result};
use crate::lifecycle::{enter, exec};
use crate::recover;
use crate::shell::quoted;
use crate::snapshot::take::SnapshotRequest;
use crate::store::name::ContainerName;

/// Run a command in a container
///
/// Its root directory is the container, with /proc, /dev and (read-only) /sys of this machine, in a
/// mount namespace of its own. The container is mounted for it, and unmounted afterwards, unless it
/// was mounted before. The exit code is the command's; 128 and the signal's number when a signal
/// ended it; 125 when cowl failed, 126 when the command can't be run, 127 when it is not there.
#[derive(Debug, clap::Args)]
pub(super) struct ExecArgs {
    /// The container
    name: OsString,
    /// Take a snapshot first, with the command as its comment; `cowl prune` may remove it again
    #[arg(long)]
    snapshot: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl Verb for ExecArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_of(&name)?;
        if self.snapshot {
            take_hooked(
                context,
                &store,
                &name,
                (&self.wish(), Sync::Background),
                |taken| {
                    output::note(&format!(
                        "cowl restore {name} {taken} takes back what the command does"
                    ));
                    Ok(())
                },
            )?;
        }
        context.keep_depth(&mut recover::open(&store, &name)?);
        exec::exec(&store, &name, &self.command)
    }

    fn code(&self, _kind: Kind) -> u8 {
        enter::FAILED
    }
}

impl ExecArgs {
    fn wish(&self) -> SnapshotRequest {
        let words: Vec<String> = self.command.iter().map(quoted).collect();
        SnapshotRequest {
            comment: words.join(" "),
            scheduled: true,
            ..SnapshotRequest::default()
        }
    }
}

/// Become a command inside a mounted container (for cowl's own use: `exec` starts it)
#[derive(Debug, clap::Args)]
pub(super) struct EnterArgs {
    /// Where the container is mounted
    place: PathBuf,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl Verb for EnterArgs {
    fn run(&self, _context: &Context) -> Result<u8> {
        let (code, error) = enter::enter(&self.place, &self.command);
        output::complain(&error, false);
        Ok(code)
    }

    fn configured(&self) -> bool {
        false
    }
}

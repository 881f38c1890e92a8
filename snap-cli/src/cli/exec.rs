//! The command `cowl exec`, and the processes that it starts: `cowl enter`, which starts `cowl user-namespace`.

use std::ffi::OsString;
use std::path::PathBuf;

use super::mount::DriverChoice;
use super::snapshot::{Sync, take_with_hooks};
use super::{CliCommand, Context, Namespace, output};
use crate::error::{Kind, Result};
use crate::lifecycle::exec::Ids;
use crate::lifecycle::{enter, exec, mapping};
use crate::lxc::config::IdMap;
use crate::recover;
use crate::shell::quoted;
use crate::snapshot::depth::MergeScope;
use crate::snapshot::take::SnapshotRequest;
use crate::store::name::ContainerName;

/// Run a command in a container
///
/// The container is the root directory, with /proc, /dev and (read-only) /sys of this machine, in a
/// mount namespace of its own. In an LXC container with an id map, the command also has the ids of
/// the container and a pid namespace: it sees no other processes, and those that it starts end with
/// it. If the container is not mounted, it is mounted for this command. The exit code is the
/// command's; 128 plus the number of the signal that ended it; 125 if cowl failed, 126 if the command
/// cannot be executed, 127 if it does not exist.
#[derive(Debug, clap::Args)]
pub(super) struct ExecArgs {
    /// The container
    name: OsString,
    /// Take a snapshot first, with the command as its comment; `cowl prune` may remove it
    #[arg(long)]
    snapshot: bool,
    /// Run the command with your own ids, even if the container has an id map (`lxc.idmap`)
    #[arg(long)]
    host_ids: bool,
    /// Mount the container with this driver [default: the setting `driver`]
    #[arg(long, value_enum, value_name = "DRIVER")]
    driver: Option<DriverChoice>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl CliCommand for ExecArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_for(&name)?;
        // Fail before the snapshot.
        let ids = match self.host_ids {
            true => Ids::OfHost,
            false => Ids::OfContainer,
        };
        let map = exec::id_map(&mut recover::open(&store, &name)?, ids)?;
        if self.snapshot {
            take_with_hooks(
                context,
                &store,
                &name,
                (&self.options(), Sync::Background),
                |taken| {
                    output::print_note(&format!(
                        "to revert the changes of the command: cowl restore {name} {taken}"
                    ));
                    Ok(())
                },
            )?;
        }
        context.limit_depth(&mut recover::open(&store, &name)?, MergeScope::Unmounted);
        let options = exec::ExecOptions {
            map: map.as_ref(),
            driver: self.driver.map(DriverChoice::driver),
        };
        exec::exec(&store, &name, &self.command, options)
    }

    fn exit_code(&self, _kind: Kind) -> u8 {
        enter::FAILED
    }
}

impl ExecArgs {
    /// Returns the options of the snapshot that `--snapshot` takes.
    fn options(&self) -> SnapshotRequest {
        let words: Vec<String> = self.command.iter().map(quoted).collect();
        SnapshotRequest {
            comment: words.join(" "),
            scheduled: true,
            ..SnapshotRequest::default()
        }
    }
}

/// Execute a command inside a mounted container (internal: started by `exec`)
#[derive(Debug, clap::Args)]
pub(super) struct EnterArgs {
    /// The container's mount point
    mountpoint: PathBuf,
    /// The file system that must be mounted there
    #[arg(long, value_name = "MAJOR:MINOR")]
    device: Option<String>,
    /// Enter a new user namespace with this range of ids; may be given several times
    #[arg(long, value_name = "u|g INSIDE OUTSIDE COUNT")]
    id_map: Vec<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl CliCommand for EnterArgs {
    fn run(&self, _context: &Context) -> Result<u8> {
        let map = IdMap::from_values(self.id_map.iter().map(String::as_bytes));
        let target = (self.mountpoint.as_path(), self.device.as_deref());
        let (code, error) = enter::enter(target, &map, &self.command);
        output::print_error(&error, output::Format::Text);
        Ok(code)
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

/// Create a user namespace and keep it until the standard input ends (internal: started by `enter`)
#[derive(Debug, clap::Args)]
pub(super) struct NamespaceArgs {}

impl CliCommand for NamespaceArgs {
    fn run(&self, _context: &Context) -> Result<u8> {
        mapping::hold_namespace()?;
        Ok(0)
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

//! The command `cowl exec`, and the processes that it starts: `cowl enter`, which starts `cowl user-namespace`.

use std::ffi::OsString;
use std::path::PathBuf;

use super::mount::DriverChoice;
use super::snapshot::{Sync, take_with_hooks};
use super::{CliCommand, Context, Namespace, output};
use crate::container::Container;
use crate::error::{Error, Kind, Result};
use crate::lifecycle::enter::ProcessSettings;
use crate::lifecycle::exec::Ids;
use crate::lifecycle::program::ImageProgram;
use crate::lifecycle::{enter, exec, mapping};
use crate::lxc::config::IdMap;
use crate::recover;
use crate::shell::quoted;
use crate::snapshot::depth::MergeScope;
use crate::snapshot::take::SnapshotRequest;

/// Run a command in a container
///
/// The container is the root directory, with /proc, /dev and (read-only) /sys of this machine, in a
/// mount namespace of its own. In an LXC container with an id map, the command also has the ids of
/// the container and a pid namespace: it sees no other processes, and those that it starts end with
/// it. If the container is not mounted, it is mounted for this command. The exit code is the
/// command's; 128 plus the number of the signal that ended it; 125 if cowl failed, 126 if the command
/// cannot be executed, 127 if it does not exist, 2 if there is no command to run.
///
/// Without a command, exec runs that of the container's image: Entrypoint and Cmd, with the image's
/// Env, User and WorkingDir. The user is looked up in /etc/passwd and /etc/group of the container. With
/// User, the command has a terminal, a session and a pid namespace of its own, and none of your keys and
/// open files. Without an id map, `exec` is no sandbox: the ids are those of this machine, and so are
/// the network, /sys and shared memory.
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
    /// The command and its arguments [default: those of the container's image]
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl CliCommand for ExecArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = context.container(&self.name)?;
        let store = context.store_for(&name)?;
        // Fail before the snapshot.
        let mut container = recover::open(&store, &name)?;
        let process = match self.command.is_empty() {
            true => Some(image_program(&container)?),
            false => None,
        };
        let command = (process.as_ref()).map_or(&self.command, |process| &process.command);
        let ids = match self.host_ids {
            true => Ids::OfHost,
            false => Ids::OfContainer,
        };
        let map = exec::id_map(&mut container, ids)?;
        drop(container);
        if self.snapshot {
            take_with_hooks(
                context,
                &store,
                &name,
                (&snapshot_of(command), Sync::Background),
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
            process: process.as_ref(),
        };
        exec::exec(&store, &name, command, options)
    }

    fn exit_code(&self, kind: Kind) -> u8 {
        match kind {
            // There is no command to run.
            Kind::Usage if self.command.is_empty() => kind.code(),
            _ => enter::FAILED,
        }
    }
}

/// Returns the options of the snapshot that `--snapshot` takes before a command.
fn snapshot_of(command: &[OsString]) -> SnapshotRequest {
    let words: Vec<String> = command.iter().map(quoted).collect();
    SnapshotRequest {
        comment: words.join(" "),
        scheduled: true,
        ..SnapshotRequest::default()
    }
}

/// Returns the process of a container's image.
fn image_program(container: &Container<'_>) -> Result<ImageProgram> {
    let name = container.name();
    let program = match &container.manifest().image {
        Some(image) => ImageProgram::of_image(image)?,
        None => ImageProgram::default(),
    };
    match program.command.is_empty() {
        false => Ok(program),
        true => Err(Error::usage(format!(
            "no command to run: {name} has no image that defines one"
        ))
        .hint(format!("write the command: cowl exec {name} -- CMD"))),
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
    /// The command is the process of the container's image
    #[arg(long)]
    of_image: bool,
    /// A variable of its environment; may be given several times
    #[arg(long, value_name = "NAME=VALUE", requires = "of_image")]
    env: Vec<String>,
    /// Its user and group in the container
    #[arg(long, value_name = "USER[:GROUP]", requires = "of_image")]
    user: Option<String>,
    /// Its working directory
    #[arg(long, value_name = "DIR", requires = "of_image")]
    directory: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

impl CliCommand for EnterArgs {
    fn run(&self, _context: &Context) -> Result<u8> {
        let map = IdMap::from_values(self.id_map.iter().map(String::as_bytes));
        let target = (self.mountpoint.as_path(), self.device.as_deref());
        let process = ProcessSettings {
            is_of_image: self.of_image,
            environment: self.env.clone(),
            user: self.user.clone(),
            directory: self.directory.clone(),
        };
        let (code, error) = enter::enter(target, &map, &self.command, &process);
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

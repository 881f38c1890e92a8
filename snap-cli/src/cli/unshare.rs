//! The command `cowl unshare`, and `cowl hold`, the process that holds a user's namespace.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use cowl_layers::shown::Show as _;

use super::{CliCommand, Context, Namespace, output};
use crate::error::{Error, Kind, Result};
use crate::host::rootless::holder::FirstStep;
use crate::host::rootless::{self, holder, outside};
use crate::lifecycle::enter;
use crate::lifecycle::serve::detach_from_shell;

/// Run a command or a shell in the namespace of a plain user's mounts
///
/// A plain user's mounts are visible only there: `cowl unshare ls PATH`. The user is root there, and files of
/// containers have the owners that they have in the containers. For root, the command runs without a namespace. The
/// exit code is the command's; 125 if cowl failed, 126 if the command cannot be executed, 127 if it does
/// not exist.
#[derive(Debug, clap::Args)]
pub(super) struct UnshareArgs {
    /// End the namespace, for example because /etc/subuid was changed: the next command creates another one. Refused
    /// while containers are mounted or programs run in it
    #[arg(long, conflicts_with = "command")]
    stop: bool,
    /// The command and its arguments [default: $SHELL]
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<OsString>,
}

impl CliCommand for UnshareArgs {
    fn run(&self, _context: &Context) -> Result<u8> {
        if self.stop {
            rootless::stop()?;
            return Ok(0);
        }
        let shell = || std::env::var_os("SHELL").filter(|shell| !shell.is_empty());
        let mut words = self.command.iter().cloned();
        let program = words
            .next()
            .unwrap_or_else(|| shell().unwrap_or_else(|| "/bin/sh".into()));
        let error = Command::new(&program).args(words).exec();
        let code = match error.kind() {
            ErrorKind::NotFound => enter::NOT_FOUND,
            _ => enter::NOT_EXECUTABLE,
        };
        let error = Error::failed(format!("cannot run {}", program.shown())).because(error);
        output::print_error(&error, output::Format::Text);
        Ok(code)
    }

    fn exit_code(&self, _kind: Kind) -> u8 {
        enter::FAILED
    }

    fn namespace(&self) -> Namespace {
        match self.stop {
            true => Namespace::Unused,
            false => Namespace::Required,
        }
    }
}

/// Hold the namespace of a plain user (internal: started by the first command)
#[derive(Debug, clap::Args)]
pub(super) struct HoldArgs {
    /// The directory of the user's lock file
    dir: PathBuf,
    /// Hold the namespace of this process instead of a new one
    #[arg(long)]
    existing: bool,
}

impl CliCommand for HoldArgs {
    fn run(&self, _context: &Context) -> Result<u8> {
        detach_from_shell()?;
        let first = match self.existing {
            true => FirstStep::Remain,
            false => FirstStep::Create,
        };
        holder::run(&self.dir, first)?;
        Ok(0)
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

/// Run programs outside of the namespace of a plain user (internal: started by commands that enter it)
#[derive(Debug, clap::Args)]
pub(super) struct OutsideArgs {}

impl CliCommand for OutsideArgs {
    fn run(&self, _context: &Context) -> Result<u8> {
        outside::serve()?;
        Ok(0)
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

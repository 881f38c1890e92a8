//! cowl called as `lxc-snapshot`.
//!
//! Options, output and exit codes are those of LXC's own program; the snapshots are those of cowl and those that LXC
//! took. docs/lxc-snapshot.md lists the differences.

mod args;
mod front;
mod list;
mod managed;
mod messages;
mod tasks;

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};

use crate::cli::{Context, output};
use crate::config::{Config, Overrides};
use crate::error::{Error, Result};
use crate::host::rootless::{self, RunsOutside};
use crate::shell::quoted;
use crate::store::{Session, Store};
use args::{Args, Task};
use front::Front;
use list::Comments;
use messages::Messages;

/// Returns whether this process was called as `lxc-snapshot`.
pub(in crate::cli) fn is_called(args: &[OsString]) -> bool {
    let name = args.first().and_then(|arg| Path::new(arg).file_name());
    name == Some(OsStr::new("lxc-snapshot"))
}

/// Runs the command line. The exit code of every error is 1, as in LXC's own program.
pub(in crate::cli) fn main(args: &[OsString]) -> ExitCode {
    let parsed = match Args::try_parse_from(args) {
        Ok(parsed) => parsed,
        Err(error) => {
            output::print_clap_output(error);
            return ExitCode::FAILURE;
        }
    };
    output::set_verbosity(parsed.quiet, 0);
    let mut messages = Messages::new(parsed.quiet);
    match print_help(&parsed).unwrap_or_else(|| run(args, &parsed, &mut messages)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            messages.error(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints the help, the usage or the version if an option requests it; otherwise returns `None`.
fn print_help(args: &Args) -> Option<Result<()>> {
    let mut command = Args::command();
    let text = if args.help {
        command.render_long_help().to_string()
    } else if args.usage {
        command.render_usage().to_string()
    } else if args.version {
        env!("CARGO_PKG_VERSION").to_owned()
    } else {
        return None;
    };
    Some(output::print_text(text.trim_end()))
}

fn run(words: &[OsString], args: &Args, messages: &mut Messages) -> Result<()> {
    if let Some(file) = &args.logfile {
        let level = args.logpriority.as_ref().and_then(|level| level.to_str());
        messages.open_log(file, level.unwrap_or_default())?;
    }
    let request = args.request();
    let name = request.name.ok_or_else(|| {
        Error::usage("no container specified").hint("specify one: lxc-snapshot -n NAME")
    })?;
    if let Some(file) = &args.rcfile {
        std::fs::File::open(file).map_err(|error| Error::at("read", file, error))?;
        messages.note("--rcfile is ignored: the container's own config is used");
    }
    if !request.left_over.is_empty() {
        let words: Vec<_> = request.left_over.iter().map(quoted).collect();
        let words = words.join(" ");
        // The additional word may be intended as the name of the new container.
        if matches!(request.task, Task::Restore { .. }) {
            return Err(Error::usage(format!("unexpected arguments: {words}"))
                .hint("specify at most one new container: -r SNAP -N NEWNAME"));
        }
        messages.note(&format!("ignored, as by LXC's lxc-snapshot: {words}"));
    }
    let context = context(words)?;
    rootless::enter(&context.root, RunsOutside::Nothing)?;
    let lxcpath = args.lxcpath.as_deref();
    let front = Front::new(&context, &name, lxcpath, messages)?;
    match request.task {
        Task::Take => front.take(args.comment.as_deref()),
        Task::List => {
            let comments = match args.showcomments {
                true => Comments::Shown,
                false => Comments::Hidden,
            };
            list::print(&front, front.find_managed()?.as_ref(), comments)
        }
        Task::Restore { snapshot, new } => {
            let new = new.filter(|new| *new != name);
            front.restore(&snapshot, new.as_deref())
        }
        Task::DestroyAll => front.destroy_all(),
        Task::Destroy(snapshot) => front.destroy(&snapshot),
    }
}

/// Creates the context from the environment and the configuration file; `words` is the command line.
fn context(words: &[OsString]) -> Result<Context> {
    let config = Config::load(Overrides::default())?;
    output::set_color(config.color);
    let typed = words.iter().skip(1).map(quoted);
    let command_line: Vec<_> = std::iter::once("lxc-snapshot".to_owned())
        .chain(typed)
        .collect();
    Ok(Context {
        root: Store::locate(config.store.clone())?,
        session: Session {
            command: command_line.join(" "),
            patience: Duration::from_secs(config.wait.min(24 * 3600)),
            program: None,
            mounts: config.mounts,
        },
        config,
        found: RefCell::default(),
    })
}

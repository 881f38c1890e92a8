//! cowl called as `lxc-snapshot`: the options, output and exit codes of LXC's own, over snapshots that cowl
//! keeps and those that LXC made. docs/lxc-snapshot.md has what is another.

mod args;
mod front;
mod kept;
mod list;
mod said;
mod tasks;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};

use crate::cli::{Context, output};
use crate::config::{Asked, Config};
use crate::error::{Error, Result};
use crate::shell::quoted;
use crate::store::{Session, Store};
use args::{Args, Task};
use front::Front;
use said::Said;

/// Whether this is the name that we were called by.
pub(in crate::cli) fn is_called(args: &[OsString]) -> bool {
    let name = args.first().and_then(|arg| Path::new(arg).file_name());
    name == Some(OsStr::new("lxc-snapshot"))
}

/// Runs the command line. Whatever goes wrong ends with 1, as there.
pub(in crate::cli) fn main(args: &[OsString]) -> ExitCode {
    let parsed = match Args::try_parse_from(args) {
        Ok(parsed) => parsed,
        Err(error) => {
            output::usage(error);
            return ExitCode::FAILURE;
        }
    };
    output::loudness(parsed.quiet, 0);
    let mut said = Said::new(parsed.quiet);
    match told(&parsed).unwrap_or_else(|| run(args, &parsed, &mut said)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            said.error(&error);
            ExitCode::FAILURE
        }
    }
}

/// Help and the like, where that was asked for.
fn told(args: &Args) -> Option<Result<()>> {
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
    Some(output::text(text.trim_end()))
}

fn run(words: &[OsString], args: &Args, said: &mut Said) -> Result<()> {
    if let Some(file) = &args.logfile {
        let level = args.logpriority.as_ref().and_then(|level| level.to_str());
        said.keep(file, level.unwrap_or_default())?;
    }
    let meant = args.meant();
    let name = meant.name.ok_or_else(|| {
        Error::usage("no container is named").hint("name one: lxc-snapshot -n NAME")
    })?;
    if let Some(file) = &args.rcfile {
        std::fs::File::open(file).map_err(|error| Error::at("read", file, error))?;
        said.note("the container's own config is kept, not that of --rcfile");
    }
    if !meant.left_over.is_empty() {
        let words: Vec<_> = meant.left_over.iter().map(quoted).collect();
        let words = words.join(" ");
        // A name too many may have been meant for the new container.
        if matches!(meant.task, Task::Restore { .. }) {
            return Err(Error::usage(format!("what is {words} to mean?"))
                .hint("one new name at most: -r SNAP -N NEWNAME"));
        }
        said.note(&format!("ignored, as lxc-snapshot does: {words}"));
    }
    let context = context(words)?;
    let asked = args.lxcpath.as_deref();
    let front = Front::new(&context, &name, asked, said)?;
    match meant.task {
        Task::Take => front.take(args.comment.as_deref()),
        Task::List => list::print(&front, front.kept()?.as_ref(), args.showcomments, said),
        Task::Restore { snapshot, new } => {
            let new = new.filter(|new| *new != name);
            front.restore(&snapshot, new.as_deref())
        }
        Task::DestroyAll => front.destroy_all(),
        Task::Destroy(snapshot) => front.destroy(&snapshot),
    }
}

fn context(words: &[OsString]) -> Result<Context> {
    let config = Config::load(Asked::default())?;
    output::colour(config.color);
    let typed = words.iter().skip(1).map(quoted);
    let who: Vec<_> = std::iter::once("lxc-snapshot".to_owned())
        .chain(typed)
        .collect();
    Ok(Context {
        root: Store::locate(config.store.clone())?,
        session: Session {
            command: who.join(" "),
            patience: Duration::from_secs(config.wait.min(24 * 3600)),
            mounts: config.mounts,
        },
        config,
    })
}

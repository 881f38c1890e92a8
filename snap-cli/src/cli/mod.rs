//! The command line: one file a verb, each a few lines over the library; output as tables or JSON;
//! errors and exit codes. The doc comments of the argument types are the help.

mod create;
mod destroy;
mod diff;
mod exec;
mod export;
mod flatten;
mod list;
mod mount;
mod output;
mod restore;
mod serve;
mod snapshot;
mod status;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::error::{Error, Kind, Result};
use crate::host::users::quoted;
use crate::store::{Session, Store};

/// Snapshots for containers: taken, restored under the same name and compared in milliseconds.
///
/// A state is named NAME (what the container is now) or NAME@SNAP (what it was then).
///
/// Exit codes: 0 done, 1 failed, 2 wrong use, 3 no such container or snapshot, 4 busy or locked,
/// 5 the store is damaged. `exec` passes the program's own code on; cowl's own failure there is
/// 125, a program that can't be run 126, one that is not there 127.
#[derive(Debug, Parser)]
#[command(name = "cowl", version, max_term_width = 100)]
struct Cli {
    /// The folder that holds everything [default: /var/lib/cowl for root, else
    /// $XDG_DATA_HOME/cowl; the environment's COWL_STORE comes before that]
    #[arg(long, global = true, value_name = "DIR")]
    store: Option<PathBuf>,

    /// How long to wait for another command that is at work on the same container
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 10)]
    wait: u64,

    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Args),
    Mount(mount::MountArgs),
    Umount(mount::UmountArgs),
    Exec(exec::ExecArgs),
    Snapshot(snapshot::Args),
    List(list::Args),
    Diff(diff::Args),
    Restore(restore::RestoreArgs),
    Clone(restore::CloneArgs),
    Flatten(flatten::Args),
    Export(export::Args),
    Status(status::Args),
    Destroy(destroy::Args),
    #[command(hide = true)]
    Serve(serve::Args),
    #[command(hide = true)]
    Enter(exec::EnterArgs),
}

/// What every verb gets.
#[derive(Debug)]
struct Context {
    root: PathBuf,
    session: Session,
}

impl Context {
    /// The store, which must be there; what killed commands left behind is cleaned up.
    fn store(&self) -> Result<Store> {
        let store = Store::open(&self.root, self.session.clone())?;
        // Not being allowed to clean up, or a damaged container, need not keep this command from its work.
        if let Err(error) = store.collect() {
            log::info!("cleaning up: {error}");
        }
        Ok(store)
    }

    /// The store, made if need be.
    fn store_or_new(&self) -> Result<Store> {
        Store::open_or_make(&self.root, self.session.clone())
    }
}

impl Verb {
    /// Whether errors are printed as JSON too.
    fn json(&self) -> bool {
        match self {
            Self::List(args) => args.json,
            Self::Diff(args) => args.json,
            Self::Status(args) => args.json,
            _ => false,
        }
    }

    /// The exit code of a failure of cowl itself.
    fn code(&self, kind: Kind) -> u8 {
        match self {
            Self::Exec(_) => crate::container::enter::FAILED,
            _ => kind.code(),
        }
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let done = |result: Result<()>| result.map(|()| 0);
        match self {
            Self::Create(args) => done(args.run(context)),
            Self::Mount(args) => done(args.run(context)),
            Self::Umount(args) => done(args.run(context)),
            Self::Exec(args) => args.run(context),
            Self::Snapshot(args) => done(args.run(context)),
            Self::List(args) => done(args.run(context)),
            Self::Diff(args) => done(args.run(context)),
            Self::Restore(args) => done(args.run(context)),
            Self::Clone(args) => done(args.run(context)),
            Self::Flatten(args) => done(args.run(context)),
            Self::Export(args) => done(args.run(context)),
            Self::Status(args) => done(args.run(context)),
            Self::Destroy(args) => done(args.run(context)),
            Self::Serve(args) => args.run(context),
            Self::Enter(args) => Ok(args.run()),
        }
    }
}

/// The command as somebody would type it again.
fn typed(args: &[OsString]) -> String {
    let words = args.iter().skip(1).map(quoted);
    std::iter::once("cowl".to_owned())
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    output::start_log();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    let run = || {
        let asked = cli.store.clone();
        let asked = asked.or_else(|| std::env::var_os("COWL_STORE").map(PathBuf::from));
        let context = Context {
            root: Store::locate(asked)?,
            session: Session {
                who: typed(&args),
                patience: Duration::from_secs(cli.wait.min(24 * 3600)),
            },
        };
        cli.verb.run(&context)
    };
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error, cli.verb.json());
            ExitCode::from(cli.verb.code(error.kind))
        }
    }
}

/// Whether a yes is given at the terminal. Without one, `--yes` must say it.
fn confirm(question: &str) -> Result<()> {
    use std::io::{BufRead, IsTerminal, Write};
    let stdin = std::io::stdin();
    let lost = |e: std::io::Error| Error::failed("cannot ask").because(e);
    if !stdin.is_terminal() {
        return Err(
            Error::usage(format!("{question} There is no terminal to ask at"))
                .hint("add --yes if you mean it"),
        );
    }
    let mut err = std::io::stderr();
    write!(err, "{question} [y/N] ")
        .and_then(|()| err.flush())
        .map_err(lost)?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(lost)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Error::failed("nothing was done: the answer was not yes")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_grammar_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_can_be_typed_again() {
        let args = ["/usr/bin/cowl", "snapshot", "web", "-m", "a b"].map(OsString::from);
        assert_eq!(typed(&args), "cowl snapshot web -m $'a b'");
    }
}

//! The command line: one file a verb, each a few lines over the library; output as tables or JSON;
//! errors and exit codes. The doc comments of the argument types are the help.

mod adopt;
mod cat;
mod check;
mod complete;
mod config;
mod create;
mod daemon_log;
mod destroy;
mod diff;
mod du;
mod exec;
mod export;
mod flatten;
mod gc;
mod hook;
mod hooks;
mod import;
mod list;
mod losses;
mod ls;
mod lxc;
mod man;
mod meta;
mod mount;
mod output;
mod pause;
mod progress;
mod prune;
mod rename;
mod restore;
mod rm;
mod serve;
mod settle;
mod show;
mod snapshot;
mod stats;
mod status;
mod table;
mod text;
mod undelete;
mod undo;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::config::{Asked, Config, When};
use crate::container::Container;
use crate::container::durability;
use crate::error::{Error, Kind, Result};
use crate::recover::{self, complete_all};
use crate::shell::quoted;
use crate::snapshot::{ResolvedState, depth, resolve};
use crate::store::collect;
use crate::store::family;
use crate::store::lock::Lock;
use crate::store::manifest::ContainerManifest;
use crate::store::name::{Address, ContainerName};
use crate::store::reserve;
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
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "DIR")]
    store: Option<PathBuf>,

    /// How long to wait for another command that is at work on the same container [default: 10]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "SECONDS")]
    wait: Option<u64>,

    /// The configuration file [default: /etc/cowl/config.toml for root, else
    /// $XDG_CONFIG_HOME/cowl/config.toml; the environment's COWL_CONFIG comes before that]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "FILE")]
    config: Option<PathBuf>,

    /// When to colour what is printed [default: auto, on a terminal without NO_COLOR]
    #[arg(long, global = true, help_heading = EVERYWHERE, value_name = "WHEN")]
    color: Option<When>,

    /// Print nothing but data and errors: no notes, no bars
    #[arg(short, long, global = true, help_heading = EVERYWHERE, conflicts_with = "verbose")]
    quiet: bool,

    /// Tell what is done; twice: every detail
    #[arg(short, long, global = true, help_heading = EVERYWHERE, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    verb: Verbs,
}

const EVERYWHERE: &str = "Options of every command";

/// One verb of the command line.
trait Verb {
    /// Does it, and answers with the exit code.
    fn run(&self, context: &Context) -> Result<u8>;

    /// Whether errors are printed as JSON too.
    fn json(&self) -> bool {
        false
    }

    /// Whether the configuration file is read: not by what cowl starts itself, whose parent has read it.
    fn configured(&self) -> bool {
        true
    }

    /// Whether it frees space, or is needed to free some, and so is to work on a full disk as well. It may be
    /// run twice then.
    fn frees(&self) -> bool {
        false
    }

    /// The exit code of a failure of cowl itself.
    fn code(&self, kind: Kind) -> u8 {
        kind.code()
    }
}

/// The verbs: the name of each with its arguments; the help lists them in this order.
macro_rules! verbs {
    ($($(#[$attr:meta])* $name:ident($args:ty),)+) => {
        #[derive(Debug, Subcommand)]
        enum Verbs {
            $($(#[$attr])* $name($args),)+
        }

        impl Verbs {
            fn verb(&self) -> &dyn Verb {
                match self {
                    $(Self::$name(args) => args,)+
                }
            }
        }
    };
}

verbs! {
    Create(create::Args),
    Adopt(adopt::AdoptArgs),
    Release(adopt::ReleaseArgs),
    Lxc(lxc::convert::Args),
    Mount(mount::MountArgs),
    Umount(mount::UmountArgs),
    Exec(exec::ExecArgs),
    Snapshot(snapshot::Args),
    List(list::Args),
    Show(show::Args),
    Comment(meta::CommentArgs),
    Tag(meta::TagArgs),
    Protect(meta::ProtectArgs),
    Rename(rename::Args),
    Diff(diff::Args),
    Ls(ls::Args),
    Cat(cat::Args),
    Restore(restore::RestoreArgs),
    Undo(undo::Args),
    Rm(rm::Args),
    Prune(prune::Args),
    Clone(restore::CloneArgs),
    Flatten(flatten::Args),
    Export(export::Args),
    Import(import::Args),
    Du(du::Args),
    ImportLxcSnapshots(lxc::import::Args),
    Status(status::Args),
    Stats(stats::Args),
    Destroy(destroy::Args),
    Undelete(undelete::Args),
    Gc(gc::Args),
    Check(check::Args),
    Config(config::Args),
    Completions(complete::Args),
    #[command(hide = true)]
    Man(man::Args),
    #[command(hide = true)]
    Hook(hook::Args),
    #[command(hide = true)]
    Serve(serve::Args),
    #[command(hide = true)]
    Settle(settle::Args),
    #[command(hide = true)]
    Enter(exec::EnterArgs),
}

/// What every verb gets.
#[derive(Debug)]
struct Context {
    root: PathBuf,
    session: Session,
    config: Config,
}

impl Context {
    /// The store that holds the container `name`; what killed commands left behind is cleaned up.
    fn store_of(&self, name: &ContainerName) -> Result<Store> {
        self.cleaned(family::holding(&self.root, &self.session, name)?)
    }

    /// All stores of the family, the home first; none where nothing was ever made.
    fn stores(&self) -> Result<Vec<Store>> {
        let found = match family::stores(&self.root, &self.session) {
            Err(error) if error.kind == Kind::NotFound => {
                output::note(&error.to_string());
                return Ok(Vec::new());
            }
            other => other?,
        };
        found.into_iter().map(|store| self.cleaned(store)).collect()
    }

    /// The home store, made if need be.
    fn store_or_new(&self) -> Result<Store> {
        self.cleaned(Store::open_or_make(&self.root, self.session.clone())?)
    }

    #[allow(
        clippy::unused_self,
        reason = "it is a rule of how every verb opens a store"
    )]
    fn cleaned(&self, store: Store) -> Result<Store> {
        // Not being allowed to clean up, or a damaged container, need not keep this command from its work.
        if let Err(error) = complete_all(&store) {
            log::warn!("{error}");
        }
        if let Err(error) = collect::collect(&store) {
            log::info!("cleaning up: {error}");
        }
        if let Err(error) = reserve::ensure(&store) {
            log::debug!("no space is set aside: {error}");
        }
        Ok(store)
    }

    /// Gives up what is set aside for the day when the disk is full; false where nothing was.
    fn give_up_reserves(&self) -> Result<bool> {
        let mut given = false;
        for store in family::stores(&self.root, &self.session)? {
            given |= reserve::release(&store)?;
        }
        Ok(given)
    }

    /// Starts making a container's states durable in the background.
    #[allow(
        clippy::unused_self,
        reason = "it is a rule of how every verb ends that freezes a state"
    )]
    fn settle(&self, store: &Store, name: &ContainerName) {
        let begun = store
            .find_id(name)
            .and_then(|id| durability::start(store, id));
        // What the command was asked for is done, and listed as settling.
        if let Err(error) = begun {
            log::warn!("what is settling of {name} is synced by a later command: {error}");
        }
    }

    /// Returns whether a container with this manifest has more layers than are to be kept.
    fn is_too_deep(&self, manifest: &ContainerManifest) -> bool {
        depth::is_over(manifest, self.config.depth_limit)
    }

    /// Merges layers of a container that has too many of them and is not mounted.
    fn keep_depth(&self, container: &mut Container<'_>) {
        let mut bar = output::Bar::new("merging old layers");
        depth::enforce_limit(container, self.config.depth_limit, &mut |done| {
            bar.tell(done)
        });
    }
}

/// The state that an address names, ready to be read: what a killed command or a dead daemon left of its
/// container is put in order, what programs wrote is in the layers, and nothing of it is collected while the
/// lock is held.
fn read_state(context: &Context, address: &Address) -> Result<(Store, ResolvedState, Lock)> {
    let store = context.store_of(&address.container)?;
    drop(recover::open(&store, &address.container)?);
    let reading = store.lock_shared()?;
    let state = resolve(&store, address)?;
    state.flush(&store)?;
    if let Some(why) = state.describe_loss(&store)? {
        log::warn!("{why}");
    }
    Ok((store, state, reading))
}

/// The tags that words of the command line spell: KEY=VALUE, or a key alone.
fn tags(words: &[OsString]) -> Result<BTreeMap<String, String>> {
    let pair = |word: &OsString| {
        let text = word
            .to_str()
            .filter(|text| !text.chars().any(char::is_control))
            .ok_or_else(|| Error::usage(format!("{word:?} can't be a tag: it is no plain text")))?;
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        match key {
            "" => Err(Error::usage(format!("the tag \"{text}\" has no key"))
                .hint("a tag is KEY=VALUE, or a key alone")),
            key => Ok((key.to_owned(), value.to_owned())),
        }
    };
    words.iter().map(pair).collect()
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
    complete::answer();
    let args: Vec<OsString> = std::env::args_os().collect();
    output::start_log();
    if lxc::snapshot::is_called(&args) {
        return lxc::snapshot::main(&args);
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return output::usage(error),
    };
    output::loudness(cli.quiet, cli.verbose);
    output::colour(cli.color.unwrap_or_default());
    let run = || {
        let asked = Asked {
            config: cli.config.clone(),
            store: cli.store.clone(),
            wait: cli.wait,
            color: cli.color,
        };
        let config = match cli.verb.verb().configured() {
            true => Config::load(asked)?,
            false => Config::without_file(asked)?,
        };
        output::colour(config.color);
        let context = Context {
            root: Store::locate(config.store.clone())?,
            session: Session {
                command: typed(&args),
                patience: Duration::from_secs(config.wait.min(24 * 3600)),
                mounts: config.mounts,
            },
            config,
        };
        let verb = cli.verb.verb();
        match verb.run(&context) {
            Err(error) if error.is_no_space() && verb.frees() && context.give_up_reserves()? => {
                output::note("the disk is full: using the space that was set aside for this");
                verb.run(&context)
            }
            Err(error) if error.is_no_space() && error.hint.is_none() => Err(error
                .hint("make room on the disk (`cowl rm` works all the same); nothing was changed")),
            done => done,
        }
    };
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error, cli.verb.verb().json());
            ExitCode::from(cli.verb.verb().code(error.kind))
        }
    }
}

/// Whether a yes is given at the terminal. Without one, `--yes` must say it.
fn confirm(question: &str) -> Result<()> {
    use std::io::{BufRead, IsTerminal, Write};
    use std::sync::OnceLock;
    // A command that runs a second time on a full disk is not to ask twice.
    static GIVEN: OnceLock<String> = OnceLock::new();
    if GIVEN.get().is_some_and(|given| given == question) {
        return Ok(());
    }
    let stdin = std::io::stdin();
    let lost = |e: std::io::Error| Error::failed("cannot ask").because(e);
    if !stdin.is_terminal() {
        return Err(
            Error::usage(format!("{question} There is no terminal to ask at"))
                .hint("add --yes if you mean it"),
        );
    }
    let mut err = std::io::stderr();
    let plain = cowl_layers::shown::plain(question, Default::default());
    write!(err, "{plain} [y/N] ")
        .and_then(|()| err.flush())
        .map_err(lost)?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(lost)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => {
            GIVEN.get_or_init(|| question.to_owned());
            Ok(())
        }
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
    fn units_call_what_there_is() {
        let dist = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("dist");
        let mut calls = 0;
        for folder in ["systemd", "apt"] {
            for entry in std::fs::read_dir(dist.join(folder)).unwrap() {
                let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
                for call in text.split("@bindir@/").skip(1) {
                    // Up to the end of the line, or of the shell's condition.
                    let call = call.lines().next().unwrap();
                    let call = call.split(';').next().unwrap();
                    let words = call.replace("\"$name\"", "web").replace("%i", "web");
                    let words = words.replace("\"before ${what% }\"", "before");
                    Cli::try_parse_from(words.split_whitespace()).unwrap();
                    calls += 1;
                }
            }
        }
        assert_eq!(calls, 5);
    }

    #[test]
    fn a_command_can_be_typed_again() {
        let args = ["/usr/bin/cowl", "snapshot", "web", "-m", "a b"].map(OsString::from);
        assert_eq!(typed(&args), "cowl snapshot web -m $'a b'");
    }
}

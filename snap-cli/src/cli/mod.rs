//! The command line: one file for each command, output as tables or JSON, errors and exit codes.
//!
//! Each command is a few lines over the library. The doc comments of the argument types are the help texts.

mod addressing;
mod adopt;
mod cat;
mod check;
mod complete;
mod config;
mod copy;
mod create;
mod daemon_log;
mod destroy;
mod destroy_containerd;
mod diff;
mod diff_stat;
mod doctor;
mod du;
mod exec;
mod export;
mod flatten;
mod gc;
mod groups;
mod hook;
mod hooks;
mod images;
mod import;
mod list;
mod losses;
mod ls;
mod lxc;
mod man;
mod meta;
mod mount;
mod mount_helper;
mod output;
mod pause;
mod progress;
mod prune;
mod pull;
mod push;
mod receive;
mod registry;
mod rename;
mod restore;
mod rm;
mod send;
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
mod unshare;
mod upgrade;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{ColorChoice, Config, Overrides};
use crate::container::Container;
use crate::container::durability;
use crate::error::{Error, Kind, Result};
use crate::host::rootless::{self, RunsOutside};
use crate::recover::{self, complete_all};
use crate::shell::quoted;
use crate::snapshot::depth::MergeScope;
use crate::snapshot::{ResolvedState, depth, resolve};
use crate::store::collect;
use crate::store::family;
use crate::store::lock::Lock;
use crate::store::manifest::ContainerManifest;
use crate::store::name::{Address, ContainerName};
use crate::store::reserve;
use crate::store::{Session, Store};

/// Take snapshots of containers, restore them under the same name, and compare them, in milliseconds
///
/// A state is named NAME (the container's current state) or NAME@SNAP (a snapshot).
///
/// Exit codes: 0 success, 1 failure, 2 usage error, 3 no such container, snapshot or image, 4 busy or locked,
/// 5 the store is damaged. `exec` returns the exit code of the program; there, 125 is a failure of
/// cowl, 126 a program that cannot be executed, and 127 a program that does not exist.
#[derive(Debug, Parser)]
#[command(name = "cowl", version, max_term_width = 100)]
struct Cli {
    /// Use the store in this directory [default: $COWL_STORE, else /var/lib/cowl for root and
    /// $XDG_DATA_HOME/cowl for other users]
    #[arg(long, global = true, help_heading = GLOBAL_OPTIONS, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Wait up to this time for another command on the same container [default: 10]
    #[arg(long, global = true, help_heading = GLOBAL_OPTIONS, value_name = "SECONDS")]
    wait: Option<u64>,

    /// Read this configuration file [default: $COWL_CONFIG, else /etc/cowl/config.toml for root and
    /// $XDG_CONFIG_HOME/cowl/config.toml for other users]
    #[arg(long, global = true, help_heading = GLOBAL_OPTIONS, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Color the output [default: auto, which means on a terminal unless NO_COLOR is set]
    #[arg(long, global = true, help_heading = GLOBAL_OPTIONS, value_name = "WHEN")]
    color: Option<ColorChoice>,

    /// Print only data and errors, no notes or progress bars
    #[arg(short, long, global = true, help_heading = GLOBAL_OPTIONS, conflicts_with = "verbose")]
    quiet: bool,

    /// Print informational messages; if given twice, debugging messages as well
    #[arg(short, long, global = true, help_heading = GLOBAL_OPTIONS, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: CliCommands,
}

/// The heading of the options that every command accepts.
const GLOBAL_OPTIONS: &str = "Global options";

/// A command of the command line.
trait CliCommand {
    /// Runs the command and returns the exit code.
    fn run(&self, context: &Context) -> Result<u8>;

    /// Returns whether the command prints JSON; its errors are printed as JSON, too.
    fn is_json(&self) -> bool {
        false
    }

    /// Returns whether the command reads the configuration file. Internal commands do not: their parent process has
    /// read it.
    fn reads_config(&self) -> bool {
        true
    }

    /// Returns whether the command needs the namespace of a plain user.
    fn namespace(&self) -> Namespace {
        Namespace::Required
    }

    /// Returns the programs that the command of a plain user runs outside of the namespace.
    fn runs_outside(&self) -> RunsOutside {
        RunsOutside::Nothing
    }

    /// Returns whether the command frees space or is needed to free space, so that it has to work on a full disk.
    ///
    /// If the disk is full, such a command runs a second time, with the store's reserve released.
    fn frees_space(&self) -> bool {
        false
    }

    /// Returns the exit code for an error of cowl itself.
    fn exit_code(&self, kind: Kind) -> u8 {
        kind.code()
    }
}

/// A command's need of the namespace in which a plain user may mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Namespace {
    /// It mounts, or it creates or removes files of any owner.
    Required,
    /// It only reads, also where the kernel permits no namespace.
    Preferred,
    /// It opens no store, or the command that has started it is in the namespace.
    Unused,
}

/// Whether a command changes something or only prints what it would change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RunMode {
    Run,
    DryRun,
}

impl RunMode {
    /// Returns the mode that the option `--dry-run` selects.
    fn from_option(dry_run: bool) -> Self {
        match dry_run {
            true => Self::DryRun,
            false => Self::Run,
        }
    }
}

/// Declares the commands, each with the type of its arguments.
macro_rules! commands {
    ($($(#[$attr:meta])* $name:ident($args:ty),)+) => {
        #[derive(Debug, Subcommand)]
        enum CliCommands {
            $($(#[$attr])* $name($args),)+
        }

        impl CliCommands {
            fn command(&self) -> &dyn CliCommand {
                match self {
                    $(Self::$name(args) => args,)+
                }
            }
        }
    };
}

commands! {
    Create(create::Args),
    Adopt(adopt::AdoptArgs),
    Release(adopt::ReleaseArgs),
    Lxc(lxc::convert::Args),
    Mount(mount::MountArgs),
    Umount(mount::UmountArgs),
    Exec(exec::ExecArgs),
    Unshare(unshare::UnshareArgs),
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
    Pull(pull::Args),
    Push(push::Args),
    Login(registry::LoginArgs),
    Logout(registry::LogoutArgs),
    Send(send::Args),
    Receive(receive::Args),
    Copy(copy::Args),
    Du(du::Args),
    ImportLxcSnapshots(lxc::import::Args),
    Status(status::Args),
    Stats(stats::Args),
    Upgrade(upgrade::Args),
    Destroy(destroy::Args),
    Undelete(undelete::Args),
    Gc(gc::Args),
    Check(check::Args),
    Doctor(doctor::Args),
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
    #[command(hide = true)]
    LxcTemplate(lxc::template::Args),
    #[command(hide = true)]
    UserNamespace(exec::NamespaceArgs),
    #[command(hide = true)]
    Hold(unshare::HoldArgs),
    #[command(hide = true)]
    Outside(unshare::OutsideArgs),
}

/// The environment of a command: the home store's path, the session and the settings.
#[derive(Debug)]
struct Context {
    root: PathBuf,
    session: Session,
    config: Config,
    /// The container that an argument named last, and its store.
    found: RefCell<Option<(ContainerName, Store)>>,
}

impl Context {
    /// Opens all stores of the family, the home store first, and cleans them up. Returns none if no store exists.
    fn stores(&self) -> Result<Vec<Store>> {
        let found = match family::stores(&self.root, &self.session) {
            Err(error) if error.kind == Kind::NotFound => {
                output::print_note(&error.to_string());
                return Ok(Vec::new());
            }
            other => other?,
        };
        found
            .into_iter()
            .map(|store| self.clean_up(store))
            .collect()
    }

    /// Opens the home store, creates it if necessary, and cleans it up.
    fn open_or_create_store(&self) -> Result<Store> {
        self.clean_up(Store::open_or_make(&self.root, self.session.clone())?)
    }

    /// Completes or rolls back interrupted operations of a store, collects garbage, and renews the reserve.
    #[allow(
        clippy::unused_self,
        reason = "every command opens stores through the context"
    )]
    fn clean_up(&self, store: Store) -> Result<Store> {
        // A missing permission or a damaged container does not prevent the command.
        if let Err(error) = complete_all(&store) {
            log::warn!("{error}");
        }
        if let Err(error) = collect::collect(&store) {
            log::info!("cannot collect garbage: {error}");
        }
        if let Err(error) = reserve::ensure(&store) {
            log::debug!("cannot reserve space: {error}");
        }
        Ok(store)
    }

    /// Releases the space that the stores reserve for a full disk; returns whether any was reserved.
    fn release_reserves(&self) -> Result<bool> {
        let mut released = false;
        for store in family::stores(&self.root, &self.session)? {
            released |= reserve::release(&store)?;
        }
        Ok(released)
    }

    /// Starts a background sync of a container's settling states.
    #[allow(
        clippy::unused_self,
        reason = "every command that freezes a state ends through the context"
    )]
    fn settle(&self, store: &Store, name: &ContainerName) {
        let begun = store
            .find_id(name)
            .and_then(|id| durability::start(store, id));
        // The command has succeeded, and its state is listed as settling.
        if let Err(error) = begun {
            log::warn!("cannot sync {name} now, a later command syncs it: {error}");
        }
    }

    /// Returns whether a container with this manifest has more layers than the limit.
    fn is_too_deep(&self, manifest: &ContainerManifest) -> bool {
        depth::is_over(manifest, self.config.depth_limit)
    }

    /// Merges layers of a container that exceeds the limit.
    fn limit_depth(&self, container: &mut Container<'_>, scope: MergeScope) {
        let mut bar = output::Bar::new("merging old layers");
        depth::enforce_limit(container, self.config.depth_limit, scope, &mut |done| {
            bar.update(done)
        });
    }
}

/// Resolves an address to a state that can be read.
///
/// Interrupted operations on the container are completed or rolled back first, and the daemon's cached writes are
/// flushed to the layers. The layers are not collected while the returned lock is held.
fn read_state(context: &Context, address: &Address) -> Result<(Store, ResolvedState, Lock)> {
    let store = context.store_for(&address.container)?;
    drop(recover::open(&store, &address.container)?);
    let reading = store.lock_shared()?;
    let state = resolve(&store, address)?;
    state.flush(&store)?;
    if let Some(why) = state.describe_loss(&store)? {
        log::warn!("{why}");
    }
    Ok((store, state, reading))
}

/// Parses tags of the command line: KEY=VALUE or KEY.
fn parse_tags(words: &[OsString]) -> Result<BTreeMap<String, String>> {
    let pair = |word: &OsString| {
        let text = word
            .to_str()
            .filter(|text| !text.chars().any(char::is_control))
            .ok_or_else(|| {
                Error::usage(format!(
                    "invalid tag \"{}\": must be printable UTF-8",
                    output::shown(word.as_encoded_bytes())
                ))
            })?;
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        match key {
            "" => Err(Error::usage(format!("the tag \"{text}\" has no key"))
                .hint("write a tag as KEY=VALUE or KEY")),
            key => Ok((key.to_owned(), value.to_owned())),
        }
    };
    words.iter().map(pair).collect()
}

/// Returns the command line, quoted for a shell; `args` begins with the name of the program.
fn command_line(args: &[OsString]) -> String {
    let words = args.iter().skip(1).map(quoted);
    std::iter::once("cowl".to_owned())
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Parses a command line; `--help` lists the commands in groups.
fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    let mut command = groups::with_grouped_help(Cli::command());
    let mut matches = command.try_get_matches_from_mut(args)?;
    Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    complete::answer();
    let mut args: Vec<OsString> = std::env::args_os().collect();
    output::init_log();
    let helper = match mount_helper::translate(&args) {
        None => None,
        Some(Ok(mount_helper::Call::Nothing)) => return ExitCode::SUCCESS,
        Some(Ok(mount_helper::Call::Command(command))) => {
            args = command;
            Some(mount_helper::exit_code)
        }
        Some(Err(error)) => {
            output::print_clap_output(error);
            return ExitCode::from(mount_helper::exit_code(Kind::Usage));
        }
    };
    if lxc::snapshot::is_called(&args) {
        return lxc::snapshot::main(&args);
    }
    let cli = match parse(&args) {
        Ok(cli) => cli,
        Err(error) => return output::print_clap_output(error),
    };
    output::set_verbosity(cli.quiet, cli.verbose);
    output::set_color(cli.color.unwrap_or_default());
    let command = cli.command.command();
    let namespace = match helper {
        // The mount would not be visible to the caller of mount(8).
        Some(_) => Namespace::Unused,
        None => command.namespace(),
    };
    match run(&cli, (command, namespace), &args) {
        Ok(code) => ExitCode::from(code),
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::print_error(&error, output::Format::from_option(command.is_json()));
            let code =
                helper.map_or_else(|| command.exit_code(error.kind), |code| code(error.kind));
            ExitCode::from(code)
        }
    }
}

/// Runs a command; if the disk is full and the command frees space, runs it again with the reserves released.
fn run(
    cli: &Cli,
    (command, namespace): (&dyn CliCommand, Namespace),
    args: &[OsString],
) -> Result<u8> {
    let overrides = Overrides {
        config: cli.config.clone(),
        store: cli.store.clone(),
        wait: cli.wait,
        color: cli.color,
    };
    let config = match command.reads_config() {
        true => Config::load(overrides)?,
        false => Config::without_file(overrides)?,
    };
    output::set_color(config.color);
    let context = Context {
        root: Store::locate(config.store.clone())?,
        session: Session {
            command: command_line(args),
            patience: Duration::from_secs(config.wait.min(24 * 3600)),
            mounts: config.mounts,
            program: None,
        },
        config,
        found: RefCell::default(),
    };
    enter((namespace, command.runs_outside()), &context.root)?;
    match command.run(&context) {
        Err(error)
            if error.is_no_space() && command.frees_space() && context.release_reserves()? =>
        {
            output::print_note(
                "the disk is full: using the space that is reserved for this command",
            );
            command.run(&context)
        }
        Err(error) if error.is_no_space() && error.hint.is_none() => {
            Err(error.hint("nothing was changed; free some space (`cowl rm` works on a full disk)"))
        }
        done => done,
    }
}

/// Enters the namespace of a plain user, if the command needs it.
fn enter((need, outside): (Namespace, RunsOutside), store: &Path) -> Result<()> {
    let is_absent = || store.symlink_metadata().is_err();
    if need == Namespace::Unused || (need == Namespace::Preferred && is_absent()) {
        return Ok(());
    }
    match rootless::enter(store, outside) {
        Err(error) if need == Namespace::Preferred => {
            log::info!("{error}");
            Ok(())
        }
        done => done,
    }
}

/// Asks a question at the terminal and fails unless the answer is yes. Without a terminal, `--yes` is required.
fn confirm(question: &str) -> Result<()> {
    use std::io::{BufRead, IsTerminal, Write};
    use std::sync::OnceLock;
    // A command that runs a second time on a full disk must not ask twice.
    static CONFIRMED: OnceLock<String> = OnceLock::new();
    if CONFIRMED.get().is_some_and(|asked| asked == question) {
        return Ok(());
    }
    let stdin = std::io::stdin();
    let failed = |e: std::io::Error| Error::failed("cannot ask for confirmation").because(e);
    if !stdin.is_terminal() {
        return Err(Error::usage(format!(
            "cannot ask for confirmation without a terminal: {question}"
        ))
        .hint("add --yes to confirm"));
    }
    let mut err = std::io::stderr();
    let plain = cowl_layers::shown::plain(question, Default::default());
    write!(err, "{plain} [y/N] ")
        .and_then(|()| err.flush())
        .map_err(failed)?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(failed)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => {
            CONFIRMED.get_or_init(|| question.to_owned());
            Ok(())
        }
        _ => Err(Error::failed("nothing was done: the answer was not yes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn installed_units_contain_valid_command_lines() {
        let dist = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("dist");
        let mut calls = 0;
        for dir in ["systemd", "apt"] {
            for entry in std::fs::read_dir(dist.join(dir)).unwrap() {
                let path = entry.unwrap().path();
                if path.ends_with("cowl-snapshotter.service") {
                    continue;
                }
                let text = std::fs::read_to_string(path).unwrap();
                for call in text.split("@bindir@/").skip(1) {
                    // The command ends at the end of the line, or at a semicolon of the shell.
                    let call = call.lines().next().unwrap();
                    let call = call.split(';').next().unwrap();
                    let words = call.replace("\"$name\"", "web").replace("%i", "web");
                    let words = words.replace("\"before ${command% }\"", "before");
                    Cli::try_parse_from(words.split_whitespace()).unwrap();
                    calls += 1;
                }
            }
        }
        assert_eq!(calls, 5);
    }

    #[test]
    fn command_lines_are_quoted() {
        let args = ["/usr/bin/cowl", "snapshot", "web", "-m", "a b"].map(OsString::from);
        assert_eq!(command_line(&args), "cowl snapshot web -m $'a b'");
    }
}

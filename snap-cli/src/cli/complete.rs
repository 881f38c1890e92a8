//! Shell completion: the scripts for the shells, and the candidates that the scripts request, with the names of
//! containers and snapshots.
//!
//! Completion only reads and takes no locks. If it cannot read something, it offers no candidates: an error message
//! would disturb the command line that the user is editing.
//!
//! The value name of an argument in the help (`NAME`, `NAME[@SNAP]`, `SNAP`) determines its candidates, so that
//! commands need no code for completion.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Arg, Command, CommandFactory, ValueHint};
use clap_complete::CompleteEnv;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{Bash, EnvCompleter, Fish, Shells, Zsh};

use super::{Cli, CliCommand, Context, Namespace, output};
use crate::config::{Config, Overrides};
use crate::error::{Error, Result};
use crate::store::containerd::is_digest_name;
use crate::store::family;
use crate::store::name::ContainerName;
use crate::store::{Session, Store};

/// The environment variable that a script sets to request candidates.
const VARIABLE: &str = "COWL_COMPLETE";

const SHELLS: Shells<'_> = Shells(&[&OwnBash, &Zsh, &Fish]);

/// Print a shell's completion script
///
/// bash: cowl completions bash > /etc/bash_completion.d/cowl; zsh: cowl completions zsh > _cowl in a
/// directory of $fpath; fish: cowl completions fish > ~/.config/fish/completions/cowl.fish.
/// `cargo xtask install` installs all three.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell
    shell: Shell,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl CliCommand for Args {
    fn run(&self, _context: &Context) -> Result<u8> {
        let mut script = Vec::new();
        let shell: &dyn EnvCompleter = match self.shell {
            Shell::Bash => &OwnBash,
            Shell::Zsh => &Zsh,
            Shell::Fish => &Fish,
        };
        shell
            .write_registration(VARIABLE, "cowl", "cowl", "cowl", &mut script)
            .map_err(|error| Error::failed("cannot generate the script").because(error))?;
        if matches!(self.shell, Shell::Zsh) {
            script.extend_from_slice(ZSH_FIRST_CALL.as_bytes());
        }
        output::write_line(script.trim_ascii())?;
        Ok(0)
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

/// The end of the script for zsh.
///
/// zsh runs a script that it finds in $fpath as the completion function on its first call, so that the script must
/// complete, too.
const ZSH_FIRST_CALL: &str =
    "if [[ $funcstack[1] == _cowl ]]; then\n    _clap_dynamic_completer_cowl \"$@\"\nfi\n";

/// Prints the candidates and exits if a completion script called this process.
pub(super) fn answer() {
    CompleteEnv::with_factory(|| with_completers(Cli::command()))
        .var(VARIABLE)
        .bin("cowl")
        .completer("cowl")
        .shells(SHELLS)
        .complete();
}

/// The kind of an argument's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueKind {
    Container,
    /// NAME or NAME@SNAP.
    Address,
    /// NAME followed by SNAPs, or NAME@SNAPs.
    Either,
    /// SNAP, of the container that an earlier word names.
    Snapshot,
    /// A..B, of the container that an earlier word names.
    Range,
    Path,
    Other,
}

/// Determines the kind of an argument's value from its value name.
fn value_kind(command: &str, arg: &Arg) -> ValueKind {
    if !arg.get_action().takes_values() {
        return ValueKind::Other;
    }
    let names = arg.get_value_names().unwrap_or_default();
    let name = names.first().map_or("", |name| name.as_str());
    // These take names of containers that do not exist yet.
    let new = matches!(command, "create" | "adopt" | "import" | "undelete");
    let has = |word: &str| name.split(['|', ':']).any(|part| part == word);
    if arg.is_positional() && !new {
        if name.contains('@') && name.contains(' ') {
            return ValueKind::Either;
        }
        if name.contains('@') {
            return ValueKind::Address;
        }
        if name.contains("..") {
            return ValueKind::Range;
        }
        if name == "SNAP" {
            return ValueKind::Snapshot;
        }
        if name == "NAME" {
            return ValueKind::Container;
        }
    }
    if has("DIR") || has("FILE") || has("PATH") {
        return ValueKind::Path;
    }
    ValueKind::Other
}

/// Adds a completer to each argument.
fn with_completers(cli: Command) -> Command {
    cli.mut_subcommands(|command| {
        let name = command.get_name().to_owned();
        command.mut_args(|arg| {
            let completer = match value_kind(&name, &arg) {
                ValueKind::Container => ArgValueCompleter::new(containers),
                ValueKind::Address => ArgValueCompleter::new(addresses),
                ValueKind::Either => ArgValueCompleter::new(either),
                ValueKind::Snapshot => ArgValueCompleter::new(snapshots),
                ValueKind::Range => ArgValueCompleter::new(ranges),
                ValueKind::Path => return arg.value_hint(ValueHint::AnyPath),
                ValueKind::Other => return arg,
            };
            arg.add(completer)
        })
    })
}

fn containers(current: &OsStr) -> Vec<CompletionCandidate> {
    let request = Request::read();
    offer(current, request.containers())
}

fn addresses(current: &OsStr) -> Vec<CompletionCandidate> {
    let request = Request::read();
    let Some(typed) = current.to_str() else {
        return Vec::new();
    };
    if let Some((container, _)) = typed.split_once('@') {
        return offer(current, request.addresses(container));
    }
    let mut names = request.containers();
    names.retain(|(name, _)| name.starts_with(typed));
    // If only one container matches, its snapshots are offered as well.
    if let [(name, _)] = names.as_slice() {
        let snapshots = request.addresses(name);
        names.extend(snapshots);
    }
    offer(current, names)
}

fn snapshots(current: &OsStr) -> Vec<CompletionCandidate> {
    let request = Request::read();
    offer(current, request.snapshots_before())
}

fn either(current: &OsStr) -> Vec<CompletionCandidate> {
    let request = Request::read();
    match request.container_before() {
        Some(container) => offer(current, request.snapshots(&container)),
        None => addresses(current),
    }
}

fn ranges(current: &OsStr) -> Vec<CompletionCandidate> {
    let request = Request::read();
    let snapshots = request.snapshots_before();
    let from = current.to_str().and_then(|text| text.split_once(".."));
    let ranges = snapshots.into_iter().map(|(name, help)| match from {
        Some((from, _)) => (format!("{from}..{name}"), help),
        None => (format!("{name}.."), help),
    });
    offer(current, ranges.collect())
}

/// Names, each with a description that may be empty.
type Names = Vec<(String, String)>;

/// Converts the names that begin with the word at the cursor to candidates.
fn offer(current: &OsStr, names: Names) -> Vec<CompletionCandidate> {
    let fits = |name: &str| {
        current
            .to_str()
            .is_some_and(|typed| name.starts_with(typed))
    };
    names
        .into_iter()
        .filter(|(name, _)| fits(name))
        .map(|(name, help)| {
            let help = (!help.is_empty()).then(|| output::shown(help.as_bytes()).into());
            CompletionCandidate::new(name).help(help)
        })
        .collect()
}

/// A request of a completion script: the words of the command line, and the stores that can be read.
struct Request {
    stores: Vec<Store>,
    words: Vec<OsString>,
}

impl Request {
    /// Reads the request from this process's command line.
    fn read() -> Self {
        let words = std::env::args_os().skip_while(|word| word != "--").skip(1);
        let words: Vec<OsString> = words.collect();
        let overrides = Overrides {
            config: option(&words, "--config"),
            store: option(&words, "--store"),
            ..Overrides::default()
        };
        let session = Session {
            command: "cowl (completion)".to_owned(),
            patience: Duration::ZERO,
            mounts: Default::default(),
            program: None,
        };
        let stores = Config::load(overrides)
            .and_then(|config| Store::locate(config.store))
            .and_then(|root| family::stores(&root, &session));
        Self {
            stores: stores.unwrap_or_default(),
            words,
        }
    }

    fn containers(&self) -> Names {
        let names = self.stores.iter().flat_map(|store| store.names());
        let mut names: Names = names
            .flatten()
            .filter_map(|(_, name)| match name {
                // No command accepts the snapshots of images.
                Ok(name) if is_digest_name(name.as_str()) => None,
                Ok(name) => Some((name.to_string(), String::new())),
                Err(_) => None,
            })
            .collect();
        names.sort();
        names
    }

    /// Returns the snapshots of a container, oldest first, with their comments.
    fn snapshots(&self, container: &str) -> Names {
        let Ok(name) = ContainerName::parse(container) else {
            return Names::new();
        };
        let found = self
            .stores
            .iter()
            .find_map(|store| match store.find(&name) {
                Ok((_, record)) => Some(record.body.snapshots),
                Err(_) => None,
            });
        let found = found.unwrap_or_default().into_iter();
        found.map(|s| (s.name.to_string(), s.comment)).collect()
    }

    fn addresses(&self, container: &str) -> Names {
        let snapshots = self.snapshots(container).into_iter();
        snapshots
            .map(|(snapshot, comment)| (format!("{container}@{snapshot}"), comment))
            .collect()
    }

    /// Returns the first container that is named before the word at the cursor.
    fn container_before(&self) -> Option<String> {
        let containers = self.containers();
        let (_, before) = self.words.split_last()?;
        before.iter().skip(1).find_map(|word| {
            let (name, _) = containers.iter().find(|(name, _)| word == name.as_str())?;
            Some(name.clone())
        })
    }

    /// Returns the snapshots of the container that is named before the word at the cursor.
    fn snapshots_before(&self) -> Names {
        let container = self.container_before();
        container.map_or_else(Names::new, |name| self.snapshots(&name))
    }
}

/// Returns the value of an option on a command line, in either form: `--name=value` or `--name value`.
fn option(words: &[OsString], name: &str) -> Option<PathBuf> {
    let given = words.iter().find_map(|word| {
        let value = word.to_str()?.strip_prefix(name)?.strip_prefix('=')?;
        Some(PathBuf::from(value))
    });
    let next = || {
        let at = words.iter().position(|word| word == name)?;
        words.get(at + 1).map(PathBuf::from)
    };
    given.or_else(next)
}

/// Completion for bash, with a script of our own.
///
/// bash splits words at the characters of COMP_WORDBREAKS, which include `@`, `:` and `=`, and replaces only the part
/// after the last of them (for `@`, including it). The script joins the words again, and cuts that prefix from the
/// candidates.
struct OwnBash;

const BASH: &str = r#"# Completion of cowl for bash.
_cowl() {
    local IFS=$' \t\n' rest=${COMP_LINE:0:COMP_POINT} word lead i breaks= cut
    local -a words=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        lead=${rest%%[^[:blank:]]*}
        rest=${rest:${#lead}}
        ((i < COMP_CWORD)) || word=$rest
        rest=${rest:${#word}}
        if ((i > 0)) && [[ -z $lead && -n $word ]]; then
            words[${#words[@]}-1]+=$word
        elif [[ -n $word || -n $lead || $i -eq 0 ]]; then
            words+=("$word")
        fi
    done
    for i in @ : =; do
        [[ $COMP_WORDBREAKS == *"$i"* ]] && breaks+=$i
    done
    word=${words[${#words[@]}-1]}
    cut=
    [[ -n $breaks && $word == *[$breaks]* ]] && cut=${word%"${word##*[$breaks]}"}
    cut=${cut%@}
    IFS=$'\013'
    COMPREPLY=($(_CLAP_IFS="$IFS" _CLAP_COMPLETE_INDEX=$((${#words[@]} - 1)) \
        VARIABLE=bash command "COMPLETER" -- "${words[@]}" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/:.] ]] && compopt -o nospace
    return 0
}
complete -o bashdefault -F _cowl BIN
"#;

impl EnvCompleter for OwnBash {
    fn name(&self) -> &'static str {
        "bash"
    }

    fn is(&self, name: &str) -> bool {
        name == "bash"
    }

    fn write_registration(
        &self,
        var: &str,
        _name: &str,
        bin: &str,
        completer: &str,
        buf: &mut dyn Write,
    ) -> std::io::Result<()> {
        let script = BASH
            .replace("VARIABLE", var)
            .replace("COMPLETER", completer)
            .replace("BIN", bin);
        buf.write_all(script.as_bytes())
    }

    fn write_complete(
        &self,
        cmd: &mut Command,
        args: Vec<OsString>,
        current_dir: Option<&Path>,
        buf: &mut dyn Write,
    ) -> std::io::Result<()> {
        Bash.write_complete(cmd, args, current_dir, buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_existing_objects_are_completed() {
        with_completers(Cli::command()).debug_assert();
        let cli = with_completers(Cli::command());
        for command in cli
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            for arg in command.get_positionals() {
                let name = format!("{} {}", command.get_name(), arg.get_id());
                let completed = arg.get::<ArgValueCompleter>().is_some();
                if arg.get_id() == "name" || arg.get_id() == "source" {
                    let new = matches!(
                        command.get_name(),
                        "create" | "adopt" | "import" | "undelete"
                    );
                    assert!(completed != new, "{name}");
                }
            }
        }
        let kind = |command: &str, id: &str| {
            let command = cli.find_subcommand(command).unwrap();
            let mut args = command.get_arguments();
            let arg = args.find(|arg| arg.get_id() == id).unwrap();
            value_kind(command.get_name(), arg)
        };
        assert_eq!(kind("mount", "address"), ValueKind::Address);
        assert_eq!(kind("diff", "from"), ValueKind::Address);
        assert_eq!(kind("restore", "snapshot"), ValueKind::Snapshot);
        assert_eq!(kind("flatten", "range"), ValueKind::Range);
        assert_eq!(kind("rm", "targets"), ValueKind::Either);
        assert_eq!(kind("create", "name"), ValueKind::Other);
        assert_eq!(kind("create", "from"), ValueKind::Path);
        assert_eq!(kind("clone", "new"), ValueKind::Other);
    }

    #[test]
    fn options_are_recognized_in_both_forms() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let store = |text| option(&words(text), "--store");
        assert_eq!(store("cowl --store /a list"), Some(PathBuf::from("/a")));
        assert_eq!(store("cowl list --store=/b"), Some(PathBuf::from("/b")));
        assert_eq!(store("cowl list --stored /b"), None);
        assert_eq!(store("cowl list --store"), None);
    }
}

//! Completion in the shell: the script that a shell asks for, and the answers to it, with the names of
//! containers and snapshots that there are. It only reads, takes no lock, and where it can't read there is
//! nothing to offer: a completion is not the place for an error.
//!
//! Which argument takes which names is told by how the help calls it (`NAME`, `NAME[@SNAP]`, `SNAP`), so
//! that a verb gets completion without doing anything for it.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Arg, Command, CommandFactory, ValueHint};
use clap_complete::CompleteEnv;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};
use clap_complete::env::{Bash, EnvCompleter, Fish, Shells, Zsh};

use super::{Cli, Context, Verb, output};
use crate::config::{Asked, Config};
use crate::error::{Error, Result};
use crate::store::family;
use crate::store::name::ContainerName;
use crate::store::{Session, Store};

/// Set by the script when it asks.
const VARIABLE: &str = "COWL_COMPLETE";

const SHELLS: Shells<'_> = Shells(&[&OwnBash, &Zsh, &Fish]);

/// Print the script that lets a shell complete cowl's verbs, options and names
///
/// bash: cowl completions bash > /etc/bash_completion.d/cowl; zsh: cowl completions zsh into a file
/// _cowl in a folder of $fpath; fish: cowl completions fish > ~/.config/fish/completions/cowl.fish.
/// `cargo xtask install` does it for all three.
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

impl Verb for Args {
    fn run(&self, _context: &Context) -> Result<u8> {
        let mut script = Vec::new();
        let shell: &dyn EnvCompleter = match self.shell {
            Shell::Bash => &OwnBash,
            Shell::Zsh => &Zsh,
            Shell::Fish => &Fish,
        };
        shell
            .write_registration(VARIABLE, "cowl", "cowl", "cowl", &mut script)
            .map_err(|error| Error::failed("cannot make the script").because(error))?;
        if matches!(self.shell, Shell::Zsh) {
            script.extend_from_slice(ZSH_FIRST.as_bytes());
        }
        output::result(script.trim_ascii())?;
        Ok(0)
    }

    fn configured(&self) -> bool {
        false
    }
}

/// Found in $fpath, the script is run as the completion itself the first time: then it has to complete, too.
const ZSH_FIRST: &str =
    "if [[ $funcstack[1] == _cowl ]]; then\n    _clap_dynamic_completer_cowl \"$@\"\nfi\n";

/// Answers a shell that asks what could stand at the cursor; does nothing otherwise.
pub(super) fn answer() {
    CompleteEnv::with_factory(|| with_names(Cli::command()))
        .var(VARIABLE)
        .bin("cowl")
        .completer("cowl")
        .shells(SHELLS)
        .complete();
}

/// What an argument takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Container,
    /// NAME or NAME@SNAP.
    Address,
    /// NAME and then its SNAPs, or NAME@SNAPs.
    Either,
    /// SNAP, of the container that is named before it.
    Snapshot,
    /// A..B, of the container that is named before it.
    Range,
    Path,
    Other,
}

/// What an argument takes, by how the help calls it.
fn takes(verb: &str, arg: &Arg) -> Takes {
    if !arg.get_action().takes_values() {
        return Takes::Other;
    }
    let names = arg.get_value_names().unwrap_or_default();
    let name = names.first().map_or("", |name| name.as_str());
    // New names, and those of containers that are not here yet.
    let new = matches!(verb, "create" | "adopt" | "import" | "undelete");
    let has = |word: &str| name.split(['|', ':']).any(|part| part == word);
    if arg.is_positional() && !new {
        if name.contains('@') && name.contains(' ') {
            return Takes::Either;
        }
        if name.contains('@') {
            return Takes::Address;
        }
        if name.contains("..") {
            return Takes::Range;
        }
        if name == "SNAP" {
            return Takes::Snapshot;
        }
        if name == "NAME" {
            return Takes::Container;
        }
    }
    if has("DIR") || has("FILE") || has("PATH") {
        return Takes::Path;
    }
    Takes::Other
}

/// The command line with what completes each argument.
fn with_names(cli: Command) -> Command {
    cli.mut_subcommands(|verb| {
        let name = verb.get_name().to_owned();
        verb.mut_args(|arg| {
            let completer = match takes(&name, &arg) {
                Takes::Container => ArgValueCompleter::new(containers),
                Takes::Address => ArgValueCompleter::new(addresses),
                Takes::Either => ArgValueCompleter::new(either),
                Takes::Snapshot => ArgValueCompleter::new(snapshots),
                Takes::Range => ArgValueCompleter::new(ranges),
                Takes::Path => return arg.value_hint(ValueHint::AnyPath),
                Takes::Other => return arg,
            };
            arg.add(completer)
        })
    })
}

fn containers(current: &OsStr) -> Vec<CompletionCandidate> {
    let known = Known::look();
    offer(current, known.containers())
}

fn addresses(current: &OsStr) -> Vec<CompletionCandidate> {
    let known = Known::look();
    let Some(typed) = current.to_str() else {
        return Vec::new();
    };
    if let Some((container, _)) = typed.split_once('@') {
        return offer(current, known.addresses(container));
    }
    let mut names = known.containers();
    names.retain(|(name, _)| name.starts_with(typed));
    // The only one it can be: its snapshots are what there is to choose from.
    if let [(name, _)] = names.as_slice() {
        let snapshots = known.addresses(name);
        names.extend(snapshots);
    }
    offer(current, names)
}

fn snapshots(current: &OsStr) -> Vec<CompletionCandidate> {
    let known = Known::look();
    offer(current, known.snapshots_before())
}

fn either(current: &OsStr) -> Vec<CompletionCandidate> {
    let known = Known::look();
    match known.container_before() {
        Some(container) => offer(current, known.snapshots(&container)),
        None => addresses(current),
    }
}

fn ranges(current: &OsStr) -> Vec<CompletionCandidate> {
    let known = Known::look();
    let snapshots = known.snapshots_before();
    let from = current.to_str().and_then(|text| text.split_once(".."));
    let ranges = snapshots.into_iter().map(|(name, help)| match from {
        Some((from, _)) => (format!("{from}..{name}"), help),
        None => (format!("{name}.."), help),
    });
    offer(current, ranges.collect())
}

/// Names with a remark each.
type Names = Vec<(String, String)>;

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

/// What there is in the stores, as far as it can be read, and what is typed already.
struct Known {
    stores: Vec<Store>,
    words: Vec<OsString>,
}

impl Known {
    fn look() -> Self {
        let asked_with = std::env::args_os().skip_while(|word| word != "--").skip(1);
        let words: Vec<OsString> = asked_with.collect();
        let asked = Asked {
            config: option(&words, "--config"),
            store: option(&words, "--store"),
            ..Asked::default()
        };
        let session = Session {
            command: "cowl (completion)".to_owned(),
            patience: Duration::ZERO,
            mounts: Default::default(),
        };
        let stores = Config::load(asked)
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
                Ok(name) => Some((name.to_string(), String::new())),
                Err(_) => None,
            })
            .collect();
        names.sort();
        names
    }

    /// The snapshots of a container, oldest first, with their comments.
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

    /// The container that is typed already, before the word at the cursor.
    fn container_before(&self) -> Option<String> {
        let containers = self.containers();
        let (_, before) = self.words.split_last()?;
        before.iter().skip(1).find_map(|word| {
            let known = containers.iter().find(|(name, _)| word == name.as_str())?;
            Some(known.0.clone())
        })
    }

    /// The snapshots of that container.
    fn snapshots_before(&self) -> Names {
        let container = self.container_before();
        container.map_or_else(Names::new, |name| self.snapshots(&name))
    }
}

/// The value of an option among words.
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

/// bash cuts words at the characters of COMP_WORDBREAKS, `@`, `:` and `=` among them, and replaces only
/// what stands after the last one (an `@` with it): its script joins the words again and cuts the answers.
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
    fn every_argument_that_names_something_is_completed() {
        with_names(Cli::command()).debug_assert();
        let cli = with_names(Cli::command());
        for verb in cli.get_subcommands().filter(|verb| !verb.is_hide_set()) {
            for arg in verb.get_positionals() {
                let name = format!("{} {}", verb.get_name(), arg.get_id());
                let completed = arg.get::<ArgValueCompleter>().is_some();
                if arg.get_id() == "name" || arg.get_id() == "source" {
                    let new = matches!(verb.get_name(), "create" | "adopt" | "import" | "undelete");
                    assert!(completed != new, "{name}");
                }
            }
        }
        let of = |verb: &str, id: &str| {
            let verb = cli.find_subcommand(verb).unwrap();
            let arg = verb.get_arguments().find(|arg| arg.get_id() == id).unwrap();
            takes(verb.get_name(), arg)
        };
        assert_eq!(of("mount", "address"), Takes::Address);
        assert_eq!(of("diff", "from"), Takes::Address);
        assert_eq!(of("restore", "snapshot"), Takes::Snapshot);
        assert_eq!(of("flatten", "range"), Takes::Range);
        assert_eq!(of("rm", "what"), Takes::Either);
        assert_eq!(of("create", "name"), Takes::Other);
        assert_eq!(of("create", "from"), Takes::Path);
        assert_eq!(of("clone", "new"), Takes::Other);
    }

    #[test]
    fn options_are_found_in_both_forms() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let store = |text| option(&words(text), "--store");
        assert_eq!(store("cowl --store /a list"), Some(PathBuf::from("/a")));
        assert_eq!(store("cowl list --store=/b"), Some(PathBuf::from("/b")));
        assert_eq!(store("cowl list --stored /b"), None);
        assert_eq!(store("cowl list --store"), None);
    }
}

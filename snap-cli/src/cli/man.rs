//! The manual, written from the same text as the help, with what the help leaves out: exit codes, the
//! environment, files.

use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use roff::{Roff, bold, roman};

use super::{Cli, Context, Verb, output};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// Write the manual pages into a folder (for those who build and install cowl)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// A section of the manual: terms with what each means.
type Section = (&'static str, &'static [(&'static str, &'static str)]);

const EXIT_STATUS: Section = (
    "EXIT STATUS",
    &[
        ("0", "Done."),
        (
            "1",
            "Something failed; or a hook after the command did, and the command is done.",
        ),
        (
            "2",
            "The command line, the environment or the configuration file can't be used like this.",
        ),
        ("3", "There is no such container, snapshot or store."),
        ("4", "Somebody uses it, or holds its lock."),
        ("5", "The store is damaged."),
        (
            "125, 126, 127",
            "`exec` only: cowl itself failed; the program can't be run; it is not there. Any other code is the program's own, or 128 and the number of the signal that ended it.",
        ),
    ],
);

const ENVIRONMENT: Section = (
    "ENVIRONMENT",
    &[
        ("COWL_CONFIG", "The configuration file, as --config."),
        (
            "COWL_STORE, COWL_WAIT, COWL_COLOR",
            "As --store, --wait and --color. An option comes before its variable, a variable before the configuration file.",
        ),
        (
            "COWL_TRASH_DAYS, COWL_DEPTH_LIMIT, COWL_PASSTHROUGH, COWL_COHERENCE, COWL_AWAKE, COWL_LXCPATH, COWL_HOOKS_DIR, COWL_HOOKS_TIMEOUT",
            "The settings of the same names in the configuration file.",
        ),
        (
            "NO_COLOR",
            "Set to anything: nothing is coloured, unless --color or COWL_COLOR says otherwise.",
        ),
        (
            "COWL_IN_HOOK",
            "Set for hooks: a cowl that is called by one runs no hooks.",
        ),
        (
            "XDG_DATA_HOME, XDG_CONFIG_HOME, HOME",
            "Where the store, the configuration file and the hooks of a user who is not root are.",
        ),
    ],
);

const CONFIGURATION: Section = (
    "CONFIGURATION FILE",
    &[
        ("store, wait, color", "As the options."),
        (
            "trash_days = 7",
            "Days that a destroyed container can be brought back.",
        ),
        (
            "depth_limit = 128",
            "A container with more layers than this is flattened; from 2 to 500.",
        ),
        (
            "passthrough = \"auto\"",
            "Which files of a container the kernel reads and writes by itself: `read`: programs and libraries of the layers below, for reading, which is what `auto` means; `all`: those that were written to as well, and then no snapshot is taken while one is open for writing; `off`. It counts from the next mount.",
        ),
        (
            "coherence = \"posix\"",
            "`overlay`: the kernel reads all files below the top by itself; a descriptor that was opened before such a file was written to keeps what it had.",
        ),
        (
            "awake = \"auto\"",
            "Whether idle CPUs are kept from sleeping while a mount has requests in numbers: `auto`: on virtual machines of at most 8 CPUs where they halt; `on`; `off`.",
        ),
        (
            "lxcpath = \"/var/lib/lxc\"",
            "Where LXC keeps its containers.",
        ),
        (
            "[hooks] dir, timeout = 60",
            "The folder of the hooks; seconds that one script may take, 0 for no limit.",
        ),
        (
            "[prune] keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, keep_within, keep_tag",
            "What `cowl prune` keeps where neither the command nor the container says anything: numbers, a span (\"14d\"), a list of tags.",
        ),
    ],
);

const HOOKS: Section = (
    "HOOKS",
    &[
        (
            "pre-EVENT.d/*, post-EVENT.d/*",
            "Executables of the hooks' folder, run in the order of their names before and after `snapshot`, `restore`, `rm` and `destroy`. They must belong to root or the user, and nobody else may write them. One before that fails stops the command before anything is changed. One after that fails is told, with exit code 1; nothing is undone. When one before has run, those after run whatever became of the command.",
        ),
        ("COWL_HOOK", "pre-EVENT or post-EVENT."),
        (
            "COWL_CONTAINER, COWL_SNAPSHOT",
            "The container; the snapshot, or several with blanks between, or nothing where it is not known yet.",
        ),
        (
            "COWL_STORE, COWL_CONFIG",
            "So that a cowl that is called finds the same.",
        ),
        (
            "COWL_MOUNTPOINT",
            "Where the container is mounted; empty when it is not.",
        ),
        ("COWL_COMMAND", "The command line."),
        (
            "COWL_RESULT",
            "For those after: `done`, `failed`, or `stopped` (by a hook before).",
        ),
    ],
);

const FILES: Section = (
    "FILES",
    &[
        (
            "/etc/cowl/config.toml, $XDG_CONFIG_HOME/cowl/config.toml",
            "The configuration file of root; of everybody else. It need not be there.",
        ),
        ("/etc/cowl/hooks.d, $XDG_CONFIG_HOME/cowl/hooks.d", "Hooks."),
        (
            "/etc/cowl/apt-snapshot",
            "Containers, one a line, of which the APT hook takes a snapshot before dpkg changes this machine.",
        ),
        ("/var/lib/cowl, $XDG_DATA_HOME/cowl", "The store."),
        (
            "/run/cowl/<store>/<id>",
            "Socket, log and state of a mount that root made; of everybody else run/<id> in the store. \
             `cowl status NAME --json` names the log.",
        ),
    ],
);

const OF_COWLFS: Section = (
    "EXIT STATUS",
    &[
        ("0", "Mounted; with -f, served until it was unmounted."),
        ("1", "The mount failed."),
        ("2", "An option is wrong."),
        ("4", "A layer or the mount point is in use."),
        ("5", "A layer is damaged."),
    ],
);

impl Verb for Args {
    fn run(&self, _context: &Context) -> Result<u8> {
        for (name, text) in pages()? {
            let path = self.folder.join(name);
            std::fs::write(&path, text).map_err(|error| Error::at("write", &path, error))?;
            output::note(&path.shown().to_string());
        }
        Ok(0)
    }

    fn configured(&self) -> bool {
        false
    }
}

/// Every page with its file's name.
fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    let cli = Cli::command().disable_help_subcommand(true);
    let mut pages = vec![page(
        cli.clone(),
        "cowl",
        &[EXIT_STATUS, ENVIRONMENT, CONFIGURATION, HOOKS, FILES],
        "cowlfs(1), lxc(7)",
    )?];
    for verb in cli.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        let name = verb.get_name();
        let verb = verb.clone().bin_name(format!("cowl {name}"));
        let see =
            "cowl(1), which has the options of every command, exit codes, environment and files";
        pages.push(page(verb, &format!("cowl-{name}"), &[], see)?);
    }
    let overlay = cowlfs::cli::Args::command();
    pages.push(page(overlay, "cowlfs", &[OF_COWLFS], "cowl(1), mount(8)")?);
    Ok(pages)
}

fn page(
    command: Command,
    name: &str,
    sections: &[Section],
    see: &str,
) -> Result<(String, Vec<u8>)> {
    let mut text = Vec::new();
    write(command.display_name(name), name, sections, see, &mut text)
        .map_err(|error| Error::failed("cannot make a manual page").because(error))?;
    Ok((format!("{name}.1"), text))
}

fn write(
    command: Command,
    name: &str,
    sections: &[Section],
    see: &str,
    out: &mut Vec<u8>,
) -> std::io::Result<()> {
    let verbs = command.has_subcommands();
    let man = Man::new(command)
        .title(name.to_uppercase())
        .source("cowl")
        .manual("cowl");
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    if verbs {
        man.render_subcommands_section(out)?;
    }
    let mut roff = Roff::new();
    for (title, terms) in sections {
        roff.control("SH", [*title]);
        for (term, meaning) in *terms {
            roff.control("TP", []);
            roff.text([bold(*term)]);
            roff.text([roman(*meaning)]);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(see)]);
    roff.to_writer(out)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_manual_says_what_the_help_says() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/man");
        let written: BTreeMap<_, _> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, std::fs::read(entry.path()).unwrap())
            })
            .collect();
        let meant: BTreeMap<_, _> = pages().unwrap().into_iter().collect();
        let stale: Vec<_> = meant
            .keys()
            .chain(written.keys())
            .filter(|name| meant.get(*name) != written.get(*name))
            .collect();
        assert!(
            stale.is_empty(),
            "type `cargo xtask man`; it renews {stale:?}"
        );
    }

    #[test]
    fn every_setting_and_every_exit_code_is_in_the_manual() {
        let (_, terms) = EXIT_STATUS;
        let of_exec = [125, 126, 127].map(|code| code.to_string()).join(", ");
        assert!(terms.iter().any(|(code, _)| *code == of_exec));
        for kind in ["failed", "usage", "not-found", "busy", "damaged"] {
            let code = crate::error::Kind::from_name(kind)
                .unwrap()
                .code()
                .to_string();
            assert!(terms.iter().any(|(known, _)| *known == code), "{kind}");
        }
        let (_, terms) = CONFIGURATION;
        let sample = include_str!("../../dist/config.toml");
        for line in sample.lines() {
            if let Some((key, _)) = line
                .strip_prefix('#')
                .and_then(|line| line.split_once(" = "))
            {
                assert!(terms.iter().any(|(term, _)| term.contains(key)), "{key}");
            }
        }
    }
}

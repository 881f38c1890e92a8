//! The manual pages: the help texts, and sections about exit codes, the environment and files.

use std::path::PathBuf;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use roff::{Roff, bold, roman};

use super::groups::{GROUPS, summaries};
use super::{Cli, CliCommand, Context, Namespace, output};
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// Write the manual pages to a directory (internal: for building and installing cowl)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// A section of a manual page: a title, and terms with their descriptions.
type Section = (&'static str, &'static [(&'static str, &'static str)]);

const EXIT_STATUS: Section = (
    "EXIT STATUS",
    &[
        ("0", "Success."),
        (
            "1",
            "The command failed, or it succeeded and a post hook failed.",
        ),
        (
            "2",
            "Usage error: the command line, the environment or the configuration file is invalid.",
        ),
        ("3", "The container, snapshot or store does not exist."),
        ("4", "A process uses the container or holds its lock."),
        ("5", "The store is damaged."),
        (
            "125, 126, 127",
            "`exec` only: cowl failed, the program cannot be executed, or the program does not exist. Any other code is the program's own, or 128 plus the number of the signal that ended it.",
        ),
    ],
);

const ENVIRONMENT: Section = (
    "ENVIRONMENT",
    &[
        ("COWL_CONFIG", "The configuration file, as with --config."),
        (
            "COWL_STORE, COWL_WAIT, COWL_COLOR",
            "As --store, --wait and --color. An option takes precedence over its variable, and a variable over the configuration file.",
        ),
        (
            "COWL_TRASH_DAYS, COWL_DEPTH_LIMIT, COWL_PASSTHROUGH, COWL_COHERENCE, COWL_AWAKE, COWL_KEEPER, COWL_DRIVER, COWL_LXCPATH, COWL_HOOKS_DIR, COWL_HOOKS_TIMEOUT",
            "The corresponding settings in the configuration file.",
        ),
        (
            "COWL_RETRY_WAIT, COWL_STALL_TIME",
            "Times in milliseconds: the first wait after a failed request to a registry (1000), from which the others are derived, and the time for which a transfer may be slow (60000). A document, such as a manifest, must arrive within ten times the latter.",
        ),
        (
            "NO_COLOR",
            "If not empty, output is not colored, except with --color or COWL_COLOR.",
        ),
        (
            "COWL_IN_HOOK",
            "Set in the environment of hooks, so that a cowl command in a hook runs no hooks.",
        ),
        (
            "XDG_DATA_HOME, XDG_CONFIG_HOME, HOME",
            "The directories of the store, the configuration file and the hooks of users other than root.",
        ),
    ],
);

const CONFIGURATION: Section = (
    "CONFIGURATION FILE",
    &[
        ("store, wait, color", "As the options."),
        (
            "trash_days = 7",
            "The number of days for which a destroyed container can be recovered.",
        ),
        (
            "depth_limit = 128",
            "The number of layers above which a container is flattened, from 2 to 500.",
        ),
        (
            "passthrough = \"auto\"",
            "Which files of a container the kernel reads and writes without the daemon. `read`, which is what `auto` selects: programs and libraries in lower layers, for reading. `all`: files in the top layer as well; a snapshot copies those that are open for writing, by sharing blocks (XFS, btrfs) or while the programs of an LXC container are stopped, and otherwise fails. `off`: none. Takes effect at the next mount.",
        ),
        (
            "coherence = \"packages\"",
            "The files in lower layers that the kernel reads without the daemon. A descriptor that was opened before a write to such a file continues to read the old content. `posix`: programs and libraries; `packages`: also files of 256 KiB or more that programs replace instead of writing to them: compressed archives, images and office documents, files without write permission, and files in /usr (except /usr/local) and other directories of package managers; `overlay`: all.",
        ),
        (
            "keeper = \"on\"",
            "With `on`, a second process starts another daemon if the daemon of a mount is killed, and programs in the mount continue (Linux 6.9 or later).",
        ),
        (
            "awake = \"auto\"",
            "Whether to keep idle CPUs awake while a mount handles many requests. `auto`: on virtual machines with at most 8 CPUs on which idle CPUs halt; `on`; `off`.",
        ),
        (
            "driver = \"fuse\"",
            "The driver of a container's mount. `fuse`: a daemon of cowl. `kernel`: kernel overlayfs, which is faster, but no snapshot can be taken while the container is mounted. Snapshots are always mounted with `fuse`. Takes effect at the next mount.",
        ),
        (
            "lxcpath = \"/var/lib/lxc\"",
            "The directory of LXC's containers.",
        ),
        (
            "[hooks] dir, timeout = 60",
            "The directory of the hooks; the time limit of one script in seconds, 0 for none.",
        ),
        (
            "[prune] keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, keep_within, keep_tag",
            "The snapshots that `cowl prune` keeps if neither the command line nor the container has rules: numbers, a span (\"14d\"), a list of tags.",
        ),
    ],
);

const HOOKS: Section = (
    "HOOKS",
    &[
        (
            "pre-EVENT.d/*, post-EVENT.d/*",
            "Executables in the hooks directory, run in order of their names before and after `snapshot`, `restore`, `rm` and `destroy`. They must belong to root or the user, and no other user may have write permission. A pre hook that fails stops the command before it changes anything. If a post hook fails, the exit code is 1, and nothing is rolled back. If any pre hook has run, the post hooks run, even if the command fails.",
        ),
        ("COWL_HOOK", "pre-EVENT or post-EVENT."),
        (
            "COWL_CONTAINER, COWL_SNAPSHOT",
            "The container; the snapshots, separated by spaces, or empty if not yet known.",
        ),
        (
            "COWL_STORE, COWL_CONFIG",
            "The store and the configuration file, for cowl commands in the hook.",
        ),
        (
            "COWL_MOUNTPOINT",
            "The container's mount point; empty if it is not mounted.",
        ),
        ("COWL_COMMAND", "The command line."),
        (
            "COWL_RESULT",
            "In post hooks: `done`, `failed`, or `stopped` (by a pre hook).",
        ),
    ],
);

const FILES: Section = (
    "FILES",
    &[
        (
            "/etc/cowl/config.toml, $XDG_CONFIG_HOME/cowl/config.toml",
            "The configuration file of root, and of other users. Optional.",
        ),
        ("/etc/cowl/hooks.d, $XDG_CONFIG_HOME/cowl/hooks.d", "Hooks."),
        (
            "/etc/cowl/apt-snapshot",
            "The containers, one per line, that the APT hook snapshots before dpkg changes this machine.",
        ),
        ("/var/lib/cowl, $XDG_DATA_HOME/cowl", "The store."),
        (
            "/run/cowl/<store>/<id>",
            "Socket, log and state of a mount of root; those of other users are in run/<id> in the store. \
             `cowl status NAME --json` prints the path of the log.",
        ),
    ],
);

const COWLFS_EXIT_STATUS: Section = (
    "EXIT STATUS",
    &[
        (
            "0",
            "The mount succeeded; with -f, it was served until it was unmounted.",
        ),
        ("1", "The mount failed."),
        ("2", "An option is invalid."),
        ("4", "A layer or the mount point is in use."),
        ("5", "A layer is damaged."),
    ],
);

impl CliCommand for Args {
    fn run(&self, _context: &Context) -> Result<u8> {
        for (name, text) in pages()? {
            let path = self.dir.join(name);
            std::fs::write(&path, text).map_err(|error| Error::at("write", &path, error))?;
            output::print_note(&path.shown().to_string());
        }
        Ok(0)
    }

    fn reads_config(&self) -> bool {
        false
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

/// Returns all pages, each with the name of its file.
fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    let cli = Cli::command().disable_help_subcommand(true);
    let mut pages = vec![page(
        cli.clone(),
        "cowl",
        &[EXIT_STATUS, ENVIRONMENT, CONFIGURATION, HOOKS, FILES],
        "cowlfs(1), lxc(7)",
    )?];
    for command in cli
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        let name = command.get_name();
        let command = command.clone().bin_name(format!("cowl {name}"));
        let see_also = "cowl(1), for global options, exit codes, environment and files";
        pages.push(page(command, &format!("cowl-{name}"), &[], see_also)?);
    }
    let overlay = cowlfs::cli::Args::command();
    pages.push(page(
        overlay,
        "cowlfs",
        &[COWLFS_EXIT_STATUS],
        "cowl(1), mount(8)",
    )?);
    Ok(pages)
}

fn page(
    command: Command,
    name: &str,
    sections: &[Section],
    see_also: &str,
) -> Result<(String, Vec<u8>)> {
    let mut text = Vec::new();
    write(
        command.display_name(name),
        name,
        sections,
        see_also,
        &mut text,
    )
    .map_err(|error| Error::failed("cannot generate a manual page").because(error))?;
    Ok((format!("{name}.1"), text))
}

fn write(
    command: Command,
    name: &str,
    sections: &[Section],
    see_also: &str,
    out: &mut Vec<u8>,
) -> std::io::Result<()> {
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .source("cowl")
        .manual("cowl");
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    let mut roff = Roff::new();
    if command.has_subcommands() {
        write_commands(&command, &mut roff);
    }
    for (title, terms) in sections {
        roff.control("SH", [*title]);
        for (term, meaning) in *terms {
            roff.control("TP", []);
            roff.text([bold(*term)]);
            roff.text([roman(*meaning)]);
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(see_also)]);
    roff.to_writer(out)
}

/// Writes the section of subcommands, in the groups of the help text.
fn write_commands(command: &Command, roff: &mut Roff) {
    roff.control("SH", ["COMMANDS"]);
    for (title, names) in &GROUPS {
        roff.control("SS", [*title]);
        for (name, about) in summaries(command, names) {
            roff.control("TP", []);
            roff.text([bold(format!("cowl-{name}")), roman("(1)")]);
            roff.text([roman(about)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_manual_agrees_with_the_help() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/man");
        let written: BTreeMap<_, _> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, std::fs::read(entry.path()).unwrap())
            })
            // Another program prints it, and verifies it.
            .filter(|(name, _)| name != "cowl-snapshotter.1")
            .collect();
        let current: BTreeMap<_, _> = pages().unwrap().into_iter().collect();
        let stale: Vec<_> = current
            .keys()
            .chain(written.keys())
            .filter(|name| current.get(*name) != written.get(*name))
            .collect();
        assert!(
            stale.is_empty(),
            "run `cargo xtask man` to update {stale:?}"
        );
    }

    #[test]
    fn the_manual_lists_each_visible_command_once() {
        let pages = pages().unwrap();
        let (_, main) = pages.iter().find(|(name, _)| name == "cowl.1").unwrap();
        let main = std::str::from_utf8(main).unwrap();
        for (name, _) in &pages {
            if let Some(command) = name.strip_prefix("cowl-") {
                let command = command.strip_suffix(".1").unwrap().replace('-', "\\-");
                let item = format!("\\fBcowl\\-{command}\\fR(1)");
                assert_eq!(main.matches(&item).count(), 1, "{item}");
            }
        }
    }

    #[test]
    fn the_manual_lists_all_settings_and_exit_codes() {
        let (_, terms) = EXIT_STATUS;
        let exec = [125, 126, 127].map(|code| code.to_string()).join(", ");
        assert!(terms.iter().any(|(code, _)| *code == exec));
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

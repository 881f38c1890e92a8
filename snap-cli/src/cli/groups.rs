//! The list of commands in the help text and in the manual, in groups.
//!
//! clap has no groups of subcommands. The names are listed here, and a test verifies that each visible command belongs
//! to exactly one group.

use clap::Command;

/// The groups with the names of their commands, in the order of the help text.
pub(super) const GROUPS: [(&str, &[&str]); 5] = [
    (
        "Create",
        &[
            "create", "adopt", "clone", "lxc", "mount", "umount", "exec", "unshare",
        ],
    ),
    (
        "Snapshot",
        &["snapshot", "restore", "undo", "comment", "tag", "protect"],
    ),
    (
        "Inspect",
        &["list", "show", "status", "stats", "diff", "ls", "cat", "du"],
    ),
    (
        "Maintain",
        &[
            "rename",
            "rm",
            "prune",
            "destroy",
            "undelete",
            "flatten",
            "upgrade",
            "gc",
            "check",
            "doctor",
            "config",
            "completions",
        ],
    ),
    (
        "Move",
        &[
            "export",
            "import",
            "push",
            "pull",
            "login",
            "logout",
            "send",
            "receive",
            "copy",
            "import-lxc-snapshots",
            "release",
        ],
    ),
];

/// Returns the command with a help text that lists its subcommands in groups.
pub(super) fn with_grouped_help(command: Command) -> Command {
    let template = template(&command);
    command.help_template(template)
}

/// Returns the name and the summary of each command of a group.
pub(super) fn summaries<'c>(
    command: &'c Command,
    names: &'c [&'c str],
) -> impl Iterator<Item = (&'c str, String)> {
    names.iter().map(|name| {
        let about = command.find_subcommand(name).and_then(Command::get_about);
        (*name, about.map(ToString::to_string).unwrap_or_default())
    })
}

/// Returns clap's default template, with the groups in place of the list of subcommands.
fn template(command: &Command) -> String {
    let (header, literal) = {
        let styles = command.get_styles();
        (styles.get_header(), styles.get_literal())
    };
    let width = GROUPS.iter().flat_map(|(_, names)| *names);
    let width = width.map(|name| name.len()).max().unwrap_or_default();
    let mut text = "{before-help}{about-with-newline}\n{usage-heading} {usage}\n".to_owned();
    for (title, names) in &GROUPS {
        text.push_str(&format!("\n{header}{title}:{header:#}\n"));
        for (name, about) in summaries(command, names) {
            // Padded outside the styles, which have no width.
            let gap = " ".repeat(width - name.len());
            text.push_str(&format!("  {literal}{name}{literal:#}{gap}  {about}\n"));
        }
    }
    text.push_str(&format!("\n{header}Options:{header:#}\n"));
    text.push_str("{options}\n\n`cowl COMMAND --help` describes a command.{after-help}");
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::Cli;
    use super::*;

    #[test]
    fn each_visible_command_is_in_one_group() {
        let cli = Cli::command();
        let visible = cli
            .get_subcommands()
            .filter(|command| !command.is_hide_set());
        let mut visible: Vec<&str> = visible.map(Command::get_name).collect();
        let mut grouped: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, names)| *names)
            .copied()
            .collect();
        visible.sort();
        grouped.sort();
        assert_eq!(grouped, visible);
    }

    #[test]
    fn the_help_lists_each_command_once_below_its_heading() {
        for render in [Command::render_help, Command::render_long_help] {
            let mut command = with_grouped_help(Cli::command());
            let help = render(&mut command).to_string();
            assert!(!help.contains("{") && !help.contains("Commands:"), "{help}");
            let mut rest = help.as_str();
            for (title, names) in &GROUPS {
                let (_, after) = rest.split_once(&format!("\n\n{title}:\n")).unwrap();
                let (block, _) = after.split_once("\n\n").unwrap();
                let listed: Vec<_> = block
                    .lines()
                    .map(|line| line.split_whitespace().next())
                    .collect();
                let expected: Vec<_> = names.iter().map(|name| Some(*name)).collect();
                assert_eq!(listed, expected);
                assert!(block.lines().all(|line| line.len() <= 100), "{block}");
                rest = after;
            }
            let options = rest.split_once("\n\nOptions:\n").unwrap().1;
            for option in ["--store", "--wait", "--quiet", "--help", "--version"] {
                let names_it = |line: &&str| {
                    let mut words = line.split_whitespace().take(2);
                    words.any(|word| word == option)
                };
                assert_eq!(options.lines().filter(names_it).count(), 1, "{option}");
            }
        }
    }
}

//! The command line of `lxc-snapshot`, compatible with that of LXC's own program.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Parser};

/// Take, list, restore and destroy snapshots of LXC containers, with cowl
///
/// Without -L, -r or -d, takes a snapshot; if several of them are given, the last one applies. The options
/// are those of LXC's own lxc-snapshot. `cowl --help` lists further commands.
#[derive(Debug, Parser)]
#[command(
    name = "lxc-snapshot",
    disable_help_flag = true,
    disable_version_flag = true,
    infer_long_args = true,
    args_override_self = true,
    max_term_width = 100,
    override_usage = "lxc-snapshot -n NAME [-P LXCPATH] [-c FILE]\n       \
                      lxc-snapshot -n NAME -L [-C]\n       \
                      lxc-snapshot -n NAME -r SNAP [[-N] NEWNAME]\n       \
                      lxc-snapshot -n NAME -d SNAP|ALL"
)]
pub(super) struct Args {
    /// The container
    #[arg(short, long, allow_hyphen_values = true)]
    pub(super) name: Option<OsString>,

    /// List the snapshots
    #[arg(short = 'L', long, overrides_with_all = ["restore", "destroy"])]
    pub(super) list: bool,

    /// Show comments in the list
    #[arg(short = 'C', long)]
    pub(super) showcomments: bool,

    /// Read the new snapshot's comment from a file
    #[arg(short, long, value_name = "FILE", allow_hyphen_values = true)]
    pub(super) comment: Option<PathBuf>,

    /// Restore this snapshot, or create a new container from it
    #[arg(
        short, long, value_name = "SNAP", allow_hyphen_values = true,
        overrides_with_all = ["list", "destroy"]
    )]
    pub(super) restore: Option<OsString>,

    /// The name of the new container; without it, the same container is restored
    #[arg(short = 'N', long, value_name = "NEWNAME", allow_hyphen_values = true)]
    pub(super) newname: Option<OsString>,

    /// Remove this snapshot; ALL, in capital letters, removes all of them
    #[arg(
        short, long, value_name = "SNAP", allow_hyphen_values = true,
        overrides_with_all = ["list", "restore"]
    )]
    pub(super) destroy: Option<OsString>,

    /// Accepted for compatibility: the file must exist, but the container's own config is used
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    pub(super) rcfile: Option<PathBuf>,

    /// The directory of LXC's containers [default: from LXC's configuration]
    #[arg(short = 'P', long, value_name = "LXCPATH", allow_hyphen_values = true)]
    pub(super) lxcpath: Option<PathBuf>,

    /// Also append messages to a log file
    #[arg(short = 'o', long, value_name = "FILE", allow_hyphen_values = true)]
    pub(super) logfile: Option<PathBuf>,

    /// The level of the log file: ERROR (the default), or WARN and below to include notes
    #[arg(short = 'l', long, value_name = "LEVEL", allow_hyphen_values = true)]
    pub(super) logpriority: Option<OsString>,

    /// Print no messages, not even errors
    #[arg(short, long)]
    pub(super) quiet: bool,

    /// Print this help
    #[arg(short = '?', short_alias = 'h', long, action = ArgAction::SetTrue)]
    pub(super) help: bool,

    /// Print only the options
    #[arg(long)]
    pub(super) usage: bool,

    /// Print cowl's version
    #[arg(long)]
    pub(super) version: bool,

    /// The container if -n is not given; with -r, the new container's name
    #[arg(value_name = "WORD")]
    pub(super) words: Vec<OsString>,
}

/// The operation that the command line requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Take,
    List,
    Restore {
        snapshot: OsString,
        new: Option<OsString>,
    },
    /// `-d ALL`.
    DestroyAll,
    Destroy(OsString),
}

/// The interpretation of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The container.
    pub(super) name: Option<OsString>,
    pub(super) task: Task,
    /// Positional words that have no meaning.
    pub(super) left_over: Vec<OsString>,
}

impl Args {
    /// Interprets options and positional words together.
    pub(super) fn request(&self) -> Request {
        let mut words = self.words.iter().cloned();
        let name = self.name.clone().or_else(|| words.next());
        let task = if let Some(snapshot) = &self.restore {
            Task::Restore {
                snapshot: snapshot.clone(),
                new: self.newname.clone().or_else(|| words.next()),
            }
        } else if self.list {
            Task::List
        } else {
            match &self.destroy {
                None => Task::Take,
                Some(all) if all == "ALL" => Task::DestroyAll,
                Some(one) => Task::Destroy(one.clone()),
            }
        };
        Request {
            name,
            task,
            left_over: words.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Request {
        let words = std::iter::once("lxc-snapshot").chain(words.iter().copied());
        Args::try_parse_from(words).unwrap().request()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn command_lines_are_interpreted_as_by_lxc() {
        let restore = |snapshot: &str, new: Option<&str>| Task::Restore {
            snapshot: snapshot.into(),
            new: new.map(OsString::from),
        };
        for (words, task) in [
            (&["-n", "c1"][..], Task::Take),
            (&["c1"], Task::Take),
            (&["-nc1", "-C"], Task::Take),
            (&["-n", "c1", "-L"], Task::List),
            (&["c1", "-LC"], Task::List),
            (&["--name=c1", "--li", "--show"], Task::List),
            (&["-n", "c1", "-d", "ALL"], Task::DestroyAll),
            (&["-n", "c1", "-d", "A"], Task::Destroy("A".into())),
            (&["-n", "c1", "-d", ""], Task::Destroy("".into())),
            (&["-n", "c1", "-d", "all"], Task::Destroy("all".into())),
            (&["-n", "c1", "-d", "ALL "], Task::Destroy("ALL ".into())),
            (&["-n", "c1", "-d", "-L"], Task::Destroy("-L".into())),
            (&["-n", "c1", "-r", "snap0"], restore("snap0", None)),
            (&["c1", "-r", "snap0", "c2"], restore("snap0", Some("c2"))),
            (
                &["-r", "snap0", "-n", "c1", "c2"],
                restore("snap0", Some("c2")),
            ),
            (
                &["-n", "c1", "-r", "s", "-N", "c2"],
                restore("s", Some("c2")),
            ),
            // The last of the three options applies.
            (&["-n", "c1", "-L", "-r", "s"], restore("s", None)),
            (&["-n", "c1", "-r", "s", "-L"], Task::List),
            (
                &["-n", "c1", "-r", "s", "-d", "t"],
                Task::Destroy("t".into()),
            ),
            (
                &["-n", "c1", "-d", "t", "-d", "u"],
                Task::Destroy("u".into()),
            ),
        ] {
            let request = parse(words);
            assert_eq!(request.name, Some("c1".into()), "{words:?}");
            assert_eq!(request.task, task, "{words:?}");
            assert!(request.left_over.is_empty(), "{words:?}");
        }
        assert_eq!(parse(&["-L"]).name, None);
        assert_eq!(parse(&["-n", "c1", "x"]).left_over, ["x"]);
        assert_eq!(parse(&["-n", "c1", "-r", "s", "a", "b"]).left_over, ["b"]);
    }

    #[test]
    fn invalid_options_are_refused() {
        for words in [
            &["--bogus"][..],
            &["-n"],
            &["-x"],
            &["-n", "c1", "--list=3"],
        ] {
            let words = std::iter::once("lxc-snapshot").chain(words.iter().copied());
            assert!(Args::try_parse_from(words).is_err());
        }
    }
}

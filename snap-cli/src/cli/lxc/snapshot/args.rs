//! The command line of `lxc-snapshot`, option by option.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Parser};

/// Snapshots of LXC containers, kept by cowl
///
/// Without -L, -r or -d a snapshot is taken. These options are those of LXC's own lxc-snapshot; of several
/// of the three, the last one counts. `cowl --help` shows what there is besides.
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

    /// Show remarks in the list
    #[arg(short = 'C', long)]
    pub(super) showcomments: bool,

    /// Take the new snapshot's remark from a file
    #[arg(short, long, value_name = "FILE", allow_hyphen_values = true)]
    pub(super) comment: Option<PathBuf>,

    /// Go back to this snapshot, or make a new container of it
    #[arg(
        short, long, value_name = "SNAP", allow_hyphen_values = true,
        overrides_with_all = ["list", "destroy"]
    )]
    pub(super) restore: Option<OsString>,

    /// The name of the new container; without it the same container goes back
    #[arg(short = 'N', long, value_name = "NEWNAME", allow_hyphen_values = true)]
    pub(super) newname: Option<OsString>,

    /// Remove this snapshot; exactly ALL removes all of them
    #[arg(
        short, long, value_name = "SNAP", allow_hyphen_values = true,
        overrides_with_all = ["list", "restore"]
    )]
    pub(super) destroy: Option<OsString>,

    /// A container's config to be read (it must be there; cowl keeps the container's own)
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    pub(super) rcfile: Option<PathBuf>,

    /// The folder of all containers [default: what LXC is set up with]
    #[arg(short = 'P', long, value_name = "LXCPATH", allow_hyphen_values = true)]
    pub(super) lxcpath: Option<PathBuf>,

    /// Write what is said to a file too
    #[arg(short = 'o', long, value_name = "FILE", allow_hyphen_values = true)]
    pub(super) logfile: Option<PathBuf>,

    /// What goes into that file: ERROR (as by default), or notes too from WARN on
    #[arg(short = 'l', long, value_name = "LEVEL", allow_hyphen_values = true)]
    pub(super) logpriority: Option<OsString>,

    /// Say nothing, not even what went wrong
    #[arg(short, long)]
    pub(super) quiet: bool,

    /// Print this
    #[arg(short = '?', short_alias = 'h', long, action = ArgAction::SetTrue)]
    pub(super) help: bool,

    /// Print the options alone
    #[arg(long)]
    pub(super) usage: bool,

    /// Print cowl's version
    #[arg(long)]
    pub(super) version: bool,

    /// The container, where -n is not given; with -r the new container's name
    #[arg(value_name = "WORD")]
    pub(super) words: Vec<OsString>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Take,
    List,
    Restore {
        snapshot: OsString,
        new: Option<OsString>,
    },
    /// Exactly ALL.
    DestroyAll,
    Destroy(OsString),
}

/// What the words mean together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meant {
    /// The container.
    pub(super) name: Option<OsString>,
    pub(super) task: Task,
    /// Words that mean nothing.
    pub(super) left_over: Vec<OsString>,
}

impl Args {
    pub(super) fn meant(&self) -> Meant {
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
        Meant {
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

    fn meant(words: &[&str]) -> Meant {
        let words = std::iter::once("lxc-snapshot").chain(words.iter().copied());
        Args::try_parse_from(words).unwrap().meant()
    }

    #[test]
    fn the_grammar_holds_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_words_mean() {
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
            // The last of them counts.
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
            let meant = meant(words);
            assert_eq!(meant.name, Some("c1".into()), "{words:?}");
            assert_eq!(meant.task, task, "{words:?}");
            assert!(meant.left_over.is_empty(), "{words:?}");
        }
        assert_eq!(meant(&["-L"]).name, None);
        assert_eq!(meant(&["-n", "c1", "x"]).left_over, ["x"]);
        assert_eq!(meant(&["-n", "c1", "-r", "s", "a", "b"]).left_over, ["b"]);
    }

    #[test]
    fn wrong_words() {
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

//! The command `cowl list`: its arguments, and the common parts of both lists.

mod columns;
mod containers;
mod snapshots;

use std::ffi::OsString;

use super::{CliCommand, Context, Namespace, text};
use crate::error::{Error, Result};
use crate::snapshot::select::{Filter, Order, Pattern};
use crate::store::manifest::SnapshotKind;
use columns::Template;

/// List the containers, or the snapshots of one
///
/// Snapshots are listed in the order in which they were taken. The size of a snapshot is the data written
/// since the snapshot that it is based on. The size of a container is that of all its layers, without
/// the data written since its last snapshot. Layers that several containers share count for each of them.
/// The containers of containerd are listed only with --containerd.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// List the snapshots of this container
    name: Option<OsString>,
    /// Draw the tree of snapshots, each below the one that it is based on; "now" is the current state
    #[arg(long, conflicts_with_all = ["json", "sort", "reverse", "format"], requires = "name")]
    tree: bool,
    /// List only entries since a time (2026-11-24, 2026-11-24 13:00) or an age (7d, 36h)
    #[arg(long, value_name = "TIME")]
    since: Option<OsString>,
    /// List only entries before a time or an age
    #[arg(long, value_name = "TIME")]
    until: Option<OsString>,
    /// List only snapshots with this tag; may be given several times
    #[arg(long, value_name = "KEY[=VALUE]", requires = "name")]
    tag: Vec<OsString>,
    /// List only entries with this text, or a pattern with * ? [abc], in their name or comment
    #[arg(long = "match", value_name = "PATTERN")]
    pattern: Option<OsString>,
    /// List only snapshots taken manually, by a timer or hook, or automatically before a change
    #[arg(long, value_enum, requires = "name")]
    kind: Vec<KindWord>,
    /// List the containers of containerd instead, or all its snapshots
    #[arg(
        long, value_enum, value_name = "WHICH", num_args = 0..=1, require_equals = true,
        default_missing_value = "containers", conflicts_with = "name"
    )]
    containerd: Option<ContainerdScope>,
    /// Sort by this column
    #[arg(long, value_enum, default_value = "taken")]
    sort: OrderWord,
    /// Reverse the order
    #[arg(short, long)]
    reverse: bool,
    /// Print each entry in this format: fields of --json in braces such as {name}, \t and \n
    #[arg(long, value_name = "TEXT", conflicts_with = "json")]
    format: Option<OsString>,
    /// Omit the header line
    #[arg(long)]
    no_header: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum KindWord {
    Manual,
    Scheduled,
    Auto,
}

/// The snapshots of containerd that are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ContainerdScope {
    /// The root filesystems of containers, which commands can use
    Containers,
    /// All snapshots, also those of images
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum OrderWord {
    Taken,
    Time,
    Name,
    Size,
    Comment,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let filter = self.filter()?;
        let template = self.template()?;
        match &self.name {
            Some(name) => {
                let name = context.container(name)?;
                let store = context.store_for(&name)?;
                snapshots::print(self, &store, &name, &filter, template.as_ref())?;
            }
            None => containers::print(self, &context.stores()?, &filter, template.as_ref())?,
        }
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

impl Args {
    fn filter(&self) -> Result<Filter> {
        let time = |word: &Option<OsString>| word.as_ref().map(text::parse_time).transpose();
        let tag = |word: &OsString| -> Result<_> {
            let word = text::parse(word)?;
            Ok(match word.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (word, None),
            })
        };
        let pattern = self.pattern.as_ref().map(text::parse).transpose()?;
        Ok(Filter {
            since: time(&self.since)?,
            until: time(&self.until)?,
            tags: self.tag.iter().map(tag).collect::<Result<_>>()?,
            pattern: pattern.as_deref().map(Pattern::parse).transpose()?,
            kinds: self
                .kind
                .iter()
                .map(|word| match word {
                    KindWord::Manual => SnapshotKind::Manual,
                    KindWord::Scheduled => SnapshotKind::Scheduled,
                    KindWord::Auto => SnapshotKind::Auto,
                })
                .collect(),
        })
    }

    fn template(&self) -> Result<Option<Template>> {
        let Some(word) = &self.format else {
            return Ok(None);
        };
        let text = word
            .to_str()
            .ok_or_else(|| Error::usage("the format is not valid UTF-8"))?;
        Template::parse(text).map(Some)
    }

    fn order(&self) -> Order {
        match self.sort {
            OrderWord::Taken => Order::Taken,
            OrderWord::Time => Order::Time,
            OrderWord::Name => Order::Name,
            OrderWord::Size => Order::Size,
            OrderWord::Comment => Order::Comment,
        }
    }

    /// Returns the names of a table's columns, or none with `--no-header`.
    fn header<'h>(&self, names: &'h [&'h str]) -> &'h [&'h str] {
        match self.no_header {
            true => &[],
            false => names,
        }
    }
}

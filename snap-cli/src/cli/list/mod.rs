//! `cowl list`: the arguments, and what both lists have in common.

mod columns;
mod containers;
mod snapshots;

use std::ffi::OsString;

use super::{Context, Verb, text};
use crate::error::{Error, Result};
use crate::snapshot::select::{Filter, Order, Pattern};
use crate::store::manifest::SnapshotKind;
use crate::store::name::ContainerName;
use columns::Template;

/// List the containers, or the snapshots of one
///
/// Snapshots are listed as they were taken, oldest first. The size of a snapshot is what was written to
/// the disk since the one that it was made from; the size of a container is that of all its layers, without
/// what was written since its last snapshot. Layers that several containers share count in each.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container whose snapshots to list
    name: Option<OsString>,
    /// Draw which snapshot was made from which; "now" is what the container is
    #[arg(long, conflicts_with_all = ["json", "sort", "reverse", "format"], requires = "name")]
    tree: bool,
    /// Only what was taken since then: a time (2026-11-24, 2026-11-24 13:00) or an age (7d, 36h)
    #[arg(long, value_name = "TIME")]
    since: Option<OsString>,
    /// Only what was taken before then
    #[arg(long, value_name = "TIME")]
    until: Option<OsString>,
    /// Only what has this tag; may be given several times
    #[arg(long, value_name = "KEY[=VALUE]", requires = "name")]
    tag: Vec<OsString>,
    /// Only what has this in its name or remark: a part, or a pattern with * ? [abc]
    #[arg(long = "match", value_name = "PATTERN")]
    pattern: Option<OsString>,
    /// Only what was made by hand, by a timer or hook, or by a command before it changed something
    #[arg(long, value_enum, requires = "name")]
    kind: Vec<KindWord>,
    /// By what to sort
    #[arg(long, value_enum, default_value = "taken")]
    sort: OrderWord,
    /// Turn the order round
    #[arg(short, long)]
    reverse: bool,
    /// Print each as this text says: {name} and other fields of --json in braces, \t and \n
    #[arg(long, value_name = "TEXT", conflicts_with = "json")]
    format: Option<OsString>,
    /// Leave the heads of the columns out
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum OrderWord {
    Taken,
    Time,
    Name,
    Size,
    Comment,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let filter = self.filter()?;
        let template = self.template()?;
        match &self.name {
            Some(name) => {
                let name = ContainerName::parse(name)?;
                let store = context.store_of(&name)?;
                snapshots::print(self, &store, &name, &filter, template.as_ref())?;
            }
            None => containers::print(self, &context.stores()?, &filter, template.as_ref())?,
        }
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn filter(&self) -> Result<Filter> {
        let moment = |word: &Option<OsString>| word.as_ref().map(text::moment).transpose();
        let tag = |word: &OsString| -> Result<_> {
            let word = text::plain(word)?;
            Ok(match word.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (word, None),
            })
        };
        let pattern = self.pattern.as_ref().map(text::plain).transpose()?;
        Ok(Filter {
            since: moment(&self.since)?,
            until: moment(&self.until)?,
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

    /// The heads of a table; none when nobody wants them.
    fn heads<'h>(&self, heads: &'h [&'h str]) -> &'h [&'h str] {
        match self.no_header {
            true => &[],
            false => heads,
        }
    }
}

//! `cowl diff`

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::output::Colour;
use super::{Context, Verb, output, read_state};
use crate::delta::{Change, DiffOptions, Status, diff_with, patch};
use crate::error::{Error, Result};
use crate::store::name::Address;
use crate::tree::ErrorKind;
use crate::tree::find::{self, Finder};

/// Show what differs between two states, path by path
///
/// A: added, M: modified, D: deleted, T: became something of another type, R: renamed. With one
/// state: what was changed in it since the snapshot that it was made from, or since the container
/// began. With paths only these are looked at, with what is below them; what was renamed from or to
/// elsewhere is then told as new or gone.
#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "a command line's switches")]
pub(super) struct Args {
    /// The state to look at; with a second one, the older of the two
    #[arg(value_name = "NAME[@SNAP]")]
    from: OsString,
    /// The state to compare it with
    #[arg(value_name = "NAME[@SNAP]")]
    to: Option<OsString>,
    /// Only these paths of the container
    #[arg(value_name = "PATH", last = true)]
    paths: Vec<OsString>,
    /// Both sizes of each path, and what of it differs: content, mode, owner, time, xattrs
    #[arg(short, long, group = "form")]
    long: bool,
    /// How much each path grew or shrank, and totals
    #[arg(long, group = "form")]
    stat: bool,
    /// A unified diff that `patch -p1` and `git apply` take: text line by line, what is not text only
    /// named. Owners, folders and devices are told in lines that they pass over; what was renamed is gone
    /// and new. (patch itself refuses names with a newline, and a folder where a file was; git does not.)
    #[arg(short, long, group = "form")]
    patch: bool,
    /// The paths alone, without a slash before them, ready to be read by another program
    #[arg(long, group = "form")]
    name_only: bool,
    /// End each path with a zero byte instead of a newline, and escape nothing in it
    #[arg(short = '0', long, requires = "name_only")]
    null: bool,
    /// Tell what was renamed as gone and new
    #[arg(long)]
    no_renames: bool,
    /// Print JSON, with sizes and what differs; a path that is not UTF-8 is an array of bytes
    #[arg(long, group = "form")]
    json: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let from = Address::parse(&self.from)?;
        let to = self.to.as_ref().map(Address::parse).transpose()?;
        let options = self.options()?;
        let (store, from, _reading) = read_state(context, &from)?;
        let (old, new, _other) = match &to {
            Some(to) => {
                let (other, to, reading) = read_state(context, to)?;
                (
                    store.view(&from.stack)?,
                    other.view(&to.stack)?,
                    Some(reading),
                )
            }
            None => {
                let parent = from.parent_stack(&store)?;
                (store.view(&parent)?, store.view(&from.stack)?, None)
            }
        };
        let changes = diff_with(&old, &new, &options).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::not_found(error.to_string()),
            _ => error.into(),
        })?;
        if self.json {
            let list: Vec<Value> = changes.iter().map(as_json).collect();
            let totals = Totals::of(&changes);
            output::data(&json!({ "changes": list, "totals": totals.as_json() }))?;
        } else if self.patch {
            let (mut before, mut after) = (Finder::new(&old), Finder::new(&new));
            for change in &changes {
                write(&patch::format_change(&mut before, &mut after, change)?)?;
            }
        } else if self.name_only {
            for change in &changes {
                write(&self.name(&change.path))?;
            }
        } else if self.long {
            long(&changes)?;
        } else if self.stat {
            stat(&changes)?;
        } else {
            changes
                .iter()
                .try_for_each(|change| output::line(&text(change)))?;
        }
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn options(&self) -> Result<DiffOptions> {
        let plain = |path: &OsString| {
            find::normalize(path.as_bytes()).map_err(|error| {
                Error::usage(error.to_string())
                    .hint("give it from the container's root, as etc/fstab")
            })
        };
        Ok(DiffOptions {
            paths: self.paths.iter().map(plain).collect::<Result<_>>()?,
            thorough: self.json || self.long || self.patch,
            no_renames: self.no_renames || self.patch,
        })
    }

    fn name(&self, path: &[u8]) -> Vec<u8> {
        match self.null {
            true => [path, b"\0"].concat(),
            false => [output::shown(path).as_bytes(), b"\n"].concat(),
        }
    }
}

fn write(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(output::stdout_lost)
}

fn as_json(change: &Change) -> Value {
    let mut value = json!({
        "status": change.status.letter().to_string(),
        "path": output::json_path(&change.path),
    });
    let mut put = |key: &str, inner: Option<Value>| {
        if let (Some(inner), Some(object)) = (inner, value.as_object_mut()) {
            object.insert(key.to_owned(), inner);
        }
    };
    put("from", change.from.as_deref().map(output::json_path));
    put("old_size", change.old_size.map(Value::from));
    put("new_size", change.new_size.map(Value::from));
    if matches!(change.status, Status::Modified | Status::Renamed) {
        put("what", Some(change.differences.words().into()));
    }
    value
}

/// The letter, in the colour that it has on a terminal.
fn letter(status: Status) -> String {
    let colour = match status {
        Status::Added => Colour::Green,
        Status::Modified => Colour::Yellow,
        Status::Deleted => Colour::Red,
        Status::TypeChanged => Colour::Magenta,
        Status::Renamed => Colour::Cyan,
    };
    output::paint(colour, &status.to_string())
}

/// The path, and where it was.
fn path(change: &Change) -> String {
    let shown = |path: &[u8]| match path {
        b"." => "/".to_owned(),
        path => format!("/{}", output::shown(path)),
    };
    match &change.from {
        Some(from) => format!("{} -> {}", shown(from), shown(&change.path)),
        None => shown(&change.path),
    }
}

fn text(change: &Change) -> String {
    format!("{} {}", letter(change.status), path(change))
}

fn long(changes: &[Change]) -> Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let size = |size: Option<u64>| size.map(output::size).unwrap_or_default();
    let row = |change: &Change| {
        vec![
            letter(change.status),
            size(change.old_size),
            size(change.new_size),
            change.differences.words().join(","),
            path(change),
        ]
    };
    let rows = changes.iter().map(row).collect();
    output::table(&["", "OLD", "NEW", "WHAT", "PATH"], rows, &[1, 2])
}

fn stat(changes: &[Change]) -> Result<()> {
    let row = |change: &Change| {
        let (old, new) = (change.old_size, change.new_size);
        let grown = match (old, new) {
            (None, None) => String::new(),
            _ => by(old.unwrap_or(0), new.unwrap_or(0)),
        };
        vec![letter(change.status), path(change), grown]
    };
    output::table(&[], changes.iter().map(row).collect(), &[2])?;
    output::line(&Totals::of(changes).text())
}

/// How much more or less there is.
fn by(old: u64, new: u64) -> String {
    match old.cmp(&new) {
        std::cmp::Ordering::Less => {
            output::paint(Colour::Green, &format!("+{}", output::size(new - old)))
        }
        std::cmp::Ordering::Equal => "0 B".to_owned(),
        std::cmp::Ordering::Greater => {
            output::paint(Colour::Red, &format!("-{}", output::size(old - new)))
        }
    }
}

struct Totals {
    counts: [(Status, &'static str, usize); 5],
    old: u64,
    new: u64,
}

impl Totals {
    fn of(changes: &[Change]) -> Self {
        let count = |status, word| {
            let count = changes
                .iter()
                .filter(|change| change.status == status)
                .count();
            (status, word, count)
        };
        Self {
            counts: [
                count(Status::Added, "added"),
                count(Status::Modified, "modified"),
                count(Status::Deleted, "deleted"),
                count(Status::TypeChanged, "of another type"),
                count(Status::Renamed, "renamed"),
            ],
            old: changes.iter().filter_map(|change| change.old_size).sum(),
            new: changes.iter().filter_map(|change| change.new_size).sum(),
        }
    }

    fn text(&self) -> String {
        let told = self.counts.iter().filter(|(_, _, count)| *count > 0);
        let mut told: Vec<_> = told
            .map(|(_, word, count)| format!("{count} {word}"))
            .collect();
        if told.is_empty() {
            return "nothing differs".to_owned();
        }
        told.push(by(self.old, self.new));
        told.join(", ")
    }

    fn as_json(&self) -> Value {
        let mut value = json!({ "old_size": self.old, "new_size": self.new });
        for (status, _, count) in self.counts {
            if let Some(object) = value.as_object_mut() {
                object.insert(status.letter().to_string(), count.into());
            }
        }
        value
    }
}

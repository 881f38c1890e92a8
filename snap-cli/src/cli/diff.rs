//! The command `cowl diff`.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::diff_stat::{self, Totals};
use super::output::Color;
use super::{CliCommand, Context, Namespace, output, read_state};
use crate::delta::{Change, DiffOptions, Status, diff_with, patch};
use crate::error::{Error, Result};
use crate::tree::ErrorKind;
use crate::tree::find::{self, Finder};

/// Show the differences between two states, path by path
///
/// A: added, M: modified, D: deleted, T: type changed, R: renamed. With one state, it is compared with
/// the snapshot that it is based on, or with the container's base. With paths, only these and what is
/// below them are compared; a rename from or to another path is then shown as added or deleted.
#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "a command line's switches")]
pub(super) struct Args {
    /// The state to inspect; with a second state, the older of the two
    #[arg(value_name = "NAME[@SNAP]")]
    from: OsString,
    /// The newer state
    #[arg(value_name = "NAME[@SNAP]")]
    to: Option<OsString>,
    /// Compare only these paths of the container
    #[arg(value_name = "PATH", last = true)]
    paths: Vec<OsString>,
    /// Print both sizes of each path, and its differences: content, mode, owner, time, xattrs
    #[arg(short, long, group = "form")]
    long: bool,
    /// Print a summary: counts and bytes by top-level directory and by kind of change
    #[arg(long, group = "form")]
    stat: bool,
    /// Print a unified diff for `patch -p1` and `git apply`. Binary files are only mentioned. Owners,
    /// directories and devices are in lines that both programs ignore. A rename is a deletion and an
    /// addition. (patch refuses names with a newline, and a directory in place of a file; git does not.)
    #[arg(short, long, group = "form")]
    patch: bool,
    /// Print only the paths, without a leading slash, for another program
    #[arg(long, group = "form")]
    name_only: bool,
    /// End each path with a zero byte instead of a newline, without escapes
    #[arg(short = '0', long, requires = "name_only")]
    null: bool,
    /// Show a rename as a deletion and an addition
    #[arg(long)]
    no_renames: bool,
    /// Print JSON with sizes and differences; a path that is not UTF-8 is an array of bytes
    #[arg(long, group = "form")]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let from = context.address(&self.from)?;
        let to = self.to.as_ref().map(|to| context.address(to)).transpose()?;
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
            let totals = Totals::of_changes(&changes);
            output::print_json(&json!({ "changes": list, "totals": totals.as_json() }))?;
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
            diff_stat::print(&changes)?;
        } else {
            changes
                .iter()
                .try_for_each(|change| output::print_line(&text(change)))?;
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
    fn options(&self) -> Result<DiffOptions> {
        let plain = |path: &OsString| {
            find::normalize(path.as_bytes()).map_err(|error| {
                Error::usage(error.to_string())
                    .hint("write it relative to the container's root, for example etc/fstab")
            })
        };
        Ok(DiffOptions {
            paths: self.paths.iter().map(plain).collect::<Result<_>>()?,
            thorough: self.json || self.long || self.patch,
            no_renames: self.no_renames || self.patch,
        })
    }

    /// Formats a path for `--name-only`, with its terminator.
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
        .map_err(output::stdout_error)
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

/// Returns the letter of a status, colored if output is colored.
fn letter(status: Status) -> String {
    let color = match status {
        Status::Added => Color::Green,
        Status::Modified => Color::Yellow,
        Status::Deleted => Color::Red,
        Status::TypeChanged => Color::Magenta,
        Status::Renamed => Color::Cyan,
    };
    output::paint(color, &status.to_string())
}

/// Formats the path, and for a rename the old path before it.
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
    let size = |size: Option<u64>| size.map(output::format_size).unwrap_or_default();
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
    output::print_table(&["", "OLD", "NEW", "WHAT", "PATH"], rows, &[1, 2])
}

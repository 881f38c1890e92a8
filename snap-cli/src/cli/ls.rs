//! The command `cowl ls`.

use std::ffi::OsString;

use cowl_layers::sys::stat::FileKind;
use serde_json::{Value, json};

use super::output::Color;
use super::{CliCommand, Context, Namespace, cat, output, read_state};
use crate::error::{Error, Result};
use crate::tree::TreeError;
use crate::tree::find::LastLink;
use crate::tree::inspect::{self, Depth, ListedEntry};

/// List a directory of a state without mounting it
///
/// Symbolic links in PATH are resolved inside the container.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The state, and the path of a directory or another file in it
    #[arg(value_name = "NAME[@SNAP][:PATH]")]
    location: OsString,
    /// Print type and mode, owner, size, time and target of each entry
    #[arg(short, long)]
    long: bool,
    /// List subdirectories recursively
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Print JSON; a path that is not UTF-8 is an array of bytes
    #[arg(long, conflicts_with = "long")]
    json: bool,
}

/// An error of a listing: of the tree, or of standard output.
enum ListError {
    Tree(TreeError),
    Output(Error),
}

impl From<TreeError> for ListError {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let location = context.state_path(&self.location)?;
        let (store, state, _reading) = read_state(context, &location.address)?;
        let view = store.view(&state.stack)?;
        let path = location.path.clone().unwrap_or_default();
        let (mut rows, mut values) = (Vec::new(), Vec::new());
        let last = match self.long {
            true => LastLink::NoFollow,
            false => LastLink::Follow,
        };
        let depth = match self.recursive {
            true => Depth::Recursive,
            false => Depth::Entries,
        };
        inspect::list(&view, &path, (last, depth), &mut |entry| {
            if self.json {
                values.push(as_json(&entry));
            } else if self.long {
                rows.push(row(&entry));
            } else {
                output::print_line(&name(&entry)).map_err(ListError::Output)?;
            }
            Ok(())
        })
        .map_err(|error| match error {
            ListError::Tree(error) => cat::describe(&error, &self.location, &location),
            ListError::Output(error) => error,
        })?;
        if self.json {
            output::print_json(&json!({ "entries": values }))?;
        }
        output::print_table(&[], rows, &[1, 2])?;
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

fn name(entry: &ListedEntry) -> String {
    let shown = output::shown(&entry.path);
    match entry.stat.kind() {
        FileKind::Directory => output::paint(Color::Blue, &shown),
        FileKind::Symlink => output::paint(Color::Cyan, &shown),
        FileKind::Regular if entry.stat.mode & 0o111 != 0 => output::paint(Color::Green, &shown),
        FileKind::Regular => shown,
        _ => output::paint(Color::Yellow, &shown),
    }
}

fn row(entry: &ListedEntry) -> Vec<String> {
    let stat = &entry.stat;
    let size = match stat.kind() {
        FileKind::CharDevice | FileKind::BlockDevice => {
            let (major, minor) = (rustix::fs::major(stat.rdev), rustix::fs::minor(stat.rdev));
            format!("{major}, {minor}")
        }
        FileKind::Directory => String::new(),
        _ => stat.size.to_string(),
    };
    let target = entry.target.as_deref().map(output::shown);
    vec![
        mode(stat.kind(), stat.perm()),
        format!("{}:{}", stat.uid, stat.gid),
        size,
        output::format_local_second(stat.mtime.secs),
        match target {
            Some(target) => format!("{} -> {target}", name(entry)),
            None => name(entry),
        },
    ]
}

/// Formats the type and the permissions in the manner of ls(1).
fn mode(kind: FileKind, perm: u32) -> String {
    let mut text = String::from(match kind {
        FileKind::Regular => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
    });
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = perm >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (perm & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

fn as_json(entry: &ListedEntry) -> Value {
    let stat = &entry.stat;
    let kind = match stat.kind() {
        FileKind::Regular => "file",
        FileKind::Directory => "folder",
        FileKind::Symlink => "link",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "character device",
        FileKind::BlockDevice => "block device",
    };
    let mut value = json!({
        "path": output::json_path(&entry.path),
        "type": kind,
        "mode": format!("{:04o}", stat.perm()),
        "uid": stat.uid,
        "gid": stat.gid,
        "modified": output::format_utc(stat.mtime.secs),
    });
    let mut put = |key: &str, inner: Value| {
        if let Some(object) = value.as_object_mut() {
            object.insert(key.to_owned(), inner);
        }
    };
    match (stat.kind(), &entry.target) {
        (_, Some(target)) => put("target", output::json_path(target)),
        (FileKind::Regular, _) => put("size", stat.size.into()),
        (FileKind::CharDevice | FileKind::BlockDevice, _) => {
            put("major", rustix::fs::major(stat.rdev).into());
            put("minor", rustix::fs::minor(stat.rdev).into());
        }
        _ => {}
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_formatted_as_by_ls() {
        for (kind, perm, text) in [
            (FileKind::Regular, 0o644, "-rw-r--r--"),
            (FileKind::Directory, 0o1777, "drwxrwxrwt"),
            (FileKind::Regular, 0o4755, "-rwsr-xr-x"),
            (FileKind::Regular, 0o2644, "-rw-r-Sr--"),
            (FileKind::Symlink, 0o777, "lrwxrwxrwx"),
        ] {
            assert_eq!(mode(kind, perm), text);
        }
    }
}

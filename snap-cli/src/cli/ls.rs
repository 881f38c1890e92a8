//! `cowl ls`

use std::ffi::OsString;

use cowl_layers::sys::stat::FileKind;
use serde_json::{Value, json};

use super::output::Colour;
use super::{Context, Verb, cat, output, read_state};
use crate::error::{Error, Result};
use crate::store::name::StatePath;
use crate::tree::TreeError;
use crate::tree::find::LastLink;
use crate::tree::inspect::{self, Depth, ListedEntry};

/// List a folder of a state, without mounting it
///
/// Symbolic links on the way lead where they would lead a program in the container.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The state, and the folder (or anything else) in it
    #[arg(value_name = "NAME[@SNAP][:PATH]")]
    place: OsString,
    /// Type and mode, owner, size, time and target of each
    #[arg(short, long)]
    long: bool,
    /// Everything below, too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Print JSON; a path that is not UTF-8 is an array of bytes
    #[arg(long, conflicts_with = "long")]
    json: bool,
}

/// Why a listing ended early.
enum Ended {
    Tree(TreeError),
    Output(Error),
}

impl From<TreeError> for Ended {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let place = StatePath::parse(&self.place)?;
        let (store, state, _reading) = read_state(context, &place.address)?;
        let view = store.view(&state.stack)?;
        let path = place.path.clone().unwrap_or_default();
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
                output::line(&name(&entry)).map_err(Ended::Output)?;
            }
            Ok(())
        })
        .map_err(|ended| match ended {
            Ended::Tree(error) => cat::told(&error, &self.place, &place),
            Ended::Output(error) => error,
        })?;
        if self.json {
            output::data(&json!({ "entries": values }))?;
        }
        output::table(&[], rows, &[1, 2])?;
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

fn name(entry: &ListedEntry) -> String {
    let shown = output::shown(&entry.path);
    match entry.stat.kind() {
        FileKind::Directory => output::paint(Colour::Blue, &shown),
        FileKind::Symlink => output::paint(Colour::Cyan, &shown),
        FileKind::Regular if entry.stat.mode & 0o111 != 0 => output::paint(Colour::Green, &shown),
        FileKind::Regular => shown,
        _ => output::paint(Colour::Yellow, &shown),
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
        output::local_second(stat.mtime.secs),
        match target {
            Some(target) => format!("{} -> {target}", name(entry)),
            None => name(entry),
        },
    ]
}

/// The type's letter and the permissions, as ls(1) writes them.
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
        "modified": output::utc_second(stat.mtime.secs),
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
    fn modes_are_written_as_ls_writes_them() {
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

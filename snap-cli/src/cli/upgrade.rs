//! The command `cowl upgrade`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{CliCommand, Context, output};
use crate::container::upgrade::{Replaced, upgrade};
use crate::container::{Container, kernel};
use crate::error::{Error, Kind, Result};
use crate::recover;
use crate::store::name::ContainerName;
use crate::store::ownership;
use crate::store::record::Record;

/// Replace the daemons of mounted containers by this version of the program
///
/// The mounts remain in use: open files, locks and running programs are not affected; programs that access a mount wait
/// for some milliseconds. The daemons of mounted snapshots of the containers are replaced as well.
///
/// A daemon that cannot be replaced continues to serve its mount; the reason is printed, and the exit code is 1.
/// Containers that are not mounted are skipped. A container that kernel overlayfs has mounted has no daemon: if it is
/// named, the command fails; with --all, it is skipped.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The containers
    #[arg(value_name = "NAME", required_unless_present = "all")]
    names: Vec<OsString>,
    /// All containers
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let program = installed_program()?;
        let mut found = Vec::new();
        let mut failed = None;
        let mut add = |name: &ContainerName, done: Result<Vec<Value>>| match done {
            Ok(mounts) if mounts.is_empty() && !self.all => {
                output::print_note(&format!("{name} is not mounted"));
            }
            Ok(mounts) => found.extend(mounts),
            // Removed since the store was read.
            Err(error) if error.kind == Kind::NotFound && self.all => {
                output::print_note(&error.to_string());
            }
            Err(error) => {
                output::print_error(&error, output::Format::from_option(self.json));
                failed = Some(error);
            }
        };
        for name in &self.names {
            let name = context.container(name)?;
            let done = context.store_for(&name).and_then(|store| {
                let container = recover::open(&store, &name)?;
                kernel::refuse(&container, "replace the daemon of")?;
                replace(&container, &program)
            });
            add(&name, done);
        }
        if self.all {
            for store in context.stores()? {
                for (id, record) in store.containers()? {
                    // Other commands report damaged manifests.
                    let Ok(Record { body: manifest, .. }) = record else {
                        continue;
                    };
                    let opened = match ownership::refuse_closed(&manifest) {
                        Ok(()) => recover::open(&store, &manifest.name),
                        // A committed snapshot of containerd has no mount.
                        Err(_) if manifest.written_head().is_none() => continue,
                        Err(_) => recover::open_for_containerd(&store, id),
                    };
                    let done = opened.and_then(|container| replace(&container, &program));
                    add(&manifest.name, done);
                }
            }
        }
        self.print(&found)?;
        let is_refused = |mount: &Value| mount.get("error").is_some_and(|error| !error.is_null());
        match failed {
            Some(error) => Err(error),
            None if found.iter().any(is_refused) => Ok(Kind::Failed.code()),
            None => Ok(0),
        }
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn print(&self, found: &[Value]) -> Result<()> {
        if self.json {
            return output::print_json(&json!({ "mounts": found }));
        }
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            _ => "-".to_owned(),
        };
        let rows = found.iter().map(|one| {
            let field = |key: &str| one.get(key).map_or_else(String::new, text);
            let pause = one.get("pause").and_then(Value::as_f64);
            let pause = pause.map_or_else(|| "-".to_owned(), |s| format!("{:.1} ms", s * 1e3));
            vec![
                match one.get("snapshot").and_then(Value::as_str) {
                    Some(snapshot) => format!("{}@{snapshot}", field("name")),
                    None => field("name"),
                },
                field("pid"),
                field("from"),
                field("to"),
                pause,
            ]
        });
        if !found.is_empty() {
            let header = ["NAME", "DAEMON", "FROM", "TO", "PAUSE"];
            output::print_table(&header, rows.collect(), &[1, 4])?;
        }
        for one in found {
            if let Some(error) = one.get("error").and_then(Value::as_str) {
                let name = one.get("name").and_then(Value::as_str).unwrap_or_default();
                output::print_error(
                    &Error::failed(format!("the daemon of {name} was not replaced: {error}"))
                        .hint("it continues to serve the mount"),
                    output::Format::Text,
                );
            }
        }
        Ok(())
    }
}

/// Returns the path of this program, at which another version may be installed since it was started.
fn installed_program() -> Result<PathBuf> {
    std::env::current_exe()
        .map_err(|error| Error::failed("cannot find the cowl program itself").because(error))
}

/// Replaces the daemons of one container. Returns a JSON value for each mount.
fn replace(container: &Container<'_>, program: &Path) -> Result<Vec<Value>> {
    let name = container.name();
    let replaced = upgrade(container, program)?;
    let snapshots = &container.manifest().snapshots;
    let value = |replaced: Replaced| {
        let snapshot = replaced.snapshot.map(|id| {
            let known = snapshots.iter().find(|snapshot| snapshot.id == id);
            known.map_or_else(|| id.to_string(), |known| known.name.to_string())
        });
        let (pid, from, to, pause, error) = match replaced.outcome {
            Ok(done) => (
                done.pid,
                Some(done.from),
                Some(done.to),
                Some(done.pause),
                None,
            ),
            Err(error) => {
                let hint = error.hint.as_deref().map(|hint| format!(" ({hint})"));
                let text = format!("{error}{}", hint.unwrap_or_default());
                (replaced.pid, None, None, None, Some(text))
            }
        };
        json!({
            "name": name,
            "snapshot": snapshot,
            "mounted_at": output::shown(replaced.mountpoint.as_os_str().as_encoded_bytes()),
            "pid": pid,
            "from": from,
            "to": to,
            "pause": pause,
            "error": error,
        })
    };
    Ok(replaced.into_iter().map(value).collect())
}

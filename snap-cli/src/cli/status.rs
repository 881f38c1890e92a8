//! The command `cowl status`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use cowl_layers::shown::Show as _;
use cowlfs::config::{Passthrough, choice_name};
use cowlfs::control::KeeperState;

use super::show::image_fields;
use super::{CliCommand, Context, Namespace, output};
use crate::container::browse::{self, SnapshotMount};
use crate::container::durability::epoch;
use crate::container::state::{Mounted, RunState};
use crate::container::{Container, dead, detach, query};
use crate::error::{Kind, Result};
use crate::host::rootless;
use crate::host::users::{Hold, User};
use crate::recover;
use crate::snapshot::describe_loss;
use crate::store::kernel::Driver;
use crate::store::manifest::Durability;
use crate::store::name::ContainerName;
use crate::store::ownership;

/// Show the containers' mounts, and the processes that use them
///
/// STATE is "mounted", "not mounted", "mounted elsewhere" (in another mount namespace), "mounted in lxc"
/// (in the namespaces of a plain user's LXC container, whose processes are not listed), or "silent" (the
/// daemon runs but does not respond; a note gives the reason). DAEMON is "kernel" for a mount of kernel
/// overlayfs. With a NAME, a second line shows which files the kernel reads and writes without the daemon
/// (passthrough), and why. Processes on the mount of a dead daemon are listed as such until they end.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Show only this container
    name: Option<OsString>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let mut found = Vec::new();
        // The other containers are shown even if one is damaged.
        let mut broken = None;
        if let Some(name) = &self.name {
            let name = context.container(name)?;
            let store = context.store_for(&name)?;
            found.push(inspect(&recover::open(&store, &name)?)?);
        } else {
            for store in context.stores()? {
                for (_, record) in store.containers()? {
                    match record {
                        // Snapshots of images and the like have no state of their own.
                        Ok(record) if ownership::refuse_closed(&record.body).is_err() => {}
                        Ok(record) => {
                            let container = recover::open(&store, &record.body.name);
                            match container.and_then(|container| inspect(&container)) {
                                Ok(details) => found.push(details),
                                // Removed since the store was read, for example an ephemeral clone.
                                Err(error) if error.kind == Kind::NotFound => {
                                    output::print_note(&error.to_string());
                                }
                                Err(error) => {
                                    output::print_error(
                                        &error,
                                        output::Format::from_option(self.json),
                                    );
                                    broken = Some(error);
                                }
                            }
                        }
                        Err(error) => {
                            output::print_error(&error, output::Format::from_option(self.json));
                            broken = Some(error);
                        }
                    }
                }
            }
        }
        self.print(&found)?;
        if rootless::has_entered() && found.iter().any(is_mounted) {
            output::print_note(
                "mounts are visible only in the namespace of your user; a shell there: cowl unshare",
            );
        }
        broken.map_or(Ok(0), Err)
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

impl Args {
    fn print(&self, found: &[Value]) -> Result<()> {
        if self.json {
            return match (&self.name, found.first()) {
                (Some(_), Some(one)) => output::print_json(one),
                _ => output::print_json(&json!({ "containers": found })),
            };
        }
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            _ => "-".to_owned(),
        };
        let rows = found.iter().flat_map(|one| {
            let field = |key: &str| one.get(key).map_or_else(String::new, text);
            let users = one.get("users").and_then(Value::as_array);
            let users = users.into_iter().flatten().map(|user| {
                let field = |key: &str| user.get(key).map_or_else(String::new, text);
                format!("{} ({})", field("pid"), field("command"))
            });
            let stranded = one.get("dead_mounts").and_then(Value::as_array);
            let stranded = stranded.into_iter().flatten().flat_map(|dead| {
                let users = dead.get("users").and_then(Value::as_array);
                users.into_iter().flatten().map(|user| {
                    let field = |key: &str| user.get(key).map_or_else(String::new, text);
                    format!("{} ({}, on a dead mount)", field("pid"), field("command"))
                })
            });
            let used_by = users.chain(stranded).collect::<Vec<_>>().join(", ");
            let own = vec![
                field("name"),
                field("state").replace('-', " "),
                field("mounted_at"),
                match field("driver").as_str() {
                    "kernel" => "kernel".to_owned(),
                    _ => field("pid"),
                },
                field("layers"),
                used_by,
            ];
            let browsed = one.get("browsed").and_then(Value::as_array);
            let browsed = browsed.into_iter().flatten().map(move |mount| {
                let inner = |key: &str| mount.get(key).map_or_else(String::new, text);
                vec![
                    format!("{}@{}", field("name"), inner("snapshot")),
                    "browsed".to_owned(),
                    inner("mounted_at"),
                    inner("pid"),
                ]
            });
            std::iter::once(own).chain(browsed).collect::<Vec<_>>()
        });
        let header = ["NAME", "STATE", "MOUNTED AT", "DAEMON", "LAYERS", "USED BY"];
        output::print_table(&header, rows.collect(), &[3, 4])?;
        match (&self.name, found) {
            (Some(_), [one]) => print_passthrough(one),
            _ => Ok(()),
        }
    }
}

/// Prints the passthrough of the container's mount, if it has a daemon that reports it.
fn print_passthrough(details: &Value) -> Result<()> {
    let Some(found) = details.get("passthrough") else {
        return Ok(());
    };
    let field = |key: &str| found.get(key).and_then(Value::as_str).unwrap_or_default();
    let option = match field("option") {
        "auto" => "default",
        _ => "chosen",
    };
    let line = format!(
        "passthrough: {} ({option}): {}",
        field("mode"),
        field("reason")
    );
    output::print_line(&output::shown(line.as_bytes()))
}

/// Returns whether the container or one of its snapshots is mounted.
fn is_mounted(details: &Value) -> bool {
    let has = |key| details.get(key).is_some_and(|value| !value.is_null());
    has("mountpoint") || has("browsed")
}

/// Returns the details of one container's mount.
fn inspect(container: &Container<'_>) -> Result<Value> {
    let manifest = container.manifest();
    let mut value = json!({
        "name": manifest.name,
        "id": container.id(),
        "layers": manifest.stack.len(),
        "snapshots": manifest.snapshots.len(),
        "mountpoint": null,
        "state": "not-mounted",
    });
    let (counts, failed) = settling(container)?;
    if let Some(object) = value.as_object_mut() {
        object.extend(manifest.image.iter().flat_map(|image| image_fields(image)));
        object.extend(counts);
    }
    for line in failed {
        output::print_note(&line);
    }
    let browsed = browsed(container)?;
    if let (false, Some(object)) = (browsed.is_empty(), value.as_object_mut()) {
        object.insert("browsed".to_owned(), browsed.into());
    }
    let stranded = dead::list_stranded(container.store(), container.id())?;
    let Some(object) = value.as_object_mut() else {
        return Ok(value);
    };
    for one in &stranded {
        output::print_note(&dead::describe_stranded(container, one));
        output::print_note(&format!("hint: {}", dead::commands(container.name())));
    }
    if !stranded.is_empty() {
        let dead = stranded.iter();
        let dead = dead.map(|one| {
            json!({ "pid": one.daemon, "reason": one.reason, "users": users_json(&one.users) })
        });
        object.insert("dead_mounts".to_owned(), dead.collect());
    }
    if let Mounted::Alive(state) = container.mounted()? {
        describe_mount(container, &state, object)?;
    }
    Ok(value)
}

/// Adds the details of a mount.
fn describe_mount(
    container: &Container<'_>,
    state: &RunState,
    object: &mut Map<String, Value>,
) -> Result<()> {
    let mountpoint = state.mountpoint.as_os_str().as_bytes();
    object.insert("mountpoint".to_owned(), output::json_path(mountpoint));
    object.insert("mounted_at".to_owned(), output::shown(mountpoint).into());
    object.insert("driver".to_owned(), state.driver().name().into());
    let pid = Some(state.pid).filter(|_| state.driver() == Driver::Fuse);
    object.insert("pid".to_owned(), pid.into());
    let log = container.store().run().dir(container.id()).join("log");
    object.insert(
        "log".to_owned(),
        output::json_path(log.as_os_str().as_bytes()),
    );
    let users = detach::users(state.pid, state.device()?)?;
    object.insert("users".to_owned(), users_json(&users));
    let answer = match query::query_status(container.store(), container.id()) {
        Ok(answer) => answer,
        // The details that are known without the daemon are shown, and so are the other containers.
        Err(error) if error.kind == Kind::Busy => {
            output::print_note(&format!("{}: {error}", container.name()));
            if let Some(hint) = &error.hint {
                output::print_note(&format!("hint: {hint}"));
            }
            object.insert("state".to_owned(), "silent".into());
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    if let Some((_, daemon)) = answer {
        object.insert("open_files".to_owned(), daemon.open_files.into());
        object.insert("open_for_write".to_owned(), daemon.open_for_write.into());
        object.insert("inodes".to_owned(), daemon.inodes.into());
        object.insert("lacking".to_owned(), daemon.lacking.into());
        object.insert("pid".to_owned(), daemon.pid.into());
        object.insert("keeper".to_owned(), daemon.keeper.name().into());
        let found = match query::query_passthrough(container.store(), container.id()) {
            // A snapshot that waits for a program delays the answer. The other containers are shown nevertheless.
            Err(error) if error.kind == Kind::Busy => {
                output::print_note(&format!("{}: {error}", container.name()));
                None
            }
            found => found?,
        };
        if let Some(found) = found {
            let name = |choice| choice_name(&Passthrough::NAMES, choice);
            let found = json!({
                "mode": name(&found.mode), "option": name(&found.option), "reason": found.reason
            });
            object.insert("passthrough".to_owned(), found);
        }
        if daemon.keeper == KeeperState::Lost {
            output::print_note(&describe_lost_keeper(container.name(), &log));
        }
    }
    let name = match state.is_here()? {
        true => "mounted",
        false if state.in_lxc => "mounted-in-lxc",
        // In another mount namespace, or in none that exists.
        false => "mounted-elsewhere",
    };
    object.insert("state".to_owned(), name.into());
    Ok(())
}

fn describe_lost_keeper(name: &ContainerName, log: &Path) -> String {
    format!(
        "{name}: its keeper was killed, and a new one could not be started yet: if the daemon is killed, programs in the \
         mount fail ({} has the reason)",
        log.shown()
    )
}

fn users_json(users: &[User]) -> Value {
    let shown = users.iter().map(|user| {
        let holds: Vec<_> = user.holds.iter().map(Hold::name).collect();
        json!({ "pid": user.pid, "command": user.command, "holds": holds })
    });
    shown.collect()
}

/// Returns the numbers of snapshots that are not durable, as fields, and messages about their failed syncs.
fn settling(container: &Container<'_>) -> Result<(Map<String, Value>, Vec<String>)> {
    let epoch = epoch(container.store())?;
    let (mut counts, mut failed) = (Map::new(), Vec::new());
    for state in [Durability::Settling, Durability::Incomplete] {
        let snapshots = container.manifest().snapshots.iter();
        let found: Vec<_> = snapshots
            .filter(|s| Durability::from_settling(s.settling.as_ref(), &epoch) == state)
            .collect();
        counts.insert(state.name().to_owned(), found.len().into());
        for snapshot in found {
            let address = format!("{}@{}", container.name(), snapshot.name);
            failed.extend(describe_loss(&address, snapshot.settling.as_ref(), &epoch));
        }
    }
    Ok((counts, failed))
}

/// Returns the mounts of the container's snapshots.
fn browsed(container: &Container<'_>) -> Result<Vec<Value>> {
    let snapshots = &container.manifest().snapshots;
    let as_json = |browse: &SnapshotMount| {
        let mountpoint = browse.mountpoint.as_os_str().as_bytes();
        let snapshot = snapshots.iter().find(|s| s.id == browse.snapshot);
        json!({
            "snapshot": snapshot.map(|snapshot| &snapshot.name),
            "mountpoint": output::json_path(mountpoint),
            "mounted_at": output::shown(mountpoint),
            "pid": browse.pid,
        })
    };
    let mounts = browse::mounts(container.store(), container.id())?;
    Ok(mounts.iter().map(as_json).collect())
}

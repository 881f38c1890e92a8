//! `cowl status`

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Map, Value, json};

use super::{Context, Verb, output};
use crate::container::browse::{self, SnapshotMount};
use crate::container::durability::epoch;
use crate::container::state::Mounted;
use crate::container::{Container, dead, detach, query};
use crate::error::{Kind, Result};
use crate::host::users::{Hold, User};
use crate::recover;
use crate::snapshot::describe_loss;
use crate::store::manifest::Durability;
use crate::store::name::ContainerName;

/// Show which containers are mounted, where, and who uses them
///
/// STATE is "mounted", "not mounted", "mounted elsewhere" (in another mount namespace than this one), or "silent":
/// the daemon lives and does not answer, and a note says why. Processes on the mount of a daemon that died are
/// listed as such until they end.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this container
    name: Option<OsString>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let mut found = Vec::new();
        // A damaged container hides none of the others.
        let mut broken = None;
        if let Some(name) = &self.name {
            let name = ContainerName::parse(name)?;
            found.push(one(&recover::open(&context.store_of(&name)?, &name)?)?);
        } else {
            for store in context.stores()? {
                for (_, record) in store.containers()? {
                    match record {
                        Ok(record) => {
                            let container = recover::open(&store, &record.body.name);
                            match container.and_then(|container| one(&container)) {
                                Ok(shown) => found.push(shown),
                                // Gone meanwhile, or with the mount that it was there for.
                                Err(error) if error.kind == Kind::NotFound => {
                                    output::note(&error.to_string());
                                }
                                Err(error) => {
                                    output::complain(&error, self.json);
                                    broken = Some(error);
                                }
                            }
                        }
                        Err(error) => {
                            output::complain(&error, self.json);
                            broken = Some(error);
                        }
                    }
                }
            }
        }
        self.print(&found)?;
        broken.map_or(Ok(0), Err)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn print(&self, found: &[Value]) -> Result<()> {
        if self.json {
            return match (&self.name, found.first()) {
                (Some(_), Some(one)) => output::data(one),
                _ => output::data(&json!({ "containers": found })),
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
                field("pid"),
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
        output::table(&header, rows.collect(), &[3, 4])
    }
}

/// Everything known of one container's mount.
fn one(container: &Container<'_>) -> Result<Value> {
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
        object.extend(counts);
    }
    for line in failed {
        output::note(&line);
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
        output::note(&dead::describe_stranded(container, one.daemon, &one.users));
    }
    if !stranded.is_empty() {
        let dead = stranded.iter();
        let dead = dead.map(|one| json!({ "pid": one.daemon, "users": shown_users(&one.users) }));
        object.insert("dead_mounts".to_owned(), dead.collect());
    }
    let Mounted::Alive(state) = container.mounted()? else {
        return Ok(value);
    };
    let place = state.mountpoint.as_os_str().as_bytes();
    object.insert("mountpoint".to_owned(), output::json_path(place));
    object.insert("mounted_at".to_owned(), output::shown(place).into());
    object.insert("pid".to_owned(), state.pid.into());
    let log = container.store().run().dir(container.id()).join("log");
    object.insert(
        "log".to_owned(),
        output::json_path(log.as_os_str().as_bytes()),
    );
    let users = detach::users(state.pid, state.device()?)?;
    object.insert("users".to_owned(), shown_users(&users));
    let known = match query::query_status(container.store(), container.id()) {
        Ok(known) => known,
        // It hides neither what is known without it nor the other containers.
        Err(error) if error.kind == Kind::Busy => {
            output::note(&format!("{}: {error}", container.name()));
            if let Some(hint) = &error.hint {
                output::note(&format!("hint: {hint}"));
            }
            object.insert("state".to_owned(), "silent".into());
            return Ok(value);
        }
        Err(error) => return Err(error),
    };
    if let Some((_, daemon)) = known {
        object.insert("open_files".to_owned(), daemon.open_files.into());
        object.insert("open_for_write".to_owned(), daemon.open_for_write.into());
        object.insert("inodes".to_owned(), daemon.inodes.into());
    }
    let shown = match state.is_here()? {
        true => "mounted",
        // In another mount namespace, or in none any more.
        false => "mounted-elsewhere",
    };
    object.insert("state".to_owned(), shown.into());
    Ok(value)
}

fn shown_users(users: &[User]) -> Value {
    let shown = users.iter().map(|user| {
        let holds: Vec<_> = user.holds.iter().map(Hold::name).collect();
        json!({ "pid": user.pid, "command": user.command, "holds": holds })
    });
    shown.collect()
}

/// How many snapshots are not durable, as fields; and the failures of their syncs, for people.
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

/// The mounts of its snapshots.
fn browsed(container: &Container<'_>) -> Result<Vec<Value>> {
    let snapshots = &container.manifest().snapshots;
    let told = |browse: &SnapshotMount| {
        let place = browse.mountpoint.as_os_str().as_bytes();
        let known = snapshots.iter().find(|s| s.id == browse.snapshot);
        json!({
            "snapshot": known.map(|known| &known.name),
            "mountpoint": output::json_path(place),
            "mounted_at": output::shown(place),
            "pid": browse.pid,
        })
    };
    let mounts = browse::mounts(container.store(), container.id())?;
    Ok(mounts.iter().map(told).collect())
}

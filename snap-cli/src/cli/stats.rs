//! The command `cowl stats`.

use std::ffi::OsString;

use cowlfs::control::Stats;
use serde_json::json;

use super::{CliCommand, Context, Namespace, output};
use crate::container::{kernel, query};
use crate::error::{Error, Result};
use crate::recover;

/// Show request counts and resource usage of a mounted container's daemon
///
/// Requests from the kernel are counted by kind since the mount. On SIGUSR1, the daemon writes the same to
/// its log.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = context.container(&self.name)?;
        let store = context.store_for(&name)?;
        let container = recover::open(&store, &name)?;
        kernel::refuse(&container, "show the statistics of")?;
        let Some(stats) = query::stats(&store, container.id())? else {
            return Err(Error::failed(format!("{name} is not mounted"))
                .hint(format!("mount it with: cowl mount {name}")));
        };
        if self.json {
            output::print_json(&json!({
                "name": name,
                "pid": stats.pid,
                "uptime": stats.uptime,
                "inodes": stats.inodes,
                "open_files": stats.open_files,
                "open_for_write": stats.open_for_write,
                "memory": stats.memory,
                "panics": stats.panics,
                "refused": stats.refused,
                "keeper": stats.keeper,
                "awake": stats.awake,
                "requests": stats.requests,
                "total": stats.total(),
            }))?;
        } else {
            print(&stats)?;
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

fn print(stats: &Stats) -> Result<()> {
    let open = u64::from(stats.open_files) + u64::from(stats.open_for_write);
    let facts = [
        ("daemon", stats.pid.to_string()),
        ("mounted for", format_duration(stats.uptime)),
        ("memory", output::format_size(stats.memory)),
        ("known inodes", stats.inodes.to_string()),
        ("open files", open.to_string()),
        ("for writing", stats.open_for_write.to_string()),
        ("requests", stats.total().to_string()),
        ("panics", stats.panics.to_string()),
        ("refused", stats.refused.to_string()),
        ("keeper", stats.keeper.name().to_owned()),
        ("awake", stats.awake.name().to_owned()),
    ];
    let facts = facts.map(|(what, value)| vec![what.to_owned(), value]);
    output::print_table(&[], facts.into(), &[])?;
    if stats.requests.is_empty() {
        return Ok(());
    }
    output::print_line("")?;
    let kinds = stats.by_count().into_iter();
    let rows = kinds.map(|(kind, count)| vec![kind.to_owned(), count.to_string()]);
    output::print_table(&["REQUEST", "COUNT"], rows.collect(), &[1])
}

/// Formats a duration in its two largest units, rounded down.
fn format_duration(seconds: f64) -> String {
    // `from_secs_f64` panics for negative values.
    let seconds = std::time::Duration::from_secs_f64(seconds.max(0.0)).as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_their_two_largest_units() {
        for (seconds, text) in [
            (0.9, "0 s"),
            (59.99, "59 s"),
            (61.0, "1 min 1 s"),
            (3_600.0 * 5.0 + 120.0, "5 h 2 min"),
            (86_400.0 * 3.0 + 3_600.0, "3 d 1 h"),
        ] {
            assert_eq!(format_duration(seconds), text);
        }
    }
}

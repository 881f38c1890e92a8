//! Runs a row in a root filesystem: in a chroot with its own mount, PID and IPC namespaces. They end with the script,
//! and with them its mounts, processes and shared memory.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::rows::{Caches, FUNCTIONS, Size, WorkRow};
use crate::run::{Failure, Result, failure};

/// Enters the root filesystem `$1` and runs the script `$2` there.
const ENTER: &str = r#"
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t tmpfs tmpfs "$1/dev/shm"
exec chroot "$1" /usr/bin/env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin bash -euo pipefail -c "$2"
"#;

/// Returns the script of a row. It prints only the microseconds that the work took.
fn script(row: &WorkRow, size: Size) -> String {
    let settle = match row.caches {
        Caches::Warm => "sync -f /",
        Caches::Dropped => "sync -f /; echo 3 > /proc/sys/vm/drop_caches",
    };
    format!(
        "exec 3>&1 1>&2\n{}\n{FUNCTIONS}\ncd /\n{}\n{settle}\nbegin=$EPOCHREALTIME\n{}\n\
         end=$EPOCHREALTIME\necho $((${{end/./}} - ${{begin/./}})) >&3\n",
        size.variables(),
        row.prepare,
        row.work
    )
}

/// Runs a row in the root filesystem at `root`, and returns the time that its work took.
pub(super) fn run(root: &Path, row: &WorkRow, size: Size) -> Result<Duration> {
    // Without the signal, the work would continue after an interruption of this program.
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare"])
        .args(["--mount", "--pid", "--ipc", "--fork", "--kill-child"])
        .args(["--propagation", "private"])
        .args(["bash", "-euc", ENTER, "bash"])
        .arg(root)
        .arg(script(row, size))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure(format!("cannot start setpriv: {error}")))?;
    if !output.status.success() {
        let text = output.stderr.trim_ascii();
        let end = text.len().saturating_sub(300);
        let text = text.get(end..).unwrap_or_default().escape_ascii();
        return failure(format!("{}: {text}", output.status));
    }
    elapsed(&output.stdout)
}

fn elapsed(output: &[u8]) -> Result<Duration> {
    let text = std::str::from_utf8(output.trim_ascii());
    match text.ok().and_then(|text| text.parse().ok()) {
        Some(microseconds) => Ok(Duration::from_micros(microseconds)),
        None => failure(format!(
            "the work did not report its time: {}",
            output.escape_ascii()
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::bench::work::rows;

    #[test]
    fn only_the_time_is_printed() {
        assert_eq!(elapsed(b"1500\n").unwrap(), Duration::from_micros(1500));
        assert!(elapsed(b"").is_err() && elapsed(b"x 1").is_err());
    }

    #[test]
    fn scripts_are_valid() {
        for row in rows::all() {
            for size in [Size::Small, Size::Full] {
                let script = script(&row, size);
                let checked = cowl_tests::command::run("bash", ["-n", "-c", &script]);
                checked.ok();
                let drops = script.contains("drop_caches");
                assert_eq!(drops, row.caches == Caches::Dropped, "{}", row.name);
            }
        }
    }
}

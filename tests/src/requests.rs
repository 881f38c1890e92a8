//! Counts a daemon's requests by kind. Unlike elapsed times, the counts are reproducible on a busy machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::mount::{Overlay, Stack};

/// Time for which the counts must not change before work is considered complete: the kernel sends RELEASE and FORGET
/// after the calls that cause them.
const SETTLE_TIME: Duration = Duration::from_millis(50);

/// Number of requests by kind.
pub type Counts = BTreeMap<String, u64>;

/// A mount whose daemon reports statistics.
#[derive(Debug)]
pub struct Counted {
    overlay: Overlay,
    socket: PathBuf,
}

impl Counted {
    /// Mounts `stack` at `mount_point`, with the control socket next to it.
    #[track_caller]
    #[must_use]
    pub fn mount(stack: &Stack, mount_point: &Path, extra: &str) -> Counted {
        Counted::mount_with(stack, mount_point, extra, &[])
    }

    /// Like [`Counted::mount`], with variables in the environment.
    #[track_caller]
    #[must_use]
    pub fn mount_with(
        stack: &Stack,
        mount_point: &Path,
        extra: &str,
        variables: &[(&str, &str)],
    ) -> Counted {
        let socket = mount_point.with_extension("socket");
        let mut options = format!("control={}", socket.to_str().expect("a plain path"));
        if !extra.is_empty() {
            options = format!("{options},{extra}");
        }
        Counted {
            overlay: Overlay::cowlfs_with(stack, mount_point, &options, variables),
            socket,
        }
    }

    /// Returns the mount.
    #[must_use]
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Unmounts it.
    #[track_caller]
    pub fn unmount(self) {
        self.overlay.unmount();
    }

    /// Returns the daemon's statistics.
    #[track_caller]
    #[must_use]
    pub fn stats(&self) -> Value {
        ask(&self.socket, "{\"ask\":\"stats\"}")
    }

    /// Returns the counts after they have stopped changing.
    #[track_caller]
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut before = counts(&self.stats());
        loop {
            std::thread::sleep(SETTLE_TIME);
            let now = counts(&self.stats());
            if now == before {
                return now;
            }
            before = now;
        }
    }

    /// Returns the requests that `work` causes.
    #[track_caller]
    pub fn during(&self, work: impl FnOnce()) -> Counts {
        let before = self.counts();
        work();
        let mut counts = self.counts();
        for (kind, count) in &before {
            if let Some(now) = counts.get_mut(kind) {
                *now -= count;
            }
        }
        counts.retain(|_, count| *count > 0);
        counts
    }
}

/// Sends one request to a control socket, and returns the answer.
#[track_caller]
#[must_use]
pub fn ask(socket: &Path, question: &str) -> Value {
    let mut stream = UnixStream::connect(socket).expect("the daemon's socket");
    stream
        .write_all(format!("{question}\n").as_bytes())
        .expect("asking the daemon");
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .expect("the daemon's answer");
    serde_json::from_str(&answer).expect("an answer in JSON")
}

fn counts(stats: &Value) -> Counts {
    let kinds = stats["requests"].as_object().expect("counts by kind");
    let kinds = kinds.iter();
    kinds
        .map(|(kind, count)| (kind.clone(), count.as_u64().expect("a count")))
        .collect()
}

/// Returns the sum over all kinds.
#[must_use]
pub fn total(counts: &Counts) -> u64 {
    counts.values().sum()
}

/// Formats a row of a table: requests per unit, in total and by kind.
#[must_use]
pub fn line(label: &str, units: u64, counts: &Counts) -> String {
    let per_unit = |count: u64| count as f64 / units as f64;
    let mut kinds: Vec<_> = counts.iter().collect();
    kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let kinds: Vec<_> = kinds
        .iter()
        .map(|(kind, count)| format!("{kind} {:.2}", per_unit(**count)))
        .collect();
    format!(
        "{label:28} {:7.2}  {}",
        per_unit(total(counts)),
        kinds.join(", ")
    )
}

//! What a mount's daemon was asked for, by kind of request: the measure of a piece of work that holds on a
//! noisy machine, too.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::mount::{Overlay, Stack};

/// How long the counts must stand still before a piece of work counts as over: the kernel lets go of files
/// and forgets names after the calls that made it do so.
const STILL: Duration = Duration::from_millis(50);

/// Counts by kind.
pub type Counts = BTreeMap<String, u64>;

/// A mount whose daemon can be asked.
#[derive(Debug)]
pub struct Counted {
    overlay: Overlay,
    socket: PathBuf,
}

impl Counted {
    /// Mounts `stack` at `place`; the socket lies beside it.
    #[track_caller]
    #[must_use]
    pub fn mount(stack: &Stack, place: &Path, extra: &str) -> Counted {
        let socket = place.with_extension("socket");
        let mut options = format!("control={}", socket.to_str().expect("a plain path"));
        if !extra.is_empty() {
            options = format!("{options},{extra}");
        }
        Counted {
            overlay: Overlay::cowlfs(stack, place, &options),
            socket,
        }
    }

    /// The mount.
    #[must_use]
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Unmounts it.
    #[track_caller]
    pub fn unmount(self) {
        self.overlay.unmount();
    }

    /// What the daemon says of itself.
    #[track_caller]
    #[must_use]
    pub fn stats(&self) -> Value {
        ask(&self.socket, "{\"ask\":\"stats\"}")
    }

    /// The counts, once they stand still.
    #[track_caller]
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut before = counts(&self.stats());
        loop {
            std::thread::sleep(STILL);
            let now = counts(&self.stats());
            if now == before {
                return now;
            }
            before = now;
        }
    }

    /// What `work` makes the kernel ask for.
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

/// Asks a daemon.
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

/// All of them.
#[must_use]
pub fn total(counts: &Counts) -> u64 {
    counts.values().sum()
}

/// One line of a table: how many for each of `units`, in all and by kind.
#[must_use]
pub fn line(what: &str, units: u64, counts: &Counts) -> String {
    let each = |count: u64| count as f64 / units as f64;
    let mut kinds: Vec<_> = counts.iter().collect();
    kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let kinds: Vec<_> = kinds
        .iter()
        .map(|(kind, count)| format!("{kind} {:.2}", each(**count)))
        .collect();
    format!(
        "{what:28} {:7.2}  {}",
        each(total(counts)),
        kinds.join(", ")
    )
}

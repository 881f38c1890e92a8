//! The statistics of a daemon, for `cowl stats`, its log and benchmarks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::KeeperState;
use crate::keeper::Custody;
use crate::requests::Requests;
use cowl_layers::error::Result;
use cowl_layers::sys;
use cowl_layers::sys::idle::LatencyOutcome;
use cowl_overlay::Overlay;

/// The activity of a daemon since the start of its mount, and its current use of resources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The process id of the daemon.
    pub pid: u32,
    /// Seconds since the start of the mount, which includes the daemons that it has replaced.
    pub uptime: f64,
    /// The number of inodes that the kernel knows.
    pub inodes: usize,
    /// The number of descriptors that are open for reading only.
    pub open_files: u32,
    /// The number of descriptors that are open for writing.
    pub open_for_write: u32,
    /// Whether open files are counted. Otherwise both numbers are 0: the kernel opens files without a request.
    #[serde(default = "counts_by_default")]
    pub counts_open_files: bool,
    /// The memory that it does not share with other processes, in bytes.
    pub memory: u64,
    /// The number of requests that a panic has ended, each of them an error of this program.
    #[serde(default)]
    pub panics: u64,
    /// The number of requests that were refused with EIO because they have ended two daemons.
    #[serde(default)]
    pub refused: u64,
    /// The process that starts another daemon if the daemon is killed.
    #[serde(default)]
    pub keeper: KeeperState,
    /// The outcome of the request to keep idle CPUs awake during a burst of requests.
    #[serde(default)]
    pub awake: LatencyOutcome,
    /// The number of requests from the kernel by kind, without kinds that were never sent.
    pub requests: BTreeMap<String, u64>,
}

/// The default for reports of earlier versions of the daemon, which always count open files.
fn counts_by_default() -> bool {
    true
}

impl Stats {
    /// Returns the number of all requests.
    pub fn total(&self) -> u64 {
        self.requests.values().sum()
    }

    /// Returns the kinds of requests with their numbers, the most frequent first.
    pub fn by_count(&self) -> Vec<(&str, u64)> {
        let kinds = self.requests.iter();
        let mut kinds: Vec<_> = kinds.map(|(name, count)| (name.as_str(), *count)).collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        kinds
    }
}

/// Formats the statistics as one line for the log.
impl fmt::Display for Stats {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:.0} s, {} inodes known, ", self.uptime, self.inodes)?;
        if self.counts_open_files {
            let (open, for_write) = (self.open_files, self.open_for_write);
            write!(
                out,
                "{} files open ({for_write} for writing), ",
                open + for_write
            )?;
        }
        write!(
            out,
            "{} KiB of memory, {} requests:",
            self.memory >> 10,
            self.total(),
        )?;
        for (name, count) in self.by_count() {
            write!(out, " {name} {count}")?;
        }
        Ok(())
    }
}

/// The sources of the statistics.
#[derive(Clone, Debug)]
pub(crate) struct StatsSource {
    overlay: Arc<Overlay>,
    requests: Arc<Requests>,
    /// When the first process began that shares `requests`.
    started: Instant,
    /// The time that the mount was served before that.
    before: Duration,
    /// The connection to the keeper, if there is one.
    custody: Option<Arc<Custody>>,
}

impl StatsSource {
    /// Creates a source for a mount whose counters began at `started`, and that was served for some time before.
    pub(crate) fn new(
        overlay: Arc<Overlay>,
        requests: Arc<Requests>,
        (started, before): (Instant, Duration),
        custody: Option<Arc<Custody>>,
    ) -> Self {
        Self {
            overlay,
            requests,
            started,
            before,
            custody,
        }
    }

    /// Returns the process that lasts as long as the mount: the keeper, or this one.
    pub(crate) fn pid(&self) -> u32 {
        let keeper = self.custody.as_ref().and_then(|custody| custody.keeper());
        keeper.unwrap_or_else(std::process::id)
    }

    /// Returns the state of the keeper.
    pub(crate) fn keeper(&self) -> KeeperState {
        match self.custody.as_ref().map(|custody| custody.keeper()) {
            None => KeeperState::None,
            Some(None) => KeeperState::Lost,
            Some(Some(_)) => KeeperState::Running,
        }
    }

    /// Returns the time since the start of the mount.
    pub(crate) fn uptime(&self) -> Duration {
        self.before + self.started.elapsed()
    }

    /// Returns the counters of requests.
    pub(crate) fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Returns the current statistics.
    pub(crate) fn read(&self) -> Result<Stats> {
        let counted = self.overlay.open_files();
        let (open_files, open_for_write) = counted.unwrap_or_default();
        Ok(Stats {
            pid: self.pid(),
            uptime: self.uptime().as_secs_f64(),
            inodes: self.overlay.inodes().len(),
            open_files,
            open_for_write,
            counts_open_files: counted.is_some(),
            memory: sys::process::own_memory()?,
            panics: cowl_layers::panics::caught(),
            refused: self.requests.refused(),
            keeper: self.keeper(),
            awake: LatencyOutcome::current(),
            requests: (self.requests.counts().into_iter())
                .map(|(kind, count)| (kind.name().to_owned(), count))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_lists_the_most_frequent_requests_first() {
        let stats = Stats {
            pid: 1,
            uptime: 61.7,
            inodes: 3,
            open_files: 2,
            open_for_write: 1,
            counts_open_files: true,
            memory: 5 << 20,
            panics: 0,
            refused: 0,
            keeper: KeeperState::None,
            awake: LatencyOutcome::Granted,
            requests: [("lookup", 2), ("getattr", 40)]
                .map(|(name, count)| (name.to_owned(), count))
                .into(),
        };
        assert_eq!(
            stats.to_string(),
            "62 s, 3 inodes known, 3 files open (1 for writing), 5120 KiB of memory, 42 requests: \
             getattr 40 lookup 2"
        );
        let text = serde_json::to_string(&stats).unwrap();
        assert_eq!(serde_json::from_str::<Stats>(&text).unwrap(), stats);
        let uncounted = Stats {
            counts_open_files: false,
            requests: BTreeMap::new(),
            ..stats
        };
        assert_eq!(
            uncounted.to_string(),
            "62 s, 3 inodes known, 5120 KiB of memory, 0 requests:"
        );
    }
}

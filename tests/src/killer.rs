//! Kills daemons again and again while a test uses their mounts.

use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Kills the daemons of some mounts until it is dropped, each one a while after it began to answer requests.
#[derive(Debug)]
pub struct Killer {
    stop: Arc<AtomicBool>,
    kills: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

/// A daemon that is to be killed.
struct Due {
    pid: u32,
    at: Instant,
}

impl Killer {
    /// Kills the daemons whose command lines contain `path`, each one a time of `lifetimes`, in milliseconds, after it
    /// began to answer requests. So each one answers some, however slow the machine is. Every eighth one lives 2 s longer.
    #[must_use]
    pub fn start(path: &Path, lifetimes: RangeInclusive<u64>) -> Self {
        let (shortest, choices) = (*lifetimes.start(), lifetimes.count() as u64);
        let (stop, kills) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU32::new(0)),
        );
        let (stopped, counted) = (stop.clone(), kills.clone());
        let path = path.as_os_str().as_encoded_bytes().to_vec();
        let thread = std::thread::spawn(move || {
            let mut due: Vec<Due> = Vec::new();
            let mut found = 0_u32;
            let mut random = u64::from(std::process::id()) | 1;
            while !stopped.load(Ordering::Relaxed) {
                let daemons = daemons(&path);
                due.retain(|one| daemons.contains(&one.pid));
                for pid in daemons {
                    let Some(index) = due.iter().position(|one| one.pid == pid) else {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let mut delay = shortest + random % choices;
                        found += 1;
                        if found.is_multiple_of(8) {
                            // On a busy machine, no daemon would live for long enough to unmount.
                            delay += 2000;
                        }
                        let at = Instant::now() + Duration::from_millis(delay);
                        due.push(Due { pid, at });
                        continue;
                    };
                    if Instant::now() >= due[index].at {
                        due.remove(index);
                        if kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).is_ok() {
                            counted.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        Self {
            stop,
            kills,
            thread: Some(thread),
        }
    }

    /// Returns the number of kills until now.
    #[must_use]
    pub fn kills(&self) -> u32 {
        self.kills.load(Ordering::Relaxed)
    }

    /// Stops, and returns the number of kills.
    #[must_use]
    pub fn stop(mut self) -> u32 {
        self.end();
        self.kills()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the thread that kills daemons");
        }
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        self.end();
    }
}

/// Returns the daemons with a keeper that answer requests and whose command lines contain `text`.
#[must_use]
pub fn daemons(text: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let line = command_line(pid);
        if line.windows(text.len()).any(|part| part == text)
            && is_ours(pid)
            && keeper_of(pid).is_some()
            && answers(pid)
        {
            found.push(pid);
        }
    }
    found
}

/// Returns whether a daemon has the thread that reads requests.
fn answers(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        std::fs::read(thread.path().join("comm")).is_ok_and(|name| name == b"session\n")
    })
}

fn is_ours(pid: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    matches!(name.trim(), "cowl" | "cowlfs")
}

fn command_line(pid: u32) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

/// Returns the keeper of a daemon; `None` for any other process. Both have the same command line.
#[must_use]
pub fn keeper_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let parent = stat
        .rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()?;
    let line = command_line(pid);
    let is_keeper = !line.is_empty() && is_ours(parent) && command_line(parent) == line;
    is_keeper.then_some(parent)
}

/// Returns the daemon of a keeper; `None` for any other process.
#[must_use]
pub fn daemon_of(pid: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    let mut children = children
        .split_whitespace()
        .filter_map(|child| child.parse().ok());
    children.find(|child| keeper_of(*child) == Some(pid))
}

/// Returns the keeper and the daemon that have a variable in their environment; `None` unless exactly these two
/// processes have it, and the daemon has begun to serve.
#[must_use]
pub fn find_pair(variable: &str) -> Option<(u32, u32)> {
    let found = with_variable(variable);
    let [one, two] = found[..] else {
        return None;
    };
    let threads = |pid: u32| {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        tasks.into_iter().flatten().count()
    };
    // A daemon can be the parent of a process that is about to take its place.
    let is_pair = |keeper, daemon| {
        keeper_of(daemon) == Some(keeper) && threads(keeper) == 1 && threads(daemon) > 1
    };
    match (is_pair(one, two), is_pair(two, one)) {
        (true, _) => Some((one, two)),
        (_, true) => Some((two, one)),
        _ => None,
    }
}

/// Returns the processes of the programs under test that have a variable (`NAME=value`) in their environment.
#[must_use]
pub fn with_variable(variable: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mut variables = environment.split(|byte| *byte == 0);
        variables.any(|one| one == variable.as_bytes()) && is_ours(*pid)
    })
    .collect()
}

/// Kills a daemon and its keeper, given either of them, so that the mount is dead.
pub fn kill_both(pid: u32) {
    let keeper = keeper_of(pid).unwrap_or(pid);
    let send = |pid: u32, signal| {
        // It may have ended.
        let _ended = kill(Pid::from_raw(pid.cast_signed()), signal);
    };
    // A keeper starts another daemon, and a daemon another keeper.
    send(keeper, Signal::SIGSTOP);
    if let Some(daemon) = daemon_of(keeper) {
        send(daemon, Signal::SIGKILL);
    }
    send(keeper, Signal::SIGKILL);
}

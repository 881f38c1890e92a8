//! Processes: the resources that they use, read from /proc; signals; processes inside a mount.

use std::path::Path;
use std::process::{Child, Command};

use crate::command::run;

/// Returns the number of a process's open descriptors.
#[must_use]
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

/// Returns the resident memory of a process in bytes.
#[must_use]
pub fn resident(pid: u32) -> usize {
    status_size(pid, "VmRSS:")
}

/// Returns the anonymous memory of a process in bytes.
#[must_use]
pub fn anonymous(pid: u32) -> usize {
    status_size(pid, "RssAnon:")
}

fn status_size(pid: u32, field: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix(field));
    let kib: usize = size.unwrap().trim_end_matches("kB").trim().parse().unwrap();
    kib * 1024
}

/// Describes what the threads of a process and of its children wait for, for messages about processes that do not end.
#[must_use]
pub fn describe_waits(pid: u32) -> String {
    let script = r#"for pid in $1 $(pgrep -P $1); do
        tr "\0" " " < /proc/$pid/cmdline; echo
        for thread in /proc/$pid/task/*; do
            echo "$(head -c 50 $thread/comm): $(cut -d " " -f 3 $thread/stat) $(cat $thread/wchan) $(cat $thread/syscall)"
            cat $thread/stack
        done
        ls -l /proc/$pid/fd
    done 2>&1; grep -e fuse /proc/self/mountinfo"#;
    run("sh", ["-c", script, "sh", &pid.to_string()]).out()
}

/// Sends a signal, as an option of kill(1).
#[track_caller]
pub fn signal(pid: u32, signal: &str) {
    run("kill", [signal, &pid.to_string()]).ok();
}

/// A process whose working directory is in a mount, until it is dropped.
#[derive(Debug)]
pub struct Inside(Child);

impl Inside {
    /// Starts one in this directory.
    #[must_use]
    pub fn of(dir: &Path) -> Self {
        let mut command = Command::new("sleep");
        Self(command.arg("1000").current_dir(dir).spawn().unwrap())
    }

    /// Returns its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

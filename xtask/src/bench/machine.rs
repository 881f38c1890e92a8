//! Describes the machine of a benchmark run, which the results depend on.

use serde::{Deserialize, Serialize};

use crate::run::{Result, Run};

/// A machine and the software that was measured on it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) date: String,
    pub(super) kernel: String,
    pub(super) cpu: String,
    pub(super) cpus: usize,
    pub(super) memory_gib: u64,
    /// One-minute load average at the start, which shows whether other work disturbed the run.
    pub(super) load: String,
    /// Output of `git describe` for the measured tree.
    pub(super) commit: String,
    pub(super) fuse_overlayfs: String,
    /// The driver that selects the sleep states of idle CPUs; `none` if there is none.
    #[serde(default)]
    pub(super) cpuidle: String,
    /// Nanoseconds for which an idle CPU of a virtual machine polls before it halts, if the driver has this parameter.
    #[serde(default)]
    pub(super) halt_poll: Option<String>,
}

impl Machine {
    /// Reads the properties of this machine.
    pub(super) fn look() -> Result<Self> {
        let output = |program: &str, args: &[&str]| Run::new(program).args(args).unseen().output();
        let line = |text: &str, label: &str| {
            let mut lines = text.lines();
            let rest = lines.find_map(|line| line.strip_prefix(label));
            rest.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned())
                .unwrap_or_default()
        };
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let load = std::fs::read_to_string("/proc/loadavg")?;
        let total = line(&meminfo, "MemTotal");
        let total = total.trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        let (_, fuse_overlayfs) = Run::new("fuse-overlayfs")
            .arg("--version")
            .unseen()
            .code_and_text()?;
        let root = crate::run::root()?;
        let commit = Run::new("git")
            .arg("-C")
            .arg(&root)
            .args(["describe", "--always", "--dirty"])
            .unseen()
            .output();
        Ok(Self {
            date: output("date", &["-u", "+%Y-%m-%d"])?,
            kernel: output("uname", &["-sr"])?,
            cpu: line(&cpuinfo, "model name"),
            cpus: std::thread::available_parallelism()?.get(),
            memory_gib: total >> 20,
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            // An unpacked source archive has no git history.
            commit: commit.unwrap_or_else(|_| "an unpacked tree".to_owned()),
            fuse_overlayfs: line(&fuse_overlayfs, "fuse-overlayfs: version"),
            cpuidle: setting("/sys/devices/system/cpu/cpuidle/current_driver")
                .unwrap_or_else(|| "none".to_owned()),
            halt_poll: setting("/sys/module/haltpoll/parameters/guest_halt_poll_ns"),
        })
    }
}

/// Returns the value of a setting of the kernel; None if this kernel does not have it.
fn setting(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

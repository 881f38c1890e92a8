//! The kernel: FUSE, replacement of a killed daemon, control groups and idle states.

use std::path::Path;

use cowl_layers::sys::kernel::version;
use rustix::fs::{CWD, Mode, OFlags};

use super::Finding;

const CGROUPS: &str = "/sys/fs/cgroup";
/// The magic number of the unified hierarchy of control groups.
const CGROUP2: i64 = 0x6367_7270;
const IDLE_DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";
const LATENCY: &str = "/dev/cpu_dma_latency";

pub(super) fn examine() -> Vec<Finding> {
    vec![fuse(), release(), cgroups(), idle()]
}

fn fuse() -> Finding {
    let device = Path::new("/dev/fuse");
    match rustix::fs::openat(CWD, device, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Finding::works("fuse", "/dev/fuse can be opened"),
        Err(error) => {
            let remedy = match error {
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    "grant access: chmod 666 /dev/fuse (as root); in a container, allow the device 10:229"
                }
                _ => {
                    "load the module: modprobe fuse (as root); in a container, pass the device /dev/fuse to it"
                }
            };
            Finding::broken("fuse", format!("cannot open /dev/fuse: {error}")).remedy(remedy)
        }
    }
}

fn release() -> Finding {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let detail = format!("Linux {release}");
    match version() {
        version if version < (6, 9, 0) => Finding::limited(
            "kernel",
            detail,
            "a mount ends if its daemon is killed, and all content is copied through the daemon",
        )
        .remedy("use Linux 6.9 or later"),
        _ => Finding::works("kernel", detail),
    }
}

fn cgroups() -> Finding {
    let unified = rustix::fs::statfs(CGROUPS).is_ok_and(|found| found.f_type == CGROUP2);
    match unified {
        true => Finding::works("cgroups", "the unified hierarchy (v2)"),
        false => Finding::limited(
            "cgroups",
            "no unified hierarchy (v1 or none)",
            "a control group of the command that mounts can limit or kill the daemon",
        )
        .remedy("boot with systemd.unified_cgroup_hierarchy=1"),
    }
}

/// Deep idle states make each request slower, because the processor has to wake up twice.
fn idle() -> Finding {
    let driver = std::fs::read_to_string(IDLE_DRIVER).unwrap_or_default();
    if matches!(driver.trim(), "" | "none") {
        return Finding::works("idle-states", "no idle driver delays requests");
    }
    let detail = format!("the idle driver is {}", driver.trim());
    let access = OFlags::WRONLY | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, LATENCY, access, Mode::empty()) {
        Ok(_) => Finding::works("idle-states", format!("{detail}; {LATENCY} can be opened")),
        Err(error) => Finding::limited(
            "idle-states",
            format!("{detail}; cannot open {LATENCY}: {error}"),
            "each request to an idle machine takes longer, because processors must wake up",
        )
        .remedy(format!("grant access: chmod 666 {LATENCY} (as root)")),
    }
}

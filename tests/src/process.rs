//! The resources that a process uses, read from /proc.

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

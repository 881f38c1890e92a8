//! The container managers that are installed.

use std::process::Command;

use cowl_layers::shown::Show as _;

use super::Finding;
use crate::host::programs::find;

/// The programs, with the option that prints the version and the package.
const PROGRAMS: [(&str, &str, &str, &str); 4] = [
    ("lxc", "lxc-start", "--version", "apt install lxc"),
    ("podman", "podman", "--version", "apt install podman"),
    (
        "containerd",
        "containerd",
        "--version",
        "apt install containerd",
    ),
    (
        "systemd-nspawn",
        "systemd-nspawn",
        "--version",
        "apt install systemd-container",
    ),
];

pub(super) fn examine() -> Vec<Finding> {
    let check = |(check, program, option, package): (&'static str, &str, &str, &str)| {
        let Some(path) = find(program) else {
            return Finding::absent(check, "not installed").remedy(package);
        };
        let output = Command::new(&path).arg(option).output();
        let text = output.map(|output| output.stdout).unwrap_or_default();
        let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let version = line.shown().to_string();
        match version.is_empty() {
            true => Finding::limited(
                check,
                format!("{} does not print its version", path.shown()),
                "it may not work",
            ),
            false => Finding::works(check, version),
        }
    };
    PROGRAMS.into_iter().map(check).collect()
}

//! The container managers that are installed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use cowl_layers::shown::Show as _;

use super::Finding;

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

/// Directories that the PATH of a plain user may lack.
const SYSTEM: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

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

/// Returns the path of an installed program.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(SYSTEM.map(PathBuf::from));
    let is_program = |file: &PathBuf| {
        std::fs::metadata(file)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    dirs.filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(program))
        .find(is_program)
}

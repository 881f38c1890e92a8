//! Finds programs.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

/// Directories that the PATH of a plain user may lack.
const SYSTEM: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Returns the path of an installed program.
pub fn find(program: &str) -> Option<PathBuf> {
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

//! Locates the programs under test: the paths in `COWL_BIN` and `COWLFS_BIN`, or the directory of the test itself in
//! Cargo's target directory.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Returns the path of `cowl`, the snapshot manager.
#[must_use]
pub fn cowl() -> PathBuf {
    find("cowl", "COWL_BIN")
}

/// Returns the path of `cowlfs`, the overlay.
#[must_use]
pub fn cowlfs() -> PathBuf {
    find("cowlfs", "COWLFS_BIN")
}

/// Returns the path of `cowl-snapshotter`, the snapshotter for containerd.
#[must_use]
pub fn cowl_snapshotter() -> PathBuf {
    find("cowl-snapshotter", "COWL_SNAPSHOTTER_BIN")
}

/// Copies both programs into a directory, which every user can enter afterwards. Users other than root may be unable to
/// enter the directory of the programs under test.
///
/// # Panics
/// If that fails.
pub fn copy_for_all_users(dir: &Path) {
    let open = |path: &Path| {
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(path, mode).expect("setting the mode");
    };
    for program in [cowl(), cowlfs()] {
        let copy = dir.join(program.file_name().expect("a name"));
        std::fs::copy(program, &copy).expect("a copy of the program");
        open(&copy);
    }
    open(dir);
}

/// Returns whether the overlay under test is cowlfs, not another program that `COWLFS_BIN` names.
#[must_use]
pub fn overlay_is_ours() -> bool {
    cowlfs().file_name().is_some_and(|name| name == "cowlfs")
}

/// Searches PATH for a program.
#[must_use]
pub fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn find(name: &str, variable: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return PathBuf::from(path);
    }
    let test = std::env::current_exe().expect("the path of this test");
    // target/debug/deps/test-hash -> target/debug
    let directory = test
        .ancestors()
        .nth(2)
        .map(Path::to_owned)
        .expect("a target directory");
    let program = directory.join(name);
    assert!(
        program.is_file(),
        "{} is not built: run `cargo build --workspace` first, or `cargo xtask test`",
        program.display()
    );
    program
}

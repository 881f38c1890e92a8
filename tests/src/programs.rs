//! Where the programs under test are. `COWL_BIN` and `COWLFS_BIN` name them when they lie
//! elsewhere; otherwise they are beside the test itself, in cargo's target folder.

use std::path::{Path, PathBuf};

/// The snapshot manager.
#[must_use]
pub fn cowl() -> PathBuf {
    find("cowl", "COWL_BIN")
}

/// The overlay.
#[must_use]
pub fn cowlfs() -> PathBuf {
    find("cowlfs", "COWLFS_BIN")
}

/// True when the overlay under test is our own, not one that `COWLFS_BIN` put in its place.
#[must_use]
pub fn overlay_is_ours() -> bool {
    cowlfs().file_name().is_some_and(|name| name == "cowlfs")
}

/// The full path of a program of the system, if there is one.
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
    let folder = test
        .ancestors()
        .nth(2)
        .map(Path::to_owned)
        .expect("a target folder");
    let program = folder.join(name);
    assert!(
        program.is_file(),
        "{} is not built: run `cargo build --workspace` first, or `cargo xtask test`",
        program.display()
    );
    program
}

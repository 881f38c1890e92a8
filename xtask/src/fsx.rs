//! Runs fsx on a mount, which verifies data after random writes, truncations, hole punches, copies and stores through
//! mappings.

use std::path::{Path, PathBuf};

use crate::run::{Result, Run, failure, note, target};

/// Minimum number of operations over all modes.
const OPERATIONS: u32 = 100_000;

/// A combination of I/O methods.
struct Mode {
    name: &'static str,
    /// Number of operations of one run.
    operations: u32,
    /// Whether the file is also accessed through mappings.
    mapped: bool,
    /// Whether the file is opened with O_DIRECT.
    direct: bool,
}

/// All modes. Each runs with each of [`SEEDS`].
const MODES: [Mode; 4] = [
    Mode {
        name: "plain",
        operations: 20_000,
        mapped: false,
        direct: false,
    },
    Mode {
        name: "mmap",
        operations: 20_000,
        mapped: true,
        direct: false,
    },
    Mode {
        name: "direct",
        operations: 10_000,
        mapped: false,
        direct: true,
    },
    Mode {
        name: "direct-mmap",
        operations: 5_000,
        mapped: true,
        direct: true,
    },
];
/// Fixed seeds, so that a failure is reproducible.
const SEEDS: [u32; 2] = [1, 2];

/// Runs every mode in `directory`. The artifacts of failed runs are kept below the target directory.
pub(crate) fn run(program: &Path, scratch: &Path, directory: &Path) -> Result<()> {
    let artifacts = target()?.join("fsx");
    std::fs::create_dir_all(&artifacts)?;
    let direct = direct_library(scratch)?;
    let mut done = 0;
    for mode in &MODES {
        let config = scratch.join(format!("{}.toml", mode.name));
        std::fs::write(&config, configuration(mode))?;
        for seed in SEEDS {
            let (count, seed) = (mode.operations.to_string(), seed.to_string());
            // With one -q, fsx still prints errors, with the log of the operations before.
            let mut fsx = Run::new(program)
                .args(["-q", "-N", &count, "-S", &seed, "-P"])
                .arg(&artifacts)
                .arg("-f")
                .arg(&config)
                .arg(directory.join(format!("fsx-{}-{seed}", mode.name)));
            if mode.direct {
                fsx = fsx.env("LD_PRELOAD", &direct);
            }
            if let Err(problem) = fsx.run() {
                return failure(format!(
                    "fsx, {}, seed {seed}: {problem}\n  the expected content of the file is in {}",
                    mode.name,
                    artifacts.display()
                ));
            }
            done += mode.operations;
        }
    }
    note(&format!("fsx: {done} operations"));
    if done < OPERATIONS {
        return failure(format!("fsx did {done} operations of {OPERATIONS}"));
    }
    Ok(())
}

fn configuration(mode: &Mode) -> String {
    let (mapped, invalidate) = if mode.mapped { (10, 1) } else { (0, 0) };
    format!(
        "[weights]\nclose_open = 1\nread = 10\nwrite = 10\nmapread = {mapped}\nmapwrite = {mapped}\n\
         invalidate = {invalidate}\ntruncate = 10\nfsync = 0.2\nfdatasync = 0.2\nposix_fallocate = 5\n\
         punch_hole = 5\nsendfile = 5\nposix_fadvise = 1\ncopy_file_range = 5\n"
    )
}

/// Builds the library that adds O_DIRECT to fsx's open calls.
fn direct_library(scratch: &Path) -> Result<PathBuf> {
    let source = scratch.join("direct.c");
    let library = scratch.join("direct.so");
    std::fs::write(&source, include_str!("direct.c"))?;
    Run::new("gcc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
        .args([&library, &source])
        .unseen()
        .run()?;
    Ok(library)
}

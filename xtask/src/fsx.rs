//! fsx on a mount: that what was written is what is read, over random writes, cuts, holes, copies
//! and mappings.

use std::path::{Path, PathBuf};

use crate::run::{Result, Run, failure, note, target};

/// The least number of operations over all modes.
const OPERATIONS: u32 = 100_000;

/// One way to read and write a file.
struct Mode {
    name: &'static str,
    /// Operations of one run.
    operations: u32,
    /// Whether mappings take part.
    mapped: bool,
    /// Whether the file is opened with O_DIRECT.
    direct: bool,
}

/// Each is run with each of [`SEEDS`].
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
/// Fixed, so that a failure can be repeated.
const SEEDS: [u32; 2] = [1, 2];

/// Runs every mode in the folder `place`. What a failed run leaves is kept below the target folder.
pub(crate) fn run(program: &Path, scratch: &Path, place: &Path) -> Result<()> {
    let kept = target()?.join("fsx");
    std::fs::create_dir_all(&kept)?;
    let direct = direct_library(scratch)?;
    let mut done = 0;
    for mode in &MODES {
        let config = scratch.join(format!("{}.toml", mode.name));
        std::fs::write(&config, configuration(mode))?;
        for seed in SEEDS {
            let (count, seed) = (mode.operations.to_string(), seed.to_string());
            // One -q: errors are still told, with the log of operations that led to one.
            let mut fsx = Run::new(program)
                .args(["-q", "-N", &count, "-S", &seed, "-P"])
                .arg(&kept)
                .arg("-f")
                .arg(&config)
                .arg(place.join(format!("fsx-{}-{seed}", mode.name)));
            if mode.direct {
                fsx = fsx.env("LD_PRELOAD", &direct);
            }
            if let Err(problem) = fsx.run() {
                return failure(format!(
                    "fsx, {}, seed {seed}: {problem}\n  what should be in the file is in {}",
                    mode.name,
                    kept.display()
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

/// Builds the library that adds O_DIRECT to fsx's opens.
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

//! Runs everything that a change must pass, fastest checks first, and counts skipped tests.
//!
//! A test that could not run is a failure, unless the caller allows it.

mod binaries;
mod doc_tests;
mod memory;

use std::path::Path;
use std::time::Instant;

use crate::conformance::Kills;
use crate::run::{Result, Run, failure, note, target, title};

/// The options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Allow exactly N skipped tests; none are skipped by root on Debian with apt and /dev/fuse
    #[arg(long, default_value_t = 0, value_name = "N")]
    allow_skips: usize,
    /// Omit pjdfstest and fsx
    #[arg(long)]
    no_conformance: bool,
    /// Run N test binaries at a time; with more than one for each two CPUs, tests may time out
    #[arg(long, default_value_t = 1, value_name = "N")]
    jobs: usize,
    /// Run only formatting, rules, unit tests, and fast tests without a mount
    #[arg(long, conflicts_with = "no_conformance")]
    quick: bool,
}

/// The packages and targets that `--quick` tests, and the slow tests that it skips.
const QUICK: [(&str, &[&str], &[&str]); 6] = [
    ("cowl-layers", &["--lib"], &[]),
    ("cowl-overlay", &["--lib"], &[]),
    (
        "cowl-overlay",
        &["--test", "overlay"],
        &["model::", "faults::"],
    ),
    ("cowlfs", &["--lib"], &[]),
    ("cowl", &["--lib"], &[]),
    (
        "cowl",
        &["--test", "commands"],
        &["verbs_model::", "archives::", "depth::"],
    ),
];

/// Runs all checks and tests, or the quick ones.
pub(crate) fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    crate::namespace::enter();
    // Tests expect the modes that this umask gives, whatever the umask of the caller.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    if options.quick {
        return run_quick(start);
    }
    crate::setup::run()?;

    title("formatting, lints, rules of the source tree");
    crate::checks::run()?;
    Run::cargo()?.args(["fmt", "--all", "--check"]).run()?;
    Run::cargo()?
        .args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ])
        .run()?;
    crate::dist::package_crates()?;

    title("tests");
    let skips = target()?.join("skipped-tests.log");
    std::fs::write(&skips, "")?;
    // The end-to-end tests run the programs themselves, which `cargo test` alone does not build.
    crate::build::programs_and_tests()?;
    let binaries = binaries::build()?;
    let scratch = memory::mount()?;
    let mut environment: Vec<(&str, &Path)> = vec![("COWL_SKIP_LOG", &skips)];
    environment.extend(scratch.map(|dir| ("TMPDIR", dir)));
    let tests =
        binaries::run(binaries, options.jobs.max(1), &environment).and_then(|()| doc_tests::run());
    let skipped = std::fs::read_to_string(&skips)?;
    let count = skipped.lines().count();
    note(&format!(
        "\n{count} tests skipped, {} allowed",
        options.allow_skips
    ));
    if count > 0 {
        note(skipped.trim_end());
    }
    tests?;

    if !options.no_conformance {
        crate::conformance::run(Kills::None, "")?;
    }
    if count != options.allow_skips {
        return failure(format!(
            "{count} tests were skipped instead of {}: see the SKIP lines above",
            options.allow_skips
        ));
    }
    note(&format!("\nall passed in {:.0?}", start.elapsed()));
    Ok(())
}

fn run_quick(start: Instant) -> Result<()> {
    crate::checks::run()?;
    Run::cargo()?.args(["fmt", "--all", "--check"]).run()?;
    Run::cargo()?
        .args(["build", "--workspace", "--bins", "--locked"])
        .run()?;
    for (package, targets, slow) in QUICK {
        Run::cargo()?
            .args(["test", "--locked", "--package", package])
            .args(targets)
            .arg("--")
            .args(slow.iter().flat_map(|test| ["--skip", *test]))
            .run()?;
    }
    note(&format!(
        "\nthe quick tests passed in {:.0?}; `cargo xtask test` runs everything",
        start.elapsed()
    ));
    Ok(())
}

//! Runs the tests that take too long for every change: power cuts, random operations, trees of a million files.

use std::time::Instant;

use crate::run::{Result, Run, failure, note, title};
use crate::{conformance, differential, power_cut};

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of power cuts on each file system, for a mount and for a store
    #[arg(long, default_value_t = 200, value_name = "N")]
    cuts: u64,
    /// Number of seeds for each of the two tests with random operations
    #[arg(long, default_value_t = 200, value_name = "N")]
    seeds: u64,
    /// Number of files in the large tree
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    files: u64,
    /// Number of snapshots of one mounted container
    #[arg(long, default_value_t = 1_000, value_name = "N")]
    snapshots: u64,
    /// First seed of the cuts and of the operations; by default the current time
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

/// Runs all parts, even if one fails, and prints their results as rows for docs/reliability.md.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::namespace::enter();
    crate::setup::run()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = match (options.seed, now) {
        (Some(seed), _) => seed,
        (None, Ok(now)) => now.as_secs(),
        (None, Err(error)) => return failure(format!("the clock is before 1970: {error}")),
    };
    let Options {
        cuts,
        seeds,
        files,
        snapshots,
        ..
    } = *options;
    let parts: [(String, &dyn Fn() -> Result<()>); 10] = [
        (format!("power-cut {cuts}"), &|| {
            power_cut::run(&power_cut::Options::with(cuts, seed, false))
        }),
        (format!("power-cut {cuts} --store"), &|| {
            power_cut::run(&power_cut::Options::with(cuts, seed, true))
        }),
        (format!("differential {seeds}"), &|| {
            differential::run(&differential::Options::with(seeds, seed))
        }),
        (format!("scale, {files} files"), &|| {
            Run::cargo()?
                .args(["test", "-p", "cowl-tests", "--locked", "--test", "mount"])
                .args(["--", "--nocapture", "scale::"])
                .env("COWL_SCALE_FILES", files.to_string())
                .run()
        }),
        (format!("snapshots, {snapshots} on one mount"), &|| {
            Run::cargo()?
                .args(["test", "-p", "cowl-tests", "--locked", "--test"])
                .args(["containers", "--", "--nocapture", "many_snapshots::"])
                .env("COWL_SCALE_SNAPSHOTS", snapshots.to_string())
                .run()
        }),
        ("conformance".to_owned(), &|| {
            conformance::run(conformance::Kills::None, "")
        }),
        ("conformance --kill".to_owned(), &|| {
            conformance::run(conformance::Kills::EverySecond, "")
        }),
        ("conformance --options passthrough=off".to_owned(), &|| {
            conformance::run(conformance::Kills::None, "passthrough=off")
        }),
        ("programs under fire".to_owned(), &programs_under_fire),
        ("kills of containerd".to_owned(), &kills_of_containerd),
    ];
    let mut rows = Vec::new();
    let mut failed = 0;
    for (name, part) in parts {
        title(&name);
        let start = Instant::now();
        let result = part();
        let took = start.elapsed();
        let word = match result {
            Ok(()) => "passed".to_owned(),
            Err(error) => {
                failed += 1;
                format!("FAILED: {error}")
            }
        };
        rows.push(format!("| `{name}` | {seed} | {took:.0?} | {word} |"));
    }
    title("for docs/reliability.md");
    note("| Command | Seed | Time | Result |");
    note("|---|---|---|---|");
    rows.iter().for_each(|row| note(row));
    match failed {
        0 => Ok(()),
        _ => failure(format!("{failed} of {} parts failed", rows.len())),
    }
}

/// Runs programs and containers whose daemons are killed many times.
fn programs_under_fire() -> Result<()> {
    Run::cargo()?
        .args(["test", "-p", "cowl-tests", "--locked"])
        .args(["--test", "under_fire", "--test", "lxc"])
        .args(["--", "--nocapture", "--test-threads=1"])
        .env("COWL_UNDER_FIRE", "1")
        .run()
}

/// Kills containerd, the snapshotter and the daemons of mounts at many more moments than the tests of a change.
fn kills_of_containerd() -> Result<()> {
    Run::cargo()?
        .args(["test", "-p", "cowl-tests", "--locked"])
        .args(["--test", "containerd", "--", "--nocapture"])
        .args(["--test-threads=1", "kills::"])
        .env("COWL_KILL_STEP", "4")
        .run()
}

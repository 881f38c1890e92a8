//! `cargo xtask bench`: measures elapsed times, compared with other implementations. Asserts nothing, because times
//! depend on the machine. Numbers of requests do not; tests/tests/mount/requests.rs asserts them.

mod ground;
mod load;
mod lowers;
mod machine;
mod mounted;
mod outcome;
mod plot;
mod report;
mod rows;
mod snapshots;
mod variants;

use crate::run::{Result, Run};

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    benchmark: Option<Benchmark>,
    /// Run all benchmarks with the smallest sizes, as a smoke test; the results are meaningless
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Benchmark {
    /// Measure a mount, compared with a plain directory, the kernel's overlayfs and fuse-overlayfs
    Mounted(mounted::Options),
    /// Measure snapshots, compared with lxc-snapshot, copies, reflinks and btrfs
    Snapshots(snapshots::Options),
    /// Regenerate docs/benchmarks.md and its charts from the last complete run of `mounted`
    Report,
}

/// Runs the selected benchmarks; without a selection, all of them.
pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(Benchmark::Report) = options.benchmark {
        return report::write(&outcome::Outcome::kept()?);
    }
    crate::setup::run()?;
    let packages: &[&str] = match &options.benchmark {
        Some(Benchmark::Mounted(_)) => &["-p", "cowlfs"],
        Some(Benchmark::Snapshots(_)) => &["-p", "cowl"],
        Some(Benchmark::Report) | None => &["-p", "cowlfs", "-p", "cowl"],
    };
    Run::cargo()?
        .args(["build", "--release", "--locked", "--bins"])
        .args(packages)
        .run()?;
    match &options.benchmark {
        Some(Benchmark::Mounted(options)) => mounted::run_and_tell(options),
        Some(Benchmark::Snapshots(options)) => snapshots::run(options),
        Some(Benchmark::Report) => Ok(()),
        None => {
            let quick = options.quick;
            let result = mounted::run_and_tell(&mounted::Options::usual(quick));
            // If the first benchmark fails, the second still runs.
            snapshots::run(&snapshots::Options::usual(quick))?;
            result
        }
    }
}

//! `cargo xtask bench`: measures elapsed times, compared with other implementations. Asserts nothing, because times
//! depend on the machine. Numbers of requests do not; tests/tests/mount/requests.rs asserts them.

mod containerd;
mod ground;
mod load;
mod lowers;
mod machine;
mod mounted;
mod namespace;
mod outcome;
mod pauses;
mod plot;
mod report;
mod rows;
mod snapshots;
mod task;
mod transfer;
mod variants;
mod work;
mod writer;

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
    /// Measure real programs in a Debian container, compared with a plain directory and the kernel's overlayfs
    Work(work::Options),
    /// Measure snapshots, compared with lxc-snapshot, copies, reflinks and btrfs
    Snapshots(snapshots::Options),
    /// Measure containerd with cowl-snapshotter, compared with its own overlayfs snapshotter
    Containerd(containerd::Options),
    /// Measure transfers through a registry and over ssh, compared with skopeo, umoci and rsync
    Transfer(transfer::Options),
    /// Regenerate docs/benchmarks.md, its charts and README.md from the last complete runs of `mounted` and `work`
    Report,
    /// Perform one step of `mounted` in other namespaces
    #[command(hide = true)]
    Task(task::Options),
    /// Write to files in a container of which `snapshots` takes snapshots
    #[command(hide = true)]
    Writer(writer::Options),
}

/// Runs the selected benchmarks; without a selection, all of them.
pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.benchmark {
        Some(Benchmark::Report) => return report::write_kept(),
        Some(Benchmark::Task(options)) => return task::run(options),
        Some(Benchmark::Writer(options)) => return writer::run(options),
        _ => {}
    }
    crate::setup::run()?;
    let packages: &[&str] = match &options.benchmark {
        Some(Benchmark::Mounted(_) | Benchmark::Work(_)) => &["-p", "cowlfs"],
        Some(Benchmark::Snapshots(_) | Benchmark::Transfer(_)) => &["-p", "cowl"],
        Some(Benchmark::Containerd(_)) => &["-p", "cowl", "-p", "cowl-snapshotter"],
        Some(Benchmark::Report | Benchmark::Task(_) | Benchmark::Writer(_)) | None => {
            &["-p", "cowlfs", "-p", "cowl", "-p", "cowl-snapshotter"]
        }
    };
    Run::cargo()?
        .args(["build", "--release", "--locked", "--bins"])
        .args(packages)
        .run()?;
    match &options.benchmark {
        Some(Benchmark::Mounted(options)) => mounted::run_and_tell(options),
        Some(Benchmark::Work(options)) => work::run_and_report(options),
        Some(Benchmark::Snapshots(options)) => snapshots::run(options),
        Some(Benchmark::Containerd(options)) => containerd::run(options),
        Some(Benchmark::Transfer(options)) => transfer::run(options),
        Some(Benchmark::Report | Benchmark::Task(_) | Benchmark::Writer(_)) => Ok(()),
        None => {
            let quick = options.quick;
            // If one benchmark fails, the others still run.
            let results = [
                mounted::run_and_tell(&mounted::Options::usual(quick)),
                work::run_and_report(&work::Options::usual(quick)),
                snapshots::run(&snapshots::Options::usual(quick)),
                containerd::run(&containerd::Options::usual(quick)),
                transfer::run(&transfer::Options::usual(quick)),
            ];
            results.into_iter().collect()
        }
    }
}

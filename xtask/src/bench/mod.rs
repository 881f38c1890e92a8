//! `cargo xtask bench`: what things take, beside what else there is. Asserts nothing: how long something
//! takes depends on the machine; what may be asserted, counts of requests, is in tests/tests/mount/requests.rs.

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

/// How `cargo xtask bench` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    which: Option<Which>,
    /// Without a name of one: the smallest run of all that goes everywhere; its figures say nothing
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Which {
    /// The overlay mounted, beside a plain folder, the kernel's overlayfs and fuse-overlayfs
    Mounted(mounted::Options),
    /// Snapshots, beside lxc-snapshot, copies, reflinks and btrfs
    Snapshots(snapshots::Options),
    /// Write docs/benchmarks.md and its pictures again from the last whole run of `mounted`
    Report,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(Which::Report) = options.which {
        return report::write(&outcome::Outcome::kept()?);
    }
    crate::setup::run()?;
    let packages: &[&str] = match &options.which {
        Some(Which::Mounted(_)) => &["-p", "cowlfs"],
        Some(Which::Snapshots(_)) => &["-p", "cowl"],
        Some(Which::Report) | None => &["-p", "cowlfs", "-p", "cowl"],
    };
    Run::cargo()?
        .args(["build", "--release", "--locked", "--bins"])
        .args(packages)
        .run()?;
    match &options.which {
        Some(Which::Mounted(options)) => mounted::run_and_tell(options),
        Some(Which::Snapshots(options)) => snapshots::run(options),
        Some(Which::Report) => Ok(()),
        None => {
            let quick = options.quick;
            let told = mounted::run_and_tell(&mounted::Options::usual(quick));
            // One does not keep the other from being measured.
            snapshots::run(&snapshots::Options::usual(quick))?;
            told
        }
    }
}

//! Random operations on a mount and on a plain folder, for as many seeds as one likes.

use crate::run::{Result, Run};

const JOBS: u64 = 2;
const STEPS: u64 = 400;

/// How `cargo xtask differential` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many seeds, each of both tests
    #[arg(value_name = "N", default_value_t = 1000)]
    seeds: u64,
    /// The first one; the tests of every change take those from 1 on
    #[arg(long, value_name = "S", default_value_t = 1_000_000)]
    first: u64,
    /// How many at a time
    #[arg(long, value_name = "N", default_value_t = JOBS)]
    jobs: u64,
    /// How many operations in a seed
    #[arg(long, value_name = "N", default_value_t = STEPS)]
    steps: u64,
    /// Look for the fewest operations that fail
    #[arg(long)]
    shrink: bool,
}

impl Options {
    /// This many seeds from `first` on.
    pub(crate) fn with(seeds: u64, first: u64) -> Self {
        Self {
            seeds,
            first,
            jobs: JOBS,
            steps: STEPS,
            shrink: false,
        }
    }
}

/// Runs them.
pub(crate) fn run(options: &Options) -> Result<()> {
    Run::cargo()?
        .args(["build", "--workspace", "--bins", "--locked"])
        .run()?;
    let mut tests = Run::cargo()?
        .args(["test", "-p", "cowl-tests", "--locked"])
        .args(["--test", "mount", "--", "--nocapture", "differential::"])
        .env("COWL_SEEDS", options.seeds.to_string())
        .env("COWL_FIRST", options.first.to_string())
        .env("COWL_JOBS", options.jobs.to_string())
        .env("COWL_STEPS", options.steps.to_string());
    if options.shrink {
        tests = tests.env("COWL_SHRINK", "1");
    }
    tests.run()
}

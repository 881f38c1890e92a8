//! Runs random operations, or random system calls, on a mount and on a plain directory, for a given number of seeds.

use crate::run::{Result, Run};

const JOBS: u64 = 2;
const STEPS: u64 = 400;
const SYSCALLS: u64 = 4000;

/// Options of `cargo xtask differential`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of seeds for each test
    #[arg(value_name = "N", default_value_t = 1000)]
    seeds: u64,
    /// First seed; `cargo xtask test` uses the seeds from 1 on
    #[arg(long, value_name = "S", default_value_t = 1_000_000)]
    first: u64,
    /// Number of seeds that run concurrently
    #[arg(long, value_name = "N", default_value_t = JOBS)]
    jobs: u64,
    /// Number of operations per seed [default: 400; with --syscalls: 4000]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Run system calls with unusual arguments instead of the operations of programs
    #[arg(long)]
    syscalls: bool,
    /// Search for the shortest sequence of operations that fails
    #[arg(long)]
    shrink: bool,
}

impl Options {
    /// Returns options for `seeds` seeds from `first` on, with defaults for the rest.
    pub(crate) fn with(seeds: u64, first: u64) -> Self {
        Self {
            seeds,
            first,
            jobs: JOBS,
            steps: None,
            syscalls: false,
            shrink: false,
        }
    }
}

/// Builds the programs and runs the differential tests.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::build::programs_and_tests()?;
    let (tests, steps) = match options.syscalls {
        true => ("syscalls::", SYSCALLS),
        false => ("differential::", STEPS),
    };
    let mut tests = Run::cargo()?
        .args(["test", "-p", "cowl-tests", "--locked"])
        .args(["--test", "mount", "--", "--nocapture", tests])
        .env("COWL_SEEDS", options.seeds.to_string())
        .env("COWL_FIRST", options.first.to_string())
        .env("COWL_JOBS", options.jobs.to_string())
        .env("COWL_STEPS", options.steps.unwrap_or(steps).to_string());
    if options.shrink {
        tests = tests.env("COWL_SHRINK", "1");
    }
    tests.run()
}

//! The project's own commands. `cargo xtask setup` prepares a machine, `cargo xtask demo` shows all main operations on
//! a Debian root filesystem, and `cargo xtask test` runs the tests that every change must pass.
//!
//! This crate depends on the layout of the repository. It must not link the crates that it tests.

mod bench;
mod build;
mod checks;
mod conformance;
mod deb;
mod demo;
mod differential;
mod dist;
mod fsx;
mod fuzz;
mod install;
mod language;
mod namespace;
mod power_cut;
mod promises;
mod run;
mod setup;
mod soak;
mod structure;
mod symbols;
mod test;
mod transcript;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The project's own commands")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install the dependencies of the build, the tests and the demo (Debian packages, /dev/fuse)
    Setup,
    /// Run all main operations of cowl on a Debian root filesystem, and verify the result with GNU tar
    Demo(demo::Options),
    /// Set up the machine and run every test that a change must pass
    Test(test::Options),
    /// Check the rules of the source tree: imports between modules, cycles, unsafe, file sizes
    Check,
    /// Run the commands of the README's transcript, and write their output to README.md and docs/transcript.svg
    Transcript,
    /// Print the frequency of the words that docs/style.md covers
    Language,
    /// Print metrics of the source tree: files, functions, methods per type, cycles
    Structure,
    /// Run random operations on a mount and on a plain directory, and compare the results
    Differential(differential::Options),
    /// Run the fuzz targets of the parsers
    Fuzz(fuzz::Options),
    /// Cut the power of a disk below a mount at many moments, and check the remaining data
    PowerCut(power_cut::Options),
    /// Run the long tests: power cuts, random operations, a million files, conformance
    Soak(soak::Options),
    /// Measure the cost of snapshots and of a mount, compared with other implementations
    Bench(bench::Options),
    /// Regenerate docs/man from the help texts
    Man,
    /// Write shell completion scripts to target/dist/completions
    Completions,
    /// Build and install the programs, man pages, completions, systemd units and the APT hook
    Install(install::InstallOptions),
    /// Remove the files that `install` installed; modified settings and added hooks remain
    Uninstall(install::UninstallOptions),
    /// Write an archive of the files that `install` installs, and Debian packages, to target/dist, with checksums
    Dist(dist::DistOptions),
    /// Run pjdfstest and fsx on a cowlfs mount, and compare with the file system below it
    Conformance(conformance::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup => setup::run(),
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Check => checks::run(),
        Command::Language => language::run(),
        Command::Transcript => transcript::run(),
        Command::Structure => structure::run(),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Differential(options) => differential::run(&options),
        Command::PowerCut(options) => power_cut::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Man => install::man(),
        Command::Completions => install::completions(),
        Command::Install(options) => install::install(&options),
        Command::Uninstall(options) => install::uninstall(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Conformance(options) => options.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            run::note(&format!("FAILED: {failure}"));
            ExitCode::FAILURE
        }
    }
}

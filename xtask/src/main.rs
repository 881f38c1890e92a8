//! The project's own commands. `cargo xtask setup` makes a machine ready, `cargo xtask demo` shows
//! the whole of what cowl does on a real Debian, `cargo xtask test` is what a change must pass.
//!
//! This program may know how the repository is laid out; it must not link the crates it tests.

mod bench;
mod checks;
mod conformance;
mod demo;
mod differential;
mod fsx;
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
    /// Install what building, testing and the demo need (Debian packages; /dev/fuse)
    Setup,
    /// Set up, build, and run cowl's whole job on a real Debian root filesystem, ending with a proof
    Demo(demo::Options),
    /// Set up and run everything that a change must pass
    Test(test::Options),
    /// Check the rules of the source tree: imports between modules, cycles, unsafe, file sizes
    Check,
    /// Run the commands of the README's transcript, and write their output into the README and docs/transcript.svg
    Transcript,
    /// Print how often words occur that docs/style.md is about
    Language,
    /// Print figures about the source tree: files, functions, methods per type, cycles
    Structure,
    /// Run random operations on a mount and on a plain folder, with as many seeds as one likes
    Differential(differential::Options),
    /// Cut the power of a disk under a mount, at many moments, and look at what is left
    PowerCut(power_cut::Options),
    /// Run what takes too long for every change: power cuts, random operations, a million files, conformance
    Soak(soak::Options),
    /// Measure what snapshots cost, beside lxc-snapshot, copies, reflinks and btrfs
    Bench(bench::Options),
    /// Write docs/man anew, from the text of the help
    Man,
    /// Write the shells' completion scripts into target/dist/completions
    Completions,
    /// Build and install programs, manual, completions, systemd units and the APT hook
    Install(install::Options),
    /// Take away what `install` put into a system; settings and hooks of your own stay
    Uninstall(install::Where),
    /// Pack what `install` installs as a tar in target/dist, with a checksum
    Dist(install::Dist),
    /// Run pjdfstest and fsx on a cowlfs mount and compare with the filesystem below it
    Conformance,
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
        Command::Differential(options) => differential::run(&options),
        Command::PowerCut(options) => power_cut::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Man => install::man(),
        Command::Completions => install::completions(),
        Command::Install(options) => install::install(&options),
        Command::Uninstall(place) => install::uninstall(&place),
        Command::Dist(options) => install::dist(&options),
        Command::Conformance => setup::run().and_then(|()| conformance::run()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            run::note(&format!("FAILED: {failure}"));
            ExitCode::FAILURE
        }
    }
}

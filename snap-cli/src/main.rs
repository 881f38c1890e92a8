//! cowl: snapshots for containers.

fn main() -> std::process::ExitCode {
    cowl::cli::main()
}

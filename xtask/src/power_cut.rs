//! Power cuts, as many as one likes, on each file system that layers are likely to lie on. The last of the
//! tests it runs gives up the promise (`volatile`; with `--store`, syncs that do nothing), and must be seen to
//! lose.

use crate::run::{Result, Run, note};

/// How `cargo xtask power-cut` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many cuts, on each file system
    #[arg(value_name = "N", default_value_t = 100)]
    cuts: u64,
    /// The first seed; one run of the programs is cut at 50 moments
    #[arg(long, value_name = "S", default_value_t = 1000)]
    seed: u64,
    /// Only this file system, or only the run without syncs
    #[arg(long, value_parser = ["ext4", "xfs", "btrfs", "volatile"])]
    only: Option<String>,
    /// Cut the power of a store while all verbs run, instead of that of a mount
    #[arg(long)]
    store: bool,
    /// Mount options of the file system
    #[arg(long, value_name = "TEXT", default_value = "")]
    base_options: String,
    /// More for mkfs
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    mkfs: String,
}

impl Options {
    /// All file systems, as they are made and mounted by default.
    pub(crate) fn with(cuts: u64, seed: u64, store: bool) -> Self {
        Self {
            cuts,
            seed,
            only: None,
            store,
            base_options: String::new(),
            mkfs: String::new(),
        }
    }
}

/// Runs the cuts.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::namespace::enter();
    crate::setup::run()?;
    Run::cargo()?
        .args([
            "build",
            "--release",
            "--locked",
            "-p",
            "cowlfs",
            "-p",
            "cowl",
        ])
        .arg("--bins")
        .run()?;
    let rig = if options.store { "store" } else { "mount" };
    Run::cargo()?
        .args([
            "test",
            "-p",
            "cowl-tests",
            "--locked",
            "--test",
            "power_cut",
        ])
        .args(["--", "--nocapture", "--test-threads=1"])
        .args(["a_cut", "without"].map(|tests| format!("{rig}::{tests}")))
        .args(left_out(options.only.as_deref()))
        .env("COWLFS_BIN", crate::run::target()?.join("release/cowlfs"))
        .env("COWL_BIN", crate::run::target()?.join("release/cowl"))
        .env("COWL_CUTS", options.cuts.to_string())
        .env("COWL_SEED", options.seed.to_string())
        .env("COWL_BASE_OPTIONS", &options.base_options)
        .env("COWL_MKFS", &options.mkfs)
        .run()?;
    note("nothing was lost that was promised, and losses are seen where nothing is promised");
    Ok(())
}

/// Arguments that make libtest skip every test except that of `only`.
fn left_out(only: Option<&str>) -> Vec<&'static str> {
    let tests = [
        ("ext4", "on_ext4"),
        ("xfs", "on_xfs"),
        ("btrfs", "on_btrfs"),
        ("volatile", "without_"),
    ];
    let others = tests
        .iter()
        .filter(|(kind, _)| only.is_some_and(|only| only != *kind));
    others.flat_map(|(_, test)| ["--skip", *test]).collect()
}

#[cfg(test)]
mod tests {
    use super::left_out;

    #[test]
    fn one_file_system_leaves_the_others_out() {
        assert!(left_out(None).is_empty());
        let wanted = [
            "--skip", "on_ext4", "--skip", "on_xfs", "--skip", "without_",
        ];
        assert_eq!(left_out(Some("btrfs")), wanted);
    }
}

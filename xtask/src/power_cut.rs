//! Runs power cuts on each supported file system. The last test gives up the guarantee (`volatile`, or with `--store`
//! syncs that do nothing) and must observe data loss, which proves that the rig detects it.

use crate::run::{Result, Run, note};

/// Options of `cargo xtask power-cut`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of cuts on each file system
    #[arg(value_name = "N", default_value_t = 100)]
    cuts: u64,
    /// First seed; each run of the programs is cut at 50 moments
    #[arg(long, value_name = "S", default_value_t = 1000)]
    seed: u64,
    /// Run only the tests of this file system, or only those without syncs
    #[arg(long, value_parser = ["ext4", "xfs", "btrfs", "volatile"])]
    only: Option<String>,
    /// Cut the power of a store while all verbs run, instead of that of a mount
    #[arg(long)]
    store: bool,
    /// Set mount options of the file system
    #[arg(long, value_name = "TEXT", default_value = "")]
    base_options: String,
    /// Pass additional arguments to mkfs
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    mkfs: String,
}

impl Options {
    /// Returns options for all file systems, with the default arguments of mkfs and mount.
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

/// Runs the power-cut tests.
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
        .args(["a_power_cut", "power_cuts_without"].map(|tests| format!("{rig}::{tests}")))
        .args(skips(options.only.as_deref()))
        .env("COWLFS_BIN", crate::run::target()?.join("release/cowlfs"))
        .env("COWL_BIN", crate::run::target()?.join("release/cowl"))
        .env("COWL_CUTS", options.cuts.to_string())
        .env("COWL_SEED", options.seed.to_string())
        .env("COWL_BASE_OPTIONS", &options.base_options)
        .env("COWL_MKFS", &options.mkfs)
        .run()?;
    note("no guaranteed data was lost, and losses were detected where nothing is guaranteed");
    Ok(())
}

/// Returns the arguments that make libtest skip every test except that of `only`.
fn skips(only: Option<&str>) -> Vec<&'static str> {
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
    use super::skips;

    #[test]
    fn one_file_system_excludes_the_others() {
        assert!(skips(None).is_empty());
        let wanted = [
            "--skip", "on_ext4", "--skip", "on_xfs", "--skip", "without_",
        ];
        assert_eq!(skips(Some("btrfs")), wanted);
    }
}

//! Runs the fuzz targets with libFuzzer, and measures which lines of the parsers they reach.
//!
//! The instrumentation needs no flags of a nightly compiler, so the toolchain of the project is sufficient.

use std::path::{Path, PathBuf};

use crate::run::{Result, Run, failure, root, target, title};

/// Each target, and the source files of its parsers.
const TARGETS: [(&str, &[&str]); 8] = [
    ("acl", &["snap-cli/src/archive/acl.rs"]),
    ("lxc_config", &["snap-cli/src/lxc/config.rs"]),
    ("manifests", &["snap-cli/src/store/record.rs"]),
    (
        "markers",
        &[
            "fs/layers/src/format/foreign.rs",
            "fs/layers/src/format/number.rs",
            "fs/layers/src/format/origin.rs",
            "fs/layers/src/format/redirect.rs",
            "fs/layers/src/format/xattr_names.rs",
            "fs/layers/src/format/zero_device.rs",
            "fs/layers/src/layer/recorded.rs",
            "fs/layers/src/view/resolve.rs",
        ],
    ),
    (
        "options",
        &[
            "fs/cowlfs/src/cli/options.rs",
            "fs/cowlfs/src/cli/split.rs",
            "fs/overlay/src/idmap.rs",
        ],
    ),
    (
        "pax",
        &[
            "snap-cli/src/archive/extended.rs",
            "snap-cli/src/archive/pax.rs",
        ],
    ),
    (
        "tar",
        &[
            "snap-cli/src/archive/entry_path.rs",
            "snap-cli/src/archive/member.rs",
            "snap-cli/src/archive/sparse.rs",
            "snap-cli/src/archive/stream.rs",
        ],
    ),
    (
        "unpack",
        &[
            "snap-cli/src/archive/entry_path.rs",
            "snap-cli/src/archive/unpack.rs",
            "snap-cli/src/tree/in_root.rs",
        ],
    ),
];

/// Flags of the compiler: the instrumentation for libFuzzer, and that for coverage.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Cinstrument-coverage";

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Target to run [default: each one in turn]
    target: Option<String>,
    /// Number of executions of each target
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    runs: u64,
    /// End each run after this time
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<u64>,
    /// Print the coverage of the committed corpus instead (needs the rustup component llvm-tools)
    #[arg(long)]
    coverage: bool,
    /// Replace the committed corpus by a minimized one that includes the inputs found on this machine
    #[arg(long, conflicts_with = "coverage")]
    minimize: bool,
}

/// The directories and the program of the fuzz targets.
struct Fuzzer {
    program: PathBuf,
    corpus: PathBuf,
    /// Inputs that were found on this machine.
    found: PathBuf,
}

/// Builds the fuzz targets, and runs them or reports their coverage.
pub(crate) fn run(options: &Options) -> Result<()> {
    let chosen: Vec<_> = TARGETS
        .iter()
        .filter(|(name, _)| options.target.as_deref().is_none_or(|only| only == *name))
        .collect();
    if chosen.is_empty() {
        let known = TARGETS.map(|(name, _)| name).join(", ");
        return failure(format!("no such target; there are {known}"));
    }
    let fuzzer = build()?;
    for (name, files) in chosen {
        title(name);
        match options {
            Options { coverage: true, .. } => fuzzer.coverage(name, files)?,
            Options { minimize: true, .. } => fuzzer.minimize(name)?,
            _ => fuzzer.run(name, options)?,
        }
    }
    Ok(())
}

fn build() -> Result<Fuzzer> {
    let package = root()?.join("tests/fuzz");
    let dir = target()?.join("fuzz");
    let version = Run::new("rustc").arg("-vV").unseen().output()?;
    let host = version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .unwrap_or_default()
        .to_owned();
    // With --target, the flags do not apply to build scripts, which have no counters to report to.
    Run::cargo()?
        .args(["build", "--release", "--locked", "--target", &host])
        .within(&package)
        .env("RUSTFLAGS", FLAGS)
        .env("CARGO_TARGET_DIR", &dir)
        .run()?;
    Ok(Fuzzer {
        program: dir.join(&host).join("release/cowl-fuzz"),
        corpus: package.join("corpus"),
        found: dir.join("found"),
    })
}

impl Fuzzer {
    fn start(&self, target: &str, profile: &Path) -> Run {
        Run::new("nice")
            .args(["-n", "19"])
            .arg(&self.program)
            .env("COWL_FUZZ", target)
            .env("LLVM_PROFILE_FILE", profile)
    }

    /// Runs a target. An input that fails is written to the directory of the found inputs, with the prefix `crash-`.
    fn run(&self, target: &str, options: &Options) -> Result<()> {
        let found = self.found.join(target);
        std::fs::create_dir_all(&found)?;
        self.start(target, Path::new("/dev/null"))
            .arg(format!("-runs={}", options.runs))
            // 0 is no limit.
            .arg(format!(
                "-max_total_time={}",
                options.minutes.unwrap_or_default() * 60
            ))
            .arg(format!("-artifact_prefix={}/", found.display()))
            .args([
                "-max_len=16384",
                "-rss_limit_mb=1024",
                "-timeout=10",
                "-print_final_stats=1",
            ])
            .args([&found, &self.corpus.join(target)])
            .run()
    }

    fn minimize(&self, target: &str) -> Result<()> {
        let (old, new) = (self.corpus.join(target), self.found.join("minimized"));
        if new.try_exists()? {
            std::fs::remove_dir_all(&new)?;
        }
        std::fs::create_dir_all(&new)?;
        self.start(target, Path::new("/dev/null"))
            .args(["-merge=1", "-max_len=16384"])
            .args([&new, &old, &self.found.join(target)])
            .run()?;
        std::fs::remove_dir_all(&old)?;
        Run::new("cp").arg("-r").args([&new, &old]).run()
    }

    fn coverage(&self, target: &str, files: &[&str]) -> Result<()> {
        let (raw, data) = (
            self.found.join("coverage.profraw"),
            self.found.join("coverage"),
        );
        std::fs::create_dir_all(&self.found)?;
        self.start(target, &raw)
            .arg("-runs=0")
            .arg(self.corpus.join(target))
            .run()?;
        let sysroot = Run::new("rustc")
            .args(["--print", "target-libdir"])
            .unseen()
            .output()?;
        let tools = Path::new(&sysroot).with_file_name("bin");
        Run::new(tools.join("llvm-profdata"))
            .args(["merge", "-sparse", "-o"])
            .args([&data, &raw])
            .run()?;
        let profile = format!("-instr-profile={}", data.display());
        let report = Run::new(tools.join("llvm-cov"))
            .arg("report")
            .arg(&self.program)
            .arg(profile);
        let mut report = report.arg("-use-color=false");
        for file in files {
            report = report.arg(root()?.join(file));
        }
        report.run()
    }
}

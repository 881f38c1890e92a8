//! `cargo xtask bench work`: real programs in the root filesystem of a Debian container, on a plain directory, the
//! kernel's overlayfs and cowlfs. The file systems alternate, as in `mounted`.

mod container;
mod image;
mod rows;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_tests::rootfs;

use self::rows::{Size, WorkRow};
use super::ground::Ground;
use super::machine::Machine;
use super::outcome::{Cell, Comparison, Line, Outcome};
use super::rows::{Group, Layers};
use super::task;
use super::variants::{self, How, REFERENCE, Variant};
use crate::run::{Failure, Result, Run, failure, note, target, title};

/// File systems that are compared by default.
const USUAL: [&str; 4] = ["native", REFERENCE, "cowlfs", "managed"];

/// Directory of the root filesystem on the base file system.
const BASE: &str = "base";

/// Options of `cargo xtask bench work`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of times that each row is measured; the median is reported
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure only these rows, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "ROWS")]
    only: Vec<String>,
    /// Measure these file systems, separated by commas, and the kernel's overlayfs [default: native,cowlfs,managed]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    among: Vec<String>,
    /// Use this directory on a disk; the default is an ext4 in memory
    #[arg(long, value_name = "DIR")]
    disk: Option<PathBuf>,
    /// Compare with another overlay program, which must accept the usual mount options
    #[arg(long, value_name = "NAME=PROGRAM[,OPTIONS]")]
    fs: Vec<String>,
    /// Run with the smallest sizes, as a smoke test; the results are meaningless
    #[arg(long)]
    quick: bool,
    /// Do not update docs/benchmarks.md; implied by a run of selected rows or file systems
    #[arg(long)]
    no_docs: bool,
}

impl Options {
    /// Returns the default options; with `quick`, those of a smoke test.
    pub(super) fn usual(quick: bool) -> Self {
        Self {
            rounds: 3,
            only: Vec::new(),
            among: Vec::new(),
            disk: None,
            fs: Vec::new(),
            quick,
            no_docs: false,
        }
    }

    fn is_whole(&self) -> bool {
        self.only.is_empty() && self.among.is_empty() && self.fs.is_empty() && !self.quick
    }

    fn size(&self) -> (Size, usize) {
        match self.quick {
            true => (Size::Small, 1),
            false => (Size::Full, self.rounds.max(1)),
        }
    }

    fn variants(&self, cowlfs: &Path) -> Result<Vec<Variant>> {
        let mut all = variants::all(cowlfs, &self.fs)?;
        let own = all.len() - self.fs.len();
        // The work needs a container of root.
        let is_possible = |variant: &Variant| !matches!(variant.how, How::Rootless(_));
        if let Some(name) = self.among.iter().find(|name| {
            all.iter()
                .all(|variant| variant.name != **name || !is_possible(variant))
        }) {
            return failure(format!("unknown file system {name}"));
        }
        let mut index = 0;
        all.retain(|variant| {
            index += 1;
            let name = variant.name.as_str();
            let chosen = match self.among.is_empty() {
                true => USUAL.contains(&name) || index > own,
                false => name == REFERENCE || self.among.iter().any(|other| other == name),
            };
            chosen && is_possible(variant)
        });
        Ok(all)
    }
}

/// Runs the comparison with the program at `cowlfs`.
pub(super) fn run(options: &Options, cowlfs: &Path) -> Result<Outcome> {
    let (size, rounds) = options.size();
    let rows = rows::selected(&options.only)?;
    let mut variants = options.variants(cowlfs)?;
    let machine = Machine::look()?;
    title("root filesystem");
    let tar = image::tar()?;
    // The base, a plain copy of it, and the files that the work adds.
    let bytes = std::fs::metadata(&tar)?.len() * 3 + (2 << 30);
    let ground = Ground::new(options.disk.as_deref(), bytes)?;
    let base = ground.path().join(BASE);
    std::fs::create_dir(&base)?;
    rootfs::unpack(&tar, &base)?;
    let mut outcome = Outcome {
        machine,
        ground: ground.description.clone(),
        rounds,
        files: count(&base)?,
        big_mib: usize::try_from(std::fs::metadata(&tar)?.len() >> 20).unwrap_or(usize::MAX),
        variants: Vec::new(),
        lines: Vec::new(),
        memory: BTreeMap::new(),
        page_cache: BTreeMap::new(),
    };
    let layers = Layers {
        directory: ground.path(),
        names: vec![BASE.to_owned()],
    };
    super::mounted::probe(&mut variants, &mut outcome, |variant| {
        variant.probe_over(&ground, &layers, Path::new("usr"))
    })?;
    title("measurements");
    let bench = Bench {
        ground: &ground,
        layers,
        size,
    };
    note(&super::report::head(&outcome.variants));
    for row in &rows {
        if !base.join(row.needs).try_exists()? {
            note(&format!(
                "!! {} is LEFT OUT: the root filesystem lacks /{}",
                row.name, row.needs
            ));
            continue;
        }
        let line = bench.row(row, &variants, rounds);
        note(&super::report::line(&line, &outcome.variants));
        super::mounted::note_errors(&line);
        outcome.lines.push(line);
    }
    Ok(outcome)
}

struct Bench<'a> {
    ground: &'a Ground,
    layers: Layers,
    size: Size,
}

impl Bench<'_> {
    fn row(&self, row: &WorkRow, variants: &[Variant], rounds: usize) -> Line {
        let mut cells: BTreeMap<String, Cell> = BTreeMap::new();
        for _ in 0..rounds {
            for variant in variants {
                let cell = cells.entry(variant.name.clone()).or_default();
                match self.measure(row, variant) {
                    Ok(took) => cell.seconds.push(took.as_secs_f64()),
                    Err(error) => cell.error = Some(error.to_string()),
                }
            }
        }
        Line {
            name: row.name.to_owned(),
            group: Group::Work,
            unit: "time".to_owned(),
            units: 1,
            cells,
        }
    }

    fn measure(&self, row: &WorkRow, variant: &Variant) -> Result<Duration> {
        self.warm()?;
        let mounted = variant.mount(self.ground, &self.layers, "run")?;
        let worked = task::sync(&self.ground.path())
            .and_then(|()| container::run(&mounted.mount_point, row, self.size));
        let ended = mounted.end();
        let took = worked?;
        ended.map(|()| took)
    }

    /// Reads the whole root filesystem, so that no variant has to read again what an earlier row has evicted.
    fn warm(&self) -> Result<()> {
        let base = self.ground.path().join(BASE);
        Run::shell(&format!(
            "tar -C '{}' -c . | cat > /dev/null",
            base.display()
        ))
        .unseen()
        .run()
    }
}

/// Returns the number of objects at and below a directory.
fn count(dir: &Path) -> Result<usize> {
    let text = Run::new("find")
        .arg(dir)
        .args(["-printf", "x"])
        .unseen()
        .output()?;
    Ok(text.len())
}

/// Runs the comparison and stores the results in target/bench. After a complete run it also updates
/// docs/benchmarks.md and README.md.
pub(super) fn run_and_report(options: &Options) -> Result<()> {
    let start = Instant::now();
    let outcome = run(options, &target()?.join("release/cowlfs"))?;
    note(&super::report::summary(&outcome));
    outcome.keep(Comparison::Work, options.is_whole())?;
    note(&format!("in {:.0?}", start.elapsed()));
    if options.is_whole() && !options.no_docs {
        super::report::write(Comparison::Work, &outcome)?;
    }
    match outcome.failed() {
        0 => Ok(()),
        failed => Err(Failure(format!("{failed} measurements failed: see above"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn names(options: &Options) -> Result<Vec<String>> {
        let variants = options.variants(Path::new("cowlfs"))?;
        Ok(variants.into_iter().map(|variant| variant.name).collect())
    }

    #[test]
    fn file_systems_are_selected_by_name() {
        let mut options = Options::usual(false);
        assert!(options.is_whole());
        assert_eq!(names(&options).unwrap(), USUAL);
        options.fs = vec!["other=/bin/other,option".to_owned()];
        assert_eq!(names(&options).unwrap().last().unwrap(), "other");
        options.among = vec!["fuse-overlayfs".to_owned()];
        assert_eq!(names(&options).unwrap(), [REFERENCE, "fuse-overlayfs"]);
        for unknown in ["rootless", "none"] {
            options.among = vec![unknown.to_owned()];
            assert!(names(&options).is_err());
        }
        assert!(!options.is_whole() && !Options::usual(true).is_whole());
    }
}

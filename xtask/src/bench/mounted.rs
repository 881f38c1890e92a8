//! `cargo xtask bench mounted`: the same work on a plain directory, the kernel's overlayfs, fuse-overlayfs and several
//! configurations of cowlfs. The file systems alternate, so that ratios remain valid if the speed of the machine
//! drifts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::ground::Ground;
use super::load;
use super::lowers;
use super::outcome::{Cell, Comparison, Line, Outcome, Told};
use super::rows::{self, Environment, Lowers, Measured, Row, Sizes};
use super::task::{self, Step, Task};
use super::variants::{self, How, Mounted, REFERENCE, Variant, between};
use crate::run::{Failure, Result, Run, failure, note, target, title};

/// Options of `cargo xtask bench mounted`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of times that each row is measured; the median is reported
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure only these rows, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "ROWS")]
    only: Vec<String>,
    /// Measure only these file systems, separated by commas, and the kernel's overlayfs
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    among: Vec<String>,
    /// Number of files in the trees
    #[arg(long, default_value_t = 10_000)]
    files: usize,
    /// Size of the big files in MiB
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    big: usize,
    /// Use this directory on a disk; the default is an ext4 in memory
    #[arg(long, value_name = "DIR")]
    disk: Option<PathBuf>,
    /// Compare with another overlay program, which must accept the usual mount options
    #[arg(long, value_name = "NAME=PROGRAM[,OPTIONS]")]
    fs: Vec<String>,
    /// Run with the smallest sizes, as a smoke test; the results are meaningless
    #[arg(long)]
    pub(super) quick: bool,
    /// Do not update docs/benchmarks.md; implied by a run of selected rows or file systems
    #[arg(long)]
    pub(super) no_docs: bool,
}

impl Options {
    /// Returns the default options; with `quick`, those of a smoke test.
    pub(super) fn usual(quick: bool) -> Self {
        Self {
            rounds: 2,
            only: Vec::new(),
            among: Vec::new(),
            files: 10_000,
            big: 256,
            disk: None,
            fs: Vec::new(),
            quick,
            no_docs: false,
        }
    }

    fn sizes(&self) -> Sizes {
        if self.quick {
            return Sizes {
                files: 500,
                owned: 500,
                names: 500,
                big_mib: 8,
                percent: 1,
            };
        }
        Sizes {
            files: self.files,
            owned: self.files * 2,
            names: 10_000,
            big_mib: self.big,
            percent: 100,
        }
    }

    /// Returns whether the results cover the complete comparison.
    pub(super) fn is_whole(&self) -> bool {
        self.only.is_empty() && self.among.is_empty() && self.fs.is_empty() && !self.quick
    }

    fn rows(&self) -> Result<Vec<Row>> {
        let mut rows = rows::all();
        if let Some(name) = self
            .only
            .iter()
            .find(|name| rows.iter().all(|row| row.name != *name))
        {
            let names: Vec<_> = rows.iter().map(|row| row.name).collect();
            return failure(format!(
                "unknown row {name}; the rows are: {}",
                names.join(" ")
            ));
        }
        rows.retain(|row| self.only.is_empty() || self.only.iter().any(|name| name == row.name));
        Ok(rows)
    }

    fn variants(&self, cowlfs: &Path) -> Result<Vec<Variant>> {
        let mut all = variants::all(cowlfs, &self.fs)?;
        if let Some(name) = self
            .among
            .iter()
            .find(|name| all.iter().all(|variant| variant.name != **name))
        {
            return failure(format!("unknown file system {name}"));
        }
        all.retain(|variant| {
            self.among.is_empty() || variant.name == REFERENCE || self.among.contains(&variant.name)
        });
        Ok(all)
    }
}

/// Runs the comparison with the program at `cowlfs`.
pub(super) fn run(options: &Options, cowlfs: &Path) -> Result<Outcome> {
    let sizes = options.sizes();
    let rounds = if options.quick {
        1
    } else {
        options.rounds.max(1)
    };
    let rows = options.rows()?;
    let mut variants = options.variants(cowlfs)?;
    let machine = super::machine::Machine::look()?;
    title("layers");
    let ground = Ground::new(options.disk.as_deref(), lowers::bytes(&sizes))?;
    lowers::make(&ground.path(), &sizes)?;
    let mut outcome = Outcome {
        machine,
        ground: ground.description.clone(),
        rounds,
        files: sizes.files,
        big_mib: sizes.big_mib,
        variants: Vec::new(),
        lines: Vec::new(),
        memory: BTreeMap::new(),
        page_cache: BTreeMap::new(),
    };
    probe(&mut variants, &mut outcome, |variant| {
        variant.probe(&ground, &sizes)
    })?;
    title("measurements");
    let mut bench = Bench {
        env: Environment {
            root: PathBuf::new(),
            tar: ground.path().join("small.tar"),
            sizes,
        },
        ground: &ground,
        outcome: &mut outcome,
    };
    note(&super::report::head(&bench.outcome.variants));
    for row in &rows {
        let line = bench.row(row, &variants, rounds);
        note(&super::report::line(&line, &bench.outcome.variants));
        note_errors(&line);
        bench.outcome.lines.push(line);
    }
    if options.only.is_empty() || options.quick {
        bench.memory(&variants)?;
    }
    Ok(outcome)
}

/// Prints the errors of a row.
pub(super) fn note_errors(line: &Line) {
    for (name, cell) in &line.cells {
        if let Some(error) = &cell.error {
            note(&format!("    {name} FAILED: {error}"));
        }
    }
}

/// Removes variants that `attempt` cannot mount, and prints a warning for each.
pub(super) fn probe(
    variants: &mut Vec<Variant>,
    outcome: &mut Outcome,
    mut attempt: impl FnMut(&mut Variant) -> Result<()>,
) -> Result<()> {
    let mut mountable = Vec::new();
    for mut variant in variants.drain(..) {
        let refused = attempt(&mut variant).err().map(|error| error.to_string());
        if let Some(error) = &refused {
            note(&format!(
                "\n!! {} {} cannot be mounted and is LEFT OUT: {error}\n",
                variant.name, variant.options
            ));
        }
        outcome.variants.push(Told {
            name: variant.name.clone(),
            options: variant.options.clone(),
            refused: refused.clone(),
            awake: variant.awake.clone(),
        });
        if refused.is_none() {
            mountable.push(variant);
        }
    }
    *variants = mountable;
    match variants.iter().any(|variant| variant.name == REFERENCE) {
        true => Ok(()),
        false => failure("cannot mount the kernel's overlayfs, which is the reference"),
    }
}

struct Bench<'a> {
    ground: &'a Ground,
    env: Environment,
    outcome: &'a mut Outcome,
}

impl Bench<'_> {
    fn row(&mut self, row: &Row, variants: &[Variant], rounds: usize) -> Line {
        let mut cells: BTreeMap<String, Cell> = BTreeMap::new();
        for round in 0..rounds {
            for variant in variants {
                // A copy is not a mount, and shares no page cache with another.
                let copied = matches!(variant.how, How::Copy);
                if copied && matches!(row.measured, Measured::Mount | Measured::Second(_)) {
                    continue;
                }
                let cell = cells.entry(variant.name.clone()).or_default();
                match self.measure(row, variant, round == 0, cell) {
                    Ok(took) => cell.seconds.push(took.as_secs_f64()),
                    Err(error) => cell.error = Some(error.to_string()),
                }
            }
        }
        Line {
            name: row.name.to_owned(),
            group: row.group,
            unit: row.unit.to_owned(),
            units: (row.units)(&self.env.sizes),
            cells,
        }
    }

    /// Takes one measurement. Requests are counted in the first round only: querying them takes time, and their number
    /// does not vary.
    fn measure(
        &mut self,
        row: &Row,
        variant: &Variant,
        count: bool,
        cell: &mut Cell,
    ) -> Result<Duration> {
        if let Measured::Mount = row.measured {
            return self.mount_time(row.lowers, variant);
        }
        let layers = row.lowers.at(&variant.top(self.ground));
        let mounted = variant.mount(self.ground, &layers, "run")?;
        let worked = self.measure_work(row, variant, &mounted, count, cell);
        let ended = mounted.end();
        let took = worked?;
        ended.map(|()| took)
    }

    fn measure_work(
        &mut self,
        row: &Row,
        variant: &Variant,
        mounted: &Mounted<'_>,
        count: bool,
        cell: &mut Cell,
    ) -> Result<Duration> {
        self.env.root = mounted.mount_point.clone();
        self.warm(row.lowers, variant)?;
        match row.measured {
            Measured::Work(..) => {
                mounted.perform(&Task::of(row, Step::Prepare, &self.env))?;
                // Otherwise the first fsync of the next variant would write the data of this preparation.
                mounted.perform(&Task::plain(Step::Sync, &mounted.mount_point))?;
                task::sync(&self.ground.path())?;
            }
            Measured::Cold(_) => drop_caches()?,
            Measured::Second(_) => return self.second(row, variant, mounted),
            Measured::Mount => return failure("a row for mounting has no work"),
        }
        let work = Task::of(row, Step::Work, &self.env);
        if !count {
            return mounted.perform(&work);
        }
        let before = mounted.stats()?;
        let took = mounted.perform(&work)?;
        cell.requests = between(&before, &mounted.stats()?);
        Ok(took)
    }

    /// Loads the names and attributes of the layers into the caches of the base file system, so that no variant pays
    /// for it.
    fn warm(&self, lowers: Lowers, variant: &Variant) -> Result<()> {
        let layers = lowers.at(&variant.top(self.ground));
        if lowers != Lowers::Big {
            for layer in layers.names {
                load::walk(&layers.directory.join(layer), 1)?;
            }
        }
        Ok(())
    }

    /// Returns the mean of several mounts, because a single one takes only milliseconds.
    fn mount_time(&self, lowers: Lowers, variant: &Variant) -> Result<Duration> {
        let times = if self.env.sizes.percent < 100 { 1 } else { 5 };
        self.warm(lowers, variant)?;
        let layers = lowers.at(&variant.top(self.ground));
        let mut all = Duration::ZERO;
        for _ in 0..times {
            let mounted = variant.mount(self.ground, &layers, "run")?;
            all += mounted.took;
            mounted.end()?;
        }
        Ok(all / times)
    }

    /// Measures reads of a library through a second mount, after the first mount has read all of it. Records the page
    /// cache that each of the two added.
    fn second(&mut self, row: &Row, variant: &Variant, mounted: &Mounted<'_>) -> Result<Duration> {
        drop_caches()?;
        let before = cached()?;
        mounted.perform(&Task::plain(Step::ReadLibrary, &mounted.mount_point))?;
        mounted.perform(&Task::of(row, Step::Work, &self.env))?;
        let after_first = cached()?;
        let layers = row.lowers.at(&variant.top(self.ground));
        let second = variant.mount(self.ground, &layers, "second")?;
        self.env.root = second.mount_point.clone();
        let read = second.perform(&Task::plain(Step::ReadLibrary, &second.mount_point));
        let worked = second.perform(&Task::of(row, Step::Work, &self.env));
        let after_second = cached()?;
        second.end()?;
        read?;
        let added = [
            after_first.saturating_sub(before),
            after_second.saturating_sub(after_first),
        ];
        self.outcome.page_cache.insert(variant.name.clone(), added);
        worked
    }

    /// Measures the memory of the daemon per known inode.
    fn memory(&mut self, variants: &[Variant]) -> Result<()> {
        title("memory");
        for variant in variants.iter().filter(|variant| variant.counted) {
            let layers = Lowers::Owned.at(&variant.top(self.ground));
            let mounted = variant.mount(self.ground, &layers, "run")?;
            let walked = || -> Result<[(u64, u64); 2]> {
                let query = || -> Result<(u64, u64)> {
                    let stats = mounted.stats()?;
                    let number = |key: &str| stats.as_ref()?.get(key)?.as_u64();
                    number("inodes")
                        .zip(number("memory"))
                        .ok_or_else(|| Failure("the daemon does not report its memory".to_owned()))
                };
                let before = query()?;
                mounted.perform(&Task::plain(Step::Walk, &mounted.mount_point))?;
                Ok([before, query()?])
            };
            let walked = walked();
            mounted.end()?;
            let [before, after] = walked?;
            let inodes = after.0.saturating_sub(before.0);
            let bytes = after.1.saturating_sub(before.1);
            note(&format!(
                "{}: {} bytes for each of {inodes} known inodes",
                variant.name,
                bytes / inodes.max(1)
            ));
            let memory = &mut self.outcome.memory;
            memory.insert(variant.name.clone(), (inodes, bytes));
        }
        Ok(())
    }
}

/// Drops the page cache, dentries and inodes.
fn drop_caches() -> Result<()> {
    Run::new("sync").unseen().run()?;
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    Ok(())
}

/// Returns the size of the page cache in bytes.
fn cached() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix("Cached:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes
        .map(|kilobytes| kilobytes << 10)
        .ok_or_else(|| Failure("/proc/meminfo lacks the line `Cached`".to_owned()))
}

/// Runs the comparison and stores the results in target/bench. After a complete run it also updates docs/benchmarks.md.
pub(super) fn run_and_tell(options: &Options) -> Result<()> {
    let start = Instant::now();
    let cowlfs = target()?.join("release/cowlfs");
    let outcome = run(options, &cowlfs)?;
    note(&super::report::summary(&outcome));
    outcome.keep(Comparison::Mounted, options.is_whole())?;
    note(&format!("in {:.0?}", start.elapsed()));
    if options.is_whole() && !options.no_docs {
        super::report::write(Comparison::Mounted, &outcome)?;
    }
    match outcome.failed() {
        0 => Ok(()),
        failed => failure(format!("{failed} measurements failed: see above")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use cowl_tests::conditions::{Need, can};

    use super::*;

    /// Runs one row of each kind on every file system that can be mounted, then the report and the charts. All rows
    /// would take minutes on a busy machine, mostly for native copies of 500 layers.
    #[test]
    fn a_quick_run_visits_every_row_and_leaves_nothing() {
        const ROWS: [&str; 6] = [
            "walk-again",
            "seqread-cold",
            "second-container-lib",
            "untar",
            "copyup-meta",
            "mount-500layers",
        ];
        const NEEDS: &[Need] = &[
            Need::Root,
            Need::Fuse,
            Need::KernelOverlay,
            Need::Program("fuse-overlayfs"),
        ];
        if !can(NEEDS) {
            return;
        }
        let options = Options {
            only: ROWS.map(str::to_owned).into(),
            ..Options::usual(true)
        };
        let outcome = run(&options, &cowl_tests::programs::cowlfs()).unwrap();
        let left = std::path::Path::new("/dev/shm");
        let ours = format!("cowl-bench-{}-", std::process::id());
        let ours = left.join(ours).into_os_string().into_encoded_bytes();
        let left = cowl_tests::mount::all().into_iter().find(|mounted| {
            let path = cowl_tests::mount::bytes(&mounted.mount_point);
            path.starts_with(&ours)
        });
        assert_eq!(left, None);

        let errors = |line: &Line| -> Vec<String> {
            let cells = line.cells.iter();
            cells
                .filter_map(|(name, cell)| Some(format!("{name}: {}", cell.error.as_ref()?)))
                .collect()
        };
        assert_eq!(outcome.lines.len(), ROWS.len());
        for line in &outcome.lines {
            let errors = errors(line);
            // Failures of fuse-overlayfs are reported and are no defect of cowlfs.
            assert!(
                errors
                    .iter()
                    .all(|error| error.starts_with("fuse-overlayfs")),
                "{}: {errors:?}",
                line.name
            );
        }
        let untar = outcome.lines.iter().find(|line| line.name == "untar");
        let requests = |name| untar.unwrap().requests(name);
        assert!(requests("cowlfs").unwrap() > 1.0);
        // Neither writes new files by passthrough.
        assert!(requests("managed").unwrap() > requests("cowlfs").unwrap());
        if outcome.compared().any(|name| name == "rootless") {
            assert!(requests("rootless").unwrap() > requests("cowlfs").unwrap());
        }
        assert!(outcome.memory.contains_key("cowlfs"));
        assert!(outcome.page_cache.contains_key("cowlfs"));

        let dir = tempfile::tempdir().unwrap();
        let page = dir.path().join("benchmarks.md");
        let own = crate::run::root().unwrap().join("docs/benchmarks.md");
        std::fs::copy(own, &page).unwrap();
        super::super::report::write_in(Comparison::Mounted, &outcome, dir.path()).unwrap();
        let text = std::fs::read_to_string(&page).unwrap();
        assert!(text.contains("| untar |"), "{text}");
        let picture = std::fs::read_to_string(dir.path().join("bench/changes.svg")).unwrap();
        assert!(picture.contains("untar") && picture.contains("</svg>"));
    }
}

//! `cargo xtask bench mounted`: the same work on a plain folder, on the kernel's overlayfs, on
//! fuse-overlayfs and on cowlfs in several forms, in turn, so that a ratio holds when the machine's speed
//! drifts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::ground::Ground;
use super::load;
use super::outcome::{Cell, Line, Outcome, Told};
use super::rows::{self, Lowers, Place, Row, Sizes, What};
use super::variants::{self, How, Mounted, REFERENCE, Variant, between};
use crate::run::{Failure, Result, Run, failure, note, target, title};

/// How `cargo xtask bench mounted` is called.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each is measured; medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only these rows; commas between them
    #[arg(long, value_delimiter = ',', value_name = "ROWS")]
    only: Vec<String>,
    /// Only these file systems, beside the kernel's
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    among: Vec<String>,
    /// How many files the trees have
    #[arg(long, default_value_t = 10_000)]
    files: usize,
    /// How many MiB the big files have
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    big: usize,
    /// In this folder on a disk; an ext4 in memory unless said
    #[arg(long, value_name = "DIR")]
    disk: Option<PathBuf>,
    /// Another one to compare with: a program that takes an overlay program's options
    #[arg(long, value_name = "NAME=PROGRAM[,OPTIONS]")]
    fs: Vec<String>,
    /// The smallest run that goes everywhere; its figures say nothing
    #[arg(long)]
    pub(super) quick: bool,
    /// Leave docs/benchmarks.md as it is; so does a run of some rows or file systems only
    #[arg(long)]
    pub(super) no_docs: bool,
}

impl Options {
    /// As they are when nothing is said.
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

    /// Whether what comes out is the whole comparison.
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
                "there is no row {name}; there are: {}",
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
            return failure(format!("there is no file system {name} to compare with"));
        }
        all.retain(|variant| {
            self.among.is_empty() || variant.name == REFERENCE || self.among.contains(&variant.name)
        });
        Ok(all)
    }
}

/// Runs it, with the program at `cowlfs`.
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
    let ground = Ground::new(options.disk.as_deref(), &sizes)?;
    let mut outcome = Outcome {
        machine,
        ground: ground.told.clone(),
        rounds,
        files: sizes.files,
        big_mib: sizes.big_mib,
        variants: Vec::new(),
        lines: Vec::new(),
        memory: BTreeMap::new(),
        page_cache: BTreeMap::new(),
    };
    probe(&mut variants, &ground, &mut outcome)?;
    title("what it takes");
    let mut bench = Bench {
        place: Place {
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
        for (name, cell) in &line.cells {
            if let Some(error) = &cell.error {
                note(&format!("    {name} FAILED: {error}"));
            }
        }
        bench.outcome.lines.push(line);
    }
    if options.only.is_empty() || options.quick {
        bench.memory(&variants)?;
    }
    Ok(outcome)
}

/// Leaves out what can't be mounted, and says so where nobody can miss it.
fn probe(variants: &mut Vec<Variant>, ground: &Ground, outcome: &mut Outcome) -> Result<()> {
    let mut able = Vec::new();
    for mut variant in variants.drain(..) {
        let refused = variant.probe(ground).err().map(|error| error.to_string());
        if let Some(error) = &refused {
            note(&format!(
                "\n!! {} {} can't be mounted and is LEFT OUT: {error}\n",
                variant.name, variant.options
            ));
        }
        outcome.variants.push(Told {
            name: variant.name.clone(),
            options: variant.options.clone(),
            refused: refused.clone(),
        });
        if refused.is_none() {
            able.push(variant);
        }
    }
    *variants = able;
    match variants.iter().any(|variant| variant.name == REFERENCE) {
        true => Ok(()),
        false => failure("the kernel's overlayfs, to which all is compared, can't be mounted"),
    }
}

struct Bench<'a> {
    ground: &'a Ground,
    place: Place,
    outcome: &'a mut Outcome,
}

impl Bench<'_> {
    fn row(&mut self, row: &Row, variants: &[Variant], rounds: usize) -> Line {
        let mut cells: BTreeMap<String, Cell> = BTreeMap::new();
        for round in 0..rounds {
            for variant in variants {
                // A copy is mounted nowhere, and shares nothing.
                let copied = matches!(variant.how, How::Copy);
                if copied && matches!(row.what, What::Mount | What::Second(_)) {
                    continue;
                }
                let cell = cells.entry(variant.name.clone()).or_default();
                match self.once(row, variant, round == 0, cell) {
                    Ok(took) => cell.seconds.push(took.as_secs_f64()),
                    Err(error) => cell.error = Some(error.to_string()),
                }
            }
        }
        Line {
            name: row.name.to_owned(),
            group: row.group,
            unit: row.unit.to_owned(),
            units: (row.units)(&self.place.sizes),
            cells,
        }
    }

    /// One measurement. Requests are counted the first time only: that takes a moment, and they do not vary.
    fn once(
        &mut self,
        row: &Row,
        variant: &Variant,
        count: bool,
        cell: &mut Cell,
    ) -> Result<Duration> {
        if let What::Mount = row.what {
            return self.mounts(row.lowers, variant);
        }
        let mounted = variant.mount(self.ground, row.lowers, "run")?;
        let worked = self.work(row, variant, &mounted, count, cell);
        let ended = mounted.end();
        let took = worked?;
        ended.map(|()| took)
    }

    fn work(
        &mut self,
        row: &Row,
        variant: &Variant,
        mounted: &Mounted,
        count: bool,
        cell: &mut Cell,
    ) -> Result<Duration> {
        self.place.root = mounted.place.clone();
        self.warm(row.lowers)?;
        let place = &self.place;
        let work = match row.what {
            What::Work(first, work) => {
                if let Some(first) = first {
                    first(place)?;
                }
                self.settle(&mounted.place)?;
                work
            }
            What::Cold(work) => {
                drop_caches()?;
                work
            }
            What::Second(work) => return self.second(row.lowers, variant, work),
            What::Mount => return failure("a mount is no work on one"),
        };
        if !count {
            return work(place);
        }
        let before = mounted.stats()?;
        let took = work(place)?;
        cell.requests = between(&before, &mounted.stats()?);
        Ok(took)
    }

    /// The layers' own file system has names and attributes in memory for everybody alike.
    fn warm(&self, lowers: Lowers) -> Result<()> {
        let (folder, layers) = lowers.at(&self.ground.path());
        if lowers != Lowers::Big {
            for layer in layers {
                load::walk(&folder.join(layer), 1)?;
            }
        }
        Ok(())
    }

    /// Nothing waits to be written, of what was made ready and of what the one before left: whoever came next
    /// would pay for it with his first fsync.
    fn settle(&self, mounted: &Path) -> Result<()> {
        for place in [mounted, &self.ground.path()] {
            let folder = std::fs::File::open(place)?;
            rustix::fs::syncfs(folder).map_err(std::io::Error::from)?;
        }
        Ok(())
    }

    /// The mean of several mounts: one takes a few milliseconds.
    fn mounts(&self, lowers: Lowers, variant: &Variant) -> Result<Duration> {
        let times = if self.place.sizes.percent < 100 { 1 } else { 5 };
        self.warm(lowers)?;
        let mut all = Duration::ZERO;
        for _ in 0..times {
            let mounted = variant.mount(self.ground, lowers, "run")?;
            all += mounted.took;
            mounted.end()?;
        }
        Ok(all / times)
    }

    /// The first mount has read the whole library; how long the second one takes, and how many bytes of
    /// page cache each of them took.
    fn second(
        &mut self,
        lowers: Lowers,
        variant: &Variant,
        work: fn(&Place) -> Result<Duration>,
    ) -> Result<Duration> {
        drop_caches()?;
        let empty = cached()?;
        load::read(&self.place.root.join("lib.so"))?;
        work(&self.place)?;
        let one = cached()?;
        let second = variant.mount(self.ground, lowers, "second")?;
        self.place.root = second.place.clone();
        let read = load::read(&self.place.root.join("lib.so"));
        let worked = work(&self.place);
        let two = cached()?;
        second.end()?;
        read?;
        let each = [one.saturating_sub(empty), two.saturating_sub(one)];
        self.outcome.page_cache.insert(variant.name.clone(), each);
        worked
    }

    /// What a known inode takes of the daemon's memory.
    fn memory(&mut self, variants: &[Variant]) -> Result<()> {
        title("memory");
        for variant in variants.iter().filter(|variant| variant.counted) {
            let mounted = variant.mount(self.ground, Lowers::Owned, "run")?;
            let walked = || -> Result<[(u64, u64); 2]> {
                let told = || -> Result<(u64, u64)> {
                    let stats = mounted.stats()?;
                    let of = |key: &str| stats.as_ref()?.get(key)?.as_u64();
                    of("inodes")
                        .zip(of("memory"))
                        .ok_or_else(|| Failure("the daemon does not tell its memory".to_owned()))
                };
                let before = told()?;
                load::walk(&mounted.place.join("tree"), 1)?;
                Ok([before, told()?])
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

/// Empties the page cache and what the kernel knows of names.
fn drop_caches() -> Result<()> {
    Run::new("sync").unseen().run()?;
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    Ok(())
}

/// Bytes of page cache.
fn cached() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix("Cached:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes
        .map(|kilobytes| kilobytes << 10)
        .ok_or_else(|| Failure("/proc/meminfo does not say what is cached".to_owned()))
}

/// Runs it, keeps the result in target/bench, and writes the docs from it when it is the whole comparison.
pub(super) fn run_and_tell(options: &Options) -> Result<()> {
    let start = Instant::now();
    let cowlfs = target()?.join("release/cowlfs");
    let outcome = run(options, &cowlfs)?;
    note(&super::report::summary(&outcome));
    outcome.keep(options.is_whole())?;
    note(&format!("in {:.0?}", start.elapsed()));
    if options.is_whole() && !options.no_docs {
        super::report::write(&outcome)?;
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

    /// Rows of every kind on every file system that can be mounted, the report, and the pictures. (All rows
    /// take minutes on a busy machine, most of it for native copies of 500 layers.)
    #[test]
    fn a_quick_run_goes_everywhere_and_leaves_nothing() {
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
            let place = cowl_tests::mount::bytes(&mounted.place);
            place.starts_with(&ours)
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
            // What others can't do is told and is no fault of ours.
            assert!(
                errors
                    .iter()
                    .all(|error| error.starts_with("fuse-overlayfs")),
                "{}: {errors:?}",
                line.name
            );
        }
        let untar = outcome.lines.iter().find(|line| line.name == "untar");
        assert!(untar.unwrap().requests("cowlfs").unwrap() > 1.0);
        assert!(outcome.memory.contains_key("cowlfs"));
        assert!(outcome.page_cache.contains_key("cowlfs"));

        let dir = tempfile::tempdir().unwrap();
        let page = dir.path().join("benchmarks.md");
        let own = crate::run::root().unwrap().join("docs/benchmarks.md");
        std::fs::copy(own, &page).unwrap();
        super::super::report::write_in(&outcome, dir.path()).unwrap();
        let text = std::fs::read_to_string(&page).unwrap();
        assert!(text.contains("| untar |"), "{text}");
        let picture = std::fs::read_to_string(dir.path().join("bench/changes.svg")).unwrap();
        assert!(picture.contains("untar") && picture.contains("</svg>"));
    }
}

//! Measures the cost of snapshots, compared on the same tree with lxc-snapshot, a plain copy, reflinks on XFS and
//! snapshots of btrfs, and snapshots while a program writes ([`super::pauses`]). Prints tables; asserts nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_tests::scratch::Scratch;

use super::pauses;
use crate::run::{Result, Run, failure, note, target, title};

/// Options of `cargo xtask bench snapshots`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of files in the base, and in the head; several sizes are separated by commas
    #[arg(long, default_values_t = [20_000], value_delimiter = ',')]
    files: Vec<usize>,
    /// Number of times that each operation is measured; the median is reported
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Measure cowl only
    #[arg(long)]
    alone: bool,
    /// Measure only snapshots while a program has files open by passthrough
    #[arg(long)]
    only_open: bool,
    /// Number of files that the program has open; several numbers are separated by commas
    #[arg(long, default_values_t = OPEN, value_delimiter = ',')]
    open: Vec<usize>,
    /// Size of each of these files in MiB; several sizes are separated by commas
    #[arg(long, default_values_t = MIB, value_delimiter = ',')]
    mib: Vec<usize>,
}

/// The numbers of open files.
const OPEN: [usize; 3] = [1, 10, 100];
/// Their sizes in MiB.
const MIB: [usize; 2] = [1, 100];

impl Options {
    /// Returns the default options; with `quick`, those of a smoke test.
    pub(super) fn usual(quick: bool) -> Self {
        let (files, rounds, open, mib) = match quick {
            true => (vec![200], 1, vec![1], vec![1]),
            false => (vec![1_000, 20_000], 5, OPEN.into(), MIB.into()),
        };
        Self {
            files,
            rounds,
            alone: false,
            only_open: false,
            open,
            mib,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Measurement {
    Time(Duration),
    Bytes(u64),
}

impl std::fmt::Display for Measurement {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Time(took) => write!(out, "{:.1} ms", took.as_secs_f64() * 1000.0),
            Self::Bytes(bytes) => write!(out, "{} KiB", bytes >> 10),
        }
    }
}

type Rows = Vec<(String, Measurement)>;

struct Bench {
    cowl: PathBuf,
    scratch: Scratch,
    rounds: usize,
    rows: Rows,
}

/// Runs the benchmark with the release build of cowl.
pub(super) fn run(options: &Options) -> Result<()> {
    let cowl = target()?.join("release/cowl");
    if !options.only_open {
        trees(options, &cowl)?;
    }
    pauses::run(&cowl, &options.open, &options.mib, options.rounds)
}

/// Measures snapshots of trees, and prints a table.
fn trees(options: &Options, cowl: &Path) -> Result<()> {
    let mut tables = Vec::new();
    for files in &options.files {
        title(&format!("{files} files"));
        tables.push(of_size(options, cowl, *files)?);
    }
    title("results");
    let sizes: Vec<_> = options.files.iter().map(ToString::to_string).collect();
    println!(
        "| files in the base and in the head | {} |",
        sizes.join(" | ")
    );
    println!("|---|{}", "---|".repeat(sizes.len()));
    for (index, (label, _)) in tables.first().into_iter().flatten().enumerate() {
        let values = tables.iter().map(|rows| match rows.get(index) {
            Some((_, value)) => value.to_string(),
            None => "-".to_owned(),
        });
        println!("| {label} | {} |", values.collect::<Vec<_>>().join(" | "));
    }
    Ok(())
}

fn of_size(options: &Options, cowl: &Path, files: usize) -> Result<Rows> {
    let mut bench = Bench {
        cowl: cowl.to_owned(),
        scratch: Scratch::new("bench"),
        rounds: options.rounds.max(1),
        rows: Vec::new(),
    };
    let base = bench.scratch.make("base");
    fill(&base, files)?;
    bench.cowl(&base, files)?;
    if !options.alone {
        bench.copy(&base)?;
        bench.lxc(&base)?;
        bench.reflink(&base)?;
        bench.btrfs(&base)?;
    }
    Ok(bench.rows)
}

/// Returns the disk usage of a directory in bytes, as du reports it.
fn disk_usage(directory: &Path) -> Result<u64> {
    let output = Run::new("du")
        .arg("-skx")
        .arg(directory)
        .unseen()
        .output()?;
    let kilobytes = output
        .split_whitespace()
        .next()
        .and_then(|n| n.parse::<u64>().ok());
    match kilobytes {
        Some(kilobytes) => Ok(kilobytes << 10),
        None => failure(format!("unexpected output of du: {output:?}")),
    }
}

/// Returns the bytes in use on a file system. du would count shared blocks twice.
fn used_bytes(mount: &Path) -> Result<u64> {
    Run::new("sync").arg("-f").arg(mount).unseen().run()?;
    let stat = rustix::fs::statvfs(mount).map_err(std::io::Error::from)?;
    Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
}

/// Creates files of 4 KiB, a hundred per directory.
fn fill(root: &Path, files: usize) -> Result<()> {
    let content = vec![b'x'; 4096];
    for number in 0..files {
        let directory = root.join(format!("d{}", number / 100));
        if number % 100 == 0 {
            std::fs::create_dir_all(&directory)?;
        }
        std::fs::write(directory.join(format!("f{number}")), &content)?;
    }
    Ok(())
}

impl Bench {
    /// Adds a row with the median time of `work` over several rounds. `after` runs between rounds and is not measured.
    fn time(
        &mut self,
        label: &str,
        rounds: usize,
        mut work: impl FnMut(usize) -> Result<()>,
        mut after: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let mut took = Vec::new();
        for round in 0..rounds {
            let start = Instant::now();
            work(round)?;
            took.push(start.elapsed());
            after(round)?;
        }
        took.sort();
        let median = took.get(took.len() / 2).copied().unwrap_or_default();
        note(&format!("{label}: {median:.1?}"));
        self.rows
            .push((label.to_owned(), Measurement::Time(median)));
        Ok(())
    }

    /// Adds a row with the increase of disk usage from `before` to `after`.
    fn bytes(&mut self, label: &str, before: u64, after: u64) {
        let bytes = after.saturating_sub(before);
        note(&format!("{label}: {bytes} bytes"));
        self.rows
            .push((label.to_owned(), Measurement::Bytes(bytes)));
    }

    /// Returns a closure that runs cowl on the store.
    fn call(&self) -> impl Fn(&[&str]) -> Result<()> + use<> {
        let (cowl, store) = (self.cowl.clone(), self.scratch.join("store"));
        move |words| {
            let run = Run::new(&cowl).arg("--store").arg(&store).args(words);
            run.unseen().output().map(drop)
        }
    }

    fn cowl(&mut self, base: &Path, files: usize) -> Result<()> {
        title("cowl");
        self.cowl_mounted(base, files)?;
        self.cowl_unmounted()
    }

    fn cowl_mounted(&mut self, base: &Path, files: usize) -> Result<()> {
        let (call, store) = (self.call(), self.scratch.join("store"));
        let rounds = self.rounds;
        let from = base.display().to_string();
        let nothing = |_| Ok(());
        self.time(
            "cowl create (copies the tree)",
            1,
            |_| call(&["create", "web", "--from", &from]),
            nothing,
        )?;
        let mount = Run::new(&self.cowl)
            .arg("--store")
            .arg(&store)
            .args(["mount", "web"])
            .unseen()
            .output()?;
        let head = Path::new(&mount).join("head");
        std::fs::create_dir(&head)?;
        fill(&head, files)?;
        // The first snapshot freezes all files, each later one a single new file.
        self.time(
            "cowl snapshot, all files new",
            1,
            |_| call(&["snapshot", "web"]),
            nothing,
        )?;
        let touch = |round: usize| -> Result<()> {
            std::fs::write(head.join(format!("touched{round}")), "x").map_err(Into::into)
        };
        touch(100)?;
        let before = disk_usage(&store)?;
        self.time(
            "cowl snapshot, mounted",
            rounds,
            |_| call(&["snapshot", "web"]),
            touch,
        )?;
        let per_snapshot = (disk_usage(&store)?.saturating_sub(before)) / rounds as u64;
        self.bytes(
            "disk usage of a cowl snapshot with one new file",
            0,
            per_snapshot,
        );
        self.time(
            "cowl clone",
            rounds,
            |round| call(&["clone", "web@snap0", &format!("c{round}")]),
            nothing,
        )?;
        self.time(
            "cowl restore, mounted",
            rounds,
            |_| call(&["restore", "web", "snap0"]),
            |_| Ok(()),
        )?;
        call(&["umount", "web"])
    }

    fn cowl_unmounted(&mut self) -> Result<()> {
        let (call, rounds) = (self.call(), self.rounds);
        let nothing = |_| Ok(());
        self.time(
            "cowl restore, unmounted",
            rounds,
            |_| call(&["restore", "web", "snap0"]),
            nothing,
        )?;
        self.time(
            "cowl mount and umount",
            rounds,
            |_| {
                call(&["mount", "web"])?;
                call(&["umount", "web"])
            },
            nothing,
        )?;
        self.time(
            "cowl list, first time (measures sizes)",
            1,
            |_| call(&["list", "web"]),
            nothing,
        )?;
        self.time("cowl list", rounds, |_| call(&["list", "web"]), nothing)?;
        self.time(
            "cowl diff with the source snapshot",
            rounds,
            |_| call(&["diff", "web@snap0"]),
            nothing,
        )?;
        self.time(
            "cowl rm of a snapshot",
            rounds.min(4),
            |round| call(&["rm", &format!("web@snap{}", round + 1), "--yes"]),
            nothing,
        )?;
        let tar = self.scratch.join("out.tar");
        let tar = tar.display().to_string();
        self.time(
            "cowl export as a tar",
            1,
            |_| call(&["export", "web@snap0", &tar]),
            nothing,
        )?;
        self.time("cowl flatten", 1, |_| call(&["flatten", "web"]), nothing)?;
        self.time(
            "cowl destroy",
            1,
            |_| call(&["destroy", "web", "--yes"]),
            nothing,
        )
    }

    fn copy(&mut self, base: &Path) -> Result<()> {
        title("cp -a");
        let to = self.scratch.join("copy");
        let (from, to) = (base.to_owned(), to);
        self.time(
            "cp -a of the base",
            1,
            |_| Run::new("cp").arg("-a").arg(&from).arg(&to).unseen().run(),
            |_| Ok(()),
        )
    }

    fn lxc(&mut self, base: &Path) -> Result<()> {
        title("lxc-snapshot");
        let path = self.scratch.make("lxc");
        let container = path.join("c1");
        std::fs::create_dir(&container)?;
        Run::new("cp")
            .arg("-a")
            .arg(base)
            .arg(container.join("rootfs"))
            .unseen()
            .run()?;
        std::fs::write(
            container.join("config"),
            format!(
                "lxc.net.0.type = empty\nlxc.apparmor.profile = unconfined\nlxc.uts.name = c1\n\
                 lxc.rootfs.path = dir:{}\n",
                container.join("rootfs").display()
            ),
        )?;
        let call = |words: &[&str]| {
            let all = ["-P", path.to_str().unwrap_or_default(), "-n", "c1"];
            // The absolute path avoids a `lxc-snapshot` of cowl earlier in PATH.
            Run::new("/usr/bin/lxc-snapshot")
                .args(all)
                .args(words)
                .unseen()
                .run()
        };
        let before = disk_usage(&path)?;
        self.time("lxc-snapshot (base only)", 1, |_| call(&[]), |_| Ok(()))?;
        let after = disk_usage(&path)?;
        self.bytes("disk usage of a snapshot of lxc-snapshot", before, after);
        self.time(
            "lxc-snapshot -r (base only)",
            1,
            |_| call(&["-r", "snap0"]),
            |_| Ok(()),
        )?;
        self.time(
            "lxc-snapshot -d (base only)",
            1,
            |_| call(&["-d", "snap0"]),
            |_| Ok(()),
        )
    }

    /// Creates a file system in an image file, mounts it, and copies the base into it.
    fn image(&self, kind: &str, base: &Path) -> Result<PathBuf> {
        let (file, mount) = (
            self.scratch.join(kind),
            self.scratch.make(&format!("on-{kind}")),
        );
        Run::shell(&format!(
            "truncate -s 8G '{f}' && mkfs.{kind} -q '{f}' && mount -o loop '{f}' '{p}' && {made} && cp -a '{b}/.' '{p}/base/'",
            f = file.display(),
            p = mount.display(),
            b = base.display(),
            made = match kind {
                "btrfs" => format!("btrfs -q subvolume create '{}/base'", mount.display()),
                _ => format!("mkdir '{}/base'", mount.display()),
            },
        ))
        .unseen()
        .run()?;
        Ok(mount)
    }

    fn reflink(&mut self, base: &Path) -> Result<()> {
        title("cp --reflink on XFS");
        let mount = self.image("xfs", base)?;
        let before = used_bytes(&mount)?;
        let timed = self.time(
            "cp -a --reflink=always on XFS (base only)",
            1,
            |_| {
                Run::new("cp")
                    .args(["-a", "--reflink=always"])
                    .arg(mount.join("base"))
                    .arg(mount.join("copy"))
                    .unseen()
                    .run()
            },
            |_| Ok(()),
        );
        let after = used_bytes(&mount)?;
        self.bytes("disk usage of a reflinked copy on XFS", before, after);
        Run::new("umount").arg(&mount).unseen().run()?;
        timed
    }

    fn btrfs(&mut self, base: &Path) -> Result<()> {
        title("btrfs");
        let mount = self.image("btrfs", base)?;
        let rounds = self.rounds;
        let call = |words: &[&str], paths: &[&str]| {
            Run::new("btrfs")
                .args(["-q", "subvolume"])
                .args(words)
                .args(paths)
                .within(&mount)
                .unseen()
                .run()
        };
        let before = used_bytes(&mount)?;
        let timed = self.time(
            "btrfs subvolume snapshot (base only)",
            rounds,
            |round| call(&["snapshot"], &["base", &format!("s{round}")]),
            |_| Ok(()),
        );
        let per_snapshot = used_bytes(&mount)?.saturating_sub(before) / rounds as u64;
        self.bytes("disk usage of a btrfs snapshot", 0, per_snapshot);
        let restored = self.time(
            "btrfs: replace the base with a snapshot",
            1,
            |_| {
                call(&["delete"], &["base"])?;
                call(&["snapshot"], &["s0", "base"])
            },
            |_| Ok(()),
        );
        let deleted = self.time(
            "btrfs subvolume delete",
            1,
            |_| call(&["delete"], &["s0"]),
            |_| Ok(()),
        );
        Run::new("umount").arg(&mount).unseen().run()?;
        timed.and(restored).and(deleted)
    }
}

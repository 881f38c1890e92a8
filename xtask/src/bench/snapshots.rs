//! What snapshots cost, beside what else there is, on the same tree: lxc-snapshot, a plain copy, reflinks
//! on XFS, snapshots of btrfs. Prints a table; asserts nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_tests::scratch::Scratch;

use crate::run::{Result, Run, failure, note, target, title};

/// How `cargo xtask bench snapshots` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many files the base has, and how many the head; several sizes with commas between them
    #[arg(long, default_values_t = [20_000], value_delimiter = ',')]
    files: Vec<usize>,
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Leave the others out
    #[arg(long)]
    alone: bool,
}

impl Options {
    /// As they are when nothing is said.
    pub(super) fn usual(quick: bool) -> Self {
        let (files, rounds) = match quick {
            true => (vec![200], 1),
            false => (vec![1_000, 20_000], 5),
        };
        Self {
            files,
            rounds,
            alone: false,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Figure {
    Took(Duration),
    Bytes(u64),
}

impl std::fmt::Display for Figure {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Took(took) => write!(out, "{:.1} ms", took.as_secs_f64() * 1000.0),
            Self::Bytes(bytes) => write!(out, "{} KiB", bytes >> 10),
        }
    }
}

type Rows = Vec<(String, Figure)>;

struct Bench {
    cowl: PathBuf,
    scratch: Scratch,
    rounds: usize,
    rows: Rows,
}

/// Runs it, with the program that was built for release.
pub(super) fn run(options: &Options) -> Result<()> {
    let cowl = target()?.join("release/cowl");
    let mut tables = Vec::new();
    for files in &options.files {
        title(&format!("{files} files"));
        tables.push(of_size(options, &cowl, *files)?);
    }
    title("what it costs");
    let sizes: Vec<_> = options.files.iter().map(ToString::to_string).collect();
    println!(
        "| files in the base and in the head | {} |",
        sizes.join(" | ")
    );
    println!("|---|{}", "---|".repeat(sizes.len()));
    for (at, (what, _)) in tables.first().into_iter().flatten().enumerate() {
        let figures = tables.iter().map(|rows| match rows.get(at) {
            Some((_, figure)) => figure.to_string(),
            None => "-".to_owned(),
        });
        println!("| {what} | {} |", figures.collect::<Vec<_>>().join(" | "));
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

/// What a folder takes on the disk.
fn taken(folder: &Path) -> Result<u64> {
    let said = Run::new("du").arg("-skx").arg(folder).unseen().output()?;
    let kilobytes = said
        .split_whitespace()
        .next()
        .and_then(|n| n.parse::<u64>().ok());
    match kilobytes {
        Some(kilobytes) => Ok(kilobytes << 10),
        None => failure(format!("du said {said:?}")),
    }
}

/// What is used of a file system: where files share blocks, du counts them twice.
fn used(place: &Path) -> Result<u64> {
    Run::new("sync").arg("-f").arg(place).unseen().run()?;
    let stat = rustix::fs::statvfs(place).map_err(std::io::Error::from)?;
    Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
}

/// Files of 4 KiB, a hundred a folder.
fn fill(root: &Path, files: usize) -> Result<()> {
    let content = vec![b'x'; 4096];
    for at in 0..files {
        let folder = root.join(format!("d{}", at / 100));
        if at % 100 == 0 {
            std::fs::create_dir_all(&folder)?;
        }
        std::fs::write(folder.join(format!("f{at}")), &content)?;
    }
    Ok(())
}

impl Bench {
    /// Measures `what`, several times; `after` makes it ready for the next time.
    fn time(
        &mut self,
        what: &str,
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
        note(&format!("{what}: {median:.1?}"));
        self.rows.push((what.to_owned(), Figure::Took(median)));
        Ok(())
    }

    /// What was taken on the disk more than `before`.
    fn bytes(&mut self, what: &str, before: u64, after: u64) {
        let bytes = after.saturating_sub(before);
        note(&format!("{what}: {bytes} bytes"));
        self.rows.push((what.to_owned(), Figure::Bytes(bytes)));
    }

    /// A function that runs cowl on the store.
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
        let place = Run::new(&self.cowl)
            .arg("--store")
            .arg(&store)
            .args(["mount", "web"])
            .unseen()
            .output()?;
        let head = Path::new(&place).join("head");
        std::fs::create_dir(&head)?;
        fill(&head, files)?;
        // The first one freezes all that was written; each of the others what one file adds.
        self.time(
            "cowl snapshot, all of it new",
            1,
            |_| call(&["snapshot", "web"]),
            nothing,
        )?;
        let touch = |round: usize| -> Result<()> {
            std::fs::write(head.join(format!("touched{round}")), "x").map_err(Into::into)
        };
        touch(100)?;
        let before = taken(&store)?;
        self.time(
            "cowl snapshot, mounted",
            rounds,
            |_| call(&["snapshot", "web"]),
            touch,
        )?;
        let each = (taken(&store)?.saturating_sub(before)) / rounds as u64;
        self.bytes(
            "a snapshot of cowl's, and one new file, on the disk",
            0,
            each,
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
            "cowl restore, not mounted",
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
            "cowl list, first time (counts sizes)",
            1,
            |_| call(&["list", "web"]),
            nothing,
        )?;
        self.time("cowl list", rounds, |_| call(&["list", "web"]), nothing)?;
        self.time(
            "cowl diff against what it was made from",
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
            // The real one, whatever stands before it in the path.
            Run::new("/usr/bin/lxc-snapshot")
                .args(all)
                .args(words)
                .unseen()
                .run()
        };
        let before = taken(&path)?;
        self.time("lxc-snapshot (base alone)", 1, |_| call(&[]), |_| Ok(()))?;
        let after = taken(&path)?;
        self.bytes("a snapshot of lxc-snapshot's on the disk", before, after);
        self.time(
            "lxc-snapshot -r (base alone)",
            1,
            |_| call(&["-r", "snap0"]),
            |_| Ok(()),
        )?;
        self.time(
            "lxc-snapshot -d (base alone)",
            1,
            |_| call(&["-d", "snap0"]),
            |_| Ok(()),
        )
    }

    /// A file system of its own in a file.
    fn image(&self, kind: &str, base: &Path) -> Result<PathBuf> {
        let (file, place) = (
            self.scratch.join(kind),
            self.scratch.make(&format!("on-{kind}")),
        );
        Run::shell(&format!(
            "truncate -s 8G '{f}' && mkfs.{kind} -q '{f}' && mount -o loop '{f}' '{p}' && {made} && cp -a '{b}/.' '{p}/base/'",
            f = file.display(),
            p = place.display(),
            b = base.display(),
            made = match kind {
                "btrfs" => format!("btrfs -q subvolume create '{}/base'", place.display()),
                _ => format!("mkdir '{}/base'", place.display()),
            },
        ))
        .unseen()
        .run()?;
        Ok(place)
    }

    fn reflink(&mut self, base: &Path) -> Result<()> {
        title("cp --reflink on XFS");
        let place = self.image("xfs", base)?;
        let before = used(&place)?;
        let timed = self.time(
            "cp -a --reflink=always on XFS (base alone)",
            1,
            |_| {
                Run::new("cp")
                    .args(["-a", "--reflink=always"])
                    .arg(place.join("base"))
                    .arg(place.join("copy"))
                    .unseen()
                    .run()
            },
            |_| Ok(()),
        );
        let after = used(&place)?;
        self.bytes("a reflinked copy on XFS on the disk", before, after);
        Run::new("umount").arg(&place).unseen().run()?;
        timed
    }

    fn btrfs(&mut self, base: &Path) -> Result<()> {
        title("btrfs");
        let place = self.image("btrfs", base)?;
        let rounds = self.rounds;
        let call = |words: &[&str], paths: &[&str]| {
            Run::new("btrfs")
                .args(["-q", "subvolume"])
                .args(words)
                .args(paths)
                .within(&place)
                .unseen()
                .run()
        };
        let before = used(&place)?;
        let timed = self.time(
            "btrfs subvolume snapshot (base alone)",
            rounds,
            |round| call(&["snapshot"], &["base", &format!("s{round}")]),
            |_| Ok(()),
        );
        let each = used(&place)?.saturating_sub(before) / rounds as u64;
        self.bytes("a snapshot of btrfs's on the disk", 0, each);
        let restored = self.time(
            "btrfs: the snapshot in place of the base",
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
        Run::new("umount").arg(&place).unseen().run()?;
        timed.and(restored).and(deleted)
    }
}

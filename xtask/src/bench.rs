//! What snapshots cost, beside what else there is, on the same tree: lxc-snapshot, a plain copy, reflinks
//! on XFS, snapshots of btrfs. Prints a table; asserts nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_tests::scratch::Scratch;

use crate::run::{Result, Run, note, target, title};

/// How `cargo xtask bench` is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many files the base has, and how many the head
    #[arg(long, default_value_t = 20_000)]
    files: usize,
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Leave the others out
    #[arg(long)]
    alone: bool,
}

struct Bench {
    cowl: PathBuf,
    scratch: Scratch,
    rounds: usize,
    rows: Vec<(String, Duration)>,
}

/// Runs it.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::setup::run()?;
    Run::cargo()?
        .args(["build", "--release", "--locked", "--bins", "-p", "cowl"])
        .run()?;
    let mut bench = Bench {
        cowl: target()?.join("release/cowl"),
        scratch: Scratch::new("bench"),
        rounds: options.rounds.max(1),
        rows: Vec::new(),
    };
    title("a tree");
    let base = bench.scratch.make("base");
    fill(&base, options.files)?;
    bench.cowl(&base, options.files)?;
    if !options.alone {
        bench.copy(&base)?;
        bench.lxc(&base)?;
        bench.reflink(&base)?;
        bench.btrfs(&base)?;
    }
    title("what it costs");
    println!(
        "| {} files in the base and in the head | ms |",
        options.files
    );
    println!("|---|---|");
    for (what, took) in &bench.rows {
        println!("| {what} | {:.1} |", took.as_secs_f64() * 1000.0);
    }
    Ok(())
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
        self.rows.push((what.to_owned(), median));
        Ok(())
    }

    fn cowl(&mut self, base: &Path, files: usize) -> Result<()> {
        title("cowl");
        let (cowl, store) = (self.cowl.clone(), self.scratch.join("store"));
        let rounds = self.rounds;
        let from = base.display().to_string();
        let call = |words: &[&str]| -> Result<()> {
            Run::new(&cowl)
                .arg("--store")
                .arg(&store)
                .args(words)
                .unseen()
                .output()
                .map(drop)
        };
        let nothing = |_| Ok(());
        self.time(
            "cowl create (copies the tree)",
            1,
            |_| call(&["create", "web", "--from", &from]),
            nothing,
        )?;
        let place = Run::new(&cowl)
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
        self.time(
            "cowl snapshot, mounted",
            rounds,
            |_| call(&["snapshot", "web"]),
            touch,
        )?;
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
        call(&["umount", "web"])?;
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
        self.time("lxc-snapshot (base alone)", 1, |_| call(&[]), |_| Ok(()))?;
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
        Run::new("umount").arg(&place).unseen().run()?;
        timed
    }

    fn btrfs(&mut self, base: &Path) -> Result<()> {
        title("btrfs");
        let place = self.image("btrfs", base)?;
        let rounds = self.rounds;
        let timed = self.time(
            "btrfs subvolume snapshot (base alone)",
            rounds,
            |round| {
                Run::new("btrfs")
                    .args(["-q", "subvolume", "snapshot"])
                    .arg(place.join("base"))
                    .arg(place.join(format!("s{round}")))
                    .unseen()
                    .run()
            },
            |_| Ok(()),
        );
        Run::new("umount").arg(&place).unseen().run()?;
        timed
    }
}

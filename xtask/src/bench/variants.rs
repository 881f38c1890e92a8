//! The file systems that are compared, as data, and how each is mounted.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cowl_tests::mount;
use serde_json::Value;

use super::ground::{self, Ground};
use super::rows::Lowers;
use crate::run::{Failure, Result, Run, failure};

/// How a file system is mounted.
#[derive(Clone, Debug)]
pub(super) enum How {
    /// Not at all: a plain copy of the layers.
    Copy,
    /// The kernel's overlayfs.
    Kernel,
    /// By a program with an overlay program's command line.
    Program(PathBuf),
}

/// A file system in one form.
#[derive(Clone, Debug)]
pub(super) struct Variant {
    pub(super) name: String,
    pub(super) how: How,
    /// Options beside the layers.
    pub(super) options: String,
    /// Its daemon can be asked what it has done.
    pub(super) counted: bool,
}

/// Kernel overlayfs as it is by itself: the others are told as ratios to it.
pub(super) const REFERENCE: &str = "kernel";

/// What is compared: `cowlfs` is the program under test, `more` are NAME=PROGRAM[,OPTION...].
pub(super) fn all(cowlfs: &Path, more: &[String]) -> Result<Vec<Variant>> {
    let of = |name: &str, how: How, options: &str| Variant {
        name: name.to_owned(),
        how,
        options: options.to_owned(),
        counted: false,
    };
    let ours = |name: &str, options: &str| of(name, How::Program(cowlfs.to_owned()), options);
    let mut variants = vec![
        of("native", How::Copy, ""),
        of(REFERENCE, How::Kernel, ""),
        of(
            "kernel-all",
            How::Kernel,
            "index=on,metacopy=on,redirect_dir=on",
        ),
        of("fuse-overlayfs", How::Program("fuse-overlayfs".into()), ""),
        ours("cowlfs", ""),
        ours("cowlfs-overlay", "coherence=overlay"),
        ours("cowlfs-plain", "passthrough=off"),
        ours("cowlfs-asleep", "awake=off"),
    ];
    for text in more {
        let Some((name, program)) = text.split_once('=') else {
            return failure(format!(
                "{text}: say NAME=PROGRAM or NAME=PROGRAM,OPTION,..."
            ));
        };
        let (program, options) = program.split_once(',').unwrap_or((program, ""));
        variants.push(of(name, How::Program(program.into()), options));
    }
    Ok(variants)
}

/// Something that is mounted.
#[derive(Debug)]
pub(super) struct Mounted {
    pub(super) place: PathBuf,
    run: PathBuf,
    socket: Option<PathBuf>,
    /// How long that took.
    pub(super) took: Duration,
}

impl Variant {
    /// Whether it can be mounted here: mounts a few files and looks at them. `Err` says why not.
    pub(super) fn probe(&mut self, ground: &Ground) -> Result<()> {
        let tried = |variant: &Self| -> Result<()> {
            let mounted = variant.mount(ground, Lowers::Few, "run")?;
            let there = std::fs::metadata(mounted.place.join("tree/d00000/f00"));
            mounted.end()?;
            there?;
            Ok(())
        };
        if matches!(self.how, How::Program(_)) {
            self.counted = true;
            if tried(self).is_ok() {
                return Ok(());
            }
        }
        self.counted = false;
        tried(self)
    }

    /// Mounts it over fresh folders called `name`.
    pub(super) fn mount(&self, ground: &Ground, lowers: Lowers, name: &str) -> Result<Mounted> {
        let [place, upper, work] = ground.fresh(name)?;
        let (folder, layers) = lowers.at(&ground.path());
        let run = ground.path().join(name);
        let mut options = OsString::from(format!("lowerdir={}", layers.join(":")));
        for (key, path) in [(",upperdir=", &upper), (",workdir=", &work)] {
            options.push(key);
            options.push(path);
        }
        if !self.options.is_empty() {
            options.push(format!(",{}", self.options));
        }
        let socket = self.counted.then(|| run.join("socket"));
        if let Some(socket) = &socket {
            options.push(",control=");
            options.push(socket);
        }
        let start = Instant::now();
        match &self.how {
            How::Copy => copy(&folder, &layers, &place)?,
            How::Kernel => {
                let mut command = Command::new("mount");
                // The new calls take an option of 256 bytes at most.
                command
                    .env("LIBMOUNT_FORCE_MOUNT2", "always")
                    .args(["-t", "overlay", "overlay", "-o"]);
                call(command.arg(options).arg(&place), &folder, &run)?;
            }
            How::Program(program) => {
                let mut command = Command::new(program);
                call(command.arg("-o").arg(options).arg(&place), &folder, &run)?;
            }
        }
        if !matches!(self.how, How::Copy) {
            while mount::at(&place).is_none() {
                if start.elapsed() > Duration::from_secs(10) {
                    return failure("nothing was mounted");
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(Mounted {
            took: start.elapsed(),
            place,
            run,
            socket,
        })
    }
}

/// Runs a program that may leave a daemon behind: what it says goes to a file, because a daemon would keep
/// a pipe open.
fn call(command: &mut Command, folder: &Path, run: &Path) -> Result<()> {
    let said = run.join("said");
    let file = std::fs::File::create(&said)?;
    let status = command
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .map_err(|error| Failure(format!("cannot start {:?}: {error}", command.get_program())))?;
    if status.success() {
        return Ok(());
    }
    let said = std::fs::read(&said)?;
    failure(format!("{status}: {}", said.trim_ascii().escape_ascii()))
}

fn copy(folder: &Path, layers: &[String], place: &Path) -> Result<()> {
    for layer in layers.iter().rev() {
        Run::new("cp")
            .arg("-a")
            .arg(folder.join(layer).join("."))
            .arg(place)
            .unseen()
            .run()?;
    }
    Run::new("sync").arg("-f").arg(place).unseen().run()
}

/// What a daemon says of itself; nothing where there is none that can be asked.
pub(super) type Stats = Option<Value>;

impl Mounted {
    /// Asks the daemon, once what it counts stands still.
    pub(super) fn stats(&self) -> Result<Stats> {
        let Some(socket) = &self.socket else {
            return Ok(None);
        };
        let mut before = ask(socket)?;
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = ask(socket)?;
            if now.get("requests") == before.get("requests") {
                return Ok(Some(now));
            }
            before = now;
        }
    }

    /// Unmounts it, waits until its daemon is gone, and removes what it left.
    pub(super) fn end(self) -> Result<()> {
        // A program that passes over options that it does not know has no socket: it ends all the same.
        let asked = self.socket.as_deref().map(ask).transpose();
        ground::unmount(&self.place)?;
        let told = asked?;
        if let Some(pid) = told.and_then(|told| told.get("pid")?.as_u64()) {
            let process = PathBuf::from(format!("/proc/{pid}"));
            let start = Instant::now();
            while process.is_dir() && start.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        ground::clear(&self.run)
    }
}

fn ask(socket: &Path) -> Result<Value> {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.write_all(b"{\"ask\":\"stats\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line)
        .map_err(|error| Failure(format!("the daemon's answer: {error}")))?;
    match answer.get("requests") {
        Some(_) => Ok(answer),
        None => failure(format!("the daemon does not tell: {answer}")),
    }
}

/// By how much the counts have grown.
pub(super) fn between(before: &Stats, after: &Stats) -> BTreeMap<String, u64> {
    let counts = |stats: &Stats| -> BTreeMap<String, u64> {
        let kinds = stats
            .as_ref()
            .and_then(|stats| stats.get("requests")?.as_object());
        kinds
            .into_iter()
            .flatten()
            .filter_map(|(kind, count)| Some((kind.clone(), count.as_u64()?)))
            .collect()
    };
    let before = counts(before);
    let mut grown = counts(after);
    for (kind, count) in &mut grown {
        *count = count.saturating_sub(before.get(kind).copied().unwrap_or(0));
    }
    grown.retain(|_, count| *count > 0);
    grown
}

//! Defines the file systems that are compared, and mounts them.

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

/// A method of mounting a file system.
#[derive(Clone, Debug)]
pub(super) enum How {
    /// No mount: a plain copy of the layers.
    Copy,
    /// The kernel's overlayfs.
    Kernel,
    /// A program with the usual command line of an overlay program.
    Program(PathBuf),
}

/// A file system with certain options.
#[derive(Clone, Debug)]
pub(super) struct Variant {
    pub(super) name: String,
    pub(super) how: How,
    /// Mount options other than the layers.
    pub(super) options: String,
    /// Whether its daemon reports statistics.
    pub(super) counted: bool,
}

/// Name of the kernel's overlayfs with default options, which is the reference for all ratios.
pub(super) const REFERENCE: &str = "kernel";

/// Returns all variants. `cowlfs` is the program under test; `more` has the form NAME=PROGRAM[,OPTION...].
pub(super) fn all(cowlfs: &Path, more: &[String]) -> Result<Vec<Variant>> {
    let variant = |name: &str, how: How, options: &str| Variant {
        name: name.to_owned(),
        how,
        options: options.to_owned(),
        counted: false,
    };
    let ours = |name: &str, options: &str| variant(name, How::Program(cowlfs.to_owned()), options);
    let mut variants = vec![
        variant("native", How::Copy, ""),
        variant(REFERENCE, How::Kernel, ""),
        variant(
            "kernel-all",
            How::Kernel,
            "index=on,metacopy=on,redirect_dir=on",
        ),
        variant("fuse-overlayfs", How::Program("fuse-overlayfs".into()), ""),
        ours("cowlfs", ""),
        ours("cowlfs-overlay", "coherence=overlay"),
        ours("cowlfs-plain", "passthrough=off"),
        ours("cowlfs-asleep", "awake=off"),
    ];
    for text in more {
        let Some((name, program)) = text.split_once('=') else {
            return failure(format!(
                "{text}: use NAME=PROGRAM or NAME=PROGRAM,OPTION,..."
            ));
        };
        let (program, options) = program.split_once(',').unwrap_or((program, ""));
        variants.push(variant(name, How::Program(program.into()), options));
    }
    Ok(variants)
}

/// A mounted variant, or a copy.
#[derive(Debug)]
pub(super) struct Mounted {
    pub(super) mount_point: PathBuf,
    run: PathBuf,
    socket: Option<PathBuf>,
    /// Time that the mount took.
    pub(super) took: Duration,
}

impl Variant {
    /// Mounts a few files and checks that they are visible; returns an error if the variant cannot be mounted here.
    ///
    /// Also determines whether the program accepts a control socket.
    pub(super) fn probe(&mut self, ground: &Ground) -> Result<()> {
        let attempt = |variant: &Self| -> Result<()> {
            let mounted = variant.mount(ground, Lowers::Few, "run")?;
            let checked = std::fs::metadata(mounted.mount_point.join("tree/d00000/f00"));
            mounted.end()?;
            checked?;
            Ok(())
        };
        if matches!(self.how, How::Program(_)) {
            self.counted = true;
            if attempt(self).is_ok() {
                return Ok(());
            }
        }
        self.counted = false;
        attempt(self)
    }

    /// Mounts the variant with an empty upper and work directory below `name`.
    pub(super) fn mount(&self, ground: &Ground, lowers: Lowers, name: &str) -> Result<Mounted> {
        let [mount_point, upper, work] = ground.fresh(name)?;
        let (directory, layers) = lowers.at(&ground.path());
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
            How::Copy => copy(&directory, &layers, &mount_point)?,
            How::Kernel => {
                let mut command = Command::new("mount");
                // fsconfig(2) limits the value of an option to 256 bytes.
                command
                    .env("LIBMOUNT_FORCE_MOUNT2", "always")
                    .args(["-t", "overlay", "overlay", "-o"]);
                call(command.arg(options).arg(&mount_point), &directory, &run)?;
            }
            How::Program(program) => {
                let mut command = Command::new(program);
                call(
                    command.arg("-o").arg(options).arg(&mount_point),
                    &directory,
                    &run,
                )?;
            }
        }
        if !matches!(self.how, How::Copy) {
            while mount::at(&mount_point).is_none() {
                if start.elapsed() > Duration::from_secs(10) {
                    return failure("no mount appeared within 10 seconds");
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(Mounted {
            took: start.elapsed(),
            mount_point,
            run,
            socket,
        })
    }
}

/// Runs a program that may leave a daemon behind. Its output goes to a file, because the daemon would keep a pipe open.
fn call(command: &mut Command, directory: &Path, run: &Path) -> Result<()> {
    let log = run.join("log");
    let file = std::fs::File::create(&log)?;
    let status = command
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .map_err(|error| Failure(format!("cannot start {:?}: {error}", command.get_program())))?;
    if status.success() {
        return Ok(());
    }
    let output = std::fs::read(&log)?;
    failure(format!("{status}: {}", output.trim_ascii().escape_ascii()))
}

fn copy(directory: &Path, layers: &[String], target: &Path) -> Result<()> {
    for layer in layers.iter().rev() {
        Run::new("cp")
            .arg("-a")
            .arg(directory.join(layer).join("."))
            .arg(target)
            .unseen()
            .run()?;
    }
    Run::new("sync").arg("-f").arg(target).unseen().run()
}

/// Statistics of a daemon; None if it has no control socket.
pub(super) type Stats = Option<Value>;

impl Mounted {
    /// Queries the daemon's statistics, after its request counters have stopped changing.
    pub(super) fn stats(&self) -> Result<Stats> {
        let Some(socket) = &self.socket else {
            return Ok(None);
        };
        let mut before = query(socket)?;
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let now = query(socket)?;
            if now.get("requests") == before.get("requests") {
                return Ok(Some(now));
            }
            before = now;
        }
    }

    /// Unmounts it, waits until its daemon has exited, and removes its directories.
    pub(super) fn end(self) -> Result<()> {
        // A program that ignores unknown options has no socket. It is unmounted before the error is returned.
        let queried = self.socket.as_deref().map(query).transpose();
        ground::unmount(&self.mount_point)?;
        let stats = queried?;
        if let Some(pid) = stats.and_then(|stats| stats.get("pid")?.as_u64()) {
            let process = PathBuf::from(format!("/proc/{pid}"));
            let start = Instant::now();
            while process.is_dir() && start.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        ground::clear(&self.run)
    }
}

fn query(socket: &Path) -> Result<Value> {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.write_all(b"{\"ask\":\"stats\"}\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line)
        .map_err(|error| Failure(format!("cannot parse the daemon's answer: {error}")))?;
    match answer.get("requests") {
        Some(_) => Ok(answer),
        None => failure(format!("the daemon does not report requests: {answer}")),
    }
}

/// Returns the increase of each counter.
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

//! Defines the file systems that are compared, and mounts them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cowl_tests::mount;
use serde_json::Value;

use super::ground::{self, Ground};
use super::lowers;
use super::namespace::UserNamespace;
use super::rows::{Layers, Lowers, Sizes};
use super::task::{self, Step, Task};
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
    /// Such a program in the namespaces of a plain user.
    Rootless(PathBuf),
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
    /// Outcome of the daemon's request to keep idle CPUs awake, if it reports it.
    pub(super) awake: Option<String>,
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
        awake: None,
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
        ours("managed", "managed"),
        variant("rootless", How::Rootless(cowlfs.to_owned()), ""),
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
pub(super) struct Mounted<'a> {
    pub(super) mount_point: PathBuf,
    run: PathBuf,
    socket: Option<PathBuf>,
    /// The namespaces in which it is visible, if it is not here.
    user: Option<&'a UserNamespace>,
    /// Time that the mount took.
    pub(super) took: Duration,
}

impl Variant {
    /// Mounts a few files, as [`Self::probe_over`] does. `sizes` are those of the layers, which are created again for a
    /// plain user.
    pub(super) fn probe(&mut self, ground: &Ground, sizes: &Sizes) -> Result<()> {
        if let How::Rootless(program) = &self.how {
            ground.user(&[program, &task::program()?])?;
            let top = self.top(ground);
            std::fs::create_dir(&top)?;
            lowers::make(&top, sizes)?;
            UserNamespace::own(&top)?;
        }
        let layers = Lowers::Few.at(&self.top(ground));
        self.probe_over(ground, &layers, Path::new("tree/d00000/f00"))
    }

    /// Mounts the layers and checks that `path` is visible; returns an error if the variant cannot be mounted here.
    ///
    /// Also determines whether the program accepts a control socket, and whether it keeps idle CPUs awake.
    pub(super) fn probe_over(
        &mut self,
        ground: &Ground,
        layers: &Layers,
        path: &Path,
    ) -> Result<()> {
        let check = Step::Check(path.to_owned());
        let attempt = |variant: &Self| -> Result<Option<String>> {
            let mounted = variant.mount(ground, layers, "run")?;
            let checked = mounted.perform(&Task::plain(check.clone(), &mounted.mount_point));
            let stats = mounted.stats();
            mounted.end()?;
            checked?;
            let awake = stats?.and_then(|stats| Some(stats.get("awake")?.as_str()?.to_owned()));
            Ok(awake.map(|awake| awake.replace('_', " ")))
        };
        if matches!(self.how, How::Program(_) | How::Rootless(_)) {
            self.counted = true;
            if let Ok(awake) = attempt(self) {
                self.awake = awake;
                return Ok(());
            }
        }
        self.counted = false;
        attempt(self).map(drop)
    }

    /// Returns the directory of its layers. A plain user has layers of its own, because it cannot change the owners of
    /// others.
    pub(super) fn top(&self, ground: &Ground) -> PathBuf {
        match self.how {
            How::Rootless(_) => ground.path().join("user"),
            _ => ground.path(),
        }
    }

    /// Mounts the variant with an empty upper and work directory below `name`.
    pub(super) fn mount<'a>(
        &self,
        ground: &'a Ground,
        layers: &Layers,
        name: &str,
    ) -> Result<Mounted<'a>> {
        let [mount_point, upper, work] = ground.fresh(name)?;
        let run = ground.path().join(name);
        let mut options = OsString::from(format!("lowerdir={}", layers.names.join(":")));
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
        let user = match &self.how {
            How::Rootless(program) => Some((ground.user(&[program])?, program)),
            _ => None,
        };
        if user.is_some() {
            UserNamespace::own(&run)?;
        }
        let directory = &layers.directory;
        let start = Instant::now();
        match &self.how {
            How::Copy => copy(layers, &mount_point)?,
            How::Kernel => {
                let mut command = Command::new("mount");
                // fsconfig(2) limits the value of an option to 256 bytes.
                command
                    .env("LIBMOUNT_FORCE_MOUNT2", "always")
                    .args(["-t", "overlay", "overlay", "-o"]);
                call(command.arg(options).arg(&mount_point), directory, &run)?;
            }
            How::Program(program) | How::Rootless(program) => {
                let mut command = match user {
                    Some((user, program)) => user.command(program, directory)?,
                    None => Command::new(program),
                };
                command.arg("-o").arg(options).arg(&mount_point);
                call(&mut command, directory, &run)?;
            }
        }
        // A mount that is visible only in other namespaces is complete when the program has returned.
        while !matches!(self.how, How::Copy | How::Rootless(_)) && mount::at(&mount_point).is_none()
        {
            if start.elapsed() > Duration::from_secs(10) {
                return failure("no mount appeared within 10 seconds");
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(Mounted {
            took: start.elapsed(),
            mount_point,
            run,
            socket,
            user: user.map(|(user, _)| user),
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

fn copy(layers: &Layers, target: &Path) -> Result<()> {
    for layer in layers.names.iter().rev() {
        Run::new("cp")
            .arg("-a")
            .arg(layers.directory.join(layer).join("."))
            .arg(target)
            .unseen()
            .run()?;
    }
    Run::new("sync").arg("-f").arg(target).unseen().run()
}

/// Statistics of a daemon; None if it has no control socket.
pub(super) type Stats = Option<Value>;

impl Mounted<'_> {
    /// Performs a task where the mount is visible.
    pub(super) fn perform(&self, task: &Task) -> Result<Duration> {
        match self.user {
            None => task.perform(),
            Some(user) => user.perform(&task::program()?, task),
        }
    }

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
        match self.user {
            None => ground::unmount(&self.mount_point)?,
            Some(user) => user.unmount(&self.mount_point)?,
        }
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

//! A program that has files open by passthrough while snapshots are taken, and measures how long it has to wait.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::task;
use crate::run::{Failure, Result, failure, note};

const MIB: usize = 1 << 20;
/// The number of bytes of a write.
const PAGE: usize = 4096;
/// The number of pages between two writes, coprime with the number of pages of a file.
const STEP: u64 = 7919;
/// The pause after each write, and after each request.
const PAUSE: Duration = Duration::from_millis(1);

/// Hidden options of `cargo xtask bench writer`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Options {
    /// The directory, which must be empty
    directory: PathBuf,
    /// The number of files
    files: usize,
    /// The size of each file in MiB
    mib: usize,
}

/// The longest times between two operations.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Gaps {
    /// Between the ends of two writes to one of the files.
    pub(super) writes: Duration,
    /// Between the ends of two changes of the mode of a directory, which are requests.
    pub(super) requests: Duration,
}

/// Performs an operation repeatedly, with pauses.
#[derive(Debug, Default)]
struct Series {
    /// The longest time between two ends, in microseconds.
    longest: AtomicU64,
}

impl Series {
    fn run(
        &self,
        over: &AtomicBool,
        operation: impl Fn(u64) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let mut last = Instant::now();
        let mut number = 0;
        while !over.load(Ordering::Relaxed) {
            operation(number)?;
            let now = Instant::now();
            let gap = u64::try_from((now - last).as_micros()).unwrap_or(u64::MAX);
            self.longest.fetch_max(gap, Ordering::Relaxed);
            last = now;
            number += 1;
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Returns the longest time in microseconds since the last call.
    fn take(&self) -> u64 {
        self.longest.swap(0, Ordering::Relaxed)
    }
}

/// Runs the program of the command line, on the standard input and output.
pub(super) fn run(options: &Options) -> Result<()> {
    write(options, std::io::stdin().lines(), note)
}

/// Creates the files and answers `ready`. Then writes to the first one, and answers each line of the input with the longest
/// gaps since the last one, until the input ends.
fn write(
    options: &Options,
    input: impl Iterator<Item = std::io::Result<String>>,
    mut answer: impl FnMut(&str),
) -> Result<()> {
    let content = vec![b'w'; MIB];
    let create = |name: String| {
        let mut both = OpenOptions::new();
        both.read(true).write(true).create_new(true);
        both.open(options.directory.join(name))
    };
    let mut files: Vec<File> = Vec::new();
    for number in 0..options.files {
        let mut file = create(format!("file{number}"))?;
        for _ in 0..options.mib {
            file.write_all(&content)?;
        }
        files.push(file);
    }
    let Some(first) = files.first() else {
        return failure("the number of files is 0");
    };
    // A directory, so that it is not one of the files that move.
    let changed = options.directory.join("changed");
    std::fs::create_dir(&changed)?;
    task::sync(&options.directory)?;
    let pages = (options.mib * MIB / PAGE) as u64;
    if pages == 0 {
        return failure("the size of the files is 0");
    }
    let page = [b'x'; PAGE];
    let store = |number: u64| first.write_all_at(&page, number * STEP % pages * PAGE as u64);
    let change = |number: u64| {
        let mode = if number.is_multiple_of(2) {
            0o700
        } else {
            0o750
        };
        std::fs::set_permissions(&changed, Permissions::from_mode(mode))
    };
    let (writes, requests, over) = (Series::default(), Series::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let threads = [
            scope.spawn(|| writes.run(&over, store)),
            scope.spawn(|| requests.run(&over, change)),
        ];
        answer("ready");
        for line in input {
            if line.is_err() {
                break;
            }
            answer(&format!("{} {}", writes.take(), requests.take()));
        }
        over.store(true, Ordering::Relaxed);
        for thread in threads {
            match thread.join() {
                Ok(done) => done?,
                Err(_) => return failure("a thread panicked"),
            }
        }
        Ok(())
    })
}

/// The program, in a process of its own. Drop ends it.
#[derive(Debug)]
pub(super) struct Writer {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Writer {
    /// Starts the program, and waits until it writes.
    pub(super) fn start(directory: &Path, (files, mib): (usize, usize)) -> Result<Self> {
        let mut child = Command::new(task::program()?)
            .args(["bench", "writer"])
            .arg(directory)
            .args([files.to_string(), mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return failure("the program has no pipes");
        };
        let mut writer = Self {
            child,
            stdin: Some(stdin),
            stdout: BufReader::new(stdout),
        };
        match writer.hear()?.trim() {
            "ready" => Ok(writer),
            other => failure(format!("unexpected output of the program: {other:?}")),
        }
    }

    /// Returns the process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Begins a new measurement of the longest gaps.
    pub(super) fn reset(&mut self) -> Result<()> {
        self.ask().map(drop)
    }

    fn ask(&mut self) -> Result<Gaps> {
        if let Some(stdin) = &mut self.stdin {
            stdin.write_all(b"\n")?;
        }
        parse(&self.hear()?)
    }

    /// Returns the longest gaps since the last call, or since [`Self::reset`].
    pub(super) fn gaps(&mut self) -> Result<Gaps> {
        let gaps = self.ask()?;
        if gaps.writes.is_zero() || gaps.requests.is_zero() {
            return failure("the program does not write, or sends no requests any more");
        }
        Ok(gaps)
    }

    /// Ends the program, and fails if it has failed.
    pub(super) fn end(mut self) -> Result<()> {
        self.stdin = None;
        let status = self.child.wait()?;
        match status.success() {
            true => Ok(()),
            false => failure(format!("the program failed: {status}")),
        }
    }

    fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(line)
    }
}

fn parse(line: &str) -> Result<Gaps> {
    let parsed = line.trim().split_once(' ').and_then(|(writes, requests)| {
        Some(Gaps {
            writes: Duration::from_micros(writes.parse().ok()?),
            requests: Duration::from_micros(requests.parse().ok()?),
        })
    });
    parsed.ok_or_else(|| Failure(format!("unexpected output of the program: {line:?}")))
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.stdin = None;
        if let Err(error) = self.child.wait() {
            note(&format!("cannot wait for the program: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::MetadataExt;

    use cowl_tests::mount::wait_until;

    use super::*;

    #[test]
    fn the_program_reports_gaps_of_at_least_its_pause() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            directory: dir.path().to_owned(),
            files: 2,
            mib: 1,
        };
        // A third operation has begun after a pause, and the gap before the second one is recorded.
        let third = usize::try_from(2 * STEP).unwrap() * PAGE % MIB;
        let mut times = std::collections::HashSet::new();
        let input = std::iter::once_with(|| {
            wait_until("three operations of each kind", || {
                let written = std::fs::read(dir.path().join("file0")).unwrap();
                let changed = std::fs::metadata(dir.path().join("changed")).unwrap();
                times.insert((changed.ctime(), changed.ctime_nsec()));
                written[third] == b'x' && times.len() > 3
            });
            Ok(String::new())
        });
        let mut answers = Vec::new();
        write(&options, input, |answer| answers.push(answer.to_owned())).unwrap();
        assert_eq!(answers.len(), 2);
        assert_eq!(answers[0], "ready");
        let gaps = parse(&answers[1]).unwrap();
        assert!(gaps.writes >= PAUSE && gaps.requests >= PAUSE, "{gaps:?}");
        let written = std::fs::read(dir.path().join("file0")).unwrap();
        assert_eq!(written.len(), MIB);
        assert!(written.contains(&b'x'));
        let other = std::fs::read(dir.path().join("file1")).unwrap();
        assert_eq!(other, vec![b'w'; MIB]);
        assert!(parse("1").is_err() && parse("1 x").is_err());
    }
}

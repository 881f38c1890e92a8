//! Runs programs in tests, and records their output, exit code and number of bytes written.
//!
//! Output goes to files, not pipes, so that a background process that inherits its parent's standard output cannot hang
//! the test.

use std::ffi::OsStr;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// Timeout after which a program is killed and the test fails.
const TIMEOUT: Duration = Duration::from_secs(300);

/// I/O counters of a process and of the children it has waited for (`/proc/PID/io`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Io {
    /// Bytes passed to write calls of any kind, including copy_file_range.
    pub wchar: u64,
    /// Bytes of dirtied page cache.
    pub write_bytes: u64,
}

impl Io {
    /// Reads `/proc/PID/io`, which exists until the process is reaped.
    pub fn of(pid: u32) -> std::io::Result<Io> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
                .ok_or_else(|| std::io::Error::other(format!("/proc/{pid}/io has no {name}")))
        };
        Ok(Io {
            wchar: field("wchar:")?,
            write_bytes: field("write_bytes:")?,
        })
    }

    /// Returns the difference to `earlier`.
    #[must_use]
    pub fn since(self, earlier: Io) -> Io {
        Io {
            wchar: self.wchar - earlier.wchar,
            write_bytes: self.write_bytes - earlier.write_bytes,
        }
    }
}

/// Results of a program.
#[derive(Debug)]
pub struct Output {
    /// Command line, for messages.
    pub line: String,
    /// Exit code; 128 + signal if a signal killed the program, as in a shell.
    pub code: i32,
    /// Standard output as bytes.
    pub stdout: Vec<u8>,
    /// Standard error as bytes.
    pub stderr: Vec<u8>,
    /// Bytes that it wrote.
    pub io: Io,
    /// Elapsed time.
    pub took: Duration,
}

impl Output {
    /// Panics with a full report unless the program succeeded.
    #[track_caller]
    pub fn ok(self) -> Output {
        assert_eq!(self.code, 0, "must succeed: {}", self.report());
        self
    }

    /// Panics unless the program ended with `code` and its standard error contains each of `words`, ignoring case.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Output {
        assert_eq!(self.code, code, "wrong exit code: {}", self.report());
        let message = self.err().to_lowercase();
        for word in words {
            assert!(
                message.contains(&word.to_lowercase()),
                "message lacks {word:?}: {}",
                self.report()
            );
        }
        assert!(
            !message.contains("panicked"),
            "a panic is not a message: {}",
            self.report()
        );
        self
    }

    /// Returns standard output as text, without trailing whitespace.
    #[must_use]
    pub fn out(&self) -> String {
        show(&self.stdout).trim_end().to_owned()
    }

    /// Returns standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        show(&self.stderr)
    }

    /// Parses standard output as JSON.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}", self.report()))
    }

    /// Returns a full report, for panic messages.
    #[must_use]
    pub fn report(&self) -> String {
        format!(
            "`{}` ended with {} after {:?}\n--- stdout\n{}--- stderr\n{}---",
            self.line,
            self.code,
            self.took,
            show(&self.stdout),
            show(&self.stderr)
        )
    }
}

/// Converts bytes to text; bytes that are not UTF-8 are escaped.
#[must_use]
pub fn show(bytes: &[u8]) -> String {
    std::str::from_utf8(bytes).map_or_else(|_| bytes.escape_ascii().to_string(), str::to_owned)
}

/// Runs `program` with `args`, and waits for it.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: impl IntoIterator<Item = S>,
) -> Output {
    let mut command = Command::new(program);
    command.args(args);
    run_command(command, b"")
}

/// Runs a shell script with `set -eu`.
#[track_caller]
pub fn sh(script: &str) -> Output {
    run("sh", ["-euc", script])
}

/// Runs a shell script with `set -eu` in `dir`.
#[track_caller]
pub fn sh_in(dir: &Path, script: &str) -> Output {
    let mut command = Command::new("sh");
    command.args(["-euc", script]).current_dir(dir);
    run_command(command, b"")
}

/// Runs a prepared command with `input` as its standard input.
///
/// Messages are English unless the test sets a locale, so that results do not depend on the caller's locale.
#[track_caller]
pub fn run_command(mut command: Command, input: &[u8]) -> Output {
    let line = format!("{command:?}");
    if !command.get_envs().any(|(name, _)| name == "LC_ALL") {
        command.env("LC_ALL", "C.UTF-8");
    }
    let mut stdin = tempfile::tempfile().expect("a temporary file");
    stdin.write_all(input).expect("writing a temporary file");
    stdin
        .seek(SeekFrom::Start(0))
        .expect("rewinding a temporary file");
    let mut stdout = tempfile::tempfile().expect("a temporary file");
    let mut stderr = tempfile::tempfile().expect("a temporary file");
    command
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(
            stdout.try_clone().expect("duplicating a descriptor"),
        ))
        .stderr(Stdio::from(
            stderr.try_clone().expect("duplicating a descriptor"),
        ));
    let start = Instant::now();
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
    let (status, io) = finish(&mut child, &line);
    let took = start.elapsed();
    let read_all = |file: &mut std::fs::File| {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))
            .expect("rewinding a temporary file");
        file.read_to_end(&mut bytes)
            .expect("reading a temporary file");
        bytes
    };
    Output {
        code: status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
        stdout: read_all(&mut stdout),
        stderr: read_all(&mut stderr),
        line,
        io,
        took,
    }
}

/// Waits for the child without reaping it, reads its I/O counters, then reaps it.
fn finish(child: &mut Child, line: &str) -> (ExitStatus, Io) {
    let start = Instant::now();
    let pid = Pid::from_child(child);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    while waitid(WaitId::Pid(pid), options)
        .expect("waiting for a child")
        .is_none()
    {
        if start.elapsed() > TIMEOUT {
            child.kill().expect("killing a child");
            child.wait().expect("waiting for a child");
            panic!("`{line}` did not end within {TIMEOUT:?}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let io = Io::of(child.id()).expect("reading the counters of an exited process");
    (child.wait().expect("waiting for a child"), io)
}

//! Running a program in a test: what it said, its exit code, and how many bytes it wrote.
//!
//! Output goes to files, not pipes, so that a background process which keeps its parent's
//! standard output open cannot hang the test.

use std::ffi::OsStr;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// A program that takes longer than this is killed, and the test fails.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the kernel accounted to a process and to the children it waited for (`/proc/PID/io`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Io {
    /// Bytes handed to write calls of any kind, copy_file_range included.
    pub wchar: u64,
    /// Bytes of page cache made dirty.
    pub write_bytes: u64,
}

impl Io {
    /// Reads `/proc/PID/io`; a process that ended but was not waited for still has it.
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

    /// What was written since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Io) -> Io {
        Io {
            wchar: self.wchar - earlier.wchar,
            write_bytes: self.write_bytes - earlier.write_bytes,
        }
    }
}

/// What a program did.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub line: String,
    /// Exit code; 128 + signal when it was killed, as a shell says it.
    pub code: i32,
    /// Standard output as bytes.
    pub stdout: Vec<u8>,
    /// Standard error as bytes.
    pub stderr: Vec<u8>,
    /// What it wrote.
    pub io: Io,
    /// How long it took.
    pub took: Duration,
}

impl Output {
    /// Panics with everything there is to know unless the program succeeded.
    #[track_caller]
    pub fn ok(self) -> Output {
        assert_eq!(self.code, 0, "must succeed: {}", self.report());
        self
    }

    /// Panics unless it ended with `code` and each of `words` stands in its standard error.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Output {
        assert_eq!(self.code, code, "wrong exit code: {}", self.report());
        let said = self.err().to_lowercase();
        for word in words {
            assert!(
                said.contains(&word.to_lowercase()),
                "message lacks {word:?}: {}",
                self.report()
            );
        }
        assert!(
            !said.contains("panicked"),
            "a panic is not a message: {}",
            self.report()
        );
        self
    }

    /// Standard output as text, without the line end.
    #[must_use]
    pub fn out(&self) -> String {
        show(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        show(&self.stderr)
    }

    /// Standard output as JSON.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}", self.report()))
    }

    /// Everything, for a failure's message.
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

/// Bytes as text when they are UTF-8, escaped when they are not.
#[must_use]
pub fn show(bytes: &[u8]) -> String {
    std::str::from_utf8(bytes).map_or_else(|_| bytes.escape_ascii().to_string(), str::to_owned)
}

/// Runs `program` with `args` to its end.
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

/// Runs a prepared command, with `input` as its standard input. Unless the test chose a locale, messages are English:
/// the caller's locale must not decide a test.
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

/// Waits for the end without reaping, reads what was written, then reaps.
fn finish(child: &mut Child, line: &str) -> (ExitStatus, Io) {
    let start = Instant::now();
    let pid = Pid::from_child(child);
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    while waitid(WaitId::Pid(pid), look)
        .expect("waiting for a child")
        .is_none()
    {
        if start.elapsed() > PATIENCE {
            child.kill().expect("killing a child");
            child.wait().expect("waiting for a child");
            panic!("`{line}` did not end within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let io = Io::of(child.id()).expect("reading what an ended process wrote");
    (child.wait().expect("waiting for a child"), io)
}

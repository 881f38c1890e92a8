//! Programs that must run outside of the namespace of the user.
//!
//! LXC creates the namespaces of a container next to that of the user, which a process cannot leave, and the kernel does
//! not permit a process in the latter to send signals to the container. So a command that starts or stops a container
//! has a child that remains outside, and runs LXC's programs for it.

use std::ffi::OsStr;
use std::io::{self, BufRead as _, BufReader, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The child of this process.
static HELPER: OnceLock<Mutex<Child>> = OnceLock::new();

/// A program to run, with its arguments: bytes, because they need not be valid UTF-8.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    program: Vec<u8>,
    arguments: Vec<Vec<u8>>,
}

/// The end of a program.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Ended {
        /// The status as wait(2) returns it.
        status: i32,
        stdout: Vec<u8>,
        stderr: Vec<u8>,
    },
    Missing,
    Failed(String),
}

/// Starts the child. To be called before this process enters the namespace.
pub fn start() -> Result<()> {
    let failed = |error| {
        Error::failed("cannot start a process outside of the namespace of your user").because(error)
    };
    let program = std::env::current_exe().map_err(failed)?;
    let child = Command::new(program)
        .arg("outside")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    HELPER.get_or_init(|| Mutex::new(child));
    Ok(())
}

/// Runs a program outside of the namespace; `None` if there is no child for that.
pub fn run<'a>(
    program: &str,
    arguments: impl IntoIterator<Item = &'a OsStr>,
) -> Option<io::Result<Output>> {
    let mut child = HELPER.get()?.lock().unwrap_or_else(PoisonError::into_inner);
    let request = Request {
        program: program.as_bytes().to_vec(),
        arguments: arguments
            .into_iter()
            .map(|argument| argument.as_bytes().to_vec())
            .collect(),
    };
    Some(ask(&mut child, &request))
}

fn ask(child: &mut Child, request: &Request) -> io::Result<Output> {
    let ended = || io::Error::other("the process outside of the namespace has ended");
    let input = child.stdin.as_mut().ok_or_else(ended)?;
    write_line(input, request)?;
    // The child writes nothing but one line for each request, so no byte is lost in the buffer.
    let output = child.stdout.as_mut().ok_or_else(ended)?;
    let mut line = String::new();
    if BufReader::new(output).read_line(&mut line)? == 0 {
        return Err(ended());
    }
    match serde_json::from_str(&line)? {
        Reply::Ended {
            status,
            stdout,
            stderr,
        } => Ok(Output {
            status: ExitStatus::from_raw(status),
            stdout,
            stderr,
        }),
        Reply::Missing => Err(io::ErrorKind::NotFound.into()),
        Reply::Failed(error) => Err(io::Error::other(error)),
    }
}

fn write_line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// Runs programs for the parent, which enters the namespace, until the standard input ends.
pub fn serve() -> Result<()> {
    let failed = |error: io::Error| {
        Error::failed("the command that needs this process has ended").because(error)
    };
    for line in io::stdin().lock().lines() {
        let line = line.map_err(failed)?;
        let Request { program, arguments } =
            serde_json::from_str(&line).map_err(|error| failed(error.into()))?;
        let output = Command::new(OsStr::from_bytes(&program))
            .args(arguments.iter().map(|bytes| OsStr::from_bytes(bytes)))
            .stdin(Stdio::null())
            .output();
        let reply = match output {
            Ok(output) => Reply::Ended {
                status: output.status.into_raw(),
                stdout: output.stdout,
                stderr: output.stderr,
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Reply::Missing,
            Err(error) => Reply::Failed(error.to_string()),
        };
        write_line(&mut io::stdout().lock(), &reply).map_err(failed)?;
    }
    Ok(())
}

//! Kills a command at each system call that changes something. strace(1) first records these calls, and then
//! delivers SIGKILL at one of them.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use cowl_tests::conditions;

/// Calls that change state visible to other processes or to a later run.
const CALLS: &str = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,syncfs,\
                     write,fchmodat,?fchmodat2,chmod,fchmod,fchown,utimensat,fchownat,setxattr,flock,\
                     connect,sendto,symlinkat,linkat,mknodat,umount2,copy_file_range,ioctl,?fsconfig,?fsmount,\
                     ?move_mount";

/// getxattrat(2) and listxattrat(2) as an strace older than these calls shows them: it shows calls that it does
/// not know whatever it was asked for.
const UNKNOWN_READS: [&str; 2] = ["syscall_0x1d0", "syscall_0x1d1"];

/// Runs at a time. A run waits more than it computes: for syncs, unmounts, and daemons that start and end.
const JOBS: usize = 4;

/// A system call of a command.
#[derive(Debug)]
pub(crate) struct Call {
    name: String,
    /// Its position among the calls of this name, from 1.
    number: usize,
}

/// Runs the command to its end and returns the calls that change something.
pub(crate) fn calls(command: &Command, log: &Path) -> Vec<Call> {
    calls_with(command, None, log)
}

/// Like [`calls`], with a file as the command's standard input.
pub(crate) fn calls_with(command: &Command, input: Option<&Path>, log: &Path) -> Vec<Call> {
    let trace = format!("trace={CALLS}");
    let options = ["-o", log.to_str().unwrap(), "-e", &trace];
    let output = strace(&options, command, input);
    assert!(output.status.success(), "{output:?}");
    let mut calls: Vec<Call> = Vec::new();
    for line in std::fs::read_to_string(log).unwrap().lines() {
        let Some((name, _)) = line.split_once('(') else {
            continue;
        };
        if UNKNOWN_READS.contains(&name) {
            continue;
        }
        let number = 1 + calls.iter().filter(|call| call.name == name).count();
        let name = name.to_owned();
        calls.push(Call { name, number });
    }
    assert!(calls.len() > 5, "{calls:?}");
    calls
}

/// Runs the command and kills it at this call. Returns false if it ended before: it then made another number
/// of calls.
pub(crate) fn kill_at(command: &Command, call: &Call) -> bool {
    kill_at_with(command, None, call)
}

/// Like [`kill_at`], with a file as the command's standard input.
pub(crate) fn kill_at_with(command: &Command, input: Option<&Path>, call: &Call) -> bool {
    let trace = format!("trace={}", call.name);
    let inject = format!("inject={}:signal=KILL:when={}", call.name, call.number);
    let options = ["-o", "/dev/null", "-e", &trace, "-e", &inject];
    let output = strace(&options, command, input);
    let killed = output.status.signal() == Some(9);
    assert!(killed || output.status.success(), "{command:?}: {output:?}");
    killed
}

/// Runs the command under strace, with its environment.
fn strace(options: &[&str], command: &Command, input: Option<&Path>) -> Output {
    let input = match input {
        Some(path) => Stdio::from(std::fs::File::open(path).unwrap()),
        None => Stdio::null(),
    };
    let mut traced = Command::new("strace");
    traced
        .arg("-qq")
        .args(options)
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(input);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => traced.env(name, value),
            None => traced.env_remove(name),
        };
    }
    traced.output().unwrap()
}

/// Runs `step` for every call, in several threads. A step kills the command at the call, checks what is left,
/// and returns whether the command was killed.
pub(crate) fn at_each(label: &str, calls: &[Call], step: impl Fn(&Call) -> bool + Sync) {
    let (next, killed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some(call) = calls.get(next.fetch_add(1, Ordering::Relaxed)) {
            killed.fetch_add(usize::from(step(call)), Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let start = |_| {
            // The name of the test, for messages and directories.
            let thread = std::thread::Builder::new().name(conditions::test_name());
            thread.spawn_scoped(scope, work).unwrap()
        };
        let threads: Vec<_> = (0..JOBS).map(start).collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                next.store(calls.len(), Ordering::Relaxed);
                std::panic::resume_unwind(panic);
            }
        }
    });
    let killed = killed.into_inner();
    eprintln!("{label}: killed at {killed} of {} calls", calls.len());
    // Some calls are not made in every run, such as those of a wait for another process.
    assert!(
        killed * 10 >= calls.len() * 8,
        "{label}: {killed} of {}",
        calls.len()
    );
}

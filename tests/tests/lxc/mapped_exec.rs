//! `cowl exec` in a container with an id map: the command has processes of its own.

use cowl_tests::command::Output;
use cowl_tests::lxc::Lxc;

fn exec(lxc: &Lxc, line: &str) -> Output {
    lxc.store().cowl(["exec", "c1", "--", "sh", "-c", line])
}

/// The command neither sees nor signals other processes.
pub(super) fn has_processes_of_its_own(lxc: &Lxc) {
    let exec = |line: &str| exec(lxc, line);
    // A process of the host with an id of the container.
    let mut outside = std::process::Command::new("setpriv")
        .args([
            "--reuid",
            "100000",
            "--regid",
            "100000",
            "--clear-groups",
            "sleep",
            "1000",
        ])
        .spawn()
        .unwrap();
    let seen = exec("cd /proc; echo [0-9]*; cat 1/comm; echo $$")
        .ok()
        .out();
    let words: Vec<_> = seen.split_whitespace().collect();
    assert_eq!(words, ["1", "2", "cowl", "2"], "{seen}");
    let pid = outside.id();
    // The init cannot be ended from inside.
    let killed = exec(&format!(
        "kill -9 1; kill -9 {pid} 2> /dev/null || echo none; kill -TERM -1; sleep 0; echo alive"
    ))
    .ok()
    .out();
    assert_eq!(
        killed.split_whitespace().collect::<Vec<_>>(),
        ["none", "alive"],
        "{killed}"
    );
    assert!(
        outside.try_wait().unwrap().is_none(),
        "a process outside was ended"
    );
    outside.kill().unwrap();
    outside.wait().unwrap();
    let written = exec(
        "if echo 0 > /proc/sys/kernel/domainname; then echo written; fi 2> /dev/null; \
         awk '$5 ~ \"^/proc/sys\" { print $5, substr($6, 1, 2) }' /proc/self/mountinfo",
    );
    let written = written.ok().out();
    let words: Vec<_> = written.split_whitespace().collect();
    assert_eq!(words.get(..2), Some(&["/proc/sys", "ro"][..]), "{written}");
    assert!(!words.contains(&"rw"), "{written}");
}

/// Orphans are reaped, and end with the command.
pub(super) fn leaves_no_process(lxc: &Lxc) {
    let out = exec(lxc,
        "(sleep 0.1 & echo $! > /orphan); while kill -0 $(cat /orphan) 2> /dev/null; do sleep 0.05; done
         (sleep 4321 &); (exec setsid sleep 4322 &) ; ls -d /proc/[0-9]* | wc -l",
    )
    .ok()
    .out();
    assert_ne!(out.trim(), "", "{out}");
    let left = "grep -alz '^432[12]$' /proc/[0-9]*/cmdline; true";
    let left = cowl_tests::command::run("sh", ["-c", left]).out();
    assert_eq!(left, "", "a process of a command remains");
}

/// The exit code of cowl is that of the command.
pub(super) fn has_the_exit_code_of_the_command(lxc: &Lxc) {
    for (line, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 125", 125),
        ("exit 128", 128),
        ("exit 254", 254),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -INT $$", 130),
        ("exec /nonexistent", 127),
        ("ulimit -c 0; kill -SEGV $$", 139),
    ] {
        let output = exec(lxc, line);
        assert_eq!(output.code, code, "{line}: {}", output.report());
    }
    assert_eq!(
        lxc.store().cowl(["exec", "c1", "--", "/nonexistent"]).code,
        127
    );
    assert_eq!(
        lxc.store().cowl(["exec", "c1", "--", "/etc/passwd"]).code,
        126
    );
}

/// Runs a command on a terminal of its own: ends it by Ctrl-C, stops it by Ctrl-Z, and kills cowl itself.
const TERMINAL: &str = r#"
import os, pty, select, signal, sys, time
def start(*command):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.argv[1], sys.argv[1:] + list(command))
    return pid, terminal
def command_line(pid):
    try: return open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError: return b""
def expect(terminal, text):
    seen = b""
    while text not in seen:
        if not select.select([terminal], [], [], 60)[0]: sys.exit(f"no {text} in {seen}")
        try: seen += os.read(terminal, 1000)
        except OSError: sys.exit(f"ended after {seen}")
pid, terminal = start("sh", "-c", "echo ready; sleep 4323; echo rest")
expect(terminal, b"ready"); os.write(terminal, b"\x03")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
pid, terminal = start("sh", "-i")
# The shell has job control: it remains when Ctrl-C ends its child, and continues a stopped one.
run = b"sh -c 'echo run$((1 + 1)); exec sleep 4323'\n"
os.write(terminal, run); expect(terminal, b"run2"); os.write(terminal, b"\x03")
os.write(terminal, b"\necho still $((1 + 1)) here\n"); expect(terminal, b"still 2 here")
os.write(terminal, run); expect(terminal, b"run2"); os.write(terminal, b"\x1a")
os.write(terminal, b"\njobs; kill -9 %1; exit 9\n"); expect(terminal, b"Stopped")
os.write(terminal, b"exit 9\n")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
pid, terminal = start("sh", "-c", "trap 'exit 42' TERM; echo ready; while :; do sleep 0.1; done")
expect(terminal, b"ready"); os.kill(pid, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
pid, terminal = start("sh", "-c", "trap '' HUP TERM INT; sleep 4323 & echo ready; wait; sleep 4323")
expect(terminal, b"ready"); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
for attempt in range(600):
    found = [p for p in os.listdir("/proc") if p.isdigit() and b"sleep\x004323" in command_line(p)]
    if not found: break
    time.sleep(0.1)
print(len(found))
"#;

/// Ctrl-C, job control, and the end of cowl itself.
pub(super) fn works_on_a_terminal(lxc: &Lxc) {
    let store = lxc.store();
    let cowl = cowl_tests::programs::cowl();
    let args = [
        "-c",
        TERMINAL,
        cowl.to_str().unwrap(),
        "--store",
        store.path().to_str().unwrap(),
    ];
    let output = cowl_tests::command::run("python3", [&args[..], &["exec", "c1", "--"]].concat());
    assert_eq!(output.out(), "130\n9\n42\n0", "{}", output.report());
}

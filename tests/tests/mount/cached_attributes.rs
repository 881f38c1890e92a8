//! Cached attributes are correct after every operation, in every mode of a mount; and execve uses the setuid and
//! setgid bits that a plain directory would have.

use cowl_tests::beside::{Beside, Content, MATRIX, NEEDS, python};
use cowl_tests::conditions::can;
use cowl_tests::mount::{Overlay, Stack};

/// Passthrough for files of the upper layer, none, and passthrough for lower files as well.
const MODES: [&str; 5] = [
    "passthrough=all",
    "passthrough=read",
    "passthrough=off",
    "passthrough=all,coherence=overlay",
    "passthrough=read,coherence=overlay",
];

/// Returns the script for mounts with these options.
fn matrix(options: &str) -> String {
    let is_without = options.contains("passthrough=off");
    let without = if is_without { "True" } else { "False" };
    format!("{MATRIX}\nWITHOUT_OPENS = {without}")
}

/// Creates the objects of `group` and runs its cases, in a mount with these options and in a plain directory.
#[track_caller]
fn same(content: Content, options: &str, group: &str) {
    eprintln!("{options}, content in the {content:?} layer");
    let lower = match content {
        Content::Lower => "LOWER = True",
        Content::Upper => "",
    };
    let matrix = matrix(options);
    let build = format!("{matrix}\nplant_{group}()");
    // Thousands of files are copied up, and this test does not cut the power.
    let beside = Beside::with(content, &build, &format!("{options},volatile"));
    let output = beside.same(&format!("{matrix}\n{lower}\nrun_{group}()"));
    assert!(
        output.lines().count() > 100,
        "too little was tried: {output}"
    );
    beside.mount.unmount();
}

#[test]
fn cached_attributes_are_invalidated_by_every_change() {
    if !can(&NEEDS) {
        return;
    }
    for options in MODES {
        // Both kinds of coherence treat files of the upper layer alike.
        if !options.contains("coherence") {
            same(Content::Upper, options, "all");
        }
        same(Content::Lower, options, "all");
    }
}

/// With `static_nlink` the kernel counts links by itself, and a plain directory is no reference.
#[test]
fn static_nlink_reports_correct_link_counts_of_files() {
    if !can(&NEEDS) {
        return;
    }
    let build = format!("{MATRIX}\nplant_all()");
    let beside = Beside::with(Content::Upper, &build, "static_nlink");
    python(beside.mount.path(), &format!("{MATRIX}\nrun_all()")).ok();
    beside.mount.unmount();
}

/// The daemon invalidates attributes while the kernel holds the locks of the request being answered.
#[test]
fn a_single_thread_does_not_deadlock_on_its_own_invalidations() {
    if !can(&NEEDS) {
        return;
    }
    for (content, options) in [
        (Content::Upper, "passthrough=all,threaded=0"),
        (Content::Lower, "passthrough=read,threaded=0"),
    ] {
        same(content, options, "all");
    }
}

#[test]
fn setuid_bits_of_programs_are_cleared_as_on_a_plain_directory() {
    if !can(&NEEDS) {
        return;
    }
    for (content, options) in [
        (Content::Upper, "passthrough=all"),
        (Content::Lower, "passthrough=read"),
        (Content::Upper, "passthrough=off"),
        (Content::Lower, "passthrough=all,coherence=overlay"),
    ] {
        same(content, options, "programs");
    }
}

/// Root makes a program setuid while another user writes to it and executes it. The program prints its status and its
/// own file, which cannot be written while it runs. The output thus shows its uid and the content that was executed.
const RACE: &str = r#"
PAGE = 4096
CONTENT = open("/bin/cat", "rb").read()
CONTENT += bytes(-len(CONTENT) % PAGE)
BEHIND = len(CONTENT)

def forked(run):
    pid = os.fork()
    if pid == 0:
        os.setgroups([]); os.setresgid(1001, 1001, 1001); os.setresuid(1001, 1001, 1001)
        try: run()
        finally: os._exit(0)
    return pid

def races(writer, rounds=60):
    ran = changed = 0
    for round in range(rounds):
        path = f"program{writer}{round % 3}"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o777)
        os.pwrite(fd, CONTENT + b"A" * PAGE, 0); os.close(fd); os.chmod(path, 0o777)
        out, into = os.pipe(); start, go = os.pipe(); waiting, ready = os.pipe()
        def write():
            flags = os.O_WRONLY | os.O_DIRECT if writer == "direct" else os.O_WRONLY
            fd = os.open(path, flags) if writer == "direct" else None
            os.write(ready, b"w"); os.read(start, 1)
            for _ in range(round * 13 % 800): pass
            if fd is None: fd = os.open(path, flags)
            os.pwritev(fd, [aligned(b"B" * PAGE)], BEHIND); os.close(fd)
        def execute():
            os.dup2(into, 1); os.write(ready, b"x"); os.read(start, 1)
            for _ in range(60): err(os.execv, path, ["cat", "/proc/self/status", path])
        children = [forked(write)]
        os.read(waiting, 1)
        os.chmod(path, 0o4777)
        for _ in range(2): children.append(forked(execute)); os.read(waiting, 1)
        os.close(into); os.write(go, b"123")
        with open(out, "rb") as pipe: output = pipe.read()
        for pid in children: os.waitpid(pid, 0)
        for fd in (start, go, waiting, ready): os.close(fd)
        for part in output.split(b"Name:\t")[1:]:
            as_root = part.split(b"Uid:\t")[1].split()[1] == b"0"
            # Two outputs may be mixed, but what was changed is a page of its own.
            ran += 1
            if as_root and b"B" * 100 in output and b"A" * 100 not in output: changed += 1
    print(f"{ran} runs, {changed} as root with what another wrote")
    assert ran > 0 and changed == 0
"#;

/// The kernel requests the mode before it opens a program and relies on it afterwards. A writer that opens and closes
/// the file in between must not be missed.
#[test]
fn a_setuid_program_never_runs_content_of_another_user() {
    if !can(&NEEDS) {
        return;
    }
    for options in ["passthrough=all", "passthrough=read", "passthrough=off"] {
        let beside = Beside::with(Content::Upper, "", options);
        for writer in ["direct", "reopened"] {
            let script = format!("{RACE}\nraces({writer:?})");
            let output = python(beside.mount.path(), &script).ok().out();
            eprintln!("{options}, {writer}: {output}");
        }
        beside.mount.unmount();
    }
}

/// The program is opened to be run before it is setuid, by a process that then waits for a CPU. Meanwhile another
/// user opens it for writing, root makes it setuid, and the other user writes.
const LATE_MODE: &str = r#"
def late_modes(rounds=120):
    hog = os.fork()
    if hog == 0:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        while True: pass
    cpus = os.sched_getaffinity(0)
    ran = changed = 0
    for round in range(rounds):
        path = f"late{round}"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o777)
        os.pwrite(fd, CONTENT + b"A" * PAGE, 0); os.close(fd); os.chmod(path, 0o777)
        out, into = os.pipe(); waiting, ready = os.pipe()
        def execute():
            os.dup2(into, 1)
            os.sched_setaffinity(0, {min(cpus)})
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            os.write(ready, b"x")
            for _ in range(20): err(os.execv, path, ["cat", "/proc/self/status", path])
        def write():
            try: fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
            except OSError: fd = None
            os.write(ready, b"w")
            if fd is None: return
            for _ in range(20000):
                if os.fstat(fd).st_mode & 0o4000:
                    # Not before: what was written then stays in a setuid program on any file system.
                    os.pwritev(fd, [aligned(b"B" * PAGE)], BEHIND)
                    break
            os.close(fd)
        run = forked(execute)
        os.close(into); os.read(waiting, 1)
        time.sleep(round % 40 / 2000)
        writer = forked(write)
        os.read(waiting, 1)
        err(os.chmod, path, 0o4777)
        os.waitpid(writer, 0)
        with open(out, "rb") as pipe: output = pipe.read()
        os.waitpid(run, 0)
        for fd in (waiting, ready): os.close(fd)
        for part in output.split(b"Name:\t")[1:]:
            ran += 1
            as_root = part.split(b"Uid:\t")[1].split()[1] == b"0"
            if as_root and b"B" * 100 in output and b"A" * 100 not in output: changed += 1
        os.unlink(path)
    os.kill(hog, signal.SIGKILL); os.waitpid(hog, 0)
    print(f"{ran} runs, {changed} as root with what another wrote")
    assert ran > 0 and changed == 0
late_modes()
"#;

/// Neither the writer nor the program had a setuid bit to be asked about when it opened the file.
#[test]
fn a_program_made_setuid_during_exec_does_not_run_content_of_another_user() {
    if !can(&NEEDS) {
        return;
    }
    // With `passthrough=off`, the daemon is notified of neither open.
    for options in ["passthrough=all", "passthrough=off"] {
        let beside = Beside::with(Content::Upper, "", options);
        let script = format!("{RACE}\n{LATE_MODE}");
        let output = python(beside.mount.path(), &script).ok().out();
        eprintln!("{options}: {output}");
        beside.mount.unmount();
    }
}

/// Kernel overlayfs has a cache of its own above cowlfs.
#[test]
fn writes_through_kernel_overlayfs_clear_setuid_bits() {
    if !can(&NEEDS) {
        return;
    }
    for options in ["passthrough=all", "passthrough=read", "passthrough=off"] {
        let beside = Beside::with(Content::Upper, "", options);
        let stack = Stack {
            lowers: vec![beside.scratch.make("empty")],
            upper: Some((
                beside.mount.path().join("upper"),
                beside.mount.path().join("work"),
            )),
        };
        for dir in ["upper", "work"] {
            std::fs::create_dir(beside.mount.path().join(dir)).unwrap();
        }
        let above = Overlay::kernel(&stack, &beside.scratch.make("above"));
        let script = format!("{}\nplant_programs()\nrun_programs()", matrix(options));
        let ours = python(above.path(), &script).ok();
        let theirs = python(&beside.plain, &script).ok();
        assert_eq!(ours.out(), theirs.out(), "{options}");
        above.unmount();
        beside.mount.unmount();
    }
}

//! Replacing the daemon of a container while programs use the mount.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cowl_tests::command::run_command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::{killer, mount, programs, tree};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Returns a mounted container with files in the base and in the upper layer.
fn mounted(store: &Store) -> PathBuf {
    let base = store.scratch().make("base");
    fs::copy("/bin/sleep", base.join("program")).unwrap();
    for name in ["read", "append", "write", "mapped", "locked", "deleted"] {
        fs::write(base.join(name), format!("base {name}")).unwrap();
    }
    fs::create_dir(base.join("dir")).unwrap();
    for number in 0..2000 {
        fs::write(base.join(format!("dir/{number}")), "entry").unwrap();
    }
    store.create("web", &base);
    store.mount("web")
}

/// Replaces the daemon, and returns its new process id.
#[track_caller]
fn upgrade(store: &Store) -> u32 {
    let before = store.pid("web");
    let json = store.cowl(["upgrade", "web", "--json"]).ok().json();
    let done = &json["mounts"][0];
    assert_eq!(done["error"], Value::Null, "{json}");
    assert_eq!(done["to"], env!("CARGO_PKG_VERSION"), "{json}");
    let pid = u32::try_from(done["pid"].as_u64().unwrap()).unwrap();
    assert_ne!(pid, before);
    assert_eq!(store.pid("web"), pid, "the state names the new daemon");
    pid
}

/// Returns whether another process could take the lock.
fn can_lock(path: &Path, kind: &str) -> bool {
    let script = "import fcntl, sys\n\
        f = open(sys.argv[1], 'r+')\n\
        try: getattr(fcntl, sys.argv[2])(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n\
        except OSError: sys.exit(9)";
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(path).arg(kind);
    match command.status().unwrap().code() {
        Some(0) => true,
        Some(9) => false,
        other => panic!("python3: {other:?}"),
    }
}

#[test]
fn open_descriptors_survive_upgrades() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = mounted(&store);
    let options = OpenOptions::new().read(true).write(true).clone();
    let mut reading = File::open(root.join("read")).unwrap();
    let writing = options.open(root.join("write")).unwrap();
    let appending = OpenOptions::new().append(true).open(root.join("append"));
    let mut appending = appending.unwrap();
    let unlinked = options.clone().create_new(true).open(root.join("unlinked"));
    let unlinked = unlinked.unwrap();
    unlinked.write_all_at(b"no name", 0).unwrap();
    fs::remove_file(root.join("unlinked")).unwrap();
    let deleted = File::open(root.join("deleted")).unwrap();
    fs::remove_file(root.join("deleted")).unwrap();
    let mut listing = fs::read_dir(root.join("dir")).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut listed: Vec<_> = listing.by_ref().take(700).map(name).collect();
    let numbers = || -> Vec<_> {
        let names = ["", "read", "write", "append", "dir", "dir/7", "program"];
        names
            .map(|name| fs::metadata(root.join(name)).unwrap().ino())
            .into()
    };
    let inos = numbers();
    for round in 0..4 {
        upgrade(&store);
        assert_eq!(numbers(), inos);
        assert_eq!(reading.metadata().unwrap().ino(), inos[1]);
        let mut text = String::new();
        reading.seek(SeekFrom::Start(0)).unwrap();
        reading.read_to_string(&mut text).unwrap();
        assert_eq!(text, "base read");
        let digit = round.to_string();
        writing.write_all_at(digit.as_bytes(), 0).unwrap();
        writing.sync_all().unwrap();
        appending.write_all(format!("+{round}").as_bytes()).unwrap();
        unlinked.write_all_at(digit.as_bytes(), 7 + round).unwrap();
        assert_eq!(unlinked.metadata().unwrap().nlink(), 0);
        let mut content = [0; 12];
        deleted.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"base deleted");
        listed.extend(listing.by_ref().take(200).map(name));
    }
    listed.extend(listing.map(name));
    listed.sort();
    listed.dedup();
    assert_eq!(listed.len(), 2000, "each name once");
    let text = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    assert_eq!(text("append"), "base append+0+1+2+3");
    assert_eq!(text("write"), "3ase write");
    let mut content = [0; 11];
    unlinked.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"no name0123");
}

/// Starts a process that has the file mapped and locked, and stores each line that it reads in the mapping.
fn map(file: &Path) -> Running {
    // It holds a record lock, which a process loses when it closes any descriptor of the file.
    let script = "import fcntl, mmap, sys\n\
        f = open(sys.argv[1], 'r+b')\n\
        fcntl.lockf(f, fcntl.LOCK_EX)\n\
        m = mmap.mmap(f.fileno(), 0)\n\
        print('ready', flush=True)\n\
        for line in sys.stdin:\n\
        \x20   m[0:4] = line[:4].encode()\n\
        \x20   print(m[0:4].decode(), flush=True)";
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(file);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Running(command.spawn().unwrap())
}

#[test]
fn locks_mappings_watches_and_processes_survive_upgrades() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = mounted(&store);
    let flocked = File::open(root.join("locked")).unwrap();
    flock(&flocked, FlockOperation::LockExclusive).unwrap();
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watch, &root, WatchFlags::CREATE).unwrap();
    let program = Command::new(root.join("program"))
        .arg("1000")
        .current_dir(root.join("dir"))
        .stdin(Stdio::null())
        .spawn()
        .map(Running)
        .unwrap();
    let mut mapper = map(&root.join("mapped"));
    let mut said = BufReader::new(mapper.0.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "ready");
    for round in 0..4 {
        upgrade(&store);
        assert!(!can_lock(&root.join("locked"), "flock"));
        assert!(!can_lock(&root.join("mapped"), "lockf"));
        let input = mapper.0.stdin.as_mut().unwrap();
        input.write_all(format!("map{round}\n").as_bytes()).unwrap();
        assert_eq!(said.next().unwrap().unwrap(), format!("map{round}"));
        fs::write(root.join(format!("new{round}")), "").unwrap();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        let event = events.next().unwrap();
        let name = event.file_name().unwrap().to_bytes().to_vec();
        assert_eq!(name, format!("new{round}").as_bytes());
        let cwd = fs::read_link(format!("/proc/{}/cwd", program.0.id())).unwrap();
        assert_eq!(cwd, root.join("dir"));
    }
    drop((flocked, mapper));
    assert!(can_lock(&root.join("locked"), "flock"));
    let mapped = fs::read_to_string(root.join("mapped")).unwrap();
    assert_eq!(mapped, "map3 mapped");
}

#[test]
fn snapshots_work_after_upgrades_and_an_unmount_ends_the_daemon() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = mounted(&store);
    let unchanged = tree::read(&root).unwrap();
    for number in 0..3 {
        upgrade(&store);
        store.ok(["snapshot", "web"]);
        fs::write(root.join("read"), "changed").unwrap();
        upgrade(&store);
        store.restore("web", &format!("snap{number}"));
        tree::assert_tree("after a restore", &root, &unchanged);
    }
    // The locks on layers are those of the new daemon: it does not count as a reader of the snapshots.
    upgrade(&store);
    store.ok(["rm", "web", "--all", "--yes"]);
    store.ok(["flatten", "web"]);
    tree::assert_tree("after a merge", &root, &unchanged);
    let pid = upgrade(&store);
    store.ok(["umount", "web"]);
    mount::wait_until("the daemon has ended", || has_ended(pid));
    store.ok(["check"]);
}

fn has_ended(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.is_empty() || status.contains("State:\tZ")
}

/// Runs `work` with 0, 1, 2... until `ended` is set; each call must succeed. Returns the number of calls.
fn repeat(ended: &AtomicBool, total: &AtomicU64, work: impl Fn(u64)) -> u64 {
    let mut number = 0;
    while !ended.load(Ordering::Relaxed) {
        work(number);
        number += 1;
        total.fetch_add(1, Ordering::Relaxed);
    }
    number
}

fn append_to(path: &Path) -> impl Fn(u64) + use<> {
    let file = OpenOptions::new().append(true).create(true).open(path);
    let file = file.unwrap();
    move |n| {
        let line = format!("{n}\n");
        assert_eq!((&file).write(line.as_bytes()).unwrap(), line.len());
    }
}

fn change_names(root: &Path, n: u64) {
    let (one, two) = (root.join(format!("a{n}")), root.join(format!("b{n}")));
    let file = OpenOptions::new().write(true).create_new(true).open(&one);
    file.unwrap().write_all(b"text").unwrap();
    fs::rename(&one, &two).unwrap();
    fs::hard_link(&two, &one).unwrap();
    assert_eq!(fs::metadata(&two).unwrap().nlink(), 2);
    fs::remove_file(&two).unwrap();
    assert_eq!(fs::read(&one).unwrap(), b"text");
    fs::remove_file(&one).unwrap();
    assert!(!one.try_exists().unwrap());
}

fn change_dirs(root: &Path, n: u64) {
    let dir = root.join(format!("d{n}"));
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink("target", dir.join("link")).unwrap();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_file(dir.join("link")).unwrap();
    fs::remove_dir(&dir).unwrap();
}

fn change_content(root: &Path, n: u64) {
    let path = root.join(format!("dir/{n}"));
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.write_all(b"entry").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "entry");
    assert_eq!(fs::read_dir(root.join("dir")).unwrap().count(), 2000);
}

/// Ends the threads of a test when it ends, also by a panic.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_operation_fails_or_is_lost_during_upgrades() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = mounted(&store);
    let (ended, total) = (AtomicBool::new(false), AtomicU64::new(0));
    let (ended, total, root) = (&ended, &total, root.as_path());
    std::thread::scope(|scope| {
        let counter = scope.spawn(move || repeat(ended, total, append_to(&root.join("counter"))));
        let names = scope.spawn(move || repeat(ended, total, |n| change_names(root, n)));
        let dirs = scope.spawn(move || repeat(ended, total, |n| change_dirs(root, n)));
        let lower = scope.spawn(move || repeat(ended, total, |n| change_content(root, n % 2000)));
        let end = EndOnDrop(ended);
        for _ in 0..20 {
            let done = total.load(Ordering::Relaxed);
            upgrade(&store);
            let start = Instant::now();
            // The threads run between two upgrades as well.
            while total.load(Ordering::Relaxed) < done + 20 {
                assert!(start.elapsed() < Duration::from_secs(60), "a thread hangs");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        drop(end);
        let written = counter.join().unwrap();
        for thread in [names, dirs, lower] {
            assert!(thread.join().unwrap() > 0);
        }
        let lines = fs::read_to_string(root.join("counter")).unwrap();
        let wanted: String = (0..written).map(|n| format!("{n}\n")).collect();
        assert!(lines == wanted, "a line is missing or twice");
    });
    assert_eq!(
        fs::read_dir(root).unwrap().count(),
        9,
        "8 names of the base and the counter"
    );
    let status = store.cowl(["stats", "web", "--json"]).ok().json();
    assert!(
        status["requests"]["create"].as_u64().unwrap() > 20,
        "counted since the mount: {status}"
    );
    assert_eq!(status["panics"], 0);
    store.ok(["umount", "web"]);
    store.ok(["check"]);
}

/// Sends a request to replace the daemon by `program`, and returns the response.
fn request(store: &Store, program: &Path) -> Value {
    serde_json::from_str(&send_request(store, program)).unwrap()
}

/// Like [`request`]. The response is empty if the daemon ends before it responds.
pub(crate) fn send_request(store: &Store, program: &Path) -> String {
    let socket = store.run_dirs()[0].join("sock");
    // The address of a socket has at most 107 bytes.
    let link = store.beside("s");
    if !link.is_symlink() {
        std::os::unix::fs::symlink(socket.parent().unwrap(), &link).unwrap();
    }
    let mut stream = UnixStream::connect(link.join("sock")).unwrap();
    let program = program.as_os_str().as_bytes();
    let line = serde_json::json!({ "ask": "upgrade", "program": program });
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut response = String::new();
    let read = BufReader::new(stream).read_line(&mut response);
    if let Err(error) = read {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    response
}

#[test]
fn a_daemon_that_cannot_be_replaced_continues() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = mounted(&store);
    let pid = store.pid("web");
    let unlinked = File::create(root.join("unlinked")).unwrap();
    fs::remove_file(root.join("unlinked")).unwrap();
    // The first message of a successor: a length, its version "9", and the versions of the state that it reads.
    let hello =
        |reads: &str| format!(r"printf '\004\000\000\000\000\000\000\000\001\071\001\{reads}' >&0");
    for (name, script, reason) in [
        (
            "exits",
            "exit 1".to_owned(),
            "ended before it has received the state",
        ),
        (
            "newer",
            format!("{}; exec sleep 20", hello("007")),
            "reads the state of other versions only",
        ),
        (
            "dies",
            format!("{}; exit 1", hello("003")),
            "ended before it was ready",
        ),
        (
            "hangs",
            format!("{}; exec sleep 60", hello("003")),
            "did not answer in time before it was ready",
        ),
    ] {
        let program = store.beside(name);
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let response = request(&store, &program);
        assert_eq!(response["answer"], "failed", "{response}");
        assert!(
            response["why"].as_str().unwrap().contains(reason),
            "{response}"
        );
        // Nothing was lost, and locks and registrations are still those of the daemon.
        assert_eq!(store.pid("web"), pid);
        unlinked.write_all_at(b"x", 0).unwrap();
        assert_eq!(unlinked.metadata().unwrap().nlink(), 0);
        fs::write(root.join("new"), name).unwrap();
        assert_eq!(fs::read_to_string(root.join("new")).unwrap(), name);
    }
    let response = request(&store, Path::new("/no/such/program"));
    assert!(
        response["why"].as_str().unwrap().contains("cannot start"),
        "{response}"
    );
    // The layer is still locked.
    let upper = fs::read_dir(store.path().join("layers")).unwrap();
    let mut upper = upper.map(|layer| layer.unwrap().path().join("work"));
    let work = upper.find(|path| path.is_dir()).unwrap();
    let tree = work.parent().unwrap().join("tree");
    let lower = store.scratch().make("lower");
    let mut command = Command::new(programs::cowlfs());
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        tree.display(),
        work.display()
    );
    command
        .arg("-o")
        .arg(options)
        .arg(store.scratch().make("other"));
    run_command(command, b"").fails(4, &["in use by another mount"]);
    drop(unlinked);
    upgrade(&store);
    store.ok(["snapshot", "web"]);
    store.ok(["umount", "web"]);
    store.ok(["check"]);
}

/// The keeper starts another daemon, so the lock and the state are still in use.
#[test]
fn a_process_whose_predecessor_was_killed_removes_nothing() {
    if !can(&[Need::Root, Need::Fuse, Need::Program("strace")]) {
        return;
    }
    let store = Store::for_test().with_keepers();
    let root = mounted(&store);
    let keeper = store.pid("web");
    let daemon = || killer::daemon_of(keeper);
    mount::wait_until("the daemon", || daemon().is_some());
    // It waits between the receipt of the state and its report.
    let (program, trace) = (store.beside("slow"), store.beside("trace"));
    let script = format!(
        "#!/bin/sh\nexec strace -D -f -o {} -e trace=recvmsg,flock,exit_group -e inject=flock:delay_enter=2000000 {} \"$@\"\n",
        trace.display(),
        programs::cowl().display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let traced = |word: &str| fs::read_to_string(&trace).is_ok_and(|text| text.contains(word));
    let killed = daemon().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            mount::wait_until("the state to be received", || traced("recvmsg"));
            let pid = rustix::process::Pid::from_raw(killed.cast_signed()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        // The daemon is killed before it responds.
        assert_eq!(send_request(&store, &program), "");
    });
    mount::wait_until("the end of the slow program", || traced("exit_group"));
    mount::wait_until("another daemon", || {
        daemon().is_some_and(|pid| pid != killed)
    });
    assert_eq!(store.pid("web"), keeper);
    assert!(mount::at(&root).is_some(), "it was detached");
    fs::write(root.join("new"), "content").unwrap();
    assert!(upgrade(&store) != keeper);
    store.ok(["umount", "web"]);
}

#[test]
fn all_mounts_are_upgraded_with_those_of_snapshots() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let root = mounted(&store);
    store.refused(["upgrade"], 2, &["required"]);
    store.ok(["snapshot", "web"]);
    let browsed = PathBuf::from(store.cowl(["mount", "web@snap0"]).ok().out());
    fs::write(root.join("read"), "changed").unwrap();
    store.create("idle", &store.beside("base"));
    let open = File::open(browsed.join("read")).unwrap();
    let output = store.ok(["upgrade", "--all"]);
    let words: Vec<Vec<&str>> = output
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(words[0], ["NAME", "DAEMON", "FROM", "TO", "PAUSE"]);
    let names: Vec<_> = words[1..].iter().map(|line| line[0]).collect();
    assert_eq!(names, ["web", "web@snap0"], "{output}");
    for line in &words[1..] {
        assert_eq!(line[2..4], [version, version]);
    }
    let mut content = [0; 9];
    open.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"base read");
    drop(open);
    let log = fs::read_to_string(store.run_dirs()[0].join("log")).unwrap_or_default();
    assert!(!log.contains("error"), "{log}");
    // A snapshot is taken by the new daemon, and SIGTERM ends it.
    store.ok(["umount", "web@snap0"]);
    assert!(mount::at(&browsed).is_none());
    let pid = store.pid("web");
    let raw = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(raw, rustix::process::Signal::TERM).unwrap();
    mount::wait_until("the daemon has ended", || has_ended(pid));
    assert!(mount::at(&root).is_none());
    let output = store.cowl(["upgrade", "web"]).ok();
    assert!(
        output.err().contains("web is not mounted"),
        "{}",
        output.report()
    );
}

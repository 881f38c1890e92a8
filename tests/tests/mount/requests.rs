//! The number of requests that the kernel sends for an operation. Times depend on the machine and its load; these
//! counts do not, and their limits are those of docs/benchmarks.md. `cargo test -p cowl-tests --test mount requests
//! -- --nocapture` prints the table.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cowl_tests::command::{run, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::{Store, find};
use cowl_tests::mount::{Stack, wait_until};
use cowl_tests::requests::{Counted, Counts, ask, line, total};
use cowl_tests::scratch::Scratch;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

const DIRS: u64 = 10;
const FILES_EACH: u64 = 100;
const FILES: u64 = DIRS * FILES_EACH;

/// Creates a tree of a thousand files in ten directories below `root`.
fn plant(root: &Path) {
    for dir in 0..DIRS {
        let dir = root.join(format!("tree/d{dir}"));
        std::fs::create_dir_all(&dir).unwrap();
        for file in 0..FILES_EACH {
            std::fs::write(dir.join(format!("f{file}")), "a few bytes\n").unwrap();
        }
    }
}

struct Case {
    scratch: Scratch,
    mount: Counted,
}

impl Case {
    /// A fresh mount over one layer with the tree in it, if `planted`.
    fn new(planted: bool) -> Option<Case> {
        Case::with(planted, "")
    }

    /// Like [`Case::new`], with options for the mount.
    fn with(planted: bool, options: &str) -> Option<Case> {
        if !can(NEEDS) {
            return None;
        }
        let scratch = Scratch::for_test();
        let mount_point = scratch.make("mount");
        let stack = Stack {
            lowers: vec![scratch.make("lower")],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        if planted {
            plant(&scratch.join("lower"));
        }
        let mount = Counted::mount(&stack, &mount_point, options);
        Some(Case { scratch, mount })
    }

    fn mount_point(&self) -> &Path {
        self.mount.overlay().path()
    }

    /// Runs a shell script in the mount, and returns the requests without those of the shell for its working
    /// directory.
    fn sh(&self, script: &str) -> Counts {
        sh_in(self.mount_point(), "true").ok();
        self.mount.during(|| {
            sh_in(self.mount_point(), script).ok();
        })
    }

    /// Prints a line of the table, and compares the counts with the limits.
    #[track_caller]
    fn at_most(&self, label: &str, allowed: Allowed, counts: &Counts) {
        let (unit, units) = allowed.each;
        let line = line(&format!("{label}, a {unit}"), units, counts);
        eprintln!("{line}");
        let most = allowed.most * units + allowed.dirs * (DIRS + 1) + allowed.once;
        assert!(
            total(counts) <= most,
            "{label}: more than {most} requests in all: {counts:?}\n{line}"
        );
    }
}

/// The number of requests that an operation may send.
#[derive(Clone, Copy, Debug)]
struct Allowed {
    /// The kind of object that is counted, and its number.
    each: (&'static str, u64),
    /// For each of them.
    most: u64,
    /// The additional number for each directory.
    dirs: u64,
    /// The additional number for the program itself, for example for its working directory.
    once: u64,
}

/// As root, tar changes the owner and the mode of each file; as another user, it sets only the time.
#[test]
fn untar_sends_few_requests_per_file() {
    for (how, most) in [
        ("--no-same-owner --no-same-permissions", 6),
        ("--same-owner --same-permissions", 9),
    ] {
        let Some(case) = Case::new(false) else {
            return;
        };
        let source = case.scratch.make("source");
        plant(&source);
        let tar = case.scratch.join("tree.tar");
        let pack = format!("tar cf '{}' tree", tar.display());
        sh_in(&source, &pack).ok();
        let counts = case.sh(&format!("tar xf '{}' {how}", tar.display()));
        assert!(counts["create"] >= FILES, "nothing was counted: {counts:?}");
        let allowed = Allowed {
            each: ("file", FILES),
            most,
            dirs: 8,
            once: 5,
        };
        case.at_most(&format!("untar {how}"), allowed, &counts);
    }
}

#[test]
fn removal_of_a_tree_sends_three_requests_per_file() {
    let Some(case) = Case::new(true) else {
        return;
    };
    let counts = case.sh("rm -rf tree");
    assert!(counts["unlink"] >= FILES, "nothing was counted: {counts:?}");
    let allowed = Allowed {
        each: ("file", FILES),
        most: 3,
        dirs: 10,
        once: 5,
    };
    case.at_most("rm -rf", allowed, &counts);
}

/// Allows this number for each directory of the tree.
fn find_takes(most: u64) -> Allowed {
    Allowed {
        // The tree's own, and the ten in it.
        each: ("directory", DIRS + 1),
        most,
        dirs: 0,
        once: 5,
    }
}

#[test]
fn a_cold_find_sends_four_requests_for_each_directory() {
    let Some(case) = Case::new(true) else {
        return;
    };
    let counts = case.sh("find tree -ls > /dev/null");
    assert!(total(&counts) > 0, "nothing was counted");
    case.at_most("find -ls, cold", find_takes(4), &counts);
}

#[test]
fn a_warm_find_sends_no_requests() {
    let Some(case) = Case::new(true) else {
        return;
    };
    case.sh("find tree -ls > /dev/null");
    // Reading a directory makes the kernel invalidate its access time, which find then requests.
    let counts = case.sh("find tree -ls > /dev/null");
    case.at_most("find -ls, a second time", find_takes(1), &counts);
    let counts = case.sh("find tree -ls > /dev/null");
    case.at_most("find -ls, warm", find_takes(0), &counts);
    for asked in ["opendir", "readdir", "readdirplus", "lookup", "releasedir"] {
        assert!(!counts.contains_key(asked), "{counts:?}");
    }
}

#[test]
fn a_warm_file_is_opened_read_and_closed_with_two_requests() {
    let Some(case) = Case::new(true) else {
        return;
    };
    let file = case.mount_point().join("tree/d0/f0");
    std::fs::read(&file).unwrap();
    let counts = case.mount.during(|| {
        for _ in 0..FILES {
            assert_eq!(std::fs::read(&file).unwrap(), b"a few bytes\n");
        }
    });
    assert!(total(&counts) > 0, "nothing was counted");
    let allowed = Allowed {
        each: ("time", FILES),
        most: 2,
        dirs: 0,
        once: 5,
    };
    case.at_most("open, read, close", allowed, &counts);
}

#[test]
fn a_new_file_sends_few_requests() {
    let Some(case) = Case::new(false) else {
        return;
    };
    let mount_point = case.mount_point().to_owned();
    let counts = case.mount.during(|| {
        for file in 0..FILES {
            drop(std::fs::File::create_new(mount_point.join(format!("f{file}"))).unwrap());
        }
    });
    assert_eq!(counts["create"], FILES, "{counts:?}");
    let allowed = Allowed {
        each: ("file", FILES),
        most: 4,
        dirs: 0,
        once: 5,
    };
    case.at_most("create, close", allowed, &counts);
}

/// Attributes that the kernel must read again cost a GETATTR request of their own after common operations.
#[test]
fn writes_send_no_needless_getattr_requests() {
    for (options, most) in [
        ("passthrough=all", [6, 4, 5, 4]),
        ("passthrough=read", [7, 5, 6, 5]),
    ] {
        let Some(case) = Case::with(false, options) else {
            return;
        };
        let path = |file| case.mount_point().join(format!("f{file}"));
        let works: [(&str, &dyn Fn(u64)); 4] = [
            ("create, write, stat", &|file| {
                std::fs::write(path(file), "a few bytes\n").unwrap();
                std::fs::metadata(path(file)).unwrap();
            }),
            ("append, stat", &|file| {
                let mut file_to_append = std::fs::OpenOptions::new();
                let mut open = file_to_append.append(true).open(path(file)).unwrap();
                open.write_all(b"more").unwrap();
                drop(open);
                std::fs::metadata(path(file)).unwrap();
            }),
            ("overwrite, stat twice", &|file| {
                std::fs::write(path(file), "other bytes\n").unwrap();
                std::fs::metadata(path(file)).unwrap();
                std::fs::metadata(path(file)).unwrap();
            }),
            ("read and write, stat", &|file| {
                let mut how = std::fs::OpenOptions::new();
                let open = how.read(true).write(true).open(path(file)).unwrap();
                open.write_all_at(b"third", 0).unwrap();
                drop(open);
                std::fs::metadata(path(file)).unwrap();
            }),
        ];
        for ((label, work), most) in works.into_iter().zip(most) {
            let counts = case.mount.during(|| (0..FILES).for_each(work));
            assert!(total(&counts) >= FILES, "nothing was counted: {counts:?}");
            let allowed = Allowed {
                each: ("file", FILES),
                most,
                dirs: 0,
                once: 5,
            };
            case.at_most(&format!("{options}: {label}"), allowed, &counts);
        }
    }
}

/// `cowl stats`, the socket and the log after SIGUSR1 say the same; the daemon lives on.
#[test]
fn requests_of_a_mount_are_reported() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    store
        .cowl(["stats", "web"])
        .fails(1, &["web is not mounted", "cowl mount web"]);
    let mount_point = store.mount("web");
    for _ in 0..7 {
        std::fs::create_dir(mount_point.join("dir")).unwrap();
        std::fs::remove_dir(mount_point.join("dir")).unwrap();
    }
    let held = std::fs::File::open(mount_point.join("file")).unwrap();
    let stats = store.cowl(["stats", "web", "--json"]).ok().json();
    assert_eq!(stats["requests"]["mkdir"], 7, "{stats}");
    assert_eq!(stats["requests"]["rmdir"], 7, "{stats}");
    let awake = stats["awake"].as_str().unwrap();
    assert!(
        ["granted", "refused", "not_requested"].contains(&awake),
        "{stats}"
    );
    assert_eq!(
        (&stats["open_files"], &stats["open_for_write"]),
        (&1.into(), &0.into()),
        "{stats}"
    );
    assert_eq!(stats["pid"], store.pid("web"), "{stats}");
    assert!(stats["memory"].as_u64().unwrap() > 100 << 10, "{stats}");
    assert!(stats["inodes"].as_u64().unwrap() >= 2, "{stats}");
    assert!(stats["uptime"].as_f64().unwrap() > 0.0, "{stats}");
    drop(held);
    let text = store.cowl(["stats", "web"]).ok().out();
    let row = |line: &str| line.split_whitespace().eq(["mkdir", "7"]);
    assert!(text.lines().any(row), "{text}");

    let status = store.cowl(["status", "web", "--json"]).ok().json();
    let log = find(&status, "log").unwrap().as_str().unwrap().to_owned();
    let pid = store.pid("web").to_string();
    run("kill", ["-USR1", &pid]).ok();
    wait_until("the daemon's log", || {
        std::fs::read_to_string(&log).unwrap().contains(" mkdir 7")
    });
    assert_eq!(store.pid("web").to_string(), pid);
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");

    let socket = Path::new(&log).with_file_name("sock");
    let answer = ask(&socket, "{\"ask\":\"of_tomorrow\"}");
    assert_eq!(answer["answer"], "failed", "{answer}");
    assert!(
        answer["why"]
            .as_str()
            .unwrap()
            .contains("does not know the request \"of_tomorrow\""),
        "{answer}"
    );
    store.cowl(["umount", "web"]).ok();
}

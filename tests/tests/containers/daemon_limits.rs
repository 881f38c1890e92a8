//! The daemon's resource limits, privileges and control groups are its own, not those of the shell that mounted.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use cowl_tests::command::{Output, run};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::programs;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// The number of CAP_SYS_RESOURCE.
const SYS_RESOURCE: u32 = 24;

fn store_with_container() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    fs::write(source.join("file"), "one\n").unwrap();
    fs::write(source.join("large"), vec![7; 1 << 20]).unwrap();
    store.create("web", &source);
    store
}

/// Mounts the container from a shell after it has run `setup`.
fn mount_from_shell(store: &Store, setup: &str) -> Output {
    let cowl = programs::cowl();
    let script = format!("{setup}\nexec \"$0\" --store \"$1\" mount web");
    run(
        "sh",
        [
            "-c".as_ref(),
            script.as_ref(),
            cowl.as_os_str(),
            store.path().as_os_str(),
        ],
    )
}

/// Returns a field of /proc/PID/status.
fn status_field(pid: u32, task: &str, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{task}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

fn has_sys_resource() -> bool {
    let sets = status_field(
        std::process::id(),
        &std::process::id().to_string(),
        "CapEff:",
    );
    u64::from_str_radix(&sets, 16).unwrap() & (1 << SYS_RESOURCE) != 0
}

fn lacking(store: &Store) -> BTreeSet<String> {
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    let names = status["lacking"].as_array().unwrap().iter();
    names
        .map(|name| name.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn soft_limits_of_the_shell_do_not_apply_to_the_daemon() {
    if !can(NEEDS) {
        return;
    }
    let store = store_with_container();
    mount_from_shell(&store, "ulimit -S -f 64; ulimit -S -t 1; ulimit -S -n 40").ok();
    let root = store.mount("web");
    fs::write(root.join("new"), vec![1; 1 << 20]).unwrap();
    fs::OpenOptions::new()
        .append(true)
        .open(root.join("large"))
        .unwrap();
    let pid = store.daemon("web");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let row = |name: &str| limits.lines().find(|line| line.starts_with(name)).unwrap();
    for name in ["Max file size", "Max cpu time"] {
        assert!(row(name).contains("unlimited"), "{}", row(name));
    }
    assert!(!lacking(&store).contains("no-limit-fsize"));
    store.cowl(["umount", "web"]).ok();
}

/// Without CAP_SYS_RESOURCE a hard limit remains. It must be an error of the write, not the end of the daemon.
#[test]
fn hard_limit_of_the_file_size_is_an_error_of_the_write() {
    if !can(NEEDS) {
        return;
    }
    let store = store_with_container();
    mount_from_shell(&store, "ulimit -f 64").ok();
    let (root, pid) = (store.mount("web"), store.daemon("web"));
    let copy_up = fs::OpenOptions::new().append(true).open(root.join("large"));
    let write = fs::write(root.join("new"), vec![1; 1 << 20]);
    let is_limited = lacking(&store).contains("no-limit-fsize");
    assert_eq!(is_limited, !has_sys_resource());
    for done in [copy_up.map(drop), write] {
        let errno = done.err().and_then(|error| error.raw_os_error());
        assert_eq!(errno, is_limited.then_some(27), "EFBIG");
    }
    assert_eq!(fs::read(root.join("large")).unwrap().len(), 1 << 20);
    assert_eq!(store.daemon("web"), pid, "the daemon is still the same");
    store.cowl(["umount", "web"]).ok();
}

/// Like kernel overlayfs, so that disk quotas and reserved blocks hold for writes through the mount.
#[test]
fn daemon_has_only_the_capabilities_that_it_needs() {
    if !can(NEEDS) {
        return;
    }
    let store = store_with_container();
    let _root = store.mount("web");
    let pid = store.daemon("web");
    let dropped = [12, 13, 16, 17, 22, SYS_RESOURCE, 25, 39];
    let kept = [0, 1, 3, 4, 6, 7, 21, 27];
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().file_name().into_string().unwrap();
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            let bits = u64::from_str_radix(&status_field(pid, &task, set), 16).unwrap();
            for number in dropped {
                assert!(bits & (1 << number) == 0, "{set} {bits:x}: has {number}");
            }
            for number in kept {
                assert!(bits & (1 << number) != 0, "{set} {bits:x}: lacks {number}");
            }
        }
    }
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    assert_eq!(
        score.trim() == "-900",
        !lacking(&store).contains("oom-score")
    );
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn daemon_without_descriptors_still_answers() {
    if !can(&[NEEDS, &[Need::Program("prlimit")]].concat()) {
        return;
    }
    let store = store_with_container();
    let root = store.mount("web");
    let pid = store.daemon("web");
    let files: Vec<_> = (0..40)
        .map(|number| fs::File::create(root.join(format!("f{number}"))).unwrap())
        .collect();
    let open: BTreeSet<u64> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .parse()
                .unwrap()
        })
        .collect();
    let lowest = (0..).find(|number| !open.contains(number)).unwrap();
    run(
        "prlimit",
        ["--pid", &pid.to_string(), &format!("--nofile={lowest}:")],
    )
    .ok();
    for _ in 0..3 {
        store.cowl(["status", "web"]).ok();
    }
    store.cowl(["snapshot", "web"]).ok();
    for file in &files {
        rustix::io::pwrite(file, b"written", 0).unwrap();
    }
    assert_eq!(store.daemon("web"), pid);
    drop(files);
    store.cowl(["umount", "web"]).ok();
}

#[test]
fn control_group_of_the_shell_does_not_limit_the_daemon() {
    let pids = Path::new("/sys/fs/cgroup/pids");
    if !can(&[NEEDS, &[Need::PidsController]].concat()) {
        return;
    }
    let store = store_with_container();
    let group = pids.join(format!("cowl-test-{}", std::process::id()));
    fs::create_dir(&group).unwrap();
    mount_from_shell(
        &store,
        &format!("echo $$ > {}/cgroup.procs", group.display()),
    )
    .ok();
    let table = fs::read_to_string(format!("/proc/{}/cgroup", store.daemon("web"))).unwrap();
    assert!(!table.contains("cowl-test-"), "{table}");
    store.cowl(["umount", "web"]).ok();
    fs::remove_dir(&group).unwrap();
}

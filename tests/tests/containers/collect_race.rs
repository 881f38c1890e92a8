//! Garbage collection during other commands: it never removes a layer that a command is creating, that a mount reads,
//! or that a manifest refers to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

/// The number of rounds of each concurrent command.
const ROUNDS: usize = 12;

/// Runs a command that may find a container busy or removed, but never damaged.
#[track_caller]
fn may(store: &Store, args: &[&str]) -> bool {
    let output = store.cowl(args);
    // Race: another command may unmount the container while an exec is about to enter it.
    let busy = output.code == 125 && output.err().contains("busy");
    assert!(
        busy || [0, 3, 4].contains(&output.code),
        "{}",
        output.report()
    );
    output.code == 0
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn gc_is_safe_during_concurrent_commands() {
    let needs = [Need::Root, Need::Fuse, Need::Program("busybox")];
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    for number in 0..50 {
        std::fs::write(source.join(number.to_string()), number.to_string()).unwrap();
    }
    let bin = store.scratch().make("source/bin");
    for program in ["sh", "cat"] {
        std::fs::copy(
            cowl_tests::programs::in_path("busybox").unwrap(),
            bin.join(program),
        )
        .unwrap();
    }
    for name in ["web", "db", "still"] {
        store.create(name, &source);
        store.cowl(["snapshot", name]).ok();
    }
    let mount_point = store.mount("still");
    let reader = std::fs::File::open(mount_point.join("7")).unwrap();
    let over = AtomicBool::new(false);
    let (collected, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    store.cowl(["check", "--deep"]).ok();
    let store = &store;
    let round = |work: &dyn Fn(usize)| {
        for number in 0..ROUNDS {
            work(number);
            done.fetch_add(1, Ordering::SeqCst);
        }
    };
    let round = &round;
    std::thread::scope(|scope| {
        for args in [
            &["gc", "--wait", "60"][..],
            &["gc", "--empty-trash", "--wait", "60"],
        ] {
            let (over, collected) = (&over, &collected);
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    collected.fetch_add(usize::from(may(store, args)), Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
        }
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                // Digests are taken as layers come, and compared ever after.
                let check = store.cowl(["check", "--deep", "--wait", "60"]);
                assert!(check.code == 0 || check.code == 4, "{}", check.report());
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let others = [
            scope.spawn(move || {
                round(&|_| {
                    may(store, &["snapshot", "web", "--wait", "60"]);
                    may(
                        store,
                        &[
                            "exec",
                            "web",
                            "--wait",
                            "60",
                            "--",
                            "sh",
                            "-c",
                            "echo x >> /0",
                        ],
                    );
                });
            }),
            scope.spawn(move || {
                round(&|number| {
                    let name = format!("new{number}");
                    may(store, &["clone", "web@snap0", &name, "--wait", "60"]);
                    may(store, &["snapshot", &name, "--wait", "60"]);
                    may(store, &["destroy", &name, "--yes", "--wait", "60"]);
                    may(store, &["undelete", &name, "--wait", "60"]);
                    may(store, &["destroy", &name, "--yes", "--now", "--wait", "60"]);
                });
            }),
            scope.spawn(move || {
                round(&|number| {
                    may(store, &["snapshot", "db", "--wait", "60"]);
                    may(store, &["restore", "db", "snap0", "--wait", "60"]);
                    let last = format!("snap{}", number + 1);
                    may(
                        store,
                        &["rm", "db", &last, "--skip-refused", "--wait", "60"],
                    );
                    may(
                        store,
                        &["snapshot", "db", "--name", "snap0x", "--wait", "60"],
                    );
                    may(store, &["rm", "db", "snap0x", "--wait", "60"]);
                });
            }),
            scope.spawn(move || {
                round(&|number| {
                    std::fs::write(mount_point.join("new"), number.to_string()).unwrap();
                    may(store, &["snapshot", "still", "--wait", "60"]);
                    may(
                        store,
                        &[
                            "prune",
                            "still",
                            "--keep-last",
                            "1",
                            "--manual",
                            "--wait",
                            "60",
                        ],
                    );
                    may(store, &["mount", "web", "--wait", "60"]);
                    may(store, &["umount", "web", "--wait", "60"]);
                });
            }),
        ];
        let ends: Vec<_> = others
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        over.store(true, Ordering::SeqCst);
        for end in ends {
            end.unwrap();
        }
    });
    let (collected, done) = (
        collected.load(Ordering::SeqCst),
        done.load(Ordering::SeqCst),
    );
    eprintln!("collected {collected} times during {done} rounds");
    assert!(collected > 5 && done == 4 * ROUNDS);
    drop(reader);
    store.cowl(["umount", "still"]).ok();
    // Every remaining state is intact, and no leftovers exist.
    store.cowl(["gc"]).ok();
    let check = store.cowl(["check", "--deep"]).ok();
    assert!(check.out().is_empty(), "{}", check.report());
    for name in ["web", "db", "still"] {
        for snapshot in store.snapshots(name) {
            store
                .cowl(["export", &format!("{name}@{snapshot}"), "-"])
                .ok();
        }
        let text = store.exec(name, "cat /49").out();
        assert_eq!(text, "49", "{name}");
    }
}

//! The container `web` in a store of its own, and commands on it that are killed at each system call.

use std::path::{Path, PathBuf};
use std::process::Command;

use cowl::store::Store;
use cowl::store::kernel::Driver;
use cowl::store::manifest::{ContainerId, ContainerManifest, LayerId};
use cowl::store::name::ContainerName;
use cowl::tree::digest;
use cowl_tests::conditions::{self, Need};
use cowl_tests::mount::wait_until;

use crate::kill::{at_each, calls, calls_with, kill_at, kill_at_with};
use crate::library;
use crate::remains;

/// Returns whether the calling test can run here; if not, it is counted as skipped.
pub(crate) fn can(mounts: bool) -> bool {
    let mut needs = vec![Need::Program("strace")];
    if mounts {
        needs.extend([Need::Root, Need::Fuse]);
    }
    conditions::can(&needs)
}

struct World {
    cli: cowl_tests::cowl::Store,
    driver: Driver,
    /// The file that is the standard input of the command.
    input: Option<PathBuf>,
}

/// The states of a container: the current one, and each snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct States {
    head: String,
    snapshots: Vec<(String, String)>,
}

impl States {
    fn names(&self) -> Vec<&str> {
        let names = self.snapshots.iter().map(|(name, _)| name.as_str());
        names.collect()
    }
}

impl World {
    fn empty(driver: Driver) -> Self {
        let cli = cowl_tests::cowl::Store::for_test();
        let cli = match driver {
            Driver::Fuse => cli,
            Driver::Kernel => cli.with_kernel_driver(),
        };
        Self {
            cli,
            driver,
            input: None,
        }
    }

    /// Copies the store, with all its time stamps.
    fn copy(&self) -> Self {
        // A process that syncs in the background would replace files while they are copied.
        wait_until("no process uses the store", || !self.is_used());
        let world = Self::empty(self.driver);
        let copied = Command::new("cp")
            .arg("-a")
            .args([self.cli.path(), world.cli.path()])
            .status();
        assert!(copied.unwrap().success());
        world
    }

    /// Returns whether the command line of a process names the store.
    fn is_used(&self) -> bool {
        let store = self.cli.path().as_os_str().as_encoded_bytes();
        let processes = std::fs::read_dir("/proc").unwrap();
        let mut lines = processes.filter_map(|entry| {
            // A process can end at any time.
            std::fs::read(entry.ok()?.path().join("cmdline")).ok()
        });
        lines.any(|line| line.split(|byte| *byte == 0).any(|word| word == store))
    }

    /// Creates the container with three snapshots, and a file written since.
    fn new(driver: Driver) -> Self {
        let world = Self::empty(driver);
        let base = world.cli.beside("base");
        std::fs::create_dir_all(base.join("etc/deep")).unwrap();
        std::fs::write(base.join("etc/file"), "one").unwrap();
        world.cli.create("web", &base);
        for round in 0..3 {
            world.write(&format!("etc/round{round}"), "content");
            world.cli.ok(["snapshot", "--no-sync", "web"]);
        }
        world.write("etc/since", "the last snapshot");
        world
    }

    fn store(&self) -> Store {
        library::open(self.cli.path()).unwrap()
    }

    /// Unmounts web. A process that another thread is about to start holds a copy of each descriptor for a moment,
    /// which keeps the mount busy.
    #[track_caller]
    fn umount(&self) {
        wait_until("web is free", || {
            let output = self.cli.cowl(["umount", "web"]);
            assert!([0, 4].contains(&output.code), "{}", output.report());
            output.code == 0
        });
    }

    fn find(&self, name: &str) -> Option<(ContainerId, ContainerManifest)> {
        let name = ContainerName::parse(name).unwrap();
        let found = self.store().containers().unwrap();
        found.into_iter().find_map(|(id, record)| {
            let manifest = record.unwrap().body;
            (manifest.name == name).then_some((id, manifest))
        })
    }

    /// Writes into the head of web, which is not mounted.
    fn write(&self, path: &str, content: &str) {
        let (_, manifest) = self.find("web").unwrap();
        let path = self.store().paths().layer_tree(manifest.head).join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn digest(&self, stack: &[LayerId]) -> String {
        let view = self.store().view(stack).unwrap();
        digest(&view, &mut |_| ()).unwrap().to_string()
    }

    fn states(&self, name: &str) -> Option<States> {
        let (id, manifest) = self.find(name)?;
        let store = self.store();
        let snapshots = manifest.snapshots.iter().map(|known| {
            let snapshot = store.snapshot(id, known.id).unwrap();
            (known.name.to_string(), self.digest(&snapshot.stack))
        });
        Some(States {
            head: self.digest(&manifest.stack),
            snapshots: snapshots.collect(),
        })
    }

    fn log(&self) -> PathBuf {
        self.cli.beside("strace.log")
    }
}

/// The mount of web before a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Unmounted,
    Mounted,
}

/// The mount of web after a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Mounted,
    Any,
}

/// Kills commands that change the mount of web by kernel overlayfs at every call. Then the mount works, or can be made.
///
/// `COWL_KERNEL_KILLS=1` adds a mount and an unmount.
pub(crate) fn mount_by_the_kernel_at_every_call() {
    let first = World::new(Driver::Kernel);
    let restored = (Before::Mounted, After::Mounted);
    kill_at_every_call(&first, restored, &["restore", "web", "snap1"], &["web"]);
    if std::env::var_os("COWL_KERNEL_KILLS").is_none() {
        // A restore contains both of the following.
        return;
    }
    let unmounted = (Before::Unmounted, After::Any);
    kill_at_every_call(&first, unmounted, &["mount", "web"], &["web"]);
    let mounted = (Before::Mounted, After::Any);
    kill_at_every_call(&first, mounted, &["umount", "web"], &["web"]);
}

/// Kills `args` at every call; `names` are the containers that the command changes.
pub(crate) fn at_every_call(mounted: bool, args: &[&str], names: &[&str]) {
    at_every_call_after(&[], mounted, args, names);
}

/// Like [`at_every_call`], in a store where the commands `prepare` were run before.
pub(crate) fn at_every_call_after(
    prepare: &[&[&str]],
    mounted: bool,
    args: &[&str],
    names: &[&str],
) {
    let first = World::new(Driver::Fuse);
    for command in prepare {
        first.cli.ok(*command);
    }
    at_every_call_in(&first, mounted, args, names);
}

/// Kills a `cowl receive new` at every call. It receives web from another store; with `exists`, the store has received the
/// first snapshot before.
pub(crate) fn at_every_call_of_receive(exists: bool) {
    let source = World::new(Driver::Fuse);
    let mut first = World::new(Driver::Fuse);
    let send = |state: &str| source.cli.cowl(["send", state]).ok().stdout;
    if exists {
        first
            .cli
            .cowl_with(["receive", "new"], &send("web@snap0"))
            .ok();
    }
    let file = source.cli.beside("stream");
    std::fs::write(&file, send("web")).unwrap();
    first.input = Some(file);
    at_every_call_in(&first, false, &["receive", "new"], &["web", "new"]);
}

fn at_every_call_in(first: &World, mounted: bool, args: &[&str], names: &[&str]) {
    let ends = match mounted {
        true => (Before::Mounted, After::Mounted),
        false => (Before::Unmounted, After::Any),
    };
    kill_at_every_call(first, ends, args, names);
}

fn kill_at_every_call(first: &World, ends: (Before, After), args: &[&str], names: &[&str]) {
    let (start, end) = ends;
    let world = || {
        let world = first.copy();
        if start == Before::Mounted {
            world.cli.ok(["mount", "web"]);
        }
        world
    };
    let states =
        |world: &World| -> Vec<_> { names.iter().map(|name| world.states(name)).collect() };
    let (calls, after) = {
        let world = world();
        let input = first.input.as_deref();
        let calls = calls_with(&world.cli.command(args), input, &world.log());
        let after = states(&world);
        if first.driver == Driver::Kernel {
            // No daemon ends with the process.
            world.cli.cowl(["umount", "web"]);
        }
        (calls, after)
    };
    at_each(&format!("{args:?}, {ends:?}"), &calls, |call| {
        let mut label = format!("{args:?} killed at {call:?}");
        let world = world();
        let before = states(&world);
        let input = first.input.as_deref();
        let killed = kill_at_with(&world.cli.command(args), input, call);
        // Any next command cleans up.
        for next in ["status", "list", "check"] {
            let output = world.cli.cowl([next]);
            assert_eq!(output.code, 0, "{label}, then {}", output.report());
            label = format!("{label}; {next} said: {}", output.err());
        }
        let now = states(&world);
        assert!(
            is_like(&now, &before) || is_like(&now, &after),
            "{label}:\nbefore {before:#?}\nnow {now:#?}\nafter {after:#?}"
        );
        for (then, now) in before.iter().zip(&now) {
            // No snapshot ever changes.
            if let (Some(then), Some(now)) = (then, now) {
                for (name, state) in &then.snapshots {
                    let same = now.snapshots.iter().find(|(other, _)| other == name);
                    assert!(same.is_none_or(|(_, now)| now == state), "{label}: {name}");
                }
            }
        }
        remains::assert_none(world.cli.path(), &label);
        if let Some((id, _)) = world.find("web") {
            if first.driver == Driver::Kernel && end == After::Any {
                // Whether it is mounted or not.
                world.cli.ok(["mount", "web"]);
                assert_mount_works(&world, id, &label);
            } else if end == After::Mounted {
                assert_mount_works(&world, id, &label);
            }
        }
        killed
    });
}

fn is_like(a: &[Option<States>], b: &[Option<States>]) -> bool {
    a.iter().zip(b).all(|(a, b)| match (a, b) {
        (Some(a), Some(b)) => a.head == b.head && a.names() == b.names(),
        (None, None) => true,
        _ => false,
    })
}

/// Checks that web is mounted, that what is written through the mount reaches the head, and that no frozen layer
/// changes.
fn assert_mount_works(world: &World, id: ContainerId, label: &str) {
    let mount_point = world.store().paths().mount_dir(id);
    assert!(is_mounted(&mount_point), "{label}: not mounted any more");
    let snapshots = world.states("web").unwrap().snapshots;
    std::fs::write(mount_point.join("etc/after"), "the crash").unwrap();
    std::fs::write(mount_point.join("etc/file"), "changed").unwrap();
    let (_, manifest) = world.find("web").unwrap();
    let head = world.store().paths().layer_tree(manifest.head);
    assert!(
        head.join("etc/after").is_file(),
        "{label}: written elsewhere"
    );
    assert_eq!(world.states("web").unwrap().snapshots, snapshots, "{label}");
    world.umount();
    world.cli.ok(["mount", "web"]);
    let text = std::fs::read_to_string(mount_point.join("etc/after")).unwrap();
    assert_eq!(text, "the crash", "{label}");
    world.umount();
}

fn is_mounted(mount_point: &Path) -> bool {
    cowl_tests::mount::at(mount_point).is_some()
}

/// Kills `args`, which changes a mounted web path by path after it has saved its state. However far the command came,
/// that state is saved, no snapshot has changed, and the repeated command has the same result.
pub(crate) fn at_every_call_path_by_path(args: &[&str]) {
    let first = World::new(Driver::Fuse);
    let world = || {
        let world = first.copy();
        world.cli.ok(["mount", "web"]);
        world
    };
    let (calls, after) = {
        let world = world();
        let calls = calls(&world.cli.command(args), &world.log());
        (calls, world.states("web").unwrap())
    };
    at_each(&format!("{args:?}"), &calls, |call| {
        let label = format!("{args:?} killed at {call:?}");
        let world = world();
        let before = world.states("web").unwrap();
        let killed = kill_at(&world.cli.command(args), call);
        world.cli.ok(["status"]);
        let now = world.states("web").unwrap();
        assert!(now.snapshots.starts_with(&before.snapshots), "{label}");
        match now.snapshots.strip_prefix(before.snapshots.as_slice()) {
            Some([]) => assert_eq!(now.head, before.head, "{label}"),
            Some([(_, saved)]) => assert_eq!(*saved, before.head, "{label}"),
            other => panic!("{label}: {other:?}"),
        }
        remains::assert_none(world.cli.path(), &label);
        world.cli.ok(args);
        assert_eq!(world.states("web").unwrap().head, after.head, "{label}");
        let (id, _) = world.find("web").unwrap();
        assert_mount_works(&world, id, &label);
        killed
    });
}

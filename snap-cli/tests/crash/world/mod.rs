//! A store for tests of crashes: strace first tells which changing calls a command makes, and then kills it
//! at each of them.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cowl::store::deleted;
use cowl::store::manifest::{ContainerId, LayerId};
use cowl::store::name::ContainerName;
use cowl::store::{Session, Store};
use cowl::tree::digest;
use cowl_tests::conditions::{self, Need};

const COWL: &str = env!("CARGO_BIN_EXE_cowl");

/// Calls that change what other processes or a later run can see.
const CALLS: &str = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,syncfs,\
                     write,fchmodat,?fchmodat2,utimensat,fchownat,setxattr,flock,connect,sendto,\
                     symlinkat,linkat,mknodat,umount2,copy_file_range,ioctl";

/// Whether the calling test can run here; else it is noted as skipped.
pub(crate) fn can(mounts: bool) -> bool {
    let mut needs = vec![Need::Program("strace")];
    if mounts {
        needs.extend([Need::Root, Need::Fuse]);
    }
    conditions::can(&needs)
}

struct World {
    dir: tempfile::TempDir,
}

/// All that a container shows: what it is now, and each snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    head: String,
    snapshots: Vec<(String, String)>,
}

impl World {
    fn empty() -> Self {
        let parent = std::env::var_os("COWL_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
        let dir = tempfile::Builder::new()
            .prefix("cowl-crash-")
            .tempdir_in(parent)
            .unwrap();
        Self { dir }
    }

    /// The same store again, with all its time stamps.
    fn copy(&self) -> Self {
        let world = Self::empty();
        let copied = Command::new("cp")
            .arg("-a")
            .args([self.path("store"), world.path("store")])
            .status();
        assert!(copied.unwrap().success());
        world
    }

    /// A store with the container web: three snapshots, and something written since.
    fn new() -> Self {
        let world = Self::empty();
        let base = world.path("base");
        std::fs::create_dir_all(base.join("etc/deep")).unwrap();
        std::fs::write(base.join("etc/file"), "one").unwrap();
        world.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        for round in 0..3 {
            world.write(&format!("etc/round{round}"), "content");
            world.ok(&["snapshot", "web"]);
        }
        world.write("etc/since", "the last snapshot");
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn store(&self) -> Store {
        let session = Session {
            who: "test".to_owned(),
            patience: Duration::from_secs(5),
            mounts: Default::default(),
        };
        Store::open(&self.path("store"), session).unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(COWL);
        command.arg("--store").arg(self.path("store")).args(args);
        command
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Unmounts web. Somebody else on this machine may be making a mount namespace just then, which holds
    /// the mount for a while.
    fn umount(&self) {
        for _ in 0..40 {
            let output = self.command(&["umount", "web"]).output().unwrap();
            match output.status.code() {
                Some(0) => return,
                Some(4) => std::thread::sleep(Duration::from_millis(500)),
                _ => panic!("{output:?}"),
            }
        }
        panic!("web stays busy");
    }

    fn find(&self, name: &str) -> Option<(ContainerId, cowl::store::manifest::ContainerManifest)> {
        let name = ContainerName::parse(name).unwrap();
        let found = self.store().containers().unwrap();
        found.into_iter().find_map(|(id, record)| {
            let manifest = record.unwrap().body;
            (manifest.name == name).then_some((id, manifest))
        })
    }

    /// Writes through the mount when there is one, else into the head.
    fn write(&self, path: &str, content: &str) {
        let (id, manifest) = self.find("web").unwrap();
        let store = self.store();
        let place = store.paths().mount_dir(id);
        let tree = if is_mounted(&place) {
            place
        } else {
            store.paths().layer_tree(manifest.head)
        };
        let path = tree.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn digest(&self, stack: &[LayerId]) -> String {
        let view = self.store().view(stack).unwrap();
        digest(&view, &mut |_| ()).unwrap().to_string()
    }

    fn shown(&self, name: &str) -> Option<Shown> {
        let (id, manifest) = self.find(name)?;
        let store = self.store();
        let snapshots = manifest.snapshots.iter().map(|known| {
            let snapshot = store.snapshot(id, known.id).unwrap();
            (known.name.to_string(), self.digest(&snapshot.stack))
        });
        Some(Shown {
            head: self.digest(&manifest.stack),
            snapshots: snapshots.collect(),
        })
    }

    fn strace(&self, options: &[&str], args: &[&str]) -> Output {
        let mut command = Command::new("strace");
        command
            .arg("-qq")
            .args(options)
            .arg(COWL)
            .arg("--store")
            .arg(self.path("store"))
            .args(args)
            .stdin(Stdio::null());
        command.output().unwrap()
    }

    /// The changing calls that the command makes, each with its number among those of its name.
    fn calls(&self, args: &[&str]) -> Vec<(String, usize)> {
        let log = self.path("strace.log");
        let trace = format!("trace={CALLS}");
        let output = self.strace(&["-o", log.to_str().unwrap(), "-e", &trace], args);
        assert!(output.status.success(), "{output:?}");
        let mut calls: Vec<(String, usize)> = Vec::new();
        for line in std::fs::read_to_string(log).unwrap().lines() {
            let Some((name, _)) = line.split_once('(') else {
                continue;
            };
            // strace tells of calls that it does not know whatever it was asked for.
            if UNKNOWN_READS.contains(&name) {
                continue;
            }
            let number = 1 + calls.iter().filter(|(other, _)| other == name).count();
            calls.push((name.to_owned(), number));
        }
        assert!(calls.len() > 5, "{calls:?}");
        calls
    }

    /// Runs the command and kills it at this call. False when it came through: then it made another
    /// number of calls this time.
    fn kill_at(&self, (name, number): &(String, usize), args: &[&str]) -> bool {
        let trace = format!("trace={name}");
        let inject = format!("inject={name}:signal=KILL:when={number}");
        let options = ["-o", "/dev/null", "-e", &trace, "-e", &inject];
        let output = self.strace(&options, args);
        let killed = output.status.signal() == Some(9);
        assert!(killed || output.status.success(), "{args:?}: {output:?}");
        killed
    }

    /// Nothing lies about that no manifest names.
    #[track_caller]
    fn is_clean(&self, what: &str) {
        let store = self.store();
        let mut used = BTreeSet::new();
        let mut files = BTreeSet::new();
        for (id, record) in store.containers().unwrap() {
            let manifest = record.unwrap().body;
            used.extend(manifest.stack.iter().map(ToString::to_string));
            files.insert(store.paths().container_file(id));
            for snapshot in &manifest.snapshots {
                let file = store.paths().snapshot_file(id, snapshot.id);
                used.extend(cowl_stack(&store, id, snapshot.id));
                files.insert(file);
            }
        }
        for deleted in deleted::list(&store).unwrap() {
            let manifest = deleted::manifest(&store, &deleted).unwrap().body;
            used.extend(manifest.stack.iter().map(ToString::to_string));
            for snapshot in &manifest.snapshots {
                let stack = store.snapshot_in(&deleted.dir, snapshot.id).unwrap().stack;
                used.extend(stack.iter().map(ToString::to_string));
            }
        }
        assert_eq!(names(&self.path("store/layers")), used, "{what}: layers");
        let locks = names(&self.path("store/locks"));
        assert!(
            !locks.iter().any(|name| name.starts_with("making")),
            "{what}: {locks:?}"
        );
        assert!(names(&self.path("store/trash")).is_empty());
        // A daemon that has synced a snapshot commits that, in the background.
        let mut tries = 500;
        while self.container_files() != files && tries > 0 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            tries -= 1;
        }
        assert_eq!(self.container_files(), files, "{what}: files of containers");
    }

    fn container_files(&self) -> BTreeSet<PathBuf> {
        let mut there = BTreeSet::new();
        let containers = self.path("store/containers");
        for id in names(&containers) {
            for name in names(&containers.join(&id)) {
                let path = containers.join(&id).join(&name);
                if path.is_dir() {
                    there.extend(names(&path).into_iter().map(|file| path.join(file)));
                } else {
                    there.insert(path);
                }
            }
        }
        there
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let inside = self.path("store/mnt");
        for place in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
            if Path::new(place).starts_with(&inside) {
                let umount = Command::new("umount").arg("-l").arg(place).status();
                assert!(umount.is_ok_and(|status| status.success()), "{place}");
            }
        }
    }
}

fn cowl_stack(
    store: &Store,
    id: ContainerId,
    snapshot: cowl::store::manifest::SnapshotId,
) -> Vec<String> {
    let stack = store.snapshot(id, snapshot).unwrap().stack;
    stack.iter().map(ToString::to_string).collect()
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn is_mounted(place: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == place.to_str())
}

/// getxattrat(2) and listxattrat(2), as an strace older than they are shows them.
const UNKNOWN_READS: [&str; 2] = ["syscall_0x1d0", "syscall_0x1d1"];

/// One at a time: a process that another thread is about to start holds for a moment a copy of every
/// descriptor, and so every mount busy.
static ALONE: Mutex<()> = Mutex::new(());

/// Kills `args` at every call; `about` are the containers that it is about.
pub(crate) fn at_every_call(mounted: bool, args: &[&str], about: &[&str]) {
    at_every_call_after(&[], mounted, args, about);
}

/// The same in a store where these commands were run before.
pub(crate) fn at_every_call_after(
    prepare: &[&[&str]],
    mounted: bool,
    args: &[&str],
    about: &[&str],
) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let first = World::new();
    for command in prepare {
        first.ok(command);
    }
    let world = || {
        let world = first.copy();
        if mounted {
            world.ok(&["mount", "web"]);
        }
        world
    };
    let shown = |world: &World| -> Vec<_> { about.iter().map(|name| world.shown(name)).collect() };
    let (calls, after) = {
        let world = world();
        let calls = world.calls(args);
        (calls, shown(&world))
    };
    let mut killed = 0;
    for call in &calls {
        let mut what = format!("{args:?} killed at {call:?}");
        let world = world();
        let before = shown(&world);
        killed += usize::from(world.kill_at(call, args));
        // Whatever is next: it cleans up.
        for next in ["status", "list", "check"] {
            let output = world.command(&[next]).output().unwrap();
            let said = output.stderr.escape_ascii();
            assert!(output.status.success(), "{what}, then {next}: {said}");
            what = format!("{what}; {next} said: {said}");
        }
        let now = shown(&world);
        assert!(
            like(&now, &before) || like(&now, &after),
            "{what}:\nbefore {before:#?}\nnow {now:#?}\nafter {after:#?}"
        );
        for (then, now) in before.iter().zip(&now) {
            // No snapshot ever changes.
            if let (Some(then), Some(now)) = (then, now) {
                for (name, state) in &then.snapshots {
                    let same = now.snapshots.iter().find(|(other, _)| other == name);
                    assert!(same.is_none_or(|(_, now)| now == state), "{what}: {name}");
                }
            }
        }
        world.is_clean(&what);
        if mounted && let Some((id, _)) = world.find("web") {
            goes_on(&world, id, &what);
        }
    }
    eprintln!("{args:?}, mounted: {mounted}: killed at {killed} calls");
    assert!(killed > 0, "{args:?}: killed nowhere");
    assert!(
        killed * 10 >= calls.len() * 9,
        "{killed} of {}",
        calls.len()
    );
}

fn like(a: &[Option<Shown>], b: &[Option<Shown>]) -> bool {
    a.iter().zip(b).all(|(a, b)| match (a, b) {
        (Some(a), Some(b)) => a.head == b.head && same_names(a, b),
        (None, None) => true,
        _ => false,
    })
}

fn same_names(a: &Shown, b: &Shown) -> bool {
    let names = |shown: &Shown| -> Vec<String> {
        shown
            .snapshots
            .iter()
            .map(|(name, _)| name.clone())
            .collect()
    };
    names(a) == names(b)
}

/// The mount is there, what is written through it lands in the head, and no frozen layer is touched.
fn goes_on(world: &World, id: ContainerId, what: &str) {
    let place = world.store().paths().mount_dir(id);
    assert!(is_mounted(&place), "{what}: not mounted any more");
    let snapshots = world.shown("web").unwrap().snapshots;
    std::fs::write(place.join("etc/after"), "the crash").unwrap();
    std::fs::write(place.join("etc/file"), "changed").unwrap();
    let (_, manifest) = world.find("web").unwrap();
    let head = world.store().paths().layer_tree(manifest.head);
    assert!(
        head.join("etc/after").is_file(),
        "{what}: written elsewhere"
    );
    assert_eq!(world.shown("web").unwrap().snapshots, snapshots, "{what}");
    world.umount();
    world.ok(&["mount", "web"]);
    let text = std::fs::read_to_string(place.join("etc/after")).unwrap();
    assert_eq!(text, "the crash", "{what}");
    world.umount();
}

/// Kills `args`, which changes a mounted web path by path and keeps what it was first: whatever it had come
/// to, that is kept, no snapshot is another, and done again it comes to the same end.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) fn at_every_call_path_by_path(args: &[&str]) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let first = World::new();
    let world = || {
        let world = first.copy();
        world.ok(&["mount", "web"]);
        world
    };
    let (calls, after) = {
        let world = world();
        (world.calls(args), world.shown("web").unwrap())
    };
    let mut killed = 0;
    for call in &calls {
        let what = format!("{args:?} killed at {call:?}");
        let world = world();
        let before = world.shown("web").unwrap();
        killed += usize::from(world.kill_at(call, args));
        world.ok(&["status"]);
        let now = world.shown("web").unwrap();
        assert!(now.snapshots.starts_with(&before.snapshots), "{what}");
        match now.snapshots.strip_prefix(before.snapshots.as_slice()) {
            Some([]) => assert_eq!(now.head, before.head, "{what}"),
            Some([(_, kept)]) => assert_eq!(*kept, before.head, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        world.is_clean(&what);
        world.ok(args);
        assert_eq!(world.shown("web").unwrap().head, after.head, "{what}");
        let (id, _) = world.find("web").unwrap();
        goes_on(&world, id, &what);
    }
    eprintln!("{args:?}: killed at {killed} calls");
    assert!(killed * 10 >= calls.len() * 9);
}

//! Commands that change more than the store (a root file system moves, LXC's config changes), killed at each
//! system call that changes something: everything is as before or as afterwards, the next command sees to
//! that, nothing lies about, and the command can be typed again.
//!
//! No container runs here: what is under test are files.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use cowl::store::deleted;
use cowl::store::{Session, Store};
use cowl_layers::view::{DirNode, Found, View};
use cowl_tests::conditions::{Need, can};

const COWL: &str = env!("CARGO_BIN_EXE_cowl");

/// Calls that change what other processes or a later run can see.
const CALLS: &str = "mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,fsync,syncfs,\
                     write,fchmodat,?fchmodat2,chmod,fchmod,fchown,utimensat,fchownat,setxattr,flock,\
                     symlinkat,linkat,mknodat,copy_file_range,ioctl";

const CONFIG: &str = "# a config\nlxc.include = /nowhere\n\nlxc.rootfs.path = dir:DIR/lxc/c1/rootfs\n\
                      lxc.uts.name = c1\n# its end";

/// What is to be killed, and what comes before it.
struct Story {
    before: &'static [&'static [&'static str]],
    command: &'static [&'static str],
}

const ADOPT: &[&str] = &["adopt", "c1", "-P", "DIR/lxc"];

struct World {
    dir: tempfile::TempDir,
}

/// All that counts: every file of LXC's folder, and what each container of the store shows. Ids and the
/// place of the world are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shown {
    files: BTreeMap<String, String>,
    containers: BTreeMap<String, (String, Vec<String>)>,
    deleted: usize,
}

impl World {
    fn new(story: &Story) -> Self {
        let parent = std::env::var_os("COWL_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
        let dir = tempfile::Builder::new()
            .prefix("cowl-crash-")
            .tempdir_in(parent)
            .unwrap();
        let world = Self { dir };
        let rootfs = world.path("lxc/c1/rootfs");
        std::fs::create_dir_all(rootfs.join("etc/deep")).unwrap();
        std::fs::write(rootfs.join("etc/file"), "one").unwrap();
        std::fs::write(world.path("lxc/c1/config"), world.here(CONFIG)).unwrap();
        for command in story.before {
            match command {
                ["write", path, text] => world.write(path, text),
                other => world.ok(other),
            }
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn here(&self, text: &str) -> String {
        text.replace("DIR", self.dir.path().to_str().unwrap())
    }

    fn command(&self, args: &[&str]) -> Vec<String> {
        let store = self.path("store").to_str().unwrap().to_owned();
        let mut words = vec!["--store".to_owned(), store];
        words.extend(args.iter().map(|arg| self.here(arg)));
        words
    }

    fn run(&self, args: &[&str]) -> Output {
        Command::new(COWL)
            .args(self.command(args))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
    }

    /// Writes into the head of c1, which is not mounted.
    fn write(&self, path: &str, text: &str) {
        let store = self.store().unwrap();
        let (_, record) = store.containers().unwrap().remove(0);
        let tree = store.paths().layer_tree(record.unwrap().body.head);
        std::fs::write(tree.join(path), text).unwrap();
    }

    fn store(&self) -> Option<Store> {
        let session = Session {
            who: "test".to_owned(),
            patience: Duration::from_secs(5),
            mounts: Default::default(),
        };
        Store::open(&self.path("store"), session).ok()
    }

    fn shown(&self) -> Shown {
        let mut ids = Vec::new();
        let mut containers = BTreeMap::new();
        let mut deleted = 0;
        if let Some(store) = self.store() {
            for (id, record) in store.containers().unwrap() {
                let manifest = record.unwrap().body;
                assert!(manifest.moving.is_none(), "{manifest:?}");
                let view = store.view(&manifest.stack).unwrap();
                let mut head = String::new();
                content(&view, &view.root().unwrap(), "", &mut head);
                let snapshots = manifest.snapshots.iter().map(|s| s.name.to_string());
                containers.insert(manifest.name.to_string(), (head, snapshots.collect()));
                ids.push((id.to_string(), manifest.name.to_string()));
            }
            deleted = deleted::list(&store).unwrap().len();
        }
        let mut files = BTreeMap::new();
        files_below(&self.path("lxc"), &mut files);
        let plain = |text: String| {
            let text = text.replace(self.dir.path().to_str().unwrap(), "DIR");
            ids.iter()
                .fold(text, |text, (id, name)| text.replace(id, name))
        };
        let files = files
            .into_iter()
            .map(|(path, text)| (plain(path), plain(text)))
            .collect();
        Shown {
            files,
            containers,
            deleted,
        }
    }

    fn strace(&self, options: &[&str], args: &[&str]) -> Output {
        let mut command = Command::new("strace");
        command
            .arg("-qq")
            .args(options)
            .arg(COWL)
            .args(self.command(args));
        command.stdin(Stdio::null()).output().unwrap()
    }

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
            // strace tells of calls that it does not know whatever it was asked for: getxattrat(2) and
            // listxattrat(2), as one older than they are shows them.
            if ["syscall_0x1d0", "syscall_0x1d1"].contains(&name) {
                continue;
            }
            let number = 1 + calls.iter().filter(|(other, _)| other == name).count();
            calls.push((name.to_owned(), number));
        }
        assert!(calls.len() > 10, "{calls:?}");
        calls
    }

    fn kill_at(&self, (name, number): &(String, usize), args: &[&str]) -> bool {
        let trace = format!("trace={name}");
        let inject = format!("inject={name}:signal=KILL:when={number}");
        let output = self.strace(&["-o", "/dev/null", "-e", &trace, "-e", &inject], args);
        let killed = output.status.signal() == Some(9);
        assert!(killed || output.status.success(), "{args:?}: {output:?}");
        killed
    }

    /// Nothing lies about that no manifest names.
    #[track_caller]
    fn is_clean(&self, what: &str) {
        let Some(store) = self.store() else { return };
        let mut used = BTreeSet::new();
        for (id, record) in store.containers().unwrap() {
            let manifest = record.unwrap().body;
            used.extend(manifest.stack.iter().map(ToString::to_string));
            for snapshot in &manifest.snapshots {
                let stack = store.snapshot(id, snapshot.id).unwrap().stack;
                used.extend(stack.iter().map(ToString::to_string));
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
        assert_eq!(
            names(&self.path("store/trash")),
            BTreeSet::new(),
            "{what}: trash"
        );
        assert_eq!(
            names(&self.path("store/moving")),
            BTreeSet::new(),
            "{what}: signs"
        );
    }
}

/// Names and content; times are another each time.
fn content(view: &View, dir: &DirNode, path: &str, out: &mut String) {
    for entry in view.list(dir).unwrap() {
        let name = std::str::from_utf8(&entry.name).unwrap();
        let path = format!("{path}/{name}");
        match view.lookup(dir, &entry.name).unwrap() {
            Found::Dir(inner) => {
                out.push_str(&format!("{path}/\n"));
                content(view, &inner, &path, out);
            }
            Found::File(file) => {
                let fd = file.data_loc().open_read().unwrap();
                let text = std::io::read_to_string(std::fs::File::from(fd)).unwrap();
                out.push_str(&format!("{path}: {text}\n"));
            }
            Found::Absent | Found::Whiteout => {}
        }
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn files_below(dir: &Path, files: &mut BTreeMap<String, String>) {
    for name in names(dir) {
        let path = dir.join(name);
        let shown = path.to_str().unwrap().to_owned();
        if path.is_dir() {
            files.insert(shown, String::new());
            files_below(&path, files);
        } else {
            files.insert(shown, std::fs::read_to_string(&path).unwrap());
        }
    }
}

fn at_every_call(story: &Story) {
    if !can(&[Need::Root, Need::Program("strace")]) {
        return;
    }
    let (calls, after) = {
        let world = World::new(story);
        let calls = world.calls(story.command);
        (calls, world.shown())
    };
    let mut killed = 0;
    for call in &calls {
        let what = format!("{:?} killed at {call:?}", story.command);
        let world = World::new(story);
        let before = world.shown();
        killed += usize::from(world.kill_at(call, story.command));
        // Whatever is next: it cleans up.
        for next in ["status", "list"] {
            world.ok(&[next]);
        }
        let now = world.shown();
        assert!(
            now == before || now == after,
            "{what}:\nbefore {before:#?}\nnow {now:#?}\nafter {after:#?}"
        );
        world.is_clean(&what);
        if now == before && before != after {
            world.ok(story.command);
            assert_eq!(world.shown(), after, "{what}, then again");
        }
    }
    eprintln!("{:?}: killed at {killed} calls", story.command);
    assert!(
        killed * 10 >= calls.len() * 9,
        "{killed} of {}",
        calls.len()
    );
}

#[test]
fn adopt() {
    at_every_call(&Story {
        before: &[],
        command: ADOPT,
    });
}

#[test]
fn release_what_moves_back() {
    at_every_call(&Story {
        before: &[ADOPT],
        command: &["release", "c1"],
    });
}

#[test]
fn release_what_was_written_to() {
    at_every_call(&Story {
        before: &[
            ADOPT,
            &["write", "new", "text"],
            &["snapshot", "c1"],
            &["write", "newer", "text"],
        ],
        command: &["release", "c1", "--yes"],
    });
}

#[test]
fn clone() {
    at_every_call(&Story {
        before: &[ADOPT, &["write", "new", "text"], &["snapshot", "c1"]],
        command: &["clone", "c1@snap0", "c2"],
    });
}

#[test]
fn restore_with_the_config() {
    at_every_call(&Story {
        before: &[
            ADOPT,
            &["write", "new", "text"],
            &["snapshot", "c1"],
            &["write", "newer", "text"],
        ],
        command: &["restore", "c1", "snap0", "--with-config"],
    });
}

#[test]
fn destroy_and_undelete() {
    at_every_call(&Story {
        before: &[ADOPT, &["snapshot", "c1"]],
        command: &["destroy", "c1", "--yes"],
    });
    at_every_call(&Story {
        before: &[ADOPT, &["snapshot", "c1"], &["destroy", "c1", "--yes"]],
        command: &["undelete", "c1"],
    });
}

//! Commands that change more than the store (a root filesystem moves, LXC's config changes), killed at each
//! system call that changes something: everything is as before or as afterwards, the next command leaves nothing
//! of an interrupted operation, and the command can be repeated.
//!
//! No container runs here: only files are tested.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use cowl::store::deleted;
use cowl_layers::view::{DirNode, Found, View};
use cowl_tests::conditions::{Need, can};

use crate::kill::{at_each, calls, kill_at};
use crate::library;
use crate::remains::{self, names};

const CONFIG: &str = "# a config\nlxc.include = /nowhere\n\nlxc.rootfs.path = dir:DIR/lxc/c1/rootfs\n\
                      lxc.uts.name = c1\nlxc.hook.mount = DIR/lxc/c1/hooks/mount\n# its end";

/// A command that is killed, and the commands before it.
struct Story {
    before: &'static [&'static [&'static str]],
    command: &'static [&'static str],
}

const ADOPT: &[&str] = &["adopt", "c1", "-P", "DIR/lxc"];

struct World {
    cli: cowl_tests::cowl::Store,
}

/// All files in LXC's directory, and the states of all containers in the store, without ids and temporary paths.
#[derive(Clone, Debug, PartialEq, Eq)]
struct WorldState {
    files: BTreeMap<String, String>,
    containers: BTreeMap<String, (String, Vec<String>)>,
    deleted: usize,
}

impl World {
    fn new(story: &Story) -> Self {
        let cli = cowl_tests::cowl::Store::for_test();
        let world = Self { cli };
        let rootfs = world.cli.beside("lxc/c1/rootfs");
        std::fs::create_dir_all(rootfs.join("etc/deep")).unwrap();
        std::fs::write(rootfs.join("etc/file"), "one").unwrap();
        std::fs::write(world.cli.beside("lxc/c1/config"), world.here(CONFIG)).unwrap();
        std::fs::create_dir(world.cli.beside("lxc/c1/hooks")).unwrap();
        std::fs::write(world.cli.beside("lxc/c1/hooks/mount"), "a hook").unwrap();
        for command in story.before {
            match command {
                ["write", path, text] => world.write(path, text),
                other => world.ok(other),
            }
        }
        world
    }

    fn dir(&self) -> &str {
        self.cli.scratch().to_str().unwrap()
    }

    fn here(&self, text: &str) -> String {
        text.replace("DIR", self.dir())
    }

    fn command(&self, args: &[&str]) -> Command {
        self.cli.command(args.iter().map(|arg| self.here(arg)))
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) {
        self.cli.ok(args.iter().map(|arg| self.here(arg)));
    }

    /// Writes into the head of c1, which is not mounted.
    fn write(&self, path: &str, text: &str) {
        let store = library::open(self.cli.path()).unwrap();
        let (_, record) = store.containers().unwrap().remove(0);
        let tree = store.paths().layer_tree(record.unwrap().body.head);
        std::fs::write(tree.join(path), text).unwrap();
    }

    fn state(&self) -> WorldState {
        let mut ids = Vec::new();
        let mut containers = BTreeMap::new();
        let mut deleted = 0;
        if let Ok(store) = library::open(self.cli.path()) {
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
        files_below(&self.cli.beside("lxc"), &mut files);
        let plain = |text: String| {
            let text = text.replace(self.dir(), "DIR");
            ids.iter()
                .fold(text, |text, (id, name)| text.replace(id, name))
        };
        let files = files
            .into_iter()
            .map(|(path, text)| (plain(path), plain(text)))
            .collect();
        WorldState {
            files,
            containers,
            deleted,
        }
    }
}

/// Appends names and content, but no times, which vary between runs.
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
        let log = world.cli.beside("strace.log");
        let calls = calls(&world.command(story.command), &log);
        (calls, world.state())
    };
    at_each(&format!("{:?}", story.command), &calls, |call| {
        let label = format!("{:?} killed at {call:?}", story.command);
        let world = World::new(story);
        let before = world.state();
        let killed = kill_at(&world.command(story.command), call);
        // Any next command cleans up.
        for next in ["status", "list"] {
            world.ok(&[next]);
        }
        let now = world.state();
        assert!(
            now == before || now == after,
            "{label}:\nbefore {before:#?}\nnow {now:#?}\nafter {after:#?}"
        );
        remains::assert_none(world.cli.path(), &label);
        if now == before && before != after {
            world.ok(story.command);
            assert_eq!(world.state(), after, "{label}, then again");
        }
        killed
    });
}

#[test]
fn adopt_survives_a_kill() {
    at_every_call(&Story {
        before: &[],
        command: ADOPT,
    });
}

#[test]
fn release_of_an_unchanged_root_filesystem_survives_a_kill() {
    at_every_call(&Story {
        before: &[ADOPT],
        command: &["release", "c1"],
    });
}

#[test]
fn release_of_a_changed_root_filesystem_survives_a_kill() {
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
fn clone_survives_a_kill() {
    at_every_call(&Story {
        before: &[ADOPT, &["write", "new", "text"], &["snapshot", "c1"]],
        command: &["clone", "c1@snap0", "c2"],
    });
}

#[test]
fn restore_with_the_config_survives_a_kill() {
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
fn destroy_and_undelete_survives_a_kill() {
    at_every_call(&Story {
        before: &[ADOPT, &["snapshot", "c1"]],
        command: &["destroy", "c1", "--yes"],
    });
    at_every_call(&Story {
        before: &[ADOPT, &["snapshot", "c1"], &["destroy", "c1", "--yes"]],
        command: &["undelete", "c1"],
    });
}

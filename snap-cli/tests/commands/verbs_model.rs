//! Property test: random sequences of commands and file changes result in the trees that a model in memory predicts, for
//! each container and each of its snapshots. `PROPTEST_CASES=N` sets the number of cases; failing cases are shrunk.
//!
//! The commands run as processes. Files are changed by the overlay in process, without a mount.

use std::collections::BTreeSet;

use crate::common::{Fs, metacopy};
use crate::library;
use crate::model_tree::{Model, Node, Rename, assert_same};
use cowl::store::Store;
use cowl::store::manifest::{ContainerId, ContainerManifest, LayerId};
use cowl::store::name::{ContainerName, SnapshotName};
use cowl_layers::layer::{Layer, Upper};
use cowl_overlay::Overlay;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;

const NAMES: [&str; 3] = ["a", "b", "c"];
/// The maximum number of containers.
const CONTAINERS: usize = 4;

/// A change of one file.
///
/// Paths are chosen when the change is applied, so that a shrunk sequence remains valid.
#[derive(Clone, Copy, Debug)]
enum Change {
    Create(u16, usize, u8),
    Mkdir(u16, usize),
    Append(u16, u8),
    Unlink(u16),
    RemoveDir(u16),
    Rename(u16, u16, usize),
    Link(u16, u16, usize),
    Chmod(u16, u32),
}

/// A command on containers. The `u8`s choose a container and its snapshots.
#[derive(Clone, Debug)]
enum Command {
    Change(u8, Vec<Change>),
    Snapshot(u8),
    Restore(u8, u8),
    RestoreNew(u8, u8),
    Clone(u8),
    Flatten(u8),
    FlattenRange(u8, u8, u8),
    FlattenBase(u8),
    FlattenDepth(u8),
    RoundTrip(u8),
    Destroy(u8),
}

fn change() -> impl Strategy<Value = Change> {
    let (at, byte, name) = (any::<u16>, any::<u8>, || 0..NAMES.len());
    prop_oneof![
        4 => (at(), name(), byte()).prop_map(|(at, name, byte)| Change::Create(at, name, byte)),
        3 => (at(), name()).prop_map(|(at, name)| Change::Mkdir(at, name)),
        3 => (at(), byte()).prop_map(|(at, byte)| Change::Append(at, byte)),
        2 => at().prop_map(Change::Unlink),
        2 => at().prop_map(Change::RemoveDir),
        3 => (at(), at(), name()).prop_map(|(at, to, name)| Change::Rename(at, to, name)),
        1 => (at(), at(), name()).prop_map(|(at, to, name)| Change::Link(at, to, name)),
        1 => (at(), prop_oneof![Just(0o600), Just(0o755)])
            .prop_map(|(at, mode)| Change::Chmod(at, mode)),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    let which = any::<u8>;
    prop_oneof![
        6 => (which(), vec(change(), 1..6)).prop_map(|(at, changes)| Command::Change(at, changes)),
        4 => which().prop_map(Command::Snapshot),
        2 => (which(), which()).prop_map(|(at, snap)| Command::Restore(at, snap)),
        1 => (which(), which()).prop_map(|(at, snap)| Command::RestoreNew(at, snap)),
        1 => which().prop_map(Command::Clone),
        1 => which().prop_map(Command::Flatten),
        1 => (which(), which(), which()).prop_map(|(at, a, b)| Command::FlattenRange(at, a, b)),
        1 => which().prop_map(Command::FlattenBase),
        1 => which().prop_map(Command::FlattenDepth),
        1 => which().prop_map(Command::RoundTrip),
        1 => which().prop_map(Command::Destroy),
    ]
}

/// The expected state of a container.
#[derive(Clone, Debug)]
struct ContainerModel {
    name: String,
    head: Model,
    /// The initial content of its head. If the head differs from it, a restore retains the head as a snapshot.
    began: Model,
    snapshots: Vec<(String, Model)>,
}

struct World {
    cli: cowl_tests::cowl::Store,
    containers: Vec<ContainerModel>,
    made: usize,
}

impl World {
    fn new() -> Self {
        let world = Self {
            cli: cowl_tests::cowl::Store::for_test(),
            containers: Vec::new(),
            made: 0,
        };
        std::fs::create_dir(world.cli.beside("base")).unwrap();
        world
    }

    fn create_first(&mut self) {
        let base = self.cli.beside("base");
        let name = self.fresh();
        self.ok(&["create", &name, "--from", base.to_str().unwrap()]);
        self.containers.push(ContainerModel {
            name,
            head: Model::new(),
            began: Model::new(),
            snapshots: Vec::new(),
        });
    }

    fn fresh(&mut self) -> String {
        self.made += 1;
        format!("c{}", self.made)
    }

    fn ok(&self, args: &[&str]) -> String {
        self.cli.ok(args)
    }

    fn store(&self) -> Store {
        library::open(self.cli.path()).unwrap()
    }

    fn manifest(&self, name: &str) -> (ContainerId, ContainerManifest) {
        let name = ContainerName::parse(name).unwrap();
        let (id, record) = self.store().find(&name).unwrap();
        (id, record.body)
    }

    fn layers(&self, stack: &[LayerId]) -> Vec<std::sync::Arc<Layer>> {
        self.store().open_layers(stack).unwrap()
    }

    fn change(&mut self, at: usize, changes: &[Change]) {
        let (_, manifest) = self.manifest(&self.containers[at].name);
        let store = self.store();
        let (tree, work) = (
            store.paths().layer_tree(manifest.head),
            store.paths().layer_work(manifest.head),
        );
        let upper = Upper::open(&tree, &work, store.space()).unwrap();
        let lowers = self.layers(manifest.below_head());
        let fs = Fs::new(Overlay::new(Some(upper), lowers, metacopy()).unwrap());
        for change in changes {
            one_change(&fs, &mut self.containers[at].head, *change);
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    fn command(&mut self, command: &Command) {
        let (Command::Change(which, _)
        | Command::Snapshot(which)
        | Command::Restore(which, _)
        | Command::RestoreNew(which, _)
        | Command::Clone(which)
        | Command::Flatten(which)
        | Command::FlattenRange(which, _, _)
        | Command::FlattenBase(which)
        | Command::FlattenDepth(which)
        | Command::RoundTrip(which)
        | Command::Destroy(which)) = command;
        if self.containers.is_empty() {
            self.create_first();
        }
        let at = usize::from(*which) % self.containers.len();
        let name = self.containers[at].name.clone();
        let snapshots = self.containers[at].snapshots.len();
        let pick = |which: &u8| (snapshots > 0).then(|| usize::from(*which) % snapshots);
        match command {
            Command::Change(_, changes) => self.change(at, changes),
            Command::Snapshot(_) => {
                let taken = self.ok(&["snapshot", &name]).trim().to_owned();
                let known = &mut self.containers[at];
                known.began = known.head.clone();
                known.snapshots.push((taken, known.head.clone()));
            }
            Command::Restore(_, snap) => {
                if let Some(snap) = pick(snap) {
                    self.restore(at, snap);
                }
            }
            Command::RestoreNew(_, snap) => {
                if let Some(snap) = pick(snap)
                    && self.containers.len() < CONTAINERS
                {
                    let new = self.fresh();
                    let (snapshot, model) = self.containers[at].snapshots[snap].clone();
                    self.ok(&["restore", &name, &snapshot, &new]);
                    self.add_container(new, model);
                }
            }
            Command::Clone(_) => {
                if self.containers.len() < CONTAINERS {
                    let new = self.fresh();
                    self.ok(&["clone", &name, &new]);
                    // The command freezes the head.
                    let known = &mut self.containers[at];
                    known.began = known.head.clone();
                    let head = known.head.clone();
                    self.add_container(new, head);
                }
            }
            Command::Flatten(_) => {
                self.ok(&["flatten", &name]);
            }
            Command::FlattenRange(_, a, b) => {
                if let (Some(a), Some(b)) = (pick(a), pick(b)) {
                    let (a, b) = (a.min(b), a.max(b));
                    let snapshots = &self.containers[at].snapshots;
                    let range = format!("{}..{}", snapshots[a].0, snapshots[b].0);
                    // Not every pair of snapshots is in the current stack.
                    let output = self.cli.cowl(["flatten", &name, &range]);
                    assert!(matches!(output.code, 0..=2), "{range}: {output:?}");
                }
            }
            Command::FlattenBase(_) => {
                self.ok(&["flatten", &name, "--base"]);
                assert_eq!(self.manifest(&name).1.stack.len(), 2);
            }
            Command::FlattenDepth(_) => {
                self.ok(&["flatten", &name, "--depth", "5"]);
                assert!(self.manifest(&name).1.stack.len() <= 5);
            }
            Command::RoundTrip(_) => {
                if self.containers.len() < CONTAINERS {
                    let new = self.fresh();
                    let file = self.cli.beside("whole.tar");
                    let file = file.to_str().unwrap();
                    self.ok(&["export", &name, "--with-snapshots", file]);
                    // The command freezes the head.
                    let known = &mut self.containers[at];
                    known.began = known.head.clone();
                    self.ok(&["import", file, &new]);
                    let back = ContainerModel {
                        name: new,
                        ..self.containers[at].clone()
                    };
                    self.containers.push(back);
                }
            }
            Command::Destroy(_) => {
                self.ok(&["destroy", &name, "--yes"]);
                self.containers.remove(at);
            }
        }
    }

    fn add_container(&mut self, name: String, model: Model) {
        self.containers.push(ContainerModel {
            name,
            head: model.clone(),
            began: model,
            snapshots: Vec::new(),
        });
    }

    fn restore(&mut self, at: usize, snap: usize) {
        let name = self.containers[at].name.clone();
        let before = self.names(&name);
        let (snapshot, model) = self.containers[at].snapshots[snap].clone();
        self.ok(&["restore", &name, &snapshot]);
        let after = self.names(&name);
        let new: Vec<_> = after.difference(&before).cloned().collect();
        let known = &mut self.containers[at];
        let changed = known.head.shown() != known.began.shown();
        assert!(new.len() <= 1 && (!changed || new.len() == 1), "{new:?}");
        let old = std::mem::replace(&mut known.head, model.clone());
        known.began = model;
        known
            .snapshots
            .extend(new.into_iter().map(|auto| (auto, old.clone())));
    }

    fn names(&self, name: &str) -> BTreeSet<String> {
        let (_, manifest) = self.manifest(name);
        manifest
            .snapshots
            .iter()
            .map(|s| s.name.to_string())
            .collect()
    }

    /// Asserts that all containers and snapshots equal the model.
    fn compare(&self) {
        let store = self.store();
        let all = self.ok(&["list", "--format", "{name}"]);
        let all: BTreeSet<&str> = all.lines().collect();
        assert_eq!(
            all,
            self.containers
                .iter()
                .map(|known| known.name.as_str())
                .collect()
        );
        for known in &self.containers {
            let (id, manifest) = self.manifest(&known.name);
            assert_same(&self.tree(&manifest.stack), &known.head);
            let names: BTreeSet<_> = known
                .snapshots
                .iter()
                .map(|(name, _)| name.clone())
                .collect();
            assert_eq!(self.names(&known.name), names);
            for (name, model) in &known.snapshots {
                let found = manifest
                    .snapshot(&SnapshotName::parse(name).unwrap())
                    .unwrap();
                let stack = store.snapshot(id, found.id).unwrap().stack;
                assert_eq!(stack.first(), Some(&found.layer), "{name}");
                assert_same(&self.tree(&stack), model);
            }
        }
    }

    fn tree(&self, stack: &[LayerId]) -> crate::common::Tree {
        Fs::new(Overlay::new(None, self.layers(stack), metacopy()).unwrap()).tree()
    }
}

/// Applies a change to the overlay and the model, and asserts that both succeed or fail in the same way.
fn one_change(fs: &Fs, model: &mut Model, change: Change) {
    let (paths, dirs) = (model.paths(), model.dirs());
    let there = |at: u16| paths.get(usize::from(at) % paths.len().max(1)).cloned();
    let inside = |at: u16, name: usize| {
        let dir = &dirs[usize::from(at) % dirs.len()];
        match dir.is_empty() {
            true => NAMES[name].to_owned(),
            false => format!("{dir}/{}", NAMES[name]),
        }
    };
    let (got, want) = match change {
        Change::Create(at, name, byte) => {
            let (path, data) = (inside(at, name), vec![byte; usize::from(byte % 5)]);
            (
                fs.create(&path, &data),
                model.make(&path, Node::file(data.clone())),
            )
        }
        Change::Mkdir(at, name) => {
            let path = inside(at, name);
            (fs.mkdir(&path), model.make(&path, Node::dir()))
        }
        Change::Rename(at, to, name) => {
            let (Some(path), to) = (there(at), inside(to, name)) else {
                return;
            };
            if model.is_inside(&path, &to) || model.is_inside(&to, &path) {
                return;
            }
            (
                fs.rename(&path, &to),
                model.rename(&path, &to, Rename::Replace),
            )
        }
        Change::Link(at, to, name) => {
            let (Some(path), to) = (there(at), inside(to, name)) else {
                return;
            };
            (fs.link(&path, &to), model.link(&path, &to))
        }
        Change::Append(at, byte) => match there(at) {
            Some(path) => (fs.append(&path, &[byte]), model.append(&path, byte)),
            None => return,
        },
        Change::Unlink(at) => match there(at) {
            Some(path) => (fs.unlink(&path), model.unlink(&path)),
            None => return,
        },
        Change::RemoveDir(at) => match there(at) {
            Some(path) => (fs.rmdir(&path), model.rmdir(&path)),
            None => return,
        },
        Change::Chmod(at, mode) => match there(at) {
            Some(path) => (fs.chmod(&path, mode), model.chmod(&path, mode)),
            None => return,
        },
    };
    assert_eq!(got, want, "{change:?}");
}

fn config() -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok();
    Config {
        cases: cases.map_or(40, |text| text.parse().unwrap()),
        max_shrink_iters: 500,
        failure_persistence: None,
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_commands_match_the_model(commands in vec(command(), 1..30)) {
        let mut world = World::new();
        for command in &commands {
            world.command(command);
        }
        world.compare();
    }
}

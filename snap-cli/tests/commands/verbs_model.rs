//! Random sequences of verbs and of changes of files must leave the trees that a model in memory says: of
//! each container, and of each of its snapshots. `PROPTEST_CASES=N` runs more; what fails is shrunk.
//!
//! The verbs are called as people call them; files are changed by the overlay in process, without a mount.

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
/// More containers than this are not made.
const CONTAINERS: usize = 4;

/// A change of one file. Places are found when their turn comes, so that a shorter history makes sense.
#[derive(Clone, Copy, Debug)]
enum Change {
    Create(u16, usize, u8),
    Mkdir(u16, usize),
    Append(u16, u8),
    Unlink(u16),
    RemoveFolder(u16),
    Rename(u16, u16, usize),
    Link(u16, u16, usize),
    Chmod(u16, u32),
}

/// Something that is done with containers: `u8`s choose one of them, and one of its snapshots.
#[derive(Clone, Debug)]
enum Act {
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
        2 => at().prop_map(Change::RemoveFolder),
        3 => (at(), at(), name()).prop_map(|(at, to, name)| Change::Rename(at, to, name)),
        1 => (at(), at(), name()).prop_map(|(at, to, name)| Change::Link(at, to, name)),
        1 => (at(), prop_oneof![Just(0o600), Just(0o755)])
            .prop_map(|(at, mode)| Change::Chmod(at, mode)),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let which = any::<u8>;
    prop_oneof![
        6 => (which(), vec(change(), 1..6)).prop_map(|(at, changes)| Act::Change(at, changes)),
        4 => which().prop_map(Act::Snapshot),
        2 => (which(), which()).prop_map(|(at, snap)| Act::Restore(at, snap)),
        1 => (which(), which()).prop_map(|(at, snap)| Act::RestoreNew(at, snap)),
        1 => which().prop_map(Act::Clone),
        1 => which().prop_map(Act::Flatten),
        1 => (which(), which(), which()).prop_map(|(at, a, b)| Act::FlattenRange(at, a, b)),
        1 => which().prop_map(Act::FlattenBase),
        1 => which().prop_map(Act::FlattenDepth),
        1 => which().prop_map(Act::RoundTrip),
        1 => which().prop_map(Act::Destroy),
    ]
}

/// What a container is to be.
#[derive(Clone, Debug)]
struct Known {
    name: String,
    head: Model,
    /// What its head began as: written to it since, it is kept by a restore.
    began: Model,
    snapshots: Vec<(String, Model)>,
}

struct World {
    cli: cowl_tests::cowl::Store,
    known: Vec<Known>,
    made: usize,
}

impl World {
    fn new() -> Self {
        let world = Self {
            cli: cowl_tests::cowl::Store::for_test(),
            known: Vec::new(),
            made: 0,
        };
        std::fs::create_dir(world.cli.beside("base")).unwrap();
        world
    }

    fn begin(&mut self) {
        let base = self.cli.beside("base");
        let name = self.fresh();
        self.ok(&["create", &name, "--from", base.to_str().unwrap()]);
        self.known.push(Known {
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
        let (_, manifest) = self.manifest(&self.known[at].name);
        let store = self.store();
        let (tree, work) = (
            store.paths().layer_tree(manifest.head),
            store.paths().layer_work(manifest.head),
        );
        let upper = Upper::open(&tree, &work, store.space()).unwrap();
        let lowers = self.layers(manifest.below_head());
        let fs = Fs::new(Overlay::new(Some(upper), lowers, metacopy()).unwrap());
        for change in changes {
            one_change(&fs, &mut self.known[at].head, *change);
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    fn act(&mut self, act: &Act) {
        let (Act::Change(which, _)
        | Act::Snapshot(which)
        | Act::Restore(which, _)
        | Act::RestoreNew(which, _)
        | Act::Clone(which)
        | Act::Flatten(which)
        | Act::FlattenRange(which, _, _)
        | Act::FlattenBase(which)
        | Act::FlattenDepth(which)
        | Act::RoundTrip(which)
        | Act::Destroy(which)) = act;
        if self.known.is_empty() {
            self.begin();
        }
        let at = usize::from(*which) % self.known.len();
        let name = self.known[at].name.clone();
        let snapshots = self.known[at].snapshots.len();
        let pick = |which: &u8| (snapshots > 0).then(|| usize::from(*which) % snapshots);
        match act {
            Act::Change(_, changes) => self.change(at, changes),
            Act::Snapshot(_) => {
                let taken = self.ok(&["snapshot", &name]).trim().to_owned();
                let known = &mut self.known[at];
                known.began = known.head.clone();
                known.snapshots.push((taken, known.head.clone()));
            }
            Act::Restore(_, snap) => {
                if let Some(snap) = pick(snap) {
                    self.restore(at, snap);
                }
            }
            Act::RestoreNew(_, snap) => {
                if let Some(snap) = pick(snap)
                    && self.known.len() < CONTAINERS
                {
                    let new = self.fresh();
                    let (snapshot, model) = self.known[at].snapshots[snap].clone();
                    self.ok(&["restore", &name, &snapshot, &new]);
                    self.began_as(new, model);
                }
            }
            Act::Clone(_) => {
                if self.known.len() < CONTAINERS {
                    let new = self.fresh();
                    self.ok(&["clone", &name, &new]);
                    // What it was is frozen by that.
                    let known = &mut self.known[at];
                    known.began = known.head.clone();
                    let head = known.head.clone();
                    self.began_as(new, head);
                }
            }
            Act::Flatten(_) => {
                self.ok(&["flatten", &name]);
            }
            Act::FlattenRange(_, a, b) => {
                if let (Some(a), Some(b)) = (pick(a), pick(b)) {
                    let (a, b) = (a.min(b), a.max(b));
                    let snapshots = &self.known[at].snapshots;
                    let range = format!("{}..{}", snapshots[a].0, snapshots[b].0);
                    // Not every pair lies below what the container is now.
                    let output = self.cli.cowl(["flatten", &name, &range]);
                    assert!(matches!(output.code, 0..=2), "{range}: {output:?}");
                }
            }
            Act::FlattenBase(_) => {
                self.ok(&["flatten", &name, "--base"]);
                assert_eq!(self.manifest(&name).1.stack.len(), 2);
            }
            Act::FlattenDepth(_) => {
                self.ok(&["flatten", &name, "--depth", "5"]);
                assert!(self.manifest(&name).1.stack.len() <= 5);
            }
            Act::RoundTrip(_) => {
                if self.known.len() < CONTAINERS {
                    let new = self.fresh();
                    let file = self.cli.beside("whole.tar");
                    let file = file.to_str().unwrap();
                    self.ok(&["export", &name, "--with-snapshots", file]);
                    // What it was is frozen by that.
                    let known = &mut self.known[at];
                    known.began = known.head.clone();
                    self.ok(&["import", file, &new]);
                    let back = Known {
                        name: new,
                        ..self.known[at].clone()
                    };
                    self.known.push(back);
                }
            }
            Act::Destroy(_) => {
                self.ok(&["destroy", &name, "--yes"]);
                self.known.remove(at);
            }
        }
    }

    fn began_as(&mut self, name: String, model: Model) {
        self.known.push(Known {
            name,
            head: model.clone(),
            began: model,
            snapshots: Vec::new(),
        });
    }

    fn restore(&mut self, at: usize, snap: usize) {
        let name = self.known[at].name.clone();
        let before = self.names(&name);
        let (snapshot, model) = self.known[at].snapshots[snap].clone();
        self.ok(&["restore", &name, &snapshot]);
        let after = self.names(&name);
        let new: Vec<_> = after.difference(&before).cloned().collect();
        let known = &mut self.known[at];
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

    /// Everything is as the model says.
    fn compare(&self) {
        let store = self.store();
        let all = self.ok(&["list", "--format", "{name}"]);
        let all: BTreeSet<&str> = all.lines().collect();
        assert_eq!(
            all,
            self.known.iter().map(|known| known.name.as_str()).collect()
        );
        for known in &self.known {
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

/// Does the same on both sides; what can't be done on one can't on the other.
fn one_change(fs: &Fs, model: &mut Model, change: Change) {
    let (paths, folders) = (model.paths(), model.dirs());
    let there = |at: u16| paths.get(usize::from(at) % paths.len().max(1)).cloned();
    let inside = |at: u16, name: usize| {
        let folder = &folders[usize::from(at) % folders.len()];
        match folder.is_empty() {
            true => NAMES[name].to_owned(),
            false => format!("{folder}/{}", NAMES[name]),
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
        Change::RemoveFolder(at) => match there(at) {
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
    fn verbs_do_what_the_model_says(acts in vec(act(), 1..30)) {
        let mut world = World::new();
        for act in &acts {
            world.act(act);
        }
        world.compare();
    }
}

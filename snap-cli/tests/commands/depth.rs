//! Tests of the depth limit: stacks never exceed it, regardless of the number of snapshots, and no content changes.

use std::path::PathBuf;

use cowl::store::Store;
use cowl::store::manifest::{ContainerId, ContainerManifest, LayerId};
use cowl::store::name::ContainerName;
use cowl::tree::digest;
use cowl_tests::command::run_command;
use cowl_tests::scratch::Scratch;

use crate::library;

/// The default limit.
const LIMIT: usize = 128;

struct World {
    cli: cowl_tests::cowl::Store,
    limit: Option<usize>,
}

impl World {
    fn new(limit: Option<usize>) -> Self {
        let cli = cowl_tests::cowl::Store::in_scratch(Scratch::in_memory());
        let world = Self { cli, limit };
        let base = world.path("base");
        std::fs::create_dir_all(base.join("d")).unwrap();
        std::fs::write(base.join("d/file"), "base").unwrap();
        world.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cli.beside(name)
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let mut command = self.cli.command(args);
        command.env_remove("COWL_DEPTH_LIMIT");
        if let Some(limit) = self.limit {
            command.env("COWL_DEPTH_LIMIT", limit.to_string());
        }
        run_command(command, b"").ok().out()
    }

    fn store(&self) -> Store {
        library::open(self.cli.path()).unwrap()
    }

    fn find(&self, name: &str) -> (ContainerId, ContainerManifest) {
        let name = ContainerName::parse(name).unwrap();
        let (id, record) = self.store().find(&name).unwrap();
        (id, record.body)
    }

    fn depth(&self, name: &str) -> usize {
        self.find(name).1.stack.len()
    }

    /// Writes a number into the head: to a new file and to one of the base. Sometimes removes a file.
    fn write(&self, number: usize) {
        let (_, manifest) = self.find("web");
        let head = self.store().paths().layer_tree(manifest.head);
        std::fs::create_dir_all(head.join("d")).unwrap();
        std::fs::write(head.join(format!("d/{number}")), number.to_string()).unwrap();
        std::fs::write(head.join("d/file"), number.to_string()).unwrap();
        if number % 7 == 6 {
            let gone = head.join(format!("d/{}", number - 1));
            let device = rustix::fs::makedev(0, 0);
            let kind = rustix::fs::FileType::CharacterDevice;
            let mode = rustix::fs::Mode::empty();
            rustix::fs::mknodat(rustix::fs::CWD, gone, kind, mode, device).unwrap();
        }
    }

    fn digest(&self, stack: &[LayerId]) -> String {
        let view = self.store().view(stack).unwrap();
        digest(&view, &mut |_| {}).unwrap().to_string()
    }

    /// Returns the digests of all snapshots, and the depth of the deepest.
    fn snapshots(&self, name: &str) -> (Vec<String>, usize) {
        let (id, manifest) = self.find(name);
        let store = self.store();
        let mut deepest = 0;
        let digests = manifest.snapshots.iter().map(|known| {
            let stack = store.snapshot(id, known.id).unwrap().stack;
            assert_eq!(stack.first(), Some(&known.layer), "{}", known.name);
            deepest = deepest.max(stack.len());
            self.digest(&stack)
        });
        (digests.collect(), deepest)
    }
}

#[test]
fn three_hundred_snapshots_stay_below_the_limit_and_none_changes() {
    let world = World::new(None);
    let mut want = Vec::new();
    for number in 0..300 {
        world.write(number);
        let (_, manifest) = world.find("web");
        want.push(world.digest(&manifest.stack));
        world.ok(&["snapshot", "web"]);
        let depth = world.depth("web");
        assert!(depth <= LIMIT, "{depth} layers after {number} snapshots");
    }
    let (got, deepest) = world.snapshots("web");
    assert!(got == want, "a snapshot changed");
    assert!(deepest <= LIMIT, "{deepest}");
    assert_eq!(world.digest(&world.find("web").1.stack), want[299]);
    // A snapshot whose layers were merged can still be restored.
    world.ok(&["restore", "web", "snap7"]);
    assert_eq!(world.digest(&world.find("web").1.stack), want[7]);
}

#[test]
fn layers_of_a_clone_are_retained_and_unused_ones_are_removed() {
    let world = World::new(Some(8));
    for number in 0..5 {
        world.write(number);
        world.ok(&["snapshot", "web"]);
    }
    world.ok(&["clone", "web", "other"]);
    let other = world.digest(&world.find("other").1.stack);
    for number in 5..40 {
        world.write(number);
        world.ok(&["snapshot", "web"]);
        assert!(world.depth("web") <= 8);
    }
    assert_eq!(world.digest(&world.find("other").1.stack), other);
    // Without snapshots, merged layers are garbage.
    let web = world.digest(&world.find("web").1.stack);
    world.ok(&["rm", "web", "--all", "--yes"]);
    world.ok(&["destroy", "other", "--yes"]);
    world.ok(&["gc", "--empty-trash"]);
    assert_eq!(world.digest(&world.find("web").1.stack), web);
    let layers = std::fs::read_dir(world.path("store/layers")).unwrap();
    assert_eq!(layers.count(), world.depth("web"));
}

#[test]
fn failed_merge_does_not_fail_the_snapshot() {
    let world = World::new(Some(4));
    for number in 0..3 {
        world.write(number);
        world.ok(&["snapshot", "web"]);
    }
    // The lowest delta is missing, so it cannot be merged.
    let (_, manifest) = world.find("web");
    assert_eq!(manifest.stack.len(), 4, "it was merged so far");
    let lost = world.store().paths().layer_tree(manifest.stack[2]);
    let away = world.path("away");
    std::fs::rename(&lost, &away).unwrap();
    world.write(3);
    assert_eq!(world.ok(&["snapshot", "web"]), "snap3");
    assert_eq!(world.depth("web"), 5);
    std::fs::rename(&away, &lost).unwrap();
    // The next snapshot merges.
    world.write(4);
    world.ok(&["snapshot", "web"]);
    assert_eq!(world.depth("web"), 4);
}

//! Updates of a container from an image in a registry, which must not lose any of its states.

use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::fake_registry::{Answer, FakeRegistry};
use crate::image::layer;
use crate::image_import::{World, two_layers};
use crate::registry::Content;

/// Returns an image with one layer more than [`two_layers`].
fn extended(world: &World) -> Content {
    let mut layers = two_layers();
    layers.push(layer(&[("srv/new", "new"), ("etc/.wh.app", "")]));
    Content::new(world, &layers)
}

/// Starts a registry whose image can be replaced.
fn registry(content: Content) -> (FakeRegistry, std::sync::Arc<Mutex<Content>>) {
    let current = std::sync::Arc::new(Mutex::new(content));
    let own = current.clone();
    let registry = FakeRegistry::start(move |request| own.lock().unwrap().answer(request));
    (registry, current)
}

fn snapshots(world: &World, fields: [&str; 2]) -> Vec<[Value; 2]> {
    let list = world.json(&["list", "web", "--json"]);
    let snapshots = list["snapshots"].as_array().unwrap().iter();
    snapshots
        .map(|snapshot| fields.map(|field| snapshot[field].clone()))
        .collect()
}

/// An image of another program has no snapshots: the state before the update gets one.
#[test]
fn the_state_before_an_update_can_be_restored() {
    let world = World::new();
    let (registry, current) = registry(Content::new(&world, &two_layers()));
    let reference = format!("{}/web", registry.name());
    world.ok(&["pull", &reference]);
    assert!(snapshots(&world, ["name", "kind"]).is_empty());
    *current.lock().unwrap() = extended(&world);
    let done = world.json(&["pull", "--update", &reference, "--json"]);
    assert_eq!(done["state"], "replaced");
    assert_eq!(done["auto_snapshot"], "auto0");
    assert_eq!(world.at("cat", "web", "srv/new"), "new");
    assert_eq!(world.at("cat", "web@auto0", "etc/app"), "app");
    let found = snapshots(&world, ["name", "kind"]);
    // Sorted by time: the image is older than the update.
    let expected = [["snap0", "manual"], ["auto0", "auto"]];
    assert_eq!(json!(found), json!(expected));
    world.ok(&["restore", "web", "--undo"]);
    assert_eq!(world.at("cat", "web", "etc/app"), "app");
    assert_eq!(world.at("ls", "web", "srv"), "");
    world.ok(&["check"]);
}

/// While an update downloads, another container gets the name: it must not get the snapshots of the image.
#[test]
fn another_container_of_the_same_name_is_not_updated() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let next = extended(&world);
    let (_, layers) = next.parsed();
    let top = layers[2].clone();
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    std::fs::write(world.path("root/etc/own"), "own").unwrap();
    let (store, root) = (world.path("store"), world.path("root"));
    let is_replaced = AtomicBool::new(false);
    let is_extended = std::sync::Arc::new(AtomicBool::new(false));
    let extend = is_extended.clone();
    let registry = FakeRegistry::start(move |request| {
        if request.path.ends_with(&top) && !is_replaced.swap(true, Ordering::Relaxed) {
            let cowl = |args: &[&str]| {
                let mut command = Command::new(cowl_tests::programs::cowl());
                command.arg("--store").arg(&store).args(args);
                cowl_tests::command::run_command(command, b"").ok();
            };
            cowl(&["destroy", "web", "--yes"]);
            cowl(&["create", "web", "--from", root.to_str().unwrap()]);
        }
        match extend.load(Ordering::Relaxed) {
            true => next.answer(request),
            false => content.answer(request),
        }
    });
    let reference = format!("{}/web", registry.name());
    world.ok(&["pull", &reference]);
    is_extended.store(true, Ordering::Relaxed);
    let refused = world.run(&["pull", "--update", &reference]);
    refused.fails(4, &["another command has replaced web", "try again"]);
    assert!(snapshots(&world, ["name", "kind"]).is_empty());
    assert_eq!(world.at("cat", "web", "etc/own"), "own");
    world.ok(&["check"]);
}

/// An image cannot make `cowl prune` remove snapshots of the container: it decides neither the kind of its snapshots, nor
/// gives them times in the future, which would be the newest ones for ever.
#[test]
fn an_image_does_not_determine_what_is_pruned() {
    let world = World::new();
    let (registry, current) = registry(Content::new(&world, &two_layers()));
    let reference = format!("{}/web", registry.name());
    world.ok(&["pull", &reference]);
    world.ok(&["snapshot", "web", "--scheduled"]);
    let mut hostile = extended(&world);
    hostile.edit(|manifest| {
        for (at, name) in ["auto0", "auto5", "x"].iter().enumerate() {
            let note = json!({
                "name": name, "created": "9000-01-01T00:00:00Z", "scheduled": at != 1,
            });
            manifest["layers"][at]["annotations"] = json!({ "io.cowl.snapshot": note.to_string() });
        }
    });
    *current.lock().unwrap() = hostile.clone();
    world.ok(&["pull", "--update", &reference]);
    world.ok(&["prune", "web", "--keep-last", "1", "--keep-daily", "1"]);
    let found = snapshots(&world, ["name", "kind"]);
    let expected = [["snap0", "scheduled"], ["x", "manual"]];
    assert_eq!(json!(found), json!(expected));
    // A new container as well.
    world.ok(&["pull", &reference, "second"]);
    let list = world.json(&["list", "second", "--json"]);
    for snapshot in list["snapshots"].as_array().unwrap() {
        assert_eq!(snapshot["kind"], "manual", "{list}");
        assert!(!snapshot["created"].as_str().unwrap().starts_with("9000"));
    }
    assert_eq!(list["snapshots"].as_array().unwrap().len(), 3);
}

/// A tag is not replaced by a state that lacks what others have pushed to it.
#[test]
fn a_push_does_not_replace_the_snapshots_of_others() {
    let world = World::new();
    let content = extended(&world);
    let reads = content.clone();
    let writes = std::sync::Arc::new(AtomicBool::new(false));
    let written = writes.clone();
    let registry = FakeRegistry::start(move |request| {
        match (
            request.method.as_str(),
            request.path.contains("/manifests/"),
        ) {
            ("PUT", true) => {
                written.store(true, Ordering::Relaxed);
                Answer::new(201, "")
            }
            // All blobs exist.
            ("HEAD", false) => Answer::new(200, "").without_length(),
            _ => reads.answer(request),
        }
    });
    let reference = format!("{}/web", registry.name());
    let (older, _current) = self::registry(Content::new(&world, &two_layers()));
    world.ok(&["pull", &format!("{}/web", older.name())]);
    let refused = world.run(&["push", "web", &reference]);
    refused.fails(1, &["--update", "--force", &content.digest()]);
    assert!(!writes.load(Ordering::Relaxed));
    let forced = world.run(&["push", "web", &reference, "--force"]).ok();
    assert!(
        forced.err().contains(&content.digest()),
        "{}",
        forced.report()
    );
    assert!(writes.load(Ordering::Relaxed));
    // A state that has them.
    writes.store(false, Ordering::Relaxed);
    let done = world.json(&["pull", "--update", &reference, "web", "--json"]);
    world.ok(&["restore", "web", done["snapshots"][0].as_str().unwrap()]);
    world.ok(&["push", "web", &reference]);
    assert!(writes.load(Ordering::Relaxed));
}

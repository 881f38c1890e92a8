//! Pushes: layers that were pushed before are not read again, and nothing else interferes with a push that runs.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cowl_tests::command::run_command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;

use crate::fake_registry::{Answer, FakeRegistry, Request};
use crate::image_import::World;
use crate::registry::transfers;
use crate::registry_access::Uploads;

/// Creates a container with a file and a snapshot of each of two states.
fn container(world: &World) {
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    std::fs::write(world.path("root/etc/name"), "one").unwrap();
    world.ok(&["create", "web", "--from", "root"]);
    change(world, "etc-two", "two");
    world.ok(&["snapshot", "web"]);
}

/// Writes a file in the container, which is not mounted.
fn change(world: &World, name: &str, content: &str) {
    let head = world.json(&["show", "web", "--json"])["head"].clone();
    let path = PathBuf::from(head.as_str().unwrap()).join(name);
    std::fs::write(path, content).unwrap();
}

fn registry() -> (Arc<Uploads>, FakeRegistry, String) {
    let uploads = Arc::new(Uploads::default());
    let answers = uploads.clone();
    let registry = FakeRegistry::start(move |request| answers.answer(request));
    let reference = format!("{}/web", registry.name());
    (uploads, registry, reference)
}

/// Returns the records of packed layers.
fn records(world: &World) -> Vec<PathBuf> {
    let layers = std::fs::read_dir(world.path("store/layers")).unwrap();
    let paths = layers.map(|layer| layer.unwrap().path().join("packed.json"));
    paths.filter(|path| path.is_file()).collect()
}

#[test]
fn layers_that_a_registry_has_are_not_read() {
    if !can(&[Need::Program("strace")]) {
        return;
    }
    let world = World::new();
    container(&world);
    let (_, registry, reference) = registry();
    // The names of the files that a push opens.
    let push = |args: &[&str]| {
        let cowl = world.command(&[&["push", "--json", "web@snap0"], args].concat());
        let mut command = std::process::Command::new("strace");
        command.args(["-f", "-qq", "-e", "trace=openat,openat2,open", "-o"]);
        command.arg(world.path("trace")).arg(programs::cowl());
        command.args(cowl.get_args()).env("COWL_RETRY_WAIT", "10");
        let done = run_command(command, b"").ok().json();
        let trace = std::fs::read_to_string(world.path("trace")).unwrap();
        (
            done,
            trace.contains("\"etc-two\"") || trace.contains("\"name\""),
        )
    };
    let (first, was_read) = push(&[&reference]);
    assert_eq!((&first["layers"], &first["packed"]), (&2.into(), &2.into()));
    assert!(was_read);
    assert_eq!(records(&world).len(), 2);
    let before = registry.take_lines().len();
    assert!(before > 6);
    // The tag refers to the image.
    let (again, was_read) = push(&[&reference]);
    assert_eq!(
        (&again["packed"], &again["digest"]),
        (&0.into(), &first["digest"])
    );
    assert!(!was_read);
    assert_eq!(registry.take_lines().len(), 1);
    // Another tag of the repository.
    let (other, was_read) = push(&[&format!("{reference}:other")]);
    assert_eq!(
        (&other["packed"], &other["digest"]),
        (&0.into(), &first["digest"])
    );
    assert_eq!(
        (&other["present"], &other["sent"]["blobs"]),
        (&3.into(), &0.into())
    );
    assert!(!was_read);
    // Another compression, and the first one again.
    let (zstd, _) = push(&[&format!("{reference}:zstd"), "--compression", "zstd"]);
    assert_eq!(zstd["packed"], 2);
    let (gzip, _) = push(&[&format!("{reference}:gzip")]);
    assert_eq!(
        (&gzip["packed"], &gzip["digest"]),
        (&0.into(), &first["digest"])
    );
    // A new snapshot.
    change(&world, "three", "three");
    let third = world.json(&["push", "web", &reference, "--json"]);
    assert_eq!((&third["packed"], &third["layers"]), (&1.into(), &3.into()));
    assert_eq!(
        (&third["present"], &third["sent"]["blobs"]),
        (&2.into(), &2.into())
    );
    world.ok(&["check", "--deep"]);
    // The records are removed with the layers.
    world.ok(&["destroy", "web", "--now", "--yes"]);
    assert_eq!(world.layers(), 0);
}

/// A layer that the registry can mount from another repository is not read.
#[test]
fn layers_that_a_registry_can_mount_are_not_packed() {
    let world = World::new();
    container(&world);
    let uploads = Arc::new(Uploads::default());
    let answers = uploads.clone();
    let registry = FakeRegistry::start(move |request: &Request| -> Answer {
        let is_other = !request.path.starts_with("/v2/web/");
        match (request.method.as_str(), is_other) {
            ("HEAD", true) => Answer::new(404, ""),
            ("POST", _) if request.path.starts_with("/v2/other/blobs/uploads/?mount=") => {
                let digest = request.path.split(['=', '&']).nth(1).unwrap();
                let digest = digest.replace("%3A", ":");
                let is_mounted = answers.blobs.lock().unwrap().contains_key(&digest);
                match is_mounted {
                    true => Answer::new(201, ""),
                    false => answers.answer(request),
                }
            }
            _ => answers.answer(request),
        }
    });
    let host = registry.name();
    let first = world.json(&["push", "web@snap0", &format!("{host}/web"), "--json"]);
    assert_eq!(first["packed"], 2);
    let push = |repository: &str| {
        let reference = format!("{host}/{repository}:{repository}");
        world.json(&[
            "push",
            "web@snap0",
            &reference,
            "--mount-from",
            "web",
            "--json",
        ])
    };
    let mounted = push("other");
    assert_eq!(
        (&mounted["packed"], &mounted["mounted"]),
        (&0.into(), &3.into())
    );
    assert_eq!(mounted["digest"], first["digest"]);
    // A registry that mounts nothing begins uploads instead, which are cancelled.
    registry.take_lines();
    let sent = push("third");
    assert_eq!((&sent["packed"], &sent["mounted"]), (&2.into(), &0.into()));
    let lines = registry.take_lines();
    let cancelled = lines.iter().filter(|line| line.starts_with("DELETE "));
    assert_eq!(cancelled.count(), 2, "{lines:?}");
}

/// A record is only a claim: a registry that lacks the blob gets the layer, and a record that is damaged is replaced.
#[test]
fn records_are_verified_where_it_matters() {
    let world = World::new();
    container(&world);
    let (_, _first, reference) = registry();
    let first = world.json(&["push", "web@snap0", &reference, "--json"]);
    let (_, _second, elsewhere) = registry();
    let other = world.json(&["push", "web@snap0", &elsewhere, "--json"]);
    assert_eq!(
        (&other["packed"], &other["digest"]),
        (&2.into(), &first["digest"])
    );
    for path in records(&world) {
        std::fs::write(path, "{}").unwrap();
    }
    let tag = format!("{elsewhere}:damaged");
    let other = world.json(&["push", "web@snap0", &tag, "--json"]);
    assert_eq!(
        (&other["packed"], &other["digest"]),
        (&2.into(), &first["digest"])
    );
    assert_eq!(other["sent"]["blobs"], 0);
    let other = world.json(&["push", "web@snap0", &tag, "--json"]);
    assert_eq!(other["packed"], 0);
    // Changed by another program, which `cowl check` notices.
    world.ok(&["check", "--deep"]);
    let layers = std::fs::read_dir(world.path("store/layers")).unwrap();
    let mut files = layers.map(|layer| layer.unwrap().path().join("tree/etc-two"));
    let file = files.find(|file| file.is_file()).unwrap();
    std::fs::write(file, "2wo").unwrap();
    world.run(&["check", "--deep"]).fails(5, &[]);
    assert!(records(&world).is_empty());
    let tag = format!("{elsewhere}:changed");
    let other = world.json(&["push", "web@snap0", &tag, "--json"]);
    assert_eq!(other["packed"], 2);
    assert_ne!(other["digest"], first["digest"]);
}

/// Runs `action` once, before the answer to the first request that `wanted` selects.
fn interrupted(
    uploads: Arc<Uploads>,
    wanted: fn(&Request) -> bool,
    action: impl Fn(&str) + Send + Sync + 'static,
) -> (FakeRegistry, String) {
    let name = Arc::new(Mutex::new(String::new()));
    let (own, done) = (name.clone(), AtomicBool::new(false));
    let registry = FakeRegistry::start(move |request: &Request| -> Answer {
        if wanted(request) && !done.swap(true, Ordering::Relaxed) {
            let reference = own.lock().unwrap().clone();
            action(&reference);
        }
        uploads.answer(request)
    });
    let reference = format!("{}/web", registry.name());
    name.lock().unwrap().clone_from(&reference);
    (registry, reference)
}

fn is_upload(request: &Request) -> bool {
    request.method == "POST"
}

/// The second of two pushes to one tag does not replace the image of the first one.
#[test]
fn two_pushes_to_one_tag_do_not_replace_each_other() {
    let (world, other) = (World::new(), Arc::new(World::new()));
    container(&world);
    container(&other);
    change(&other, "of-the-other", "x");
    let uploads = Arc::new(Uploads::default());
    let second = other.clone();
    let (_registry, reference) = interrupted(uploads.clone(), is_upload, move |reference| {
        second.ok(&["push", "web", reference]);
    });
    let refused = world.run(&["push", "web@snap0", &reference]);
    refused.fails(4, &["another command has changed the tag", "try again"]);
    let tagged = uploads.blobs.lock().unwrap()["latest"].clone();
    world
        .run(&["push", "web@snap0", &reference])
        .fails(1, &["layers that the state lacks"]);
    assert!(uploads.blobs.lock().unwrap()["latest"] == tagged);
    let done = other.json(&["push", "web", &reference, "--json"]);
    assert_eq!(done["packed"], 0);
    assert!(transfers(&world).is_empty());
}

/// The directory of a push is removed neither during it, whatever its age, nor retained after a kill.
#[test]
fn the_directory_of_a_running_push_is_not_collected() {
    let world = Arc::new(World::new());
    container(&world);
    let collecting = world.clone();
    let (_registry, reference) = interrupted(Arc::default(), is_upload, move |_| {
        let names = transfers(&collecting);
        assert_eq!(names.len(), 1, "{names:?}");
        let dir = collecting.path("store/transfers").join(&names[0]);
        let old = std::time::SystemTime::now() - std::time::Duration::from_secs(100 * 3600);
        std::fs::File::open(dir).unwrap().set_modified(old).unwrap();
        collecting.ok(&["gc", "--empty-transfers"]);
        assert_eq!(transfers(&collecting), names);
    });
    world.ok(&["push", "web@snap0", &reference]);
    assert!(transfers(&world).is_empty());
    let left = world.path("store/transfers/push-of-a-killed-command");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("layer-0"), "x").unwrap();
    world.ok(&["gc"]);
    assert!(!left.try_exists().unwrap());
}

/// A container that is destroyed during its push: the push fails, and the tag is not written.
#[test]
fn layers_that_are_removed_during_a_push_are_reported() {
    let world = Arc::new(World::new());
    container(&world);
    let (uploads, destroying) = (Arc::new(Uploads::default()), world.clone());
    let is_first = |request: &Request| request.path.contains("/manifests/");
    let (_registry, reference) = interrupted(uploads.clone(), is_first, move |_| {
        destroying.ok(&["destroy", "web", "--now", "--yes"]);
    });
    world
        .run(&["push", "web@snap0", &reference])
        .fails(1, &["removed or merged during the push"]);
    assert!(!uploads.blobs.lock().unwrap().contains_key("latest"));
    assert!(transfers(&world).is_empty());
}

/// A disk that is too small for all packed layers in transfer: the push waits until some are sent.
#[test]
fn a_full_disk_waits_for_the_layers_in_transfer() {
    if !can(&[Need::Root]) {
        return;
    }
    let world = Arc::new(World::new());
    let store = world.path("store");
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    std::fs::create_dir(&store).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=64m,mode=700", "none"];
    let mut command = std::process::Command::new("mount");
    command.args(mount).arg(&store);
    run_command(command, b"").ok();
    world.ok(&["create", "web", "--from", "root"]);
    for name in ["one", "two", "three", "four"] {
        let random = std::fs::File::open("/dev/urandom").unwrap();
        let mut noise = Vec::new();
        random.take(10_000_000).read_to_end(&mut noise).unwrap();
        let head = world.json(&["show", "web", "--json"])["head"].clone();
        std::fs::write(Path::new(head.as_str().unwrap()).join(name), noise).unwrap();
        world.ok(&["snapshot", "web"]);
    }
    // The uploads of the first two of these layers do not end before the third one has failed.
    let (uploads, watching) = (Uploads::default(), world.clone());
    let (was_seen, was_removed) = (AtomicBool::new(false), AtomicBool::new(false));
    let registry = FakeRegistry::start(move |request| {
        let is_large = request.method == "PATCH" && request.body.len() > 1_000_000;
        let begin = Instant::now();
        while is_large && !was_removed.load(Ordering::Relaxed) {
            assert!(
                begin.elapsed() < Duration::from_secs(200),
                "the disk was not full"
            );
            let exists = transfers(&watching).iter().any(|name| {
                let dir = watching.path("store/transfers").join(name);
                dir.join("layer-3").try_exists().unwrap()
            });
            let was_seen = was_seen.fetch_or(exists, Ordering::Relaxed);
            was_removed.store(was_seen && !exists, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(1));
        }
        uploads.answer(request)
    });
    let reference = format!("{}/web", registry.name());
    let done = world.json(&["push", "web@snap3", &reference, "--json"]);
    assert_eq!(
        (&done["packed"], &done["sent"]["blobs"]),
        (&5.into(), &6.into())
    );
    assert!(transfers(&world).is_empty());
}

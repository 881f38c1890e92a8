//! Registries that answer wrongly, are interrupted, or are hostile. Nothing incomplete gets a name, and nothing unbounded is
//! read.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::fake_registry::{Answer, FakeRegistry, Request};
use crate::image::{Layout, MANIFEST, digest, layer, machine};
use crate::image_import::{World, base, config, two_layers};

/// The content of a repository.
#[derive(Clone, Default)]
pub(crate) struct Content {
    manifest: Vec<u8>,
    blobs: HashMap<String, Vec<u8>>,
}

impl Content {
    /// Returns an image with these layers.
    pub(crate) fn new(world: &World, layers: &[Vec<u8>]) -> Self {
        let layout = Layout::new(&world.path("source"));
        let image = layout.image(layers, &config(), machine());
        Self::of(&layout, &image)
    }

    fn of(layout: &Layout, image: &Value) -> Self {
        let mut blobs = HashMap::new();
        for entry in std::fs::read_dir(layout.0.join("blobs/sha256")).unwrap() {
            let data = std::fs::read(entry.unwrap().path()).unwrap();
            blobs.insert(digest(&data), data);
        }
        let manifest = blobs[image["digest"].as_str().unwrap()].clone();
        Self { manifest, blobs }
    }

    /// Returns the document, and its layers' digests.
    pub(crate) fn parsed(&self) -> (Value, Vec<String>) {
        let manifest: Value = serde_json::from_slice(&self.manifest).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        let layers = layers
            .iter()
            .map(|layer| layer["digest"].as_str().unwrap().to_owned());
        let layers = layers.collect();
        (manifest, layers)
    }

    /// Returns the digest of the manifest.
    pub(crate) fn digest(&self) -> String {
        digest(&self.manifest)
    }

    /// Changes the manifest.
    pub(crate) fn edit(&mut self, edit: impl FnOnce(&mut Value)) {
        let mut manifest: Value = serde_json::from_slice(&self.manifest).unwrap();
        edit(&mut manifest);
        self.manifest = manifest.to_string().into_bytes();
    }

    /// Answers as a registry does, with ranges.
    pub(crate) fn answer(&self, request: &Request) -> Answer {
        let path = request.path.as_str();
        if path == "/v2/" {
            return Answer::new(200, "{}");
        }
        if path.contains("/manifests/") {
            return Answer::new(200, self.manifest.clone()).header("Content-Type", MANIFEST);
        }
        let Some(data) = path
            .rsplit('/')
            .next()
            .and_then(|name| self.blobs.get(name))
        else {
            return Answer::new(404, r#"{"errors":[{"code":"BLOB_UNKNOWN"}]}"#);
        };
        let range = request
            .header("range")
            .and_then(|range| range.strip_prefix("bytes="));
        match range.and_then(|range| range.strip_suffix('-')) {
            None => Answer::new(200, data.clone()),
            Some(first) => {
                let first: usize = first.parse().unwrap();
                let range = format!("bytes {first}-{}/{}", data.len() - 1, data.len());
                Answer::new(206, &data[first..]).header("Content-Range", range)
            }
        }
    }
}

/// Returns a layer that compresses badly.
pub(crate) fn large() -> Vec<u8> {
    let mut state = 1u64;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        char::from(b' ' + (state >> 58) as u8)
    };
    let text: String = (0..3_000_000).map(next).collect();
    layer(&[("etc/", ""), ("etc/large", &text)])
}

pub(crate) fn transfers(world: &World) -> Vec<String> {
    match std::fs::read_dir(world.path("store/transfers")) {
        Ok(found) => found
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect(),
        Err(_) => Vec::new(),
    }
}

#[track_caller]
pub(crate) fn assert_nothing_was_created(world: &World) {
    assert_eq!(world.layers(), 0);
    let list = world.json(&["list", "--json"]);
    let text = list.to_string();
    assert!(!text.contains("\"web\""), "{text}");
}

#[test]
fn an_image_is_pulled_and_only_missing_layers_are_downloaded() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let (_, layers) = content.parsed();
    let registry = FakeRegistry::start(move |request| content.answer(request));
    let reference = format!("{}/team/web", registry.name());
    let done = world.json(&["pull", &reference, "--json"]);
    assert_eq!(done["container"], "web");
    assert_eq!(done["downloaded"]["layers"], 2);
    assert_eq!(done["state"], "created");
    assert_eq!(world.at("cat", "web", "etc/app"), "app");
    let shown = world.json(&["show", "web", "--json"]);
    assert!(
        shown.to_string().contains(&format!("{reference}:latest")),
        "{shown}"
    );
    let lines = registry.take_lines();
    for layer in &layers {
        let count = lines
            .iter()
            .filter(|line| line.contains(layer.as_str()))
            .count();
        assert_eq!(count, 1, "{lines:?}");
    }
    let done = world.json(&["pull", &reference, "again", "--json"]);
    assert_eq!(done["downloaded"]["bytes"], 0);
    let lines = registry.take_lines();
    assert!(
        !lines
            .iter()
            .any(|line| layers.iter().any(|l| line.contains(l.as_str()))),
        "{lines:?}"
    );
    world.ok(&[
        "create",
        "third",
        "--from",
        &format!("docker://{reference}"),
    ]);
    world
        .run(&["pull", &reference])
        .fails(1, &["already exists", "--update"]);
    world
        .run(&["pull", "debian:12", "x"])
        .fails(2, &["short names"]);
    assert!(transfers(&world).is_empty());
    world.ok(&["check"]);
}

/// A download continues where it was cut, in the same command and in the next one.
#[test]
fn interrupted_downloads_continue() {
    let world = World::new();
    let content = Content::new(&world, &[base(), large()]);
    let (_, layers) = content.parsed();
    let (digest, size) = (layers[1].clone(), content.blobs[&layers[1]].len());
    assert!(size > 2_000_000, "{size}");
    let cuts = Arc::new(AtomicUsize::new(0));
    let (seen, wanted) = (cuts.clone(), digest.clone());
    let registry = FakeRegistry::start(move |request| {
        let answer = content.answer(request);
        let is_large = request.method == "GET" && request.path.ends_with(&wanted);
        match is_large && seen.fetch_add(1, Ordering::Relaxed) % 3 < 2 {
            true => answer.cut_after(700_000),
            false => answer,
        }
    });
    let reference = format!("{}/web", registry.name());
    world.ok(&["pull", &reference]);
    let ranges: Vec<_> = registry
        .requests()
        .iter()
        .filter(|request| request.path.ends_with(&digest))
        .map(|request| request.header("range").unwrap_or("all").to_owned())
        .collect();
    assert_eq!(ranges, ["all", "bytes=700000-", "bytes=1400000-"]);
    assert_eq!(cuts.load(Ordering::Relaxed), 3);
    world.ok(&["check"]);
}

#[test]
fn an_earlier_download_is_continued_and_verified() {
    let world = World::new();
    let content = Content::new(&world, &[base(), large()]);
    let (_, layers) = content.parsed();
    let digest = layers[1].clone();
    let data = content.blobs[&digest].clone();
    let registry = FakeRegistry::start(move |request| content.answer(request));
    let reference = format!("{}/web", registry.name());
    let partial = world
        .path("store/transfers")
        .join(digest.strip_prefix("sha256:").unwrap());
    let begin = |content: &[u8]| {
        std::fs::create_dir_all(partial.parent().unwrap()).unwrap();
        std::fs::write(&partial, content).unwrap();
    };
    // The store exists only after the first command that needs it.
    world.ok(&["pull", &reference, "first"]);
    world.ok(&["destroy", "first", "--now", "--yes"]);
    registry.take_lines();

    begin(&data[..1_000_000]);
    world.ok(&["pull", &reference, "web"]);
    let requests = registry.requests();
    let range = requests
        .iter()
        .find(|r| r.path.ends_with(&digest))
        .unwrap()
        .header("range");
    assert_eq!(range, Some("bytes=1000000-"));
    assert!(!partial.try_exists().unwrap());
    world.ok(&["destroy", "web", "--now", "--yes"]);

    // A wrong part, which another registry may have sent, is detected, and everything is downloaded again.
    let mut wrong = data[..1_000_000].to_vec();
    wrong[5] ^= 1;
    begin(&wrong);
    registry.take_lines();
    let done = world.json(&["pull", &reference, "web", "--json"]);
    assert_eq!(done["state"], "created");
    assert!(!partial.try_exists().unwrap());
    let requests = registry.take_lines();
    let count = requests.iter().filter(|line| line.ends_with(&digest));
    assert_eq!(count.count(), 2, "{requests:?}");
    world.ok(&["destroy", "web", "--now", "--yes"]);
    // A complete file is not downloaded, and not counted.
    begin(&data);
    let done = world.json(&["pull", &reference, "web", "--json"]);
    let bytes = done["downloaded"]["bytes"].as_u64().unwrap();
    assert!(
        bytes < data.len() as u64 && done["downloaded"]["layers"] == 1,
        "{done}"
    );
    world.ok(&["destroy", "web", "--now", "--yes"]);
    // More than the whole blob is not a part of it.
    begin(&[&data[..], b"x"].concat());
    world.ok(&["pull", &reference, "web"]);
    world.ok(&["destroy", "web", "--now", "--yes"]);

    // Interrupted downloads are removed after a day, and on request.
    begin(&data[..10]);
    world.ok(&["gc"]);
    assert!(partial.try_exists().unwrap());
    world.ok(&["gc", "--empty-transfers"]);
    assert!(!partial.try_exists().unwrap());
    begin(&data[..10]);
    let file = std::fs::File::options().write(true).open(&partial).unwrap();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(25 * 3600);
    file.set_modified(old).unwrap();
    drop(file);
    world.ok(&["pull", &reference, "web"]);
    assert!(!partial.try_exists().unwrap());
}

/// Two commands that need the same blob do not write to the same file.
#[test]
fn a_blob_that_another_command_downloads_is_downloaded_apart() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let (_, layers) = content.parsed();
    let registry = FakeRegistry::start(move |request| content.answer(request));
    let dir = world.path("store/transfers");
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    world.ok(&["create", "other", "--from", "root"]);
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(layers[1].strip_prefix("sha256:").unwrap());
    std::fs::write(&path, "of the other command").unwrap();
    let locked = std::fs::File::open(&path).unwrap();
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).unwrap();
    world.ok(&["pull", &format!("{}/web", registry.name())]);
    world.ok(&["gc", "--empty-transfers"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"of the other command");
    assert_eq!(world.at("cat", "web", "etc/app"), "app");
    drop(locked);
    world.ok(&["gc", "--empty-transfers"]);
    assert!(transfers(&world).is_empty());
}

/// A registry that lets downloads begin again and again is given up.
#[test]
fn endless_downloads_are_given_up() {
    let world = World::new();
    let content = Content::new(&world, &[base(), large()]);
    let (_, layers) = content.parsed();
    let top = layers[1].clone();
    let registry = FakeRegistry::start(move |request| {
        let answer = content.answer(request);
        match (request.path.ends_with(&top), request.header("range")) {
            (true, Some(_)) => Answer::new(416, ""),
            (true, None) => answer.cut_after(1_200_000),
            (false, _) => answer,
        }
    });
    let refused = world.run(&["pull", &format!("{}/web", registry.name())]);
    refused.fails(1, &["cannot download", "try again"]);
    assert_nothing_was_created(&world);
}

/// A blob with another content, or of another size than in the manifest.
#[test]
fn wrong_blobs_are_refused() {
    let world = World::new();
    let good = Content::new(&world, &two_layers());
    let (_, layers) = good.parsed();
    let top = layers[1].clone();
    let serve = |change: fn(&mut Vec<u8>)| {
        let mut content = good.clone();
        change(content.blobs.get_mut(&top).unwrap());
        FakeRegistry::start(move |request| content.answer(request))
    };
    for (change, message) in [
        ((|data| data[20] ^= 1) as fn(&mut Vec<u8>), "another digest"),
        (|data| data.push(0), "bytes for the blob"),
        (|data| data.truncate(10), "bytes for the blob"),
        (|data| data.clear(), "bytes for the blob"),
    ] {
        let registry = serve(change);
        let reference = format!("{}/web", registry.name());
        world.run(&["pull", &reference]).fails(1, &[message]);
        assert_nothing_was_created(&world);
        assert!(
            !transfers(&world)
                .iter()
                .any(|name| top.contains(name.as_str()))
        );
    }
    // The size of a body is not declared, and it never ends.
    let content = good.clone();
    let registry = FakeRegistry::start(move |request| {
        let answer = content.answer(request);
        match request.path.ends_with(&top) {
            true => Answer::new(200, vec![b'x'; 50_000_000]).without_length(),
            false => answer,
        }
    });
    let reference = format!("{}/web", registry.name());
    world
        .run(&["pull", &reference])
        .fails(1, &["bytes for the blob"]);
    assert_nothing_was_created(&world);
}

#[test]
fn hostile_manifests_are_refused() {
    let world = World::new();
    let good = Content::new(&world, &two_layers());
    let (_, layers) = good.parsed();
    let layer = layers[0].clone();
    type Edit = Box<dyn Fn(&mut Content)>;
    let edit = |edit: fn(&mut Value)| -> Edit { Box::new(move |c| c.edit(edit)) };
    let cases: Vec<(Edit, &[&str])> = vec![
        (
            edit(|m| m["layers"] = json!(vec![m["layers"][0].clone(); 5000])),
            &["5000 layers", "400"],
        ),
        (edit(|m| m["layers"] = json!([])), &["no layers"]),
        (
            edit(|m| m["layers"][0]["mediaType"] = json!("text/html")),
            &["media type"],
        ),
        (edit(|m| m["layers"][0]["size"] = json!(-1)), &["manifest"]),
        (
            edit(|m| m["layers"][0]["digest"] = json!("sha256:../../../etc/passwd")),
            &["manifest"],
        ),
        (
            edit(|m| m["layers"][0]["digest"] = json!("md5:0")),
            &["manifest"],
        ),
        (
            edit(|m| m["config"]["size"] = json!(1u64 << 40)),
            &["limit"],
        ),
        (edit(|m| m["manifests"] = json!([])), &["at once"]),
        (Box::new(|c| c.manifest = b"{".to_vec()), &["manifest"]),
        (Box::new(|c| c.manifest = vec![b' '; 5 << 20]), &["limit"]),
        (
            Box::new(|c| c.manifest = "[".repeat(100_000).into_bytes()),
            &["manifest"],
        ),
    ];
    for (change, words) in cases {
        let mut content = good.clone();
        change(&mut content);
        let registry = FakeRegistry::start(move |request| content.answer(request));
        let reference = format!("{}/web", registry.name());
        world.run(&["pull", &reference]).fails(1, words);
        assert_nothing_was_created(&world);
        let lines = registry.take_lines();
        assert!(!lines.iter().any(|line| line.contains(&layer)), "{lines:?}");
    }
    // The digest of the reference is verified.
    let content = good.clone();
    let registry = FakeRegistry::start(move |request| content.answer(request));
    let reference = format!("{}/web@{}", registry.name(), digest(b"other"));
    world
        .run(&["pull", &reference])
        .fails(1, &["another digest"]);
    // So is the digest of a manifest in an index.
    let mut content = good;
    let index = json!({ "schemaVersion": 2, "manifests": [
        { "mediaType": MANIFEST, "digest": digest(b"other"), "size": content.manifest.len() },
    ]});
    let inner = std::mem::replace(&mut content.manifest, index.to_string().into_bytes());
    let registry =
        FakeRegistry::start(
            move |request| match request.path.ends_with(&digest(b"other")) {
                true => Answer::new(200, inner.clone()).header("Content-Type", MANIFEST),
                false => Answer::new(200, content.manifest.clone())
                    .header("Content-Type", "application/vnd.oci.image.index.v1+json"),
            },
        );
    world
        .run(&["pull", &format!("{}/web", registry.name())])
        .fails(1, &["another digest"]);
    assert_nothing_was_created(&world);
}

/// Annotations of snapshots are claims: names are checked, and control characters do not reach the terminal.
#[test]
fn hostile_names_of_snapshots_are_not_used() {
    let world = World::new();
    let mut content = Content::new(&world, &two_layers());
    let note = |name: &str| json!({ "name": name, "created": "x", "comment": "c" }).to_string();
    content.edit(|manifest| {
        manifest["layers"][0]["annotations"] = json!({ "io.cowl.snapshot": note("../../x") });
        manifest["layers"][1]["annotations"] =
            json!({ "io.cowl.snapshot": note("snap18446744073709551615") });
    });
    let registry = FakeRegistry::start(move |request| content.answer(request));
    world.ok(&["pull", &format!("{}/web", registry.name())]);
    let list = world.json(&["list", "web", "--json"]);
    let names: Vec<_> = list["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].clone())
        .collect();
    assert_eq!(names, ["snap0", "snap1"]);
    assert_eq!(world.ok(&["snapshot", "web"]), "snap2");
    assert_eq!(world.at("ls", "web@snap0", "etc"), "os");
    world.ok(&["check"]);
}

#[test]
fn errors_of_a_registry_are_reported() {
    let world = World::new();
    let answers = AtomicUsize::new(0);
    let text = r#"{"errors":[{"code":"DENIED","message":"no\u001b[31m access"}]}"#;
    let registry = FakeRegistry::start(move |request| match request.path.as_str() {
        "/v2/" => Answer::new(200, "{}"),
        path if path.contains("/denied/") => Answer::new(403, text),
        path if path.contains("/none/") => Answer::new(404, "<html>"),
        path if path.contains("/busy/") => {
            answers.fetch_add(1, Ordering::Relaxed);
            Answer::new(503, "").header("Retry-After", "0")
        }
        _ => Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let name = registry.name();
    let denied = world.run(&["pull", &format!("{name}/denied/web")]);
    let denied = denied.fails(1, &["DENIED", "cowl login"]);
    assert!(!denied.err().contains('\u{1b}'), "{}", denied.err());
    world
        .run(&["pull", &format!("{name}/none/web")])
        .fails(3, &["404"]);
    world
        .run(&["pull", &format!("{name}/private/web")])
        .fails(1, &["401", "cowl login"]);
    registry.take_lines();
    world
        .run(&["pull", &format!("{name}/busy/web")])
        .fails(1, &["503"]);
    assert_eq!(registry.take_lines().len(), 8);
    drop(registry);
    world
        .run(&["pull", &format!("{name}/web")])
        .fails(1, &["cannot connect"]);
    let json = world.run(&["pull", "--json", &format!("{name}/web")]);
    // After the messages about repeated attempts.
    let text = json.fails(1, &["trying again"]).err();
    let json: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(json["error"]["kind"], "failed");
    assert_nothing_was_created(&world);
}

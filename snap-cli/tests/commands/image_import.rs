//! Containers from images, and images from containers, without other programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use cowl_tests::command::{Output, run_command, sh_in};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use serde_json::{Value, json};

use crate::image::{Layout, MANIFEST, digest, gzip, layer, machine, tagged};

pub(crate) struct World(pub(crate) Scratch);

impl World {
    pub(crate) fn new() -> Self {
        Self(Scratch::for_test())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Returns the command line, which may be changed before it runs. The waits after errors of a registry are short.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(programs::cowl());
        command.arg("--store").arg(self.path("store")).args(args);
        command.current_dir(&*self.0).env("COWL_RETRY_WAIT", "10");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        run_command(self.command(args), b"")
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        self.run(args).ok().out()
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        self.run(args).ok().json()
    }

    /// Runs `cowl ls` or `cowl cat` on a path of a state.
    #[track_caller]
    pub(crate) fn at(&self, command: &str, state: &str, path: &str) -> String {
        self.ok(&[command, &format!("{state}:{path}")])
    }

    pub(crate) fn layers(&self) -> usize {
        match std::fs::read_dir(self.path("store/layers")) {
            Ok(found) => found.count(),
            Err(_) => 0,
        }
    }

    /// Returns the only image in an exported layout: its manifest and its config.
    pub(crate) fn exported(&self, layout: &str) -> (Value, Value) {
        let read = |path: PathBuf| -> Value {
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
        };
        let layout = Layout(self.path(layout));
        let blob = |descriptor: &Value| read(layout.blob(descriptor["digest"].as_str().unwrap()));
        let index = read(layout.0.join("index.json"));
        let manifest = blob(&index["manifests"][0]);
        let config = blob(&manifest["config"]);
        (manifest, config)
    }
}

pub(crate) fn base() -> Vec<u8> {
    layer(&[("etc/", ""), ("etc/os", "one"), ("bin/sh", "shell")])
}

pub(crate) fn config() -> Value {
    json!({
        "Env": ["A=1", "PATH=/bin"], "Entrypoint": ["/bin/sh"], "Cmd": ["-c", "x"],
        "WorkingDir": "/etc", "User": "web", "Healthcheck": { "Test": ["NONE"] },
    })
}

/// The files of two layers, of which the second changes the first.
pub(crate) fn two_layers() -> Vec<Vec<u8>> {
    let top = [("etc/.wh.os", ""), ("etc/app", "app"), ("srv/", "")];
    vec![base(), layer(&top)]
}

#[test]
fn images_share_their_lower_layers() {
    let world = World::new();
    Layout::with(&world.path("one"), &two_layers(), &config());
    let other = [base(), layer(&[("etc/other", "other")])];
    Layout::with(&world.path("two"), &other, &json!(null));
    world.ok(&["create", "one", "--from", "oci:one"]);
    assert_eq!(world.layers(), 3, "two layers and a head");
    world.ok(&["create", "again", "--from", "oci:one:1.0"]);
    assert_eq!(world.layers(), 4, "a head");
    world.ok(&["import", "two", "two"]);
    assert_eq!(world.layers(), 6, "a layer and a head");
    assert_eq!(world.at("ls", "one", "etc"), "app");
    assert_eq!(world.at("ls", "two", "etc"), "os\nother");
    let stack = |name: &str| world.json(&["show", name, "--json"])["layers"].clone();
    assert_eq!(stack("one")[1], stack("again")[1]);
    assert_eq!(stack("one")[2], stack("two")[2]);
    // The layers remain while any container uses them.
    world.ok(&["destroy", "one", "--now", "--yes"]);
    world.ok(&["destroy", "two", "--now", "--yes"]);
    assert_eq!(world.layers(), 3);
    assert_eq!(world.at("cat", "again", "etc/app"), "app");
    world.ok(&["destroy", "again", "--now", "--yes"]);
    assert_eq!(world.layers(), 0);
    world.ok(&["create", "one", "--from", "oci:one"]);
    world.ok(&["check"]);
}

#[test]
fn the_layers_of_an_image_become_snapshots_on_request() {
    let world = World::new();
    Layout::with(&world.path("image"), &two_layers(), &config());
    world.ok(&["create", "web", "--layer-snapshots", "--from", "image"]);
    let list = world.json(&["list", "web", "--json"]);
    let snapshots = list["snapshots"].as_array().unwrap();
    assert_eq!(snapshots.len(), 2);
    for (at, snapshot) in snapshots.iter().enumerate() {
        assert_eq!(snapshot["name"], format!("layer{}", at + 1));
        assert_eq!(snapshot["comment"], format!("step {at}"));
        let created = snapshot["created"].as_str().unwrap();
        assert!(
            created.starts_with(&format!("2020-01-0{}", at + 1)),
            "{created}"
        );
    }
    assert_eq!(world.at("ls", "web@layer1", "etc"), "os");
    assert_eq!(world.at("ls", "web@layer2", "etc"), "app");
    world.ok(&["check"]);
    world.ok(&["snapshot", "web"]);
    world.ok(&["restore", "web", "layer1"]);
    assert_eq!(world.at("cat", "web", "etc/os"), "one");
}

#[test]
fn the_settings_of_an_image_are_kept() {
    let world = World::new();
    Layout::with(&world.path("image"), &two_layers(), &config());
    world.ok(&["create", "web", "--from", "image"]);
    world.ok(&["clone", "web", "copy"]);
    world.ok(&["export", "copy", "--with-snapshots", "copy.tar"]);
    world.ok(&["import", "copy.tar", "moved"]);
    for name in ["web", "copy", "moved"] {
        for command in ["show", "status"] {
            let shown = world.json(&[command, name, "--json"]);
            assert_eq!(shown["image"], "1.0", "{name}: {shown}");
            let digest = shown["image_digest"].as_str().unwrap();
            assert!(digest.starts_with("sha256:"), "{digest}");
            assert_eq!(shown["platform"], format!("linux/{}", machine()));
            assert_eq!(shown["command"], json!(["/bin/sh", "-c", "x"]));
            assert_eq!(shown["environment"], json!(["A=1", "PATH=/bin"]));
            assert_eq!(
                (&shown["user"], &shown["directory"]),
                (&json!("web"), &json!("/etc"))
            );
        }
        assert!(world.ok(&["show", name]).contains("/bin/sh -c x"));
    }
    std::fs::create_dir(world.path("root")).unwrap();
    world.ok(&["create", "plain", "--from", "root"]);
    world
        .run(&["exec", "plain"])
        .fails(2, &["no command to run", "cowl exec plain -- CMD"]);
}

#[test]
fn an_image_is_selected_by_tag_and_platform() {
    let world = World::new();
    let layout = Layout::new(&world.path("image"));
    let file = |name: &'static str| [layer(&[(name, "x")])];
    let none = json!(null);
    let own = layout.image(&file("own"), &none, machine());
    let other = layout.image(&file("other"), &none, "s390x");
    let with_platform = |mut one: Value, architecture: &str| {
        one["platform"] = json!({ "os": "linux", "architecture": architecture });
        one
    };
    let index = json!({
        "schemaVersion": 2,
        "manifests": [with_platform(other.clone(), "s390x"), with_platform(own.clone(), machine())],
    });
    let index_type = "application/vnd.oci.image.index.v1+json";
    let index = layout.add(index_type, index.to_string().as_bytes());
    let signature = json!({ "mediaType": "application/x", "digest": digest(b""), "size": 0 });
    layout.write_index(&[tagged(index, "multi"), tagged(other, "foreign"), signature]);
    let create = |name: &str, args: &[&str]| world.run(&[&["create", name], args].concat());
    create("a", &["--from", "oci:image:multi"]).ok();
    assert_eq!(world.ok(&["ls", "a"]), "own");
    create(
        "b",
        &["--from", "oci:image:multi", "--platform", "linux/s390x"],
    )
    .ok();
    assert_eq!(world.ok(&["ls", "b"]), "other");
    create(
        "c",
        &["--from", "oci:image:foreign", "--platform", "linux/s390x"],
    )
    .ok();
    let cases: [(&[&str], &[&str]); 5] = [
        (
            &["--from", "image"],
            &["2 images", "multi", "foreign", "oci:DIR:TAG"],
        ),
        (&["--from", "oci:image:no"], &["no image no here", "multi"]),
        (
            &["--from", "oci:image:foreign"],
            &["linux/s390x", "--platform"],
        ),
        (
            &["--from", "oci:image:multi", "--platform", "linux/riscv64"],
            &["linux/riscv64", "linux/s390x"],
        ),
        (&["--from", "oci:missing"], &["missing"]),
    ];
    for (args, words) in cases {
        create("d", args).fails(1, words);
    }
    create("d", &["--from", "image", "--platform", "x"]).fails(2, &["OS/ARCH"]);
    std::fs::create_dir(world.path("root")).unwrap();
    create("d", &["--from", "root", "--platform", "linux/arm"]).fails(2, &["not one"]);
    create("d", &["--from", "docker://debian"]).fails(2, &["short names"]);
    create("d", &["--from", "docker-daemon:debian"]).fails(2, &["docker-daemon:", "skopeo copy"]);
    create("d", &["--from", "dir:image"]).fails(2, &["dir:", "skopeo copy"]);
}

/// Every kind of damage is detected before the container has a name, and nothing remains.
#[test]
fn damaged_images_leave_nothing() {
    type Damage = fn(&Layout, &Value, &mut Value);
    fn blob(layout: &Layout, descriptor: &Value) -> PathBuf {
        layout.blob(descriptor["digest"].as_str().unwrap())
    }
    let cases: [(&str, &str, Damage); 9] = [
        ("content", "another digest", |layout, manifest, _| {
            let path = blob(layout, &manifest["layers"][1]);
            let mut data = std::fs::read(&path).unwrap();
            // A byte of the header of gzip that no decoder reads.
            data[4] ^= 1;
            std::fs::write(path, data).unwrap();
        }),
        ("truncated", "shorter", |layout, manifest, _| {
            let path = blob(layout, &manifest["layers"][1]);
            let data = std::fs::read(&path).unwrap();
            std::fs::write(path, &data[..data.len() - 1]).unwrap();
        }),
        ("longer", "longer", |layout, manifest, _| {
            let path = blob(layout, &manifest["layers"][1]);
            let data = std::fs::read(&path).unwrap();
            std::fs::write(path, [&data[..], b"\0"].concat()).unwrap();
        }),
        ("missing", "missing", |layout, manifest, _| {
            std::fs::remove_file(blob(layout, &manifest["layers"][1])).unwrap();
        }),
        ("config", "another digest", |layout, manifest, _| {
            let path = blob(layout, &manifest["config"]);
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(path, text.replace("step 0", "step X")).unwrap();
        }),
        ("order", "another content", |_, _, manifest| {
            manifest["layers"].as_array_mut().unwrap().reverse();
        }),
        ("count", "its config has 2", |_, _, manifest| {
            manifest["layers"].as_array_mut().unwrap().pop();
        }),
        ("type", "unknown media type", |_, _, manifest| {
            manifest["layers"][0]["mediaType"] = json!("application/x");
        }),
        ("both", "at once", |_, _, manifest| {
            manifest["manifests"] = json!([]);
        }),
    ];
    let world = World::new();
    for (name, message, damage) in cases {
        let layout = Layout::with(&world.path(name), &two_layers(), &config());
        let index = std::fs::read(layout.0.join("index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        let old = std::fs::read(blob(&layout, &index["manifests"][0])).unwrap();
        let old: Value = serde_json::from_slice(&old).unwrap();
        let mut new = old.clone();
        damage(&layout, &old, &mut new);
        layout.write_index(&[layout.add(MANIFEST, new.to_string().as_bytes())]);
        let source = format!("oci:{name}");
        world
            .run(&["create", "web", "--from", &source])
            .fails(1, &[message]);
        assert_eq!(world.layers(), 0, "{name}");
        assert_eq!(
            world.json(&["list", "--json"])["containers"],
            json!([]),
            "{name}"
        );
    }
    // Layers that the store has are not read again.
    Layout::with(&world.path("good"), &two_layers(), &config());
    world.ok(&["create", "web", "--from", "oci:good"]);
    world.ok(&["create", "other", "--from", "oci:content"]);
    assert_eq!(world.at("ls", "other", "etc"), "app");
    assert_eq!(world.layers(), 4);
}

#[test]
fn archives_of_images_are_recognized() {
    let world = World::new();
    Layout::with(&world.path("image"), &two_layers(), &config());
    let tar = |script: &str| sh_in(&world.0, script).ok();
    tar("tar -cf oci.tar -C image oci-layout index.json blobs; gzip -k oci.tar");
    let saved = world.path("saved");
    let layers = two_layers();
    std::fs::create_dir(&saved).unwrap();
    for (at, layer) in layers.iter().enumerate() {
        std::fs::write(saved.join(format!("{at}.tar")), layer).unwrap();
    }
    let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
    let settings = json!({
        "architecture": machine(), "os": "linux", "config": config(),
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    std::fs::write(saved.join("c.json"), settings.to_string()).unwrap();
    let list = json!([{
        "Config": "c.json", "RepoTags": ["localhost/app:1"], "Layers": ["0.tar", "1.tar"],
    }]);
    std::fs::write(saved.join("manifest.json"), list.to_string()).unwrap();
    tar("tar -cf saved.tar -C saved .; xz -k saved.tar; mkdir bad; cp saved/* bad");
    let forced = ["create", "web", "--force", "--from", "oci-archive:oci.tar"];
    world.run(&forced).fails(2, &["--force"]);
    let sources = [
        "oci.tar",
        "oci.tar.gz",
        "oci-archive:oci.tar",
        "oci-archive:oci.tar.gz:1.0",
        "saved",
        "saved.tar",
        "saved.tar.xz",
        "docker-archive:saved.tar",
        "docker-archive:saved.tar:app:1",
    ];
    for (at, source) in sources.iter().enumerate() {
        let name = format!("c{at}");
        world.ok(&["create", &name, "--from", source]);
        assert_eq!(world.at("ls", &name, "etc"), "app", "{source}");
        assert_eq!(world.layers(), at + 3, "{source}");
    }
    // The name of a layer does not lead out of a directory.
    let outside = list.to_string().replace("0.tar", "../saved/0.tar");
    std::fs::write(world.path("bad/manifest.json"), outside).unwrap();
    world
        .run(&["create", "bad", "--from", "bad"])
        .fails(1, &["0.tar"]);
    world
        .run(&["create", "bad", "--from", "docker-archive:saved.tar:no"])
        .fails(1, &["no image no here", "localhost/app:1"]);
    world
        .run(&["create", "bad", "--keep-blobs", "--from", "saved.tar"])
        .fails(2, &["--keep-blobs"]);
    world.ok(&["create", "files", "--force", "--from", "oci.tar"]);
    assert_eq!(world.ok(&["ls", "files"]), "blobs\nindex.json\noci-layout");
}

#[test]
fn the_same_state_results_in_the_same_image() {
    let world = World::new();
    Layout::with(&world.path("image"), &two_layers(), &config());
    world.ok(&["create", "web", "--from", "oci:image"]);
    write(&world, "web", "etc/new", "new");
    world.ok(&["snapshot", "web", "-m", "a comment"]);
    world.ok(&["export", "web@snap0", "--oci", "one"]);
    world.ok(&["export", "web@snap0", "--oci", "one.tar"]);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    world.ok(&["export", "web@snap0", "--oci", "two"]);
    world.ok(&["export", "web@snap0", "--oci", "two.tar"]);
    sh_in(&world.0, "diff -r one two; cmp one.tar two.tar").ok();
    let index = std::fs::read_to_string(world.path("one/index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    assert_eq!(
        index["manifests"][0]["annotations"],
        json!({
            "org.opencontainers.image.ref.name": "snap0",
            "io.containerd.image.name": "localhost/web:snap0",
        })
    );
    let (manifest, settings) = world.exported("one");
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 3);
    assert_eq!(settings["config"], config());
    let history = settings["history"].as_array().unwrap();
    assert_eq!(
        (&history[0]["created_by"], history.len()),
        (&json!("step 0"), 3)
    );
    assert_eq!(history[2]["comment"], "a comment");
    let shown = world.json(&["show", "web@snap0", "--json"]);
    assert_eq!(history[2]["created"], shown["created"]);
    assert_eq!(settings["created"], shown["created"]);
    // An unchanged container is the image.
    world.ok(&["create", "same", "--from", "oci:image"]);
    world.ok(&["export", "same", "--oci", "same"]);
    let (same, _) = world.exported("same");
    assert_eq!(same["layers"].as_array().unwrap().len(), 2);
    assert_eq!(
        same["layers"][0], manifest["layers"][0],
        "exports share their base"
    );
    // An export is imported with the same result, and its layers are shared with it.
    world.ok(&["create", "back", "--from", "one"]);
    assert_eq!(world.at("cat", "back", "etc/new"), "new");
    assert_eq!(world.at("ls", "back", "etc"), world.at("ls", "web", "etc"));
    world.ok(&["export", "back", "--oci", "back"]);
    assert_eq!(world.exported("back").0["layers"], manifest["layers"]);
}

#[test]
fn layers_of_an_image_are_compressed_with_zstd_on_request() {
    let world = World::new();
    Layout::with(&world.path("image"), &two_layers(), &config());
    world.ok(&["create", "web", "--from", "oci:image"]);
    world.ok(&["export", "web", "--oci", "--compression", "zstd", "out"]);
    let (manifest, _) = world.exported("out");
    for layer in manifest["layers"].as_array().unwrap() {
        assert_eq!(
            layer["mediaType"],
            "application/vnd.oci.image.layer.v1.tar+zstd"
        );
    }
    world.ok(&["create", "back", "--from", "out"]);
    assert_eq!(world.at("ls", "back", "etc"), "app");
    world
        .run(&["export", "web", "--compression", "zstd", "out.tar"])
        .fails(2, &["--oci"]);
}

#[test]
fn kept_blobs_are_exported_unchanged() {
    let world = World::new();
    let layers = two_layers();
    Layout::with(&world.path("image"), &layers, &config());
    // The layers without blobs are not used.
    world.ok(&["create", "without", "--from", "oci:image"]);
    world.ok(&["create", "web", "--keep-blobs", "--from", "oci:image"]);
    assert_eq!(world.layers(), 6);
    world.ok(&["create", "again", "--keep-blobs", "--from", "oci:image"]);
    assert_eq!(world.layers(), 7);
    write(&world, "web", "etc/new", "new");
    world.ok(&["export", "web", "--oci", "out"]);
    world.ok(&["export", "without", "--oci", "recreated"]);
    let digests = |layout: &str| {
        let (manifest, settings) = world.exported(layout);
        let layers = manifest["layers"].as_array().unwrap().iter();
        let blobs: Vec<_> = layers.map(|layer| layer["digest"].clone()).collect();
        let diff_ids = settings["rootfs"]["diff_ids"].as_array().unwrap().clone();
        (blobs, diff_ids)
    };
    let (blobs, diff_ids) = digests("out");
    assert_eq!((blobs.len(), diff_ids.len()), (3, 3));
    for (at, layer) in layers.iter().enumerate() {
        assert_eq!(blobs[at], digest(&gzip(layer)));
        assert_eq!(diff_ids[at], digest(layer));
    }
    assert_ne!(digests("recreated").0[0], blobs[0]);
    world.ok(&["check"]);
    // The blob is verified, and removed with its layer.
    let id = world.json(&["show", "web", "--json"])["layers"][2].clone();
    let blob = format!("store/layers/{}/blob", id.as_str().unwrap());
    std::fs::write(world.path(&blob), "damaged").unwrap();
    world
        .run(&["export", "web", "--oci", "bad"])
        .fails(1, &["blob"]);
    assert!(!world.path("bad").try_exists().unwrap());
    for name in ["web", "again", "without"] {
        world.ok(&["destroy", name, "--now", "--yes"]);
    }
    assert_eq!(world.layers(), 0);
}

/// An archive of a whole container cannot claim that its layers are those of an image.
#[test]
fn archives_of_containers_do_not_provide_layers_of_images() {
    let world = World::new();
    Layout::with(&world.path("image"), &two_layers(), &config());
    world.ok(&["create", "web", "--from", "oci:image"]);
    world.ok(&["export", "web", "--with-snapshots", "web.tar"]);
    world.ok(&["destroy", "web", "--now", "--yes"]);
    world.ok(&["import", "web.tar"]);
    let layers = world.layers();
    world.ok(&["create", "new", "--from", "oci:image"]);
    assert_eq!(world.layers(), layers + 3);
}

/// Writes a file of a container that is not mounted.
fn write(world: &World, container: &str, path: &str, content: &str) {
    let shown = world.json(&["show", container, "--json"]);
    let head = Path::new(shown["head"].as_str().unwrap()).join(path);
    std::fs::create_dir_all(head.parent().unwrap()).unwrap();
    std::fs::write(head, content).unwrap();
}

//! Containers from images: hostile documents, limits, and layers that must not be shared.

use std::process::Command;

use cowl_tests::command::run_command;
use cowl_tests::programs;
use serde_json::{Value, json};

use crate::image::{Layout, MANIFEST, layer, layer_with_xattr, machine};
use crate::image_import::{World, base, config, two_layers};

/// A config that cannot be stored in a manifest would make the store unreadable.
#[test]
fn deeply_nested_settings_are_refused() {
    let world = World::new();
    let nested = |depth: usize| {
        let mut value = json!(1);
        for _ in 0..depth {
            value = json!([value]);
        }
        json!({ "x": value })
    };
    for depth in [32, 100, 119, 120, 121] {
        Layout::with(&world.path("deep"), &two_layers(), &nested(depth));
        world
            .run(&["create", "web", "--from", "oci:deep"])
            .fails(1, &["nested too deeply"]);
        assert_eq!(world.layers(), 0, "{depth}");
    }
    // serde_json creates no deeper values than this.
    for depth in [124, 125, 126, 127, 128] {
        let text = format!(r#"{}1{}"#, "[".repeat(depth), "]".repeat(depth));
        let layout = Layout::with(&world.path("deep"), &two_layers(), &json!({ "x": "DEEP" }));
        replace_config(&layout, "\"DEEP\"", &text);
        world
            .run(&["create", "web", "--from", "oci:deep"])
            .fails(1, &["of the image"]);
    }
    let many = json!({ "x": vec![0; 1 << 14] });
    Layout::with(&world.path("many"), &two_layers(), &many);
    world
        .run(&["create", "web", "--from", "oci:many"])
        .fails(1, &["too many values"]);
    Layout::with(&world.path("good"), &two_layers(), &nested(31));
    world.ok(&["create", "web", "--from", "oci:good"]);
    world.ok(&["export", "web", "--with-snapshots", "web.tar"]);
    world.ok(&["import", "web.tar", "copy"]);
    world.ok(&["export", "copy", "--oci", "again"]);
    world.ok(&["check"]);
}

/// Replaces a text in the config of the only image of a layout.
fn replace_config(layout: &Layout, old: &str, new: &str) {
    let read = |digest: &Value| {
        let path = layout.blob(digest.as_str().unwrap());
        std::fs::read_to_string(path).unwrap()
    };
    let index = std::fs::read(layout.0.join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let manifest = read(&index["manifests"][0]["digest"]);
    let mut manifest: Value = serde_json::from_str(&manifest).unwrap();
    let config = read(&manifest["config"]["digest"]).replacen(old, new, 1);
    let media_type = manifest["config"]["mediaType"].clone();
    manifest["config"] = layout.add(media_type.as_str().unwrap(), config.as_bytes());
    layout.write_index(&[layout.add(MANIFEST, manifest.to_string().as_bytes())]);
}

/// The annotations of an index are not copied for each of its images.
#[test]
fn large_annotations_take_little_memory() {
    let world = World::new();
    let layout = Layout::new(&world.path("image"));
    let image = layout.image(&two_layers(), &config(), machine());
    let inner = json!({ "schemaVersion": 2, "manifests": vec![image; 20_000] });
    let index_type = "application/vnd.oci.image.index.v1+json";
    let mut index = layout.add(index_type, inner.to_string().as_bytes());
    let long = "x".repeat(1 << 20);
    index["annotations"] = json!({
        "org.opencontainers.image.ref.name": "1.0", "io.containerd.image.name": long, "x": long,
    });
    layout.write_index(&[index]);
    let mut command = Command::new("sh");
    let script = "ulimit -v 1000000; exec \"$0\" --store store create web --from oci:image:1.0";
    command.args(["-c", script]).arg(programs::cowl());
    command.current_dir(&*world.0);
    run_command(command, b"").ok();
    let shown = world.json(&["show", "web", "--json"]);
    assert_eq!(shown["image"], "1.0");
}

#[test]
fn damaged_layers_are_no_longer_shared() {
    let world = World::new();
    Layout::with(&world.path("image"), &two_layers(), &config());
    world.ok(&["create", "web", "--from", "oci:image"]);
    world.ok(&["check"]);
    let shown = world.json(&["show", "web", "--json"]);
    let base = shown["layers"][2].as_str().unwrap();
    let file = world.path("store/layers").join(base).join("tree/etc/os");
    std::fs::write(file, "damaged").unwrap();
    world.run(&["check"]).fails(5, &[]);
    world.ok(&["create", "new", "--from", "oci:image"]);
    let layers = |name: &str| world.json(&["show", name, "--json"])["layers"].clone();
    let bottom = |name: &str| layers(name)[2].clone();
    assert_ne!(bottom("new"), base);
    // The layer above was created over the damaged one.
    assert_ne!(layers("new")[1], shown["layers"][1]);
    world.ok(&["export", "new", "--dir", "out"]);
    world.ok(&["create", "again", "--from", "oci:image"]);
    assert_eq!(bottom("again"), bottom("new"));
}

/// An export opens no more than two states at a time.
#[test]
fn images_of_many_layers_need_few_descriptors() {
    let world = World::new();
    let names: Vec<_> = (0..60).map(|number| format!("file{number}")).collect();
    let layers: Vec<_> = names
        .iter()
        .map(|name| layer(&[(name.as_str(), "x")]))
        .collect();
    Layout::with(&world.path("image"), &layers, &config());
    let limited = |arguments: &str| {
        let script = format!("ulimit -n 256; exec \"$0\" --store store {arguments}");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(programs::cowl());
        command.current_dir(&*world.0);
        run_command(command, b"").ok();
    };
    limited("create web --from oci:image");
    limited("export web --oci out");
    let (manifest, _) = world.exported("out");
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 60);
    limited("create again --from oci:out");
    assert_eq!(world.ok(&["ls", "again"]).lines().count(), 60);
}

/// Containers that were created without `--skip-unsupported` do not lack what it omits.
#[test]
fn incomplete_layers_are_not_shared() {
    let world = World::new();
    let layers = [
        base(),
        // No file system but AFS has such xattrs.
        layer_with_xattr("etc/marked", "afs.x"),
        layer(&[("etc/top", "top")]),
    ];
    Layout::with(&world.path("image"), &layers, &config());
    Layout::with(&world.path("lower"), &layers[..2], &config());
    let create = |name: &str, more: &[&str]| world.run(&[&["create", name][..], more].concat());
    create("a", &["--skip-unsupported", "--from", "oci:image"]).ok();
    assert_eq!(world.layers(), 4);
    for image in ["oci:image", "oci:lower"] {
        create("b", &["--from", image]).fails(1, &["--skip-unsupported"]);
        assert_eq!(world.layers(), 4, "{image}");
    }
    create("b", &["--skip-unsupported", "--from", "oci:image"]).ok();
    assert_eq!(world.layers(), 7, "only the lowest layer is shared");
    world.ok(&["export", "a", "--oci", "out"]);
    let (manifest, _) = world.exported("out");
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 3);
}

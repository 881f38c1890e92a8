//! Archives that podman and docker write, and exports that they read with the tar package of Go.

use std::path::{Path, PathBuf};

use cowl_tests::command::{run, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::engine::Engine;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};
use rustix::fs::FileType;

use super::archive_programs::{TREE, compared, cowl, read, unpacked_by_gnu_tar};

/// Exports a container that contains the tree, and returns the archive and the tree.
fn exported(scratch: &Scratch) -> (PathBuf, Tree) {
    sh_in(scratch, TREE).ok();
    let archive = scratch.join("exported.tar");
    let tree = scratch.join("tree");
    cowl(
        scratch,
        &["create", "web", "--from", tree.to_str().unwrap()],
    )
    .ok();
    // Engines cannot save an image that was imported with sparse entries.
    let args = ["export", "--no-sparse", "web", archive.to_str().unwrap()];
    cowl(scratch, &args).ok();
    (archive, read(&tree).0)
}

/// Imports the archive into the engine, and returns the archives that the engine writes: first that of a container,
/// then those of the image.
fn rewritten(engine: &Engine, dir: &Path, archive: &Path) -> Vec<PathBuf> {
    let path = |name: &str| dir.join(format!("{}-{name}.tar", engine.name()));
    let run = |args: &[&str]| engine.run(args).ok().out();
    run(&["import", archive.to_str().unwrap(), "cowl-test:1"]);
    let container = run(&["create", "cowl-test:1", "/program"]);
    let mut written = vec![path("export")];
    run(&["export", &container, "-o", written[0].to_str().unwrap()]);
    let formats: &[&str] = match engine.name() {
        "podman" => &["docker-archive", "oci-archive"],
        _ => &[""],
    };
    for format in formats {
        let saved = path(&format!("save{format}"));
        let mut args = vec!["save", "cowl-test:1", "-o", saved.to_str().unwrap()];
        if !format.is_empty() {
            args.extend(["--format", format]);
        }
        run(&args);
        written.push(saved);
    }
    written
}

/// Returns the layers in an archive of an image.
fn layers(scratch: &Scratch, archive: &Path) -> Vec<PathBuf> {
    let dir = scratch.make("image");
    run("rm", ["-rf", dir.to_str().unwrap()]).ok();
    let dir = scratch.make("image");
    sh_in(&dir, &format!("tar -xf '{}'", archive.display())).ok();
    let found = sh_in(&dir, "find . -type f -size +8k").ok().out();
    found.lines().map(|line| dir.join(line)).collect()
}

/// Removes what the engine does not store, and what it adds to a container.
fn without_losses(engine: &Engine, mut tree: Tree, original: &Tree) -> Tree {
    tree.retain(|path, _| !path.is_empty() && original.contains_key(path));
    let kept: &[&[u8]] = match engine.name() {
        "podman" => &[b"security.", b"user.note"],
        _ => &[b"security."],
    };
    for (path, entry) in &mut tree {
        let is_kept = |name: &[u8]| kept.iter().any(|prefix| name.starts_with(prefix));
        entry.xattrs.retain(|name, _| is_kept(name));
        // Times before 1970 become 0, and files are added to this directory.
        if entry.mtime.0 < 0 || path == b"etc" {
            entry.mtime = (0, 0);
        }
        // Nanoseconds are lost in the archive of a container.
        entry.mtime.1 = 0;
        if entry.kind == FileType::Directory {
            entry.nlink = 0;
        }
    }
    tree
}

fn engines_agree_with_gnu_tar(scratch: &Scratch, engine: &Engine) {
    let (archive, original) = exported(scratch);
    let written = rewritten(engine, scratch, &archive);
    let (_, (back, _)) = unpacked_by_gnu_tar(scratch, &written[0]);
    let back = without_losses(engine, back, &original);
    let want = without_losses(engine, original.clone(), &original);
    let differences = tree::differences(&want, &back, Compare::HISTORY);
    assert_eq!(differences, [""; 0], "{} export", engine.name());
    assert_eq!(compared(scratch, &written[0], &[]), [""; 0]);
    for image in &written[1..] {
        let name = image.file_stem().unwrap().to_str().unwrap();
        let args = ["create", name, "--from", image.to_str().unwrap()];
        cowl(scratch, &args).ok();
        let to = scratch.join(format!("{name}.dir"));
        cowl(scratch, &["export", name, "--dir", to.to_str().unwrap()]).ok();
        let back = without_losses(engine, read(&to).0, &original);
        let differences = tree::differences(&want, &back, Compare::HISTORY);
        assert_eq!(differences, [""; 0], "{} {name}", engine.name());
        assert_eq!(compared(scratch, image, &["--force"]), [""; 0], "{image:?}");
        let layers = layers(scratch, image);
        assert_eq!(layers.len(), 1, "{image:?}: {layers:?}");
        assert_eq!(compared(scratch, &layers[0], &[]), [""; 0], "{image:?}");
    }
}

#[test]
fn archives_of_podman_are_imported_and_podman_imports_exports() {
    if !can(&[Need::Root, Need::Program("podman")]) {
        return;
    }
    let scratch = Scratch::for_test();
    let engine = Engine::podman(&scratch.make("podman"));
    engines_agree_with_gnu_tar(&scratch, &engine);
    engine.run(&["rm", "-a", "-f"]).ok();
    engine.run(&["rmi", "-a", "-f"]).ok();
}

#[test]
fn archives_of_docker_are_imported_and_docker_imports_exports() {
    if !can(&[
        Need::Root,
        Need::Program("dockerd"),
        Need::Program("docker"),
    ]) {
        return;
    }
    let scratch = Scratch::for_test();
    let engine = Engine::docker(&scratch.make("docker"));
    engines_agree_with_gnu_tar(&scratch, &engine);
}

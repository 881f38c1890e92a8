//! Damage of every kind is made, found, and put right where that can be.

use std::path::{Path, PathBuf};

use cowl_tests::cowl::Store;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The container web with three snapshots, and a clone of the second, all measured.
fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("base-file"), "base\n").unwrap();
    store.create("web", &source);
    for number in 0..3 {
        std::fs::write(head(&store).join(format!("file-{number}")), "content").unwrap();
        store.cowl(["snapshot", "web"]).ok();
    }
    store.cowl(["clone", "web@snap1", "other"]).ok();
    let check = store.cowl(["check", "--deep"]).ok();
    assert!(check.out().is_empty(), "{}", check.report());
    store
}

fn manifest(store: &Store, name: &str) -> (PathBuf, Value) {
    let containers = std::fs::read_dir(store.path().join("containers")).unwrap();
    for entry in containers {
        let file = entry.unwrap().path().join("container.json");
        let value: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        if value["name"] == name {
            return (file, value);
        }
    }
    panic!("no {name}")
}

fn layer(store: &Store, id: &Value) -> PathBuf {
    store.path().join("layers").join(id.as_str().unwrap())
}

fn head(store: &Store) -> PathBuf {
    layer(store, &manifest(store, "web").1["head"]).join("tree")
}

/// Returns the directory of the layer with index `at` in the current stack of web, counted from the top.
fn of_stack(store: &Store, at: usize) -> PathBuf {
    layer(store, &manifest(store, "web").1["stack"][at])
}

fn snapshot_file(store: &Store, at: usize) -> PathBuf {
    let (file, manifest) = manifest(store, "web");
    let id = manifest["snapshots"][at]["id"].as_str().unwrap();
    file.with_file_name("snapshots").join(format!("{id}.json"))
}

/// Changes a file of the store so that its checksum is right.
fn change(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    let object = value.as_object_mut().unwrap();
    object.remove("checksum");
    let sum = Sha256::digest(serde_json::to_vec(object).unwrap());
    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    object.insert("checksum".to_owned(), format!("sha256:{hex}").into());
    std::fs::write(file, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// Runs `check`, and verifies its exit code and that its output contains `words`.
#[track_caller]
fn says(store: &Store, args: &[&str], code: i32, words: &[&str]) {
    let args = [&["check"], args].concat();
    let output = store.cowl(&args);
    assert_eq!(output.code, code, "{}", output.report());
    for word in words {
        assert!(
            output.out().contains(word),
            "no {word:?}: {}",
            output.report()
        );
    }
}

/// Repairs the store, and verifies that no problem is left and that the states have the same files as before.
#[track_caller]
fn is_right_again(store: &Store, words: &[&str]) {
    says(store, &["--repair"], 0, words);
    let check = store.cowl(["check", "--deep"]).ok();
    assert!(check.out().is_empty(), "{}", check.report());
    for (state, files) in [("web@snap0", 2), ("web@snap2", 4), ("other", 3)] {
        let list = store.cowl(["export", state, "-"]).ok().stdout;
        let names = ["base-file", "file-0", "file-1", "file-2"];
        let there = |name: &&&str| list.windows(name.len()).any(|part| part == name.as_bytes());
        assert_eq!(names.iter().filter(there).count(), files, "{state}");
    }
}

#[test]
fn a_layer_modified_by_another_program_is_reported() {
    let store = store();
    let base = of_stack(&store, 4).join("tree/base-file");
    let before = std::fs::metadata(&base).unwrap().modified().unwrap();
    std::fs::write(&base, "BASE\n").unwrap();
    says(
        &store,
        &[],
        5,
        &["damaged", "modified by another program", "web"],
    );
    // With the old mtime, only a comparison of contents detects the change.
    let file = std::fs::File::options().write(true).open(&base).unwrap();
    file.set_modified(before).unwrap();
    says(&store, &[], 0, &[]);
    says(&store, &["--deep"], 5, &["content differs"]);
    // It cannot be repaired, and the repair changes nothing.
    says(&store, &["--deep", "--repair"], 5, &["content differs"]);
    std::fs::write(&base, "base\n").unwrap();
    file.set_modified(before).unwrap();
    says(&store, &["--deep"], 0, &[]);
    // A new file in a layer.
    let tree = of_stack(&store, 1).join("tree");
    std::fs::write(tree.join("new"), "").unwrap();
    says(&store, &["web"], 5, &["modified by another program"]);
    // The clone does not depend on that layer.
    says(&store, &["other"], 0, &[]);
}

#[test]
fn an_unreadable_manifest_is_reported() {
    let store = store();
    let (file, _) = manifest(&store, "other");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    says(&store, &[], 5, &["damaged", file.to_str().unwrap()]);
    // Only the unreadable manifest refers to the layers, which must not be treated as unused.
    says(&store, &["--repair"], 5, &["damaged"]);
    store.cowl(["gc"]).fails(5, &["container.json"]);
    std::fs::write(&file, whole).unwrap();
    is_right_again(&store, &[]);
}

#[test]
fn a_snapshot_with_a_missing_or_damaged_file_is_repaired() {
    let store = store();
    std::fs::remove_file(snapshot_file(&store, 1)).unwrap();
    std::fs::write(snapshot_file(&store, 2), "{}").unwrap();
    says(&store, &[], 5, &["web@snap1", "web@snap2"]);
    is_right_again(&store, &["rebuilt from its top layer"]);
    // The unreadable file is retained.
    let kept = std::fs::read_dir(store.path().join("damaged")).unwrap();
    let kept: Vec<_> = kept.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(kept.len(), 1);
    assert_eq!(std::fs::read(&kept[0]).unwrap(), b"{}");
    // The container manifest and the snapshot file describe different states.
    let layer = manifest(&store, "web").1["snapshots"][0]["layer"].clone();
    change(&snapshot_file(&store, 1), |file| {
        file["stack"][0] = layer.clone();
        file["stack"].as_array_mut().unwrap().truncate(1);
    });
    says(&store, &[], 5, &["web@snap1", "different states"]);
}

#[test]
fn a_layer_with_a_missing_or_damaged_file_is_repaired() {
    let store = store();
    std::fs::remove_file(of_stack(&store, 1).join("layer.json")).unwrap();
    std::fs::write(of_stack(&store, 4).join("layer.json"), "torn").unwrap();
    says(&store, &[], 5, &["layer.json"]);
    is_right_again(&store, &["rebuilt from a stack"]);
    // The layer still counts as the base, and not as the delta of a snapshot.
    let list = store.cowl(["list", "web", "--json"]).ok().json();
    assert!(list["snapshots"][0]["size"].as_u64().unwrap() > 0);
}

#[test]
fn a_missing_layer_is_reported() {
    let store = store();
    let tree = of_stack(&store, 2).join("tree");
    std::fs::rename(&tree, tree.with_file_name("elsewhere")).unwrap();
    says(&store, &[], 5, &["missing", "other, web depend on it"]);
    says(&store, &["--repair"], 5, &["missing"]);
    std::fs::rename(tree.with_file_name("elsewhere"), &tree).unwrap();
    is_right_again(&store, &[]);
}

#[test]
fn a_missing_work_directory_is_recreated() {
    let store = store();
    std::fs::remove_dir(of_stack(&store, 0).join("work")).unwrap();
    says(&store, &[], 5, &["work directory of web"]);
    is_right_again(&store, &["created, empty"]);
}

#[test]
fn impossible_counters_and_parents_are_repaired() {
    let store = store();
    let (file, _) = manifest(&store, "web");
    change(&file, |manifest| {
        manifest["next_snap"] = 1.into();
        manifest["snapshots"][1]["parent"] = "00000000-0000-4000-8000-000000000000".into();
    });
    says(
        &store,
        &[],
        5,
        &["snap1", "already assigned", "parent snapshot of web@snap1"],
    );
    is_right_again(&store, &["corrected"]);
    assert_eq!(store.cowl(["snapshot", "web"]).ok().out(), "snap3");
}

#[test]
fn duplicate_names_are_reported() {
    let store = store();
    let (file, _) = manifest(&store, "other");
    change(&file, |manifest| manifest["name"] = "web".into());
    says(&store, &[], 5, &["two containers are named web"]);
    change(&file, |manifest| manifest["name"] = "other".into());
    let (file, _) = manifest(&store, "web");
    change(&file, |manifest| {
        manifest["snapshots"][1]["name"] = "snap0".into()
    });
    says(&store, &[], 5, &["lists the snapshot snap0 twice"]);
}

#[test]
fn a_head_that_another_state_depends_on_is_reported() {
    let store = store();
    let (file, other) = manifest(&store, "other");
    let head = manifest(&store, "web").1["head"].clone();
    change(&file, |manifest| {
        manifest["stack"] = serde_json::json!([other["head"], head]);
    });
    says(
        &store,
        &[],
        5,
        &["web writes to the layer", "other, web depend"],
    );
}

#[test]
fn a_frozen_layer_that_a_mount_writes_to_is_reported() {
    let store = store();
    let tree = std::fs::File::open(of_stack(&store, 2).join("tree")).unwrap();
    rustix::fs::flock(&tree, rustix::fs::FlockOperation::LockExclusive).unwrap();
    says(&store, &[], 5, &["a mount writes to the layer"]);
}

#[test]
fn leftovers_are_reported_and_removed() {
    let store = store();
    let root = store.path();
    let id = "00000000-0000-4000-8000-000000000001";
    let web = manifest(&store, "web").0;
    std::fs::create_dir_all(root.join("layers").join(id).join("tree/deep")).unwrap();
    std::fs::create_dir_all(root.join("containers").join(id)).unwrap();
    let gone = "00000000-0000-4000-8000-000000000002";
    std::fs::create_dir_all(root.join("mnt").join(gone)).unwrap();
    std::fs::create_dir_all(root.join("run").join(gone)).unwrap();
    std::fs::create_dir_all(root.join("trash/layer-x")).unwrap();
    std::fs::write(root.join("locks/name-gone.lock"), "1 x\n").unwrap();
    std::fs::write(web.with_file_name("container.json.7.tmp"), "").unwrap();
    std::fs::write(
        web.with_file_name("snapshots").join(format!("{id}.json")),
        "{}",
    )
    .unwrap();
    std::fs::create_dir(root.join("layers/mine")).unwrap();
    let run = root
        .join("run")
        .join(web.parent().unwrap().file_name().unwrap());
    std::fs::create_dir_all(&run).unwrap();
    std::fs::write(run.join("state.json"), "torn").unwrap();
    let words = [
        "a layer that is not referenced",
        "whose creation was interrupted",
        "a file that is not referenced",
        "a directory of a removed container",
        "an unused lock file",
        "an object in the trash",
        "not created by cowl",
        "the mount of web is unreadable",
    ];
    says(&store, &[], 0, &words);
    says(&store, &["--repair"], 0, &["removed"]);
    // Files that cowl did not create are left in place.
    says(&store, &[], 0, &["not created by cowl"]);
    std::fs::remove_dir(root.join("layers/mine")).unwrap();
    is_right_again(&store, &[]);
    assert!(!root.join("layers").join(id).try_exists().unwrap());
}

#[test]
fn an_interrupted_change_is_completed_or_rolled_back() {
    let store = store();
    let (file, manifest) = manifest(&store, "web");
    let next = file.with_file_name("container.json.next");
    std::fs::copy(&file, &next).unwrap();
    let generation = manifest["generation"].as_u64().unwrap();
    change(&next, |manifest| {
        manifest["generation"] = (generation + 1).into()
    });
    says(&store, &[], 0, &["a change of web was interrupted"]);
    is_right_again(&store, &["completed or rolled back"]);
    assert!(!next.try_exists().unwrap());
}

#[test]
fn an_invalid_list_of_stores_is_reported() {
    let store = store();
    std::fs::write(store.path().join("stores.json"), "torn").unwrap();
    let check = store.cowl(["check"]).fails(5, &["stores.json"]);
    assert!(check.err().contains("2 containers"), "{}", check.report());
    std::fs::remove_file(store.path().join("stores.json")).unwrap();
    is_right_again(&store, &[]);
}

#[test]
fn a_destroyed_container_that_cannot_be_restored_is_reported() {
    let store = store();
    store.cowl(["destroy", "other", "--yes"]).ok();
    says(&store, &[], 0, &[]);
    let deleted = std::fs::read_dir(store.path().join("deleted")).unwrap();
    let deleted = deleted.last().unwrap().unwrap().path();
    std::fs::write(deleted.join("container.json"), "torn").unwrap();
    says(&store, &[], 5, &["in the trash", "container.json"]);
    store.cowl(["gc"]).fails(5, &["container.json"]);
    store.cowl(["gc", "--empty-trash"]).ok();
    says(&store, &[], 0, &[]);
}

#[test]
fn problems_are_printed_as_json() {
    let store = store();
    let tree = of_stack(&store, 2).join("tree");
    std::fs::write(tree.join("new"), "").unwrap();
    let check = store.cowl(["check", "--json"]);
    assert_eq!(check.code, 5, "{}", check.report());
    let json = &check.json()["stores"][0];
    assert_eq!(json["damaged"], true);
    assert_eq!(json["findings"][0]["level"], "damaged");
    assert_eq!(json["findings"][0]["about"], "layer");
    assert_eq!(json["findings"][0]["path"], tree.to_str().unwrap());
}

//! Pruning: snapshots that match a rule are retained, manual snapshots are retained, and the plan is printed first.

use cowl_tests::cowl::Store;

/// web with snap0 (by hand) and snap1 to snap5 (by a timer).
fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("base"), "base\n").unwrap();
    store.create("web", &source);
    store.cowl(["snapshot", "web"]).ok();
    for _ in 0..5 {
        store.cowl(["snapshot", "web", "--scheduled"]).ok();
    }
    store
}

#[test]
fn prune_applies_the_rules_of_the_command_line() {
    let store = store();
    let plan = store
        .cowl(["prune", "web", "--keep-last", "2", "--dry-run"])
        .ok();
    let lines: Vec<_> = plan.out().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 7, "{}", plan.report());
    assert!(
        lines[1].contains("keep") && lines[1].ends_with("manual"),
        "{lines:?}"
    );
    assert!(
        lines[2].contains("web@snap1") && lines[2].contains("remove"),
        "{lines:?}"
    );
    assert!(lines[6].ends_with("last"), "{lines:?}");
    assert_eq!(store.snapshots("web").len(), 6);
    store.cowl(["tag", "web@snap2", "release=1"]).ok();
    store.cowl(["protect", "web@snap3"]).ok();
    let json = store
        .cowl([
            "prune",
            "web",
            "--keep-last",
            "1",
            "--keep-tag",
            "release",
            "--json",
        ])
        .ok()
        .json();
    assert_eq!(json["removed"], serde_json::json!(["snap1", "snap4"]));
    assert_eq!(json["kept"][0]["why"][0], "manual");
    assert_eq!(store.snapshots("web"), ["snap0", "snap2", "snap3", "snap5"]);
    store
        .cowl([
            "prune",
            "web",
            "--keep-last",
            "1",
            "--manual",
            "--protected",
        ])
        .ok();
    assert_eq!(store.snapshots("web"), ["snap5"]);
    // All of one day.
    store
        .cowl(["prune", "web", "--keep-within", "1d", "--manual"])
        .ok();
    assert_eq!(store.snapshots("web"), ["snap5"]);
}

#[test]
fn nothing_is_pruned_without_a_rule() {
    let store = store();
    for args in [
        &["prune", "web"][..],
        &["prune", "web", "--manual"],
        &["prune", "web", "--keep-last", "0"],
        &["prune", "web", "--keep-last", "-1"],
        &["prune", "web", "--keep-last", "x"],
        &["prune", "web", "--keep-within", "soon"],
        &["prune"],
        &["prune", "web", "--all-containers"],
        &["prune", "--all-containers", "--keep-last", "1"],
        &["prune", "web", "--save"],
    ] {
        store.cowl(args).fails(2, &[]);
        assert_eq!(store.snapshots("web").len(), 6, "{args:?}");
    }
    // Containers without rules are not pruned.
    store.cowl(["prune", "--all-containers"]).ok();
    assert_eq!(store.snapshots("web").len(), 6);
}

#[test]
fn prune_applies_the_saved_rules_of_the_container() {
    let store = store();
    store.cowl(["clone", "web", "other"]).ok();
    for _ in 0..3 {
        store.cowl(["snapshot", "other", "--scheduled"]).ok();
    }
    let saved = [
        "prune",
        "web",
        "--keep-last",
        "3",
        "--keep-tag",
        "a=b",
        "--save",
    ];
    store.cowl(saved).ok();
    assert_eq!(store.snapshots("web").len(), 6);
    let rules = store.cowl(["prune", "web", "--show-settings"]).ok().out();
    assert_eq!(rules, "--keep-last 3 --keep-tag a=b");
    store.cowl(["prune", "--all-containers"]).ok();
    assert_eq!(store.snapshots("web"), ["snap0", "snap3", "snap4", "snap5"]);
    assert_eq!(store.snapshots("other").len(), 3);
    // Manual snapshots are pruned only with an option, by the same rules.
    store.cowl(["prune", "web", "--manual"]).ok();
    assert_eq!(store.snapshots("web"), ["snap3", "snap4", "snap5"]);
    store.cowl(["prune", "web", "--forget"]).ok();
    store.cowl(["prune", "web"]).fails(2, &["keep"]);
}

#[test]
fn du_reports_the_size_of_each_state() {
    let store = store();
    let manifest = |name: &str| store.cowl(["du", name, "--json"]).ok().json();
    let head = || {
        let containers = std::fs::read_dir(store.path().join("containers")).unwrap();
        let id = containers.map(|entry| {
            let file = entry.unwrap().path().join("container.json");
            let value: serde_json::Value =
                serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
            value["head"].as_str().unwrap().to_owned()
        });
        store
            .path()
            .join("layers")
            .join(id.last().unwrap())
            .join("tree")
    };
    std::fs::write(head().join("a"), vec![1; 200_000]).unwrap();
    std::fs::write(head().join("b"), vec![1; 200_000]).unwrap();
    store.cowl(["snapshot", "web"]).ok();
    store.restore("web", "snap0");
    let du = manifest("web");
    let states = du["states"].as_array().unwrap();
    let state = |name: &str| states.iter().find(|s| s["snapshot"] == name).unwrap();
    assert!(state("snap6")["unique"]["bytes"].as_u64().unwrap() >= 400_000);
    assert_eq!(state("snap6")["unique"]["inodes"], 3);
    assert_eq!(state("snap1")["unique"]["bytes"], 0);
    assert_eq!(du["base"]["inodes"], 2);
    let args = ["du", "web", "--json", "--remove", "snap0..snap2", "snap6"];
    let removal = store.cowl(args).ok().json();
    assert_eq!(removal["freed"]["layers"], 1);
    assert_eq!(removal["freed"]["bytes"], state("snap6")["unique"]["bytes"]);
    let all = store.cowl(["du", "--json"]).ok().json();
    assert_eq!(all["containers"][0]["total"], du["total"]);
    let table = store.cowl(["du", "web"]).ok().out();
    assert!(
        table.contains("(now)") && table.contains("UNIQUE"),
        "{table}"
    );
    store
        .cowl(["du", "web", "--remove", "snap9"])
        .fails(3, &["snap9"]);
    store.cowl(["du", "--remove", "snap6"]).fails(2, &[]);
}

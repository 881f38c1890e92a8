//! Tests of all output formats of `cowl diff` that need no mount.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use cowl_tests::cowl::Store;
use serde_json::{Value, json};

/// Creates the container web, with all kinds of changes since its snapshot snap0 that need no mount.
fn changed() -> Store {
    let store = Store::for_test();
    let base = store.beside("base");
    std::fs::create_dir_all(base.join("etc/apt")).unwrap();
    std::fs::write(base.join("etc/fstab"), "one\ntwo\n").unwrap();
    std::fs::write(base.join("etc/mode"), "x").unwrap();
    std::fs::write(base.join("thing"), "12345").unwrap();
    store.create("web", &base);
    store.ok(["snapshot", "web"]);
    let head = head_of_web(&store);
    let at = |path: &str| head.join(path);
    std::fs::create_dir_all(at("etc/apt")).unwrap();
    std::fs::write(at("etc/apt/new"), vec![b'n'; 2048]).unwrap();
    std::fs::write(at("etc/fstab"), "one\nTWO\nthree\n").unwrap();
    std::fs::write(at("etc/a b\n"), "").unwrap();
    std::fs::write(at("etc/mode"), "x").unwrap();
    let old = std::fs::metadata(base.join("etc/mode")).unwrap();
    let file = std::fs::File::options().write(true).open(at("etc/mode"));
    file.unwrap().set_modified(old.modified().unwrap()).unwrap();
    std::fs::set_permissions(at("etc/mode"), PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("etc", at("thing")).unwrap();
    store
}

fn head_of_web(store: &Store) -> PathBuf {
    let shown = store.cowl(["show", "web", "--json"]).ok().json();
    PathBuf::from(shown["head"].as_str().unwrap())
}

#[test]
fn diff_has_all_output_formats() {
    let store = changed();
    assert_eq!(
        store.ok(["diff", "web"]),
        "A /etc/a b\\n\nA /etc/apt/new\nM /etc/fstab\nM /etc/mode\nT /thing\n"
    );
    assert_eq!(
        store.ok(["diff", "web@snap0", "web", "--long"]),
        "   OLD      NEW  WHAT          PATH\n\
         A           0 B                /etc/a b\\n\n\
         A       2.0 KiB                /etc/apt/new\n\
         M  8 B     14 B  content,time  /etc/fstab\n\
         M  1 B      1 B  mode          /etc/mode\n\
         T  5 B      3 B                /thing\n"
    );
    assert_eq!(
        store.ok(["diff", "web", "--stat"]),
        "/etc    2 added, 2 modified  +2.0 KiB\n\
         /thing  1 type changed           -2 B\n\
         2 added (+2.0 KiB), 2 modified (+6 B), 1 type changed (-2 B); +2.0 KiB in total\n"
    );
    assert_eq!(
        store.ok(["diff", "web", "--name-only"]),
        "etc/a b\\n\netc/apt/new\netc/fstab\netc/mode\nthing\n"
    );
    assert_eq!(
        store.ok(["diff", "web", "--name-only", "-0"]),
        "etc/a b\n\0etc/apt/new\0etc/fstab\0etc/mode\0thing\0"
    );
    let output: Value = serde_json::from_str(&store.ok(["diff", "web", "--json"])).unwrap();
    assert_eq!(
        output,
        json!({
            "changes": [
                {"status": "A", "path": "etc/a b\n", "new_size": 0},
                {"status": "A", "path": "etc/apt/new", "new_size": 2048},
                {"status": "M", "path": "etc/fstab", "old_size": 8, "new_size": 14,
                 "what": ["content", "time"]},
                {"status": "M", "path": "etc/mode", "old_size": 1, "new_size": 1, "what": ["mode"]},
                {"status": "T", "path": "thing", "old_size": 5, "new_size": 3},
            ],
            "totals": {"A": 2, "M": 2, "D": 0, "T": 1, "R": 0, "old_size": 14, "new_size": 2066},
        })
    );
    let nothing = store.ok(["diff", "web@snap0", "web@snap0", "--stat"]);
    assert_eq!(nothing, "no differences\n");
    let coloured = store.ok(["--color", "always", "diff", "web", "--", "etc/fstab"]);
    assert_eq!(coloured, "\u{1b}[33mM\u{1b}[0m /etc/fstab\n");
}

#[test]
fn diff_is_limited_to_given_paths() {
    let store = changed();
    let only = |paths: &[&str]| store.ok([&["diff", "web@snap0", "web", "--"], paths].concat());
    assert_eq!(
        only(&["/etc/apt/", "etc/fstab"]),
        "A /etc/apt/new\nM /etc/fstab\n"
    );
    assert_eq!(only(&["thing"]), "T /thing\n");
    assert_eq!(
        only(&["etc/apt", "etc/apt/new", "./etc//apt"]),
        "A /etc/apt/new\n"
    );
    assert_eq!(only(&["/"]), store.ok(["diff", "web"]));
    assert_eq!(store.ok(["diff", "web", "--", "etc/mode"]), "M /etc/mode\n");
    let refused = |args: &[&str], code, word: &str| {
        store.cowl(args).fails(code, &[word]);
    };
    refused(&["diff", "web", "--", "etc/nothing"], 3, "etc/nothing");
    refused(&["diff", "web", "--", "../etc"], 2, "..");
    refused(&["diff", "web", "--stat", "--patch"], 2, "--stat");
    refused(&["diff", "web", "-0"], 2, "--name-only");
}

#[test]
fn patch_has_the_documented_format() {
    let store = changed();
    let patch = store.ok([
        "diff",
        "web",
        "--patch",
        "--",
        "etc/fstab",
        "etc/mode",
        "thing",
    ]);
    let expected = "\
diff --git a/etc/fstab b/etc/fstab
--- a/etc/fstab
+++ b/etc/fstab
@@ -1,2 +1,3 @@
 one
-two
+TWO
+three
diff --git a/etc/mode b/etc/mode
old mode 100644
new mode 100755
diff --git a/thing b/thing
deleted file mode 100644
--- a/thing
+++ /dev/null
@@ -1,1 +0,0 @@
-12345
\\ No newline at end of file
diff --git a/thing b/thing
new file mode 120000
--- /dev/null
+++ b/thing
@@ -0,0 +1,1 @@
+etc
\\ No newline at end of file
";
    assert_eq!(patch, expected);
}

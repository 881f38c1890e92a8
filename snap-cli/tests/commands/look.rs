//! Tests of `cowl ls` and `cowl cat`, which read a state without a mount.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};

use cowl_tests::cowl::Store;
use serde_json::{Value, json};

/// Creates the container web with its snapshot snap0, and changes a file.
fn web() -> Store {
    let store = Store::for_test();
    let base = store.beside("base");
    let at = |path: &str| base.join(path);
    std::fs::create_dir_all(at("usr/bin")).unwrap();
    std::fs::create_dir_all(at("etc")).unwrap();
    std::fs::write(at("etc/passwd"), "of the container\n").unwrap();
    std::fs::write(at("usr/bin/tool"), [0, 1, 255]).unwrap();
    std::fs::set_permissions(at("usr/bin/tool"), PermissionsExt::from_mode(0o755)).unwrap();
    symlink("usr/bin", at("bin")).unwrap();
    // Absolute targets, and ".." above the root, resolve inside the container.
    symlink("/etc/passwd", at("etc/absolute")).unwrap();
    symlink("../../../../../etc/passwd", at("etc/upwards")).unwrap();
    symlink("loop", at("etc/loop")).unwrap();
    std::fs::write(base.join(OsStr::from_bytes(b"odd:\xff")), "odd").unwrap();
    store.create("web", &base);
    store.ok(["snapshot", "web"]);
    let shown = store.cowl(["show", "web", "--json"]).ok().json();
    let head = std::path::PathBuf::from(shown["head"].as_str().unwrap());
    std::fs::create_dir_all(head.join("etc")).unwrap();
    std::fs::write(head.join("etc/passwd"), "changed\n").unwrap();
    store
}

#[test]
fn file_of_any_state_is_printed() {
    let store = web();
    assert_eq!(store.ok(["cat", "web:etc/passwd"]), "changed\n");
    let old = "of the container\n";
    assert_eq!(store.ok(["cat", "web@snap0:/etc/passwd"]), old);
    assert_eq!(store.ok(["cat", "web@snap0:etc/absolute"]), old);
    assert_eq!(store.ok(["cat", "web@snap0:etc/upwards"]), old);
    assert_eq!(store.cowl(["cat", "web:bin/tool"]).ok().stdout, [0, 1, 255]);
    assert_eq!(
        store.ok(["cat", "web:etc/passwd", "web@snap0:etc/passwd"]),
        format!("changed\n{old}")
    );
    let odd: [&OsStr; 2] = ["cat".as_ref(), OsStr::from_bytes(b"web@snap0:odd:\xff")];
    assert_eq!(store.cowl(odd).ok().stdout, b"odd");

    store.refused(
        ["cat", "web:etc"],
        1,
        &["web:etc", "is a directory", "cowl ls web"],
    );
    store.refused(["cat", "web:etc/no"], 3, &["web:etc/no", "no such path"]);
    store.refused(["cat", "web:etc/passwd/x"], 3, &["not a directory"]);
    store.refused(
        ["cat", "web:etc/loop"],
        1,
        &["too many levels of symbolic links"],
    );
    store.refused(["cat", "web"], 2, &["cowl cat web:PATH"]);
    store.refused(["cat", "web@snap7:etc"], 3, &["snap7"]);
    store.refused(["cat", ":etc"], 2, &["container name"]);
}

#[test]
fn directories_are_listed() {
    let store = web();
    assert_eq!(store.ok(["ls", "web"]), "bin\netc\nodd:\\xff\nusr\n");
    assert_eq!(store.ok(["ls", "web@snap0:bin"]), "tool\n");
    assert_eq!(store.ok(["ls", "web:/bin/tool"]), "tool\n");
    assert_eq!(
        store
            .ok(["ls", "web:etc/loop", "-l"])
            .matches("loop")
            .count(),
        2
    );
    assert_eq!(store.ok(["ls", "web:usr", "-R"]), "bin\nbin/tool\n");
    let long = store.ok(["ls", "web:bin/", "--long"]);
    assert!(long.starts_with("-rwxr-xr-x  0:0  3  20"), "{long}");
    assert!(long.ends_with("  tool\n"), "{long}");
    let link = store.ok(["ls", "web:bin", "-l"]);
    assert!(
        link.starts_with("lrwxrwxrwx") && link.ends_with("bin -> usr/bin\n"),
        "{link}"
    );
    let listing = store.cowl(["ls", "web:", "-R", "--json"]).ok().stdout;
    let listing: Value = serde_json::from_slice(&listing).unwrap();
    let find = |path: Value| {
        let entries = listing["entries"].as_array().unwrap();
        entries.iter().find(|entry| entry["path"] == path).unwrap()
    };
    let tool = find("usr/bin/tool".into());
    assert_eq!(
        (&tool["type"], &tool["mode"], &tool["size"]),
        (&json!("file"), &json!("0755"), &json!(3))
    );
    assert_eq!(find("bin".into())["target"], "usr/bin");
    assert_eq!(find(b"odd:\xff"[..].into())["size"], 3);
    store.refused(["ls", "web:nothing"], 3, &["web:nothing"]);
    store.refused(["ls", "wbe:etc"], 3, &["did you mean web?"]);
}

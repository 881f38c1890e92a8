//! `cowl ls` and `cowl cat`: a state is looked into without a mount.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

struct Store {
    dir: tempfile::TempDir,
}

impl Store {
    fn new() -> Self {
        let store = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let base = store.dir.path().join("base");
        let at = |path: &str| base.join(path);
        std::fs::create_dir_all(at("usr/bin")).unwrap();
        std::fs::create_dir_all(at("etc")).unwrap();
        std::fs::write(at("etc/passwd"), "of the container\n").unwrap();
        std::fs::write(at("usr/bin/tool"), [0, 1, 255]).unwrap();
        std::fs::set_permissions(at("usr/bin/tool"), PermissionsExt::from_mode(0o755)).unwrap();
        symlink("usr/bin", at("bin")).unwrap();
        // Absolute, and upwards over the root: inside the container all the same.
        symlink("/etc/passwd", at("etc/absolute")).unwrap();
        symlink("../../../../../etc/passwd", at("etc/upwards")).unwrap();
        symlink("loop", at("etc/loop")).unwrap();
        std::fs::write(base.join(OsStr::from_bytes(b"odd:\xff")), "odd").unwrap();
        store.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        store.ok(&["snapshot", "web"]);
        let shown: Value = serde_json::from_slice(&store.ok(&["show", "web", "--json"])).unwrap();
        let head = std::path::PathBuf::from(shown["head"].as_str().unwrap());
        std::fs::create_dir_all(head.join("etc")).unwrap();
        std::fs::write(head.join("etc/passwd"), "changed\n").unwrap();
        store
    }

    fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_cowl"))
            .arg("--store")
            .arg(self.dir.path().join("store"))
            .args(args)
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ok<S: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[S]) -> Vec<u8> {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        output.stdout
    }

    #[track_caller]
    fn text(&self, args: &[&str]) -> String {
        String::from_utf8(self.ok(args)).unwrap()
    }

    #[track_caller]
    fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        let output = self.run(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: no {word:?} in {said}");
        }
    }
}

#[test]
fn a_file_of_any_state_is_printed() {
    let store = Store::new();
    assert_eq!(store.text(&["cat", "web:etc/passwd"]), "changed\n");
    let old = "of the container\n";
    assert_eq!(store.text(&["cat", "web@snap0:/etc/passwd"]), old);
    assert_eq!(store.text(&["cat", "web@snap0:etc/absolute"]), old);
    assert_eq!(store.text(&["cat", "web@snap0:etc/upwards"]), old);
    assert_eq!(store.ok(&["cat", "web:bin/tool"]), [0, 1, 255]);
    assert_eq!(
        store.text(&["cat", "web:etc/passwd", "web@snap0:etc/passwd"]),
        format!("changed\n{old}")
    );
    let odd: [&OsStr; 2] = ["cat".as_ref(), OsStr::from_bytes(b"web@snap0:odd:\xff")];
    assert_eq!(store.ok(&odd), b"odd");

    store.refused(
        &["cat", "web:etc"],
        1,
        &["web:etc", "folder", "cowl ls web"],
    );
    store.refused(&["cat", "web:etc/no"], 3, &["web:etc/no", "no such path"]);
    store.refused(&["cat", "web:etc/passwd/x"], 3, &["not a folder"]);
    store.refused(&["cat", "web:etc/loop"], 1, &["too many symbolic links"]);
    store.refused(&["cat", "web"], 2, &["cowl cat web:PATH"]);
    store.refused(&["cat", "web@snap7:etc"], 3, &["snap7"]);
    store.refused(&["cat", ":etc"], 2, &["container name"]);
}

#[test]
fn folders_are_listed() {
    let store = Store::new();
    assert_eq!(store.text(&["ls", "web"]), "bin\netc\nodd:\\xff\nusr\n");
    assert_eq!(store.text(&["ls", "web@snap0:bin"]), "tool\n");
    assert_eq!(store.text(&["ls", "web:/bin/tool"]), "tool\n");
    assert_eq!(
        store
            .text(&["ls", "web:etc/loop", "-l"])
            .matches("loop")
            .count(),
        2
    );
    assert_eq!(store.text(&["ls", "web:usr", "-R"]), "bin\nbin/tool\n");
    let long = store.text(&["ls", "web:bin/", "--long"]);
    assert!(long.starts_with("-rwxr-xr-x  0:0  3  20"), "{long}");
    assert!(long.ends_with("  tool\n"), "{long}");
    let link = store.text(&["ls", "web:bin", "-l"]);
    assert!(
        link.starts_with("lrwxrwxrwx") && link.ends_with("bin -> usr/bin\n"),
        "{link}"
    );
    let told = store.ok(&["ls", "web:", "-R", "--json"]);
    let told: Value = serde_json::from_slice(&told).unwrap();
    let find = |path: Value| {
        let entries = told["entries"].as_array().unwrap();
        entries.iter().find(|entry| entry["path"] == path).unwrap()
    };
    let tool = find("usr/bin/tool".into());
    assert_eq!(
        (&tool["type"], &tool["mode"], &tool["size"]),
        (&json!("file"), &json!("0755"), &json!(3))
    );
    assert_eq!(find("bin".into())["target"], "usr/bin");
    assert_eq!(find(b"odd:\xff"[..].into())["size"], 3);
    store.refused(&["ls", "web:nothing"], 3, &["web:nothing"]);
    store.refused(&["ls", "wbe:etc"], 3, &["did you mean web?"]);
}

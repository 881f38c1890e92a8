//! Mistakes: each gets a message that names the cause, has its exit code, and changes nothing. Exit codes: 1 failed,
//! 2 usage, 3 no such container or snapshot, 4 busy or locked.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use cowl_tests::command::{run, run_command, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount;
use cowl_tests::programs;
use cowl_tests::tree::{self, Compare, Tree};

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

/// A store with the container `web`, unmounted, with the snapshot snap0 and a change after it.
fn store() -> Store {
    let store = Store::for_test();
    let base = store.scratch().make("base");
    sh_in(
        &base,
        "mkdir bin etc; cp /bin/busybox bin; ln -s busybox bin/sh; echo one > etc/file",
    )
    .ok();
    store.create("web", &base);
    store.cowl(["snapshot", "web"]).ok();
    store
        .cowl(["exec", "web", "--", "/bin/busybox", "touch", "/new"])
        .ok();
    store
}

/// The store's content, without lock files and logs, which hold no user data.
fn content(store: &Store) -> Tree {
    let mut tree = tree::read(store.path()).unwrap();
    tree.retain(|path, _| {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        !name.starts_with(b"lock") && !name.ends_with(b".lock") && !path.starts_with(b"run/")
    });
    tree
}

/// Runs a wrong command line; the store stays as it is.
#[track_caller]
fn refused<S: AsRef<OsStr> + Copy>(store: &Store, args: &[S], code: i32, words: &[&str]) {
    let before = content(store);
    store.cowl(args.iter().copied()).fails(code, words);
    let command = store.command(args.iter().copied());
    tree::assert_same(
        &format!("{command:?}"),
        &content(store),
        &before,
        Compare::HISTORY,
    );
    assert!(
        mount::below(store.path()).is_empty(),
        "{command:?} leaves something mounted"
    );
}

#[test]
fn unknown_names_are_refused() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    for args in [
        &["mount", "wab"][..],
        &["umount", "wab"],
        &["exec", "wab", "--", "true"],
        &["snapshot", "wab"],
        &["list", "wab"],
        &["status", "wab"],
        &["diff", "wab"],
        &["restore", "wab", "snap0"],
        &["clone", "wab", "new"],
        &["flatten", "wab"],
        &["export", "wab", "-"],
        &["destroy", "wab", "--yes"],
    ] {
        let code = if args.first() == Some(&"exec") {
            125
        } else {
            3
        };
        refused(&store, args, code, &["wab", "web"]);
    }
    for args in [
        &["restore", "web", "snap7"][..],
        &["restore", "web", "snap7", "new"],
        &["clone", "web@snap7", "new"],
        &["diff", "web@snap7", "web"],
        &["diff", "web", "web@snap7"],
        &["export", "web@snap7", "-"],
        &["flatten", "web", "snap7..snap0"],
    ] {
        refused(&store, args, 3, &["snap7"]);
    }
}

#[test]
fn existing_names_are_refused() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let base = store.scratch().join("base");
    let base = base.to_str().unwrap();
    refused(
        &store,
        &["create", "web", "--from", base],
        1,
        &["web", "exists"],
    );
    refused(&store, &["clone", "web", "web"], 1, &["web", "exists"]);
    refused(
        &store,
        &["restore", "web", "snap0", "web"],
        1,
        &["web", "exists"],
    );
}

#[test]
fn invalid_names_are_refused() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let base = store.scratch().join("base");
    let long = "n".repeat(65);
    let bad: [&[u8]; 14] = [
        b"a/b",
        b"/a",
        b"..",
        b"a..b",
        b".",
        b"",
        b".hidden",
        b"-dash",
        b"a b",
        b"a\nb",
        b"\xff\xfe",
        b"a@b",
        b"\xc3\xa9",
        long.as_bytes(),
    ];
    for name in bad {
        let name = OsStr::from_bytes(name);
        let dashes = OsStr::new("--");
        let from = OsStr::new("--from");
        let word = |text: &'static str| OsStr::new(text);
        refused(
            &store,
            &[word("create"), from, base.as_os_str(), dashes, name],
            2,
            &[],
        );
        refused(&store, &[word("clone"), dashes, word("web"), name], 2, &[]);
        refused(
            &store,
            &[word("restore"), dashes, word("web"), word("snap0"), name],
            2,
            &[],
        );
        if name != "a@b" {
            refused(&store, &[word("mount"), dashes, name], 2, &[]);
            refused(
                &store,
                &[word("destroy"), word("--yes"), dashes, name],
                2,
                &[],
            );
        }
        if name != "a@b" && name != "-dash" {
            refused(
                &store,
                &[word("restore"), dashes, word("web"), name],
                2,
                &[],
            );
        }
    }
    let longest = "n".repeat(64);
    store.create(&longest, &base);
    store.cowl(["destroy", &longest, "--yes"]).ok();
}

/// Tars that must not be unpacked, and good ones cut short.
const TARS: &str = r#"
import io, tarfile, sys
def make(name, entries):
    with tarfile.open(name, "w") as tar:
        for kind, path, target in entries:
            entry = tarfile.TarInfo(path)
            entry.type = kind
            entry.linkname = target
            data = b""
            if kind == tarfile.REGTYPE:
                data = b"x" * 3000
                entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
R, S, L, D = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
make("absolute.tar", [(R, "good", ""), (R, "/outside", "")])
make("dotdot.tar", [(R, "good", ""), (R, "a/../../outside", "")])
make("through.tar", [(S, "link", "/"), (R, "link/outside", "")])
make("throughdots.tar", [(S, "link", "../.."), (R, "link/outside", "")])
make("hardout.tar", [(L, "link", "../../outside")])
make("hardabsolute.tar", [(L, "link", "/etc/passwd")])
make("hardmissing.tar", [(L, "link", "absent")])
make("good.tar", [(D, "etc", ""), (R, "etc/file", ""), (R, "etc/other", "")])
data = open("good.tar", "rb").read()
open("cut.tar", "wb").write(data[:2000])
open("nothing.tar", "wb").write(b"")
open("text.tar", "wb").write(b"this is not a tar archive\n" * 100)
"#;

#[test]
fn unusable_sources_are_refused() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let dir = store.scratch().make("tars");
    std::fs::write(dir.join("make.py"), TARS).unwrap();
    sh_in(
        &dir,
        "python3 make.py; head -c 200000 /dev/urandom > noise; tar -cf noisy.tar noise
         gzip -k noisy.tar; zstd -q noisy.tar; xz -0 -k noisy.tar
         for f in noisy.tar.*; do head -c 150000 $f > cut-$f; done; mkfifo fifo",
    )
    .ok();
    for (file, words) in [
        ("absent.tar", &["absent.tar"][..]),
        ("hardout.tar", &["outside"]),
        ("hardabsolute.tar", &["passwd"]),
        ("hardmissing.tar", &["absent"]),
        ("cut.tar", &[]),
        ("nothing.tar", &[]),
        ("text.tar", &["tar"]),
        ("cut-noisy.tar.gz", &[]),
        ("cut-noisy.tar.zst", &[]),
        ("cut-noisy.tar.xz", &[]),
        ("make.py", &["tar"]),
    ] {
        let file = dir.join(file);
        refused(
            &store,
            &["create", "new", "--from", file.to_str().unwrap()],
            1,
            words,
        );
    }
    // As with GNU tar, these entries are in the new root filesystem: never outside of it.
    for name in ["absolute", "through", "throughdots"] {
        let file = dir.join(format!("{name}.tar"));
        store
            .cowl(["create", name, "--from", file.to_str().unwrap()])
            .ok();
        let outside = store.cowl(["cat", &format!("{name}:outside")]).ok();
        assert_eq!(outside.stdout.len(), 3000, "{name}");
        assert!(!Path::new("/outside").try_exists().unwrap(), "{name}");
        store.ok(["destroy", name, "--now", "--yes"]);
    }
    // An entry that would be outside is skipped.
    let file = dir.join("dotdot.tar");
    let args = ["create", "dotdot", "--from", file.to_str().unwrap()];
    let output = store.cowl(args).ok();
    assert!(
        output.err().contains("skipped an entry with '..'"),
        "{}",
        output.report()
    );
    store.ok(["cat", "dotdot:good"]);
    store.ok(["destroy", "dotdot", "--now", "--yes"]);
    let before = content(&store);
    for input in [
        &b""[..],
        b"neither",
        &std::fs::read(dir.join("cut.tar")).unwrap(),
    ] {
        store
            .cowl_with(["create", "new", "--from", "-"], input)
            .fails(1, &[]);
    }
    tree::assert_same(
        "standard input",
        &content(&store),
        &before,
        Compare::HISTORY,
    );
    let own = store.path().to_str().unwrap();
    refused(&store, &["create", "new", "--from", own], 1, &[]);
    assert!(!dir.join("outside").is_file() && !store.scratch().join("outside").is_file());
    // The valid archive from which the invalid ones were made.
    store.create("new", &dir.join("good.tar"));
}

/// Runs cowl as a user without any right.
fn as_nobody(store: &Store, args: &[&str]) -> Command {
    let program = store.scratch().join("cowl");
    if !program.is_file() {
        std::fs::copy(programs::cowl(), &program).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::set_permissions(&**store.scratch(), PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(program);
    command
        .arg("--store")
        .arg(store.path())
        .args(args)
        .env("HOME", "/nonexistent");
    command
}

#[test]
fn missing_permissions_are_reported() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let secret = store.scratch().make("secret");
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o700)).unwrap();
    let before = content(&store);
    for args in [
        &["list"][..],
        &["mount", "web"],
        &["snapshot", "web"],
        &["restore", "web", "snap0"],
        &["destroy", "web", "--yes"],
        &["create", "new", "--from", secret.to_str().unwrap()],
    ] {
        run_command(as_nobody(&store, args), b"").fails(1, &["permission denied"]);
    }
    tree::assert_same(
        "without permission",
        &content(&store),
        &before,
        Compare::HISTORY,
    );
}

#[test]
fn unusable_mount_points_are_refused() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let full = store.scratch().make("full");
    std::fs::write(full.join("file"), "").unwrap();
    for (path, words) in [
        (store.scratch().join("absent"), &["absent"][..]),
        (full.join("file"), &["file"]),
        (full, &["full", "empty"]),
    ] {
        refused(
            &store,
            &["mount", "web", "--at", path.to_str().unwrap()],
            1,
            words,
        );
    }
}

#[test]
fn a_missing_dev_fuse_is_reported() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let before = content(&store);
    for words in ["mount web", "exec web -- /bin/sh -c true"] {
        let script = format!(
            "mount -t tmpfs tmpfs /dev; mknod /dev/null c 1 3; exec '{}' --store '{}' {words}",
            programs::cowl().display(),
            store.path().display()
        );
        let args = ["-m", "--propagation", "private", "sh", "-euc", &script];
        let code = if words.starts_with("exec") { 125 } else { 1 };
        run("unshare", args).fails(code, &["/dev/fuse"]);
    }
    tree::assert_same(
        "without /dev/fuse",
        &content(&store),
        &before,
        Compare::HISTORY,
    );
    // The container can be mounted afterwards.
    assert!(store.mount("web").join("new").is_file());
}

#[test]
fn a_store_of_a_newer_version_is_refused() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    let file = store.path().join("store.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let format = json.get_mut("format").expect("a format number");
    *format = serde_json::json!(format.as_u64().unwrap() + 1);
    std::fs::write(&file, json.to_string()).unwrap();
    for args in [
        &["list"][..],
        &["mount", "web"],
        &["snapshot", "web"],
        &["destroy", "web", "--yes"],
    ] {
        refused(&store, args, 1, &["newer"]);
    }
}

#[test]
fn invalid_command_lines_are_usage_errors() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    for args in [
        &["frobnicate"][..],
        &["mount"],
        &["restore", "web"],
        &["create", "new"],
        &["snapshot", "web", "--frobnicate"],
        &["clone", "web"],
        &["flatten", "web", "snap0..snap0..snap0"],
        &["restore", "web@snap0", "snap0"],
        &["mount", "web@snap0@snap0"],
        &["exec", "web"],
    ] {
        let before = content(&store);
        let output = store.cowl(args);
        assert!(matches!(output.code, 2 | 125), "{}", output.report());
        assert!(!output.err().is_empty());
        tree::assert_same("usage", &content(&store), &before, Compare::HISTORY);
    }
    // Without a terminal to ask for confirmation on, nothing is destroyed unless `--yes` is given.
    let before = content(&store);
    let output = store.cowl(["destroy", "web"]);
    assert_ne!(output.code, 0, "{}", output.report());
    assert!(output.err().contains("--yes"), "{}", output.report());
    tree::assert_same("destroy", &content(&store), &before, Compare::HISTORY);
    assert!(Path::new(&programs::cowl()).is_file());
}

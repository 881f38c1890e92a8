//! Tests of the commands `export` and `import` that need no mount: containers round-trip, and invalid archives are
//! refused and leave nothing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use cowl::store::Store;
use cowl::store::name::{Address, ContainerName};
use cowl::tree::{digest, digest_dir};
use cowl_tests::command::{Output, run_command};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use serde_json::Value;

use crate::library;

struct World {
    scratch: Scratch,
    store: &'static str,
}

impl World {
    /// Creates a store with the container web, whose snapshots have all kinds of metadata, and a file written since.
    fn new() -> Self {
        let world = Self {
            scratch: Scratch::for_test(),
            store: "store",
        };
        let base = world.path("base");
        std::fs::create_dir_all(base.join("etc/deep")).unwrap();
        std::fs::write(base.join("etc/file"), "one").unwrap();
        std::fs::hard_link(base.join("etc/file"), base.join("etc/deep/alias")).unwrap();
        world.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        world.write("etc/first", "first");
        world.ok(&[
            "snapshot",
            "web",
            "-m",
            "a c\u{f6}mment\nin two lines",
            "--tag",
            "k=v",
        ]);
        world.write("etc/second", "second");
        world.ok(&["snapshot", "web", "--name", "named", "--protect"]);
        world.write("etc/first", "changed");
        world.ok(&["snapshot", "web", "--scheduled"]);
        // The number of a removed snapshot is not reused.
        world.ok(&["snapshot", "web"]);
        world.ok(&["rm", "web", "snap2"]);
        world.write("etc/lost", "before the restore");
        world.ok(&["restore", "web", "snap0"]);
        world.write("etc/head", "since");
        world
    }

    /// Runs commands on another store in the same directory.
    fn other(&self, store: &'static str, run: impl FnOnce(&Other<'_>)) {
        run(&Other { world: self, store });
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    fn open(&self, store: &str) -> Store {
        library::open(&self.path(store)).unwrap()
    }

    fn write(&self, path: &str, content: &str) {
        let store = self.open(self.store);
        let (_, record) = store.find(&ContainerName::parse("web").unwrap()).unwrap();
        let path = store.paths().layer_tree(record.body.head).join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn run_in(&self, store: &str, args: &[&str], input: &[u8]) -> Output {
        let mut command = Command::new(programs::cowl());
        command
            .arg("--store")
            .arg(self.path(store))
            .args(args)
            .current_dir(&*self.scratch);
        run_command(command, input)
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> Vec<u8> {
        self.run_in(self.store, args, b"").ok().stdout
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(&*self.scratch).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

struct Other<'w> {
    world: &'w World,
    store: &'static str,
}

impl Other<'_> {
    #[track_caller]
    fn ok(&self, args: &[&str]) -> Vec<u8> {
        self.ok_with(args, b"")
    }

    #[track_caller]
    fn ok_with(&self, args: &[&str], input: &[u8]) -> Vec<u8> {
        self.world.run_in(self.store, args, input).ok().stdout
    }

    #[track_caller]
    fn refused(&self, args: &[&str], input: &[u8], code: i32, words: &[&str]) {
        let output = self.world.run_in(self.store, args, input);
        let message = output.stderr.escape_ascii().to_string();
        assert_eq!(output.code, code, "{args:?}: {message}");
        for word in words {
            assert!(
                message.contains(word),
                "{args:?}: no {word:?} in: {message}"
            );
        }
        for dir in ["layers", "containers", "trash"] {
            let path = self.world.path(self.store).join(dir);
            if let Ok(mut left) = std::fs::read_dir(path) {
                assert!(left.next().is_none(), "{args:?} left something in {dir}");
            }
        }
        if let Ok(locks) = std::fs::read_dir(self.world.path(self.store).join("locks")) {
            for lock in locks {
                let name = lock.unwrap().file_name().into_string().unwrap();
                assert!(
                    !name.starts_with("making") && !name.starts_with("name-"),
                    "{name}"
                );
            }
        }
    }
}

/// Parses the list of a container, without its id and the sizes of its layers.
fn listed(bytes: &[u8]) -> Value {
    let mut list: Value = serde_json::from_slice(bytes).unwrap();
    list["id"].take();
    for snapshot in list["snapshots"].as_array_mut().unwrap() {
        for key in ["size", "inodes", "unique", "shared"] {
            if let Some(value) = snapshot.get_mut(key) {
                value.take();
            }
        }
    }
    list
}

/// Returns the digests of a container and of its snapshots.
fn digests(store: &Store, name: &str) -> Vec<(String, String)> {
    let address = Address::parse(name).unwrap();
    let (id, record) = store.find(&address.container).unwrap();
    let digest = |stack: &[_]| {
        digest(&store.view(stack).unwrap(), &mut |_| {})
            .unwrap()
            .to_string()
    };
    let mut all = vec![("head".to_owned(), digest(&record.body.stack))];
    for snapshot in &record.body.snapshots {
        let stack = store.snapshot(id, snapshot.id).unwrap().stack;
        all.push((snapshot.name.to_string(), digest(&stack)));
    }
    all
}

#[test]
fn container_round_trips_with_snapshots() {
    let world = World::new();
    for file in ["whole.tar", "whole.tar.zst", "whole.tar.gz"] {
        world.ok(&["export", "web", "--with-snapshots", file]);
    }
    let streamed = world.ok(&["export", "web", "--with-snapshots", "-"]);
    assert_eq!(streamed, std::fs::read(world.path("whole.tar")).unwrap());
    let list = listed(&world.ok(&["list", "web", "--json"]));
    assert_eq!(list["snapshots"].as_array().unwrap().len(), 4, "{list:#}");
    let want = digests(&world.open("store"), "web");
    let pairs = ["snap0..named", "named..snap1", "snap0..auto0"];
    let diff = |args: [&str; 3]| args.map(str::to_owned);
    let diffs: Vec<_> = pairs
        .iter()
        .map(|pair| {
            let (a, b) = pair.split_once("..").unwrap();
            diff(["diff", &format!("web@{a}"), &format!("web@{b}")])
        })
        .collect();
    let diff_outputs = |run: &dyn Fn(&[&str]) -> Vec<u8>| -> Vec<Vec<u8>> {
        diffs
            .iter()
            .map(|args| run(&[&args[0], &args[1], &args[2]]))
            .collect()
    };
    let want_diffs = diff_outputs(&|args| world.ok(args));
    for (store, source) in [
        ("one", "whole.tar"),
        ("two", "whole.tar.zst"),
        ("three", "whole.tar.gz"),
        ("four", "-"),
    ] {
        world.other(store, |other| {
            other.ok_with(&["import", source], &streamed);
            assert_eq!(
                listed(&other.ok(&["list", "web", "--json"])),
                list,
                "{source}"
            );
            assert_eq!(digests(&world.open(store), "web"), want, "{source}");
            assert_eq!(diff_outputs(&|args| other.ok(args)), want_diffs, "{source}");
            // Numbering continues.
            assert_eq!(other.ok(&["snapshot", "web"]), b"snap3\n");
            assert_eq!(digests(&world.open(store), "web")[0], want[0]);
            other.ok(&["restore", "web", "named"]);
        });
    }
    // Import into the original store under another name.
    world.ok(&["import", "whole.tar", "web2"]);
    assert_eq!(digests(&world.open("store"), "web2"), want);
    world.ok(&["destroy", "web", "--yes", "--now", "--protected"]);
    assert_eq!(digests(&world.open("store"), "web2"), want);
    world.ok(&["import", "whole.tar"]);
    assert_eq!(digests(&world.open("store"), "web"), want);
}

#[test]
fn existing_name_is_refused_with_a_hint() {
    let world = World::new();
    world.ok(&["export", "web", "--with-snapshots", "whole.tar"]);
    let before = digests(&world.open("store"), "web");
    let output = world.run_in("store", &["import", "whole.tar"], b"");
    let message = output.stderr.escape_ascii().to_string();
    assert_eq!(output.code, 1, "{message}");
    assert!(message.contains("cowl import FILE NAME"), "{message}");
    assert_eq!(digests(&world.open("store"), "web"), before);
}

#[test]
fn invalid_archives_are_refused_and_leave_nothing() {
    let world = World::new();
    let whole = world.ok(&["export", "web", "--with-snapshots", "-"]);
    world.ok(&["export", "web", "plain.tar"]);
    std::fs::write(world.path("text"), "some text").unwrap();
    world.other("new", |other| {
        other.refused(&["import", "plain.tar"], b"", 2, &["NAME"]);
        other.refused(&["import", "nowhere.tar"], b"", 1, &["nowhere.tar"]);
        other.refused(&["import", "text", "x"], b"", 1, &["not a tar"]);
        other.refused(&["import", "-", "bad/name"], &whole, 2, &["bad/name"]);
        other.refused(
            &["create", "x", "--from", "-"],
            &whole,
            1,
            &["whole container", "cowl import"],
        );
        other.refused(
            &["import", "-"],
            &whole[..whole.len() / 2],
            1,
            &["truncated"],
        );
        other.refused(&["import", "-"], &[], 1, &["empty"]);
        // The checksum in the manifest itself.
        let text = b"\"next_snap\": 3";
        let at = whole
            .windows(text.len())
            .position(|part| part == text)
            .unwrap();
        let mut lies = whole.clone();
        lies[at + text.len() - 1] = b'0';
        other.refused(&["import", "-"], &lies, 1, &["checksum"]);
        // The content of a file.
        let at = whole
            .windows(7)
            .rposition(|part| part == b"changed")
            .unwrap();
        let mut lies = whole.clone();
        lies[at] = b'C';
        other.refused(&["import", "-"], &lies, 1, &["wrong checksum"]);
        // A newer version.
        let mut newer = whole.clone();
        let text = b"\"format\": 1";
        let at = newer
            .windows(text.len())
            .position(|part| part == text)
            .unwrap();
        newer[at + text.len() - 1] = b'9';
        other.refused(
            &["import", "-"],
            &newer,
            1,
            &["format 9", "a newer version of cowl"],
        );
        // The valid archive can still be imported.
        other.ok_with(&["import", "-"], &whole);
    });
}

#[test]
fn state_is_exported_as_a_directory() {
    let world = World::new();
    world.ok(&["export", "web@named", "--dir", "out"]);
    let want = &digests(&world.open("store"), "web")[2];
    assert_eq!(want.0, "named");
    let got = digest_dir(&world.path("out"), &mut |_| {}).unwrap();
    assert_eq!(got.to_string(), want.1);
    let names = world.names();
    // Existing targets are not changed.
    world
        .run_in("store", &["export", "web", "--dir", "out"], b"")
        .fails(1, &[]);
    std::fs::write(world.path("file"), "x").unwrap();
    world
        .run_in("store", &["export", "web", "--dir", "file"], b"")
        .fails(1, &[]);
    std::fs::remove_file(world.path("file")).unwrap();
    assert_eq!(world.names(), names, "something was left");
    std::fs::create_dir(world.path("empty")).unwrap();
    world.ok(&["export", "web", "--dir", "empty"]);
    assert!(world.path("empty/etc/head").is_file());
    // Import of the directory.
    world.ok(&["import", "out", "again"]);
    assert_eq!(&digests(&world.open("store"), "again")[0].1, &want.1);
}

/// A file is replaced by a complete export only. A directory is never replaced.
#[test]
fn an_existing_file_is_replaced_by_a_complete_export_only() {
    let world = World::new();
    // Numbers that compression cannot make smaller than the limit below.
    let mut state = 1_u64;
    let numbers = (0..1 << 16).map(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        format!("{state:016x}")
    });
    world.write("etc/large", &numbers.collect::<String>());
    world.ok(&["export", "web@named", "out.tar"]);
    let first = std::fs::read(world.path("out.tar")).unwrap();
    let names = world.names();
    for form in [&[][..], &["--with-snapshots"], &["--oci"]] {
        // The size limit makes a write of the export fail halfway.
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "trap '' XFSZ; ulimit -f 128; exec \"$@\"",
                "sh",
                programs::cowl().to_str().unwrap(),
                "--store",
                world.path("store").to_str().unwrap(),
                "export",
                "web",
                "out.tar",
            ])
            .args(form)
            .current_dir(&*world.scratch);
        run_command(command, b"").fails(1, &[]);
        let left = std::fs::read(world.path("out.tar")).unwrap();
        assert!(left == first, "{form:?}: the old file is not retained");
        assert_eq!(world.names(), names, "{form:?}: something was left");
    }
    world.ok(&["export", "web", "out.tar"]);
    assert!(std::fs::read(world.path("out.tar")).unwrap() != first);
    std::fs::create_dir_all(world.path("dir.tar/full")).unwrap();
    for form in ["--dir", "--oci"] {
        world
            .run_in("store", &["export", "web", "dir.tar", form], b"")
            .fails(1, &[]);
    }
    assert!(world.path("dir.tar/full").is_dir());
}

fn unpack(tar: &Path) -> Vec<String> {
    let output = Command::new("tar").arg("-tf").arg(tar).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let names = String::from_utf8(output.stdout).unwrap();
    names.lines().map(str::to_owned).collect()
}

#[test]
fn changes_are_exported_as_an_image_layer() {
    let world = World::new();
    world.ok(&["export", "web@named", "--delta", "d.tar"]);
    assert_eq!(
        unpack(&world.path("d.tar")),
        ["./", "./etc/", "./etc/second"]
    );
    // Relative to its parent, which is snap0 after the restore.
    world.ok(&["export", "web", "--delta", "d.tar"]);
    assert_eq!(unpack(&world.path("d.tar")), ["./", "./etc/", "./etc/head"]);
    world.ok(&["export", "web@snap0..snap1", "--delta", "d.tar"]);
    assert_eq!(
        unpack(&world.path("d.tar")),
        ["./", "./etc/", "./etc/first", "./etc/second"]
    );
    world.ok(&["export", "web@named..snap0", "--delta", "d.tar"]);
    assert_eq!(
        unpack(&world.path("d.tar")),
        ["./", "./etc/", "./etc/.wh.second"]
    );
    world.ok(&["export", "web@..snap0", "--delta", "d.tar.gz"]);
    assert_eq!(
        unpack(&world.path("d.tar.gz")),
        ["./", "./etc/", "./etc/first"]
    );
    for (args, words) in [
        (["export", "web@snap0..nope", "--delta", "x.tar"], "nope"),
        (["export", "web@snap0..named", "--dir", "x"], "snap0..named"),
        (["export", "web@snap0", "--with-snapshots", "x.tar"], "web"),
        (["export", "web", "--delta", "x.zip"], ".tar"),
    ] {
        let output = world.run_in("store", &args, b"");
        let message = output.stderr.escape_ascii().to_string();
        assert!(matches!(output.code, 2 | 3), "{args:?}: {message}");
        assert!(message.contains(words), "{args:?}: {message}");
    }
    assert!(world.names().iter().all(|name| !name.starts_with('x')));
}

#[test]
fn flatten_into_the_base_changes_no_content() {
    let world = World::new();
    world.ok(&["clone", "web@named", "other"]);
    let (web, other) = (
        digests(&world.open("store"), "web"),
        digests(&world.open("store"), "other"),
    );
    world.ok(&["flatten", "web", "--base"]);
    assert_eq!(digests(&world.open("store"), "web"), web);
    assert_eq!(digests(&world.open("store"), "other"), other);
    // Its initial content is in the base now.
    world.ok(&["diff", "web"]);
    world.ok(&["diff", "web@snap0"]);
    world.ok(&["flatten", "other", "--base"]);
    world.ok(&["protect", "web@named", "--off"]);
    world.ok(&["rm", "web", "--all", "--yes"]);
    world.ok(&["diff", "web"]);
    world.ok(&["diff", "other"]);
    assert_eq!(digests(&world.open("store"), "web")[0], web[0]);
    let layers = std::fs::read_dir(world.path("store/layers"))
        .unwrap()
        .count();
    assert_eq!(layers, 4, "two containers, each a head and a base");
    world
        .run_in("store", &["flatten", "web", "snap0..", "--base"], b"")
        .fails(2, &[]);
}

/// A container image is a tar archive or a directory, too, but it does not contain a root filesystem directly.
#[test]
fn images_are_not_accepted_as_root_filesystems() {
    let world = World::new();
    world.ok(&["export", "web", "--oci", "layout"]);
    world.ok(&["export", "web", "--oci", "oci.tar"]);
    let saved = world.path("saved");
    std::fs::create_dir(&saved).unwrap();
    let manifest = r#"[{"Config":"c.json","RepoTags":["x:latest"],"Layers":["l/layer.tar"]}]"#;
    std::fs::write(saved.join("manifest.json"), manifest).unwrap();
    std::fs::write(saved.join("c.json"), "{}").unwrap();
    std::fs::create_dir(saved.join("l")).unwrap();
    std::fs::write(saved.join("l/layer.tar"), [0; 1024]).unwrap();
    let pack = |args: &[&str]| {
        let done = Command::new("tar")
            .args(args)
            .current_dir(&*world.scratch)
            .output();
        assert!(done.unwrap().status.success());
    };
    pack(&[
        "-czf",
        "oci.tar.gz",
        "-C",
        "layout",
        "oci-layout",
        "index.json",
        "blobs",
    ]);
    pack(&["-cf", "saved.tar", "-C", "saved", "."]);
    let hint = ["not a root filesystem", "oci-archive:FILE", "--force"];
    world.other("other", |other| {
        for source in ["oci.tar", "oci.tar.gz", "saved.tar"] {
            // An image is not read from a pipe.
            let archive = std::fs::read(world.path(source)).unwrap();
            other.refused(&["create", "c", "--from", "-"], &archive, 1, &hint);
            other.refused(&["import", "-", "c"], &archive, 1, &hint);
        }
        for source in ["saved", "docker-archive:saved.tar"] {
            let config = ["the config of the image"];
            other.refused(&["create", "c", "--from", source], b"", 1, &config);
            other.refused(&["import", source, "c"], b"", 1, &config);
        }
        for (n, source) in ["layout", "oci.tar.gz", "saved.tar"].iter().enumerate() {
            let (one, two) = (format!("one{n}"), format!("two{n}"));
            other.ok(&["create", &one, "--force", "--from", source]);
            other.ok(&["import", source, &two, "--force"]);
        }
        let names = other.ok(&["ls", "one0"]);
        assert_eq!(names.as_slice(), b"blobs\nindex.json\noci-layout\n");
    });
    // A root filesystem may contain such files, too.
    std::fs::create_dir(world.path("layout/etc")).unwrap();
    pack(&["-cf", "root.tar", "-C", "layout", "."]);
    world.other("other", |other| {
        other.ok(&["create", "rootfs", "--from", "root.tar"]);
    });
}

/// Programs recreate the layers of images from their files, and compare the bytes.
#[test]
fn layers_of_images_have_no_sparse_entries() {
    let world = World::new();
    world.write("etc/sparse", "");
    let store = world.open(world.store);
    let (_, record) = store.find(&ContainerName::parse("web").unwrap()).unwrap();
    let file = store
        .paths()
        .layer_tree(record.body.head)
        .join("etc/sparse");
    std::fs::File::options()
        .write(true)
        .open(file)
        .unwrap()
        .set_len(3 << 20)
        .unwrap();
    drop(store);
    world.ok(&["export", "web", "--delta", "delta.tar"]);
    world.ok(&["export", "web", "--oci", "layout"]);
    world.ok(&["export", "web", "plain.tar"]);
    let is_sparse = |data: &[u8]| data.windows(10).any(|part| part == b"GNU.sparse");
    assert!(is_sparse(&std::fs::read(world.path("plain.tar")).unwrap()));
    let delta = std::fs::read(world.path("delta.tar")).unwrap();
    assert!(delta.len() > 3 << 20 && !is_sparse(&delta));
    let mut large = 0;
    for blob in std::fs::read_dir(world.path("layout/blobs/sha256")).unwrap() {
        let packed = std::fs::read(blob.unwrap().path()).unwrap();
        let mut data = Vec::new();
        use std::io::Read as _;
        if flate2::read::GzDecoder::new(&packed[..])
            .read_to_end(&mut data)
            .is_ok()
        {
            assert!(!is_sparse(&data));
            large += usize::from(data.len() > 3 << 20);
        }
    }
    assert_eq!(large, 1);
}

//! Export and import: whole containers through a pipe, directories, changes as image layers; and merges of layers
//! that other containers use.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount::wait_until;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

/// Creates and mounts a container with files of every kind, and with snapshots after renames, removals, replaced
/// directories, hard links, holes and devices. The last changes are not in a snapshot.
fn container(store: &Store) -> PathBuf {
    let base = store.scratch().make("base");
    sh_in(
        &base,
        "mkdir -p etc/old/deep usr/gone srv; echo one > etc/file; ln etc/file etc/old/alias
         echo deep > etc/old/deep/file; echo gone > usr/gone/file; echo m > meta; truncate -s 3M hole
         echo end >> hole; mkfifo fifo; mknod null c 1 3; ln -s nowhere dangling
         chown 1000:1001 srv; chmod 2775 srv; setfattr -n user.note -v kept srv
         setfattr -n trusted.note -v kept etc/file; touch -d '2001-02-03 04:05:06.789' meta
         touch \"$(printf 'bad\\377')\" '.wh.only-a-name'",
    )
    .ok();
    store.create("web", &base);
    let at = store.mount("web");
    sh_in(
        &at,
        "mv etc/old etc/new; rm -r usr/gone; chmod 600 meta; echo x >> srv/log",
    )
    .ok();
    store
        .cowl(["snapshot", "web", "-m", "renamed", "--tag", "a=b"])
        .ok();
    sh_in(
        &at,
        "rm -r etc/new/deep; mkdir etc/new/deep; echo fresh > etc/new/deep/f; mv meta etc/meta2
         mknod zero c 0 0; ln etc/file srv/third",
    )
    .ok();
    store.cowl(["snapshot", "web", "--protect"]).ok();
    sh_in(&at, "mv etc/new usr/; echo changed > etc/file; rm fifo").ok();
    store.cowl(["snapshot", "web"]).ok();
    sh_in(&at, "echo since > srv/since; mv usr/new/deep usr/deep").ok();
    at
}

/// Returns the tree of `NAME[@SNAP]`, through a mount of a clone.
fn shown(store: &Store, state: &str) -> Tree {
    store.cowl(["clone", state, "look"]).ok();
    let at = store.mount("look");
    let tree = tree::read(&at).unwrap();
    store.cowl(["umount", "look"]).ok();
    store.cowl(["destroy", "look", "--yes"]).ok();
    store.cowl(["gc", "--empty-trash"]).ok();
    tree
}

const STATES: [&str; 4] = ["web", "web@snap0", "web@snap1", "web@snap2"];

fn assert_tree(label: &str, got: &Tree, want: &Tree) {
    tree::assert_same(label, got, want, Compare::SAME);
}

#[test]
fn a_mounted_container_is_piped_into_another_store() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let at = container(&store);
    let other = Store::in_scratch(Scratch::new("exchange-other"));
    let before = tree::read(&at).unwrap();
    let mut out = store
        .command(["export", "web", "--with-snapshots", "-"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let into = other
        .command(["import", "-"])
        .stdin(out.stdout.take().unwrap())
        .output()
        .unwrap();
    assert!(into.status.success(), "{into:?}");
    assert!(out.wait().unwrap().success());
    // The source continues to run and is unchanged.
    assert_tree("the source", &tree::read(&at).unwrap(), &before);
    sh_in(&at, "echo more > more; rm more; touch -d @0 .").ok();
    for state in STATES.iter().skip(1) {
        assert_tree(state, &shown(&other, state), &shown(&store, state));
    }
    let list = |store: &Store| {
        let format = "{name} {created} {kind} {comment} {parent} {protected} {tags}";
        store.cowl(["list", "web", "--format", format]).ok().out()
    };
    assert_eq!(list(&other), list(&store));
    // Renames are detected by the inode numbers, which a copy-up preserves.
    for pair in [
        ["web@snap0", "web@snap1"],
        ["web@snap1", "web@snap2"],
        ["web@snap0", "web@snap2"],
    ] {
        let diff = |store: &Store| store.cowl(["diff", pair[0], pair[1]]).ok().out();
        let output = diff(&store);
        assert!(output.contains("R "), "{output}");
        assert_eq!(diff(&other), output);
    }
    // The imported container can be mounted, written and restored.
    let new = other.mount("web");
    assert_tree("the head", &tree::read(&new).unwrap(), &before);
    sh_in(&new, "echo x > x; mv usr/deep back").ok();
    assert_eq!(other.cowl(["snapshot", "web"]).ok().out(), "snap3");
    other.restore("web", "snap1");
    store.cowl(["umount", "web"]).ok();
    other.cowl(["umount", "web"]).ok();
}

#[test]
fn a_directory_with_all_changes_applied_equals_the_mount() {
    let mut needs = NEEDS.to_vec();
    needs.push(Need::Program("tar"));
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let at = container(&store);
    store.cowl(["umount", "web"]).ok();
    for (number, state) in STATES.iter().enumerate() {
        let out = store.scratch().join(format!("out{number}"));
        store
            .cowl(["export", state, "--dir", out.to_str().unwrap()])
            .ok();
        assert_tree(state, &tree::read(&out).unwrap(), &shown(&store, state));
    }
    // Apply the layers as a tool without knowledge of cowl does.
    let dir = store.scratch().join("out1");
    for state in ["web@snap1", "web@snap2", "web"] {
        let delta = store.scratch().join("delta.tar");
        store
            .cowl(["export", state, "--delta", delta.to_str().unwrap()])
            .ok();
        apply(&dir, &delta);
        assert_tree(state, &tree::read(&dir).unwrap(), &shown(&store, state));
    }
    drop(at);
}

#[test]
fn podman_loads_an_exported_image_unchanged() {
    let mut needs = NEEDS.to_vec();
    needs.push(Need::Program("podman"));
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    container(&store);
    store.cowl(["umount", "web"]).ok();
    // A name that image layers reserve for deletions: the export is refused with a message.
    let image = store.scratch().join("image.tar");
    let image = image.to_str().unwrap();
    let refused = store.cowl(["export", "web", "--oci", image]);
    refused.fails(1, &[".wh.only-a-name"]);
    assert!(!Path::new(image).try_exists().unwrap());
    let at = store.mount("web");
    sh_in(&at, "rm .wh.only-a-name zero").ok();
    store.cowl(["umount", "web"]).ok();
    store.cowl(["flatten", "web", "--base"]).ok();
    store.cowl(["clone", "web", "new"]).ok();
    let at = store.mount("new");
    sh_in(
        &at,
        // Podman does not change the attributes of a directory that is replaced.
        "truncate -s 2M hole; echo end >> hole; mv usr/new etc/again; rm -r srv; mkdir srv; setfattr -n user.note -v kept srv; echo s > srv/s",
    )
    .ok();
    store.cowl(["snapshot", "new"]).ok();
    sh_in(&at, "rm dangling; echo y > y").ok();
    store.cowl(["umount", "new"]).ok();
    store.cowl(["export", "new", "--oci", image]).ok();
    let podman = |args: &[&str]| {
        let (root, run) = (store.scratch().join("root"), store.scratch().join("run"));
        let mut command = std::process::Command::new("podman");
        command.arg("--root").arg(root).arg("--runroot").arg(run);
        command.args(["--storage-driver", "vfs"]).args(args);
        cowl_tests::command::run_command(command, b"")
    };
    podman(&["load", "-q", "-i", image]).ok();
    let id = podman(&["images", "-q"]).ok().out();
    let mount_point = PathBuf::from(podman(&["image", "mount", &id]).ok().out());
    let mut got = tree::read(&mount_point).unwrap();
    let mut want = shown(&store, "new");
    // Podman drops trusted.* xattrs, and sets the attributes of the root directory itself.
    for tree in [&mut got, &mut want] {
        tree.remove(&b""[..]);
        for entry in tree.values_mut() {
            entry
                .xattrs
                .retain(|name, _| !name.starts_with(b"trusted."));
        }
    }
    podman(&["image", "unmount", &id]).ok();
    // Podman recreates the layers from their files, and compares the digests.
    let again = store.scratch().join("again.tar");
    let again = again.to_str().unwrap();
    podman(&["save", "-q", "--format", "oci-archive", "-o", again, &id]).ok();
    podman(&["rmi", "-a", "-f"]).ok();
    assert_tree("the image", &got, &want);
}

/// Unpacks an image layer: first the deletions, then the entries.
fn apply(dir: &Path, delta: &Path) {
    let script = "
        tar -tf \"$1\" | grep -E '(^|/)\\.wh\\.' > ../marks || true
        while IFS= read -r mark; do
            dir=${mark%/*}; name=${mark##*/.wh.}
            case ${mark##*/} in
            .wh..wh..opq) find \"$dir\" -mindepth 1 -delete;;
            *) rm -rf \"$dir/$name\";;
            esac
        done < ../marks
        tar --numeric-owner --acls --xattrs --xattrs-include='*' --exclude='.wh.*' -xpf \"$1\"";
    let args = [
        "-euc".as_ref(),
        script.as_ref(),
        "sh".as_ref(),
        delta.as_os_str(),
    ];
    let mut command = std::process::Command::new("sh");
    command.args(args).current_dir(dir);
    cowl_tests::command::run_command(command, b"").ok();
}

#[test]
fn layers_are_merged_while_a_clone_above_them_is_written() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let at = container(&store);
    store.cowl(["clone", "web@snap1", "clone"]).ok();
    let clone = store.mount("clone");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (clone, stop) = (clone.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) || rounds < 20 {
                let file = clone.join(format!("srv/file{}", rounds % 10));
                std::fs::write(&file, rounds.to_string()).unwrap();
                std::fs::write(clone.join("etc/file"), rounds.to_string()).unwrap();
                std::fs::rename(&file, clone.join("etc/moved")).unwrap();
                assert_eq!(
                    std::fs::read(clone.join("etc/new/deep/f")).unwrap(),
                    b"fresh\n"
                );
                rounds += 1;
            }
        })
    };
    let before = tree::read(&at).unwrap();
    let want: Vec<Tree> = STATES
        .iter()
        .skip(1)
        .map(|state| shown(&store, state))
        .collect();
    for args in [
        &["flatten", "web", "snap0..snap2"][..],
        &["flatten", "web", "--base"],
    ] {
        store.cowl(args).ok();
        assert_tree("the head", &tree::read(&at).unwrap(), &before);
        for (state, want) in STATES.iter().skip(1).zip(&want) {
            assert_tree(
                &format!("{state} after {args:?}"),
                &shown(&store, state),
                want,
            );
        }
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    store.cowl(["umount", "clone"]).ok();
    // Also after a remount: no layer of the clone was removed.
    let clone = store.mount("clone");
    assert_eq!(
        std::fs::read(clone.join("etc/new/deep/f")).unwrap(),
        b"fresh\n"
    );
    store.cowl(["umount", "clone"]).ok();
    store.cowl(["umount", "web"]).ok();
    // The clone is all that is left of the old layers.
    store.cowl(["destroy", "clone", "--yes"]).ok();
    store.cowl(["protect", "web@snap1", "--off"]).ok();
    store.cowl(["rm", "web", "--all", "--yes"]).ok();
    // A daemon that was unmounted holds its layers for a moment more.
    wait_until("the old layers to go", || {
        store.cowl(["gc", "--empty-trash"]).ok();
        let layers = std::fs::read_dir(store.path().join("layers")).unwrap();
        layers.count() == 2
    });
    let at = store.mount("web");
    assert_tree("the head", &tree::read(&at).unwrap(), &before);
    store.cowl(["umount", "web"]).ok();
}

/// Only the command line of cowlfs reads these names as whiteouts, not a mount of cowl.
#[test]
fn names_of_image_whiteouts_are_ordinary_in_containers() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let base = store.scratch().make("base");
    sh_in(
        &base,
        "mkdir d e; echo f > file; echo w > .wh.file; echo d > d/old; touch d/.wh..wh..opq e/old; mkdir .wh.e",
    )
    .ok();
    let plain = store.scratch().join("plain");
    sh_in(store.scratch(), "cp -a base plain").ok();
    store.create("web", &base);
    let changes = [
        "rm d/old; mkdir .wh.d; mv .wh.file d/.wh.moved; echo again > d/old; ln file e/.wh.old",
        "rm -r e; mkdir e; touch e/.wh..wh..opq; rm d/.wh..wh..opq; mv d .wh.f",
    ];
    for change in changes {
        let at = store.mount("web");
        for dir in [&at, &plain] {
            sh_in(dir, change).ok();
        }
        store.cowl(["snapshot", "web"]).ok();
        store.cowl(["umount", "web"]).ok();
        let want = tree::read(&plain).unwrap();
        tree::assert_same(change, &shown(&store, "web"), &want, Compare::HISTORY);
    }
}

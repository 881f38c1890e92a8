//! Clones that are there for one mount.

use std::fs;
use std::path::Path;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount;

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    fs::write(source.join("file"), "base").unwrap();
    store.create("web", &source);
    store.cowl(["snapshot", "web"]).ok();
    store
}

fn layers(store: &Store) -> usize {
    fs::read_dir(store.path().join("layers")).unwrap().count()
}

fn containers(store: &Store) -> usize {
    fs::read_dir(store.path().join("containers"))
        .unwrap()
        .count()
}

/// A clone that is restored from the trash or imported from a file is no longer ephemeral.
#[test]
fn a_restored_container_is_retained() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    store
        .cowl(["clone", "web@snap0", "once", "--ephemeral"])
        .ok();
    let mount_point = store.mount("once");
    fs::write(mount_point.join("file"), "changed").unwrap();
    let file = store.scratch().join("once.tar");
    let file = file.to_str().unwrap();
    store
        .cowl(["export", "once", "--with-snapshots", file])
        .ok();
    store.cowl(["destroy", "once", "--yes"]).ok();
    store.cowl(["undelete", "once"]).ok();
    store.cowl(["import", file, "twice"]).ok();
    for name in ["once", "twice"] {
        for _ in 0..2 {
            let mount_point = store.mount(name);
            assert_eq!(
                fs::read_to_string(mount_point.join("file")).unwrap(),
                "changed"
            );
            store.cowl(["umount", name]).ok();
        }
    }
}

#[test]
fn an_ephemeral_clone_is_removed_with_its_mount() {
    if !can(&NEEDS) {
        return;
    }
    let store = store();
    store.cowl(["gc"]).ok();
    let before = (layers(&store), containers(&store));
    let make = || {
        store
            .cowl(["clone", "web@snap0", "once", "--ephemeral"])
            .ok()
    };
    let gone = || {
        store.cowl(["mount", "once"]).fails(3, &["once"]);
        store.cowl(["undelete", "once"]).fails(3, &["once"]);
        // A daemon that is just ending still holds its layers.
        mount::wait_until("all that the clone had is gone", || {
            store.cowl(["gc"]).ok();
            (layers(&store), containers(&store)) == before
        });
    };

    // Commands do not remove it before its first mount.
    make();
    store.cowl(["status"]).ok();
    store
        .cowl(["mount", "once", "--at", "/absent"])
        .fails(1, &["/absent"]);
    store.cowl(["show", "once"]).ok();
    let mount_point = store.mount("once");
    fs::write(mount_point.join("file"), "changed").unwrap();
    store.cowl(["snapshot", "once"]).ok();
    store.cowl(["restore", "once", "snap0"]).ok();
    assert_eq!(
        fs::read_to_string(mount_point.join("file")).unwrap(),
        "changed"
    );
    store.cowl(["umount", "once"]).ok();
    gone();

    // If another process unmounts it, its daemon removes it.
    make();
    let mount_point = store.mount("once");
    sh_in(Path::new("/"), &format!("umount {}", mount_point.display())).ok();
    mount::wait_until("it is gone", || containers(&store) == before.1);
    gone();

    // After its daemon was killed, the next command removes it.
    make();
    let mount_point = store.mount("once");
    store.kill_daemon("once");
    mount::wait_until("the mount is dead", || fs::metadata(&mount_point).is_err());
    // The daemon releases its lock shortly after its mount ends.
    mount::wait_until("the next command sees it", || {
        store.cowl(["status"]);
        mount::at(&mount_point).is_none()
    });
    gone();

    // After a reboot: the state is another boot's.
    make();
    let mount_point = store.mount("once");
    let run = store.run_dirs().into_iter();
    let mut states = run.map(|dir| dir.join("state.json"));
    let state = states.rfind(|path| path.try_exists().unwrap()).unwrap();
    store.kill_daemon("once");
    mount::wait_until("the mount is dead", || fs::metadata(&mount_point).is_err());
    mount::detach(&mount_point).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let text = fs::read_to_string(&state).unwrap();
    fs::write(&state, text.replace(boot.trim(), "another")).unwrap();
    gone();
    assert!(store.cowl(["cat", "web:file"]).ok().out() == "base");
}

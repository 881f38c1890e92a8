//! Overlays of the kernel with a layer in a mount.

use std::path::Path;

use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount::{Overlay, Stack, wait_until};

use crate::namespaces::{Holder, NEEDS, USER, changed};

/// A kernel overlayfs holds the file system although no process or descriptor does.
#[test]
fn an_overlay_of_the_kernel_on_a_mount_is_refused_and_named() {
    let needs = [NEEDS, &[Need::KernelOverlay]].concat();
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let mount_point = changed(&store);
    let (other, merged) = (
        store.scratch().make("other"),
        store.scratch().make("merged"),
    );
    let overlay = Overlay::kernel(&Stack::of(&[&other, &mount_point]), &merged);
    store
        .cowl(["restore", "web", "snap0"])
        .fails(4, &["overlay at", merged.to_str().unwrap()]);
    assert_eq!(std::fs::read(merged.join("file")).unwrap(), b"changed\n");
    overlay.unmount();
    // The namespace of another test may hold a copy of the overlay for a moment.
    wait_until("the container is restored", || {
        store.cowl(["restore", "web", "snap0"]).code == 0
    });
}

/// Any user can mount an overlay whose layers have the paths that mountinfo shows, in a namespace of that user.
#[test]
fn an_overlay_on_a_directory_of_the_same_name_prevents_no_unmount() {
    let needs = [NEEDS, &[Need::KernelOverlay, Need::Program("setpriv")]].concat();
    if !can(&needs) {
        return;
    }
    let store = Store::for_test();
    let mount_point = changed(&store);
    let path = mount_point.display();
    let top = mount_point.components().nth(1).unwrap();
    let top = Path::new("/").join(top).display().to_string();
    let line = format!(
        "mount -t tmpfs none {top}; mkdir -p {path} {top}/other {top}/merged
         mount -t overlay -o lowerdir={path}:{top}/other none {top}/merged
         echo ready; read line || true"
    );
    let user = [
        "setpriv",
        "--reuid=4242",
        "--regid=4242",
        "--clear-groups",
        "unshare",
    ];
    let words = [&user[..], USER, &["sh", "-euc", &line]].concat();
    let mut holder = Holder::start(&words);
    store.restore("web", "snap0");
    assert_eq!(std::fs::read(mount_point.join("file")).unwrap(), b"one\n");
    holder.lives();
    store.cowl(["umount", "web"]).ok();
}

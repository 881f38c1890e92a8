//! One format: kernel overlayfs reads layers of cowlfs as the same tree, and cowlfs reads layers of the kernel
//! (index=off, redirect_dir=on, metacopy=on) as the same tree.

use std::path::Path;

use cowl_tests::command::{sh, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::rootfs;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::KernelOverlay];

/// Two lower layers and an empty upper. No file has two names: the kernel breaks hard links.
fn stack(scratch: &Scratch) -> Stack {
    sh_in(
        scratch,
        "mkdir -p l2/dir/sub/deep l2/both/below l2/gone l2/keep l2/replaced l2/hidden l1/both l1/hidden
         mkdir upper work
         for f in dir/one dir/sub/two dir/sub/deep/three both/file both/below/file gone/file keep/file \
                  replaced/file top big hidden/file attributes; do echo $f > l2/$f; done
         seq 100000 > l2/big; ln -s dir/one l2/link; mkfifo l2/fifo
         echo upper > l1/both/file; echo more > l1/both/more; mknod l1/top c 0 0
         setfattr -n trusted.overlay.opaque -v y l1/hidden; echo seen > l1/hidden/seen
         setfattr -n user.a -v b l2/attributes; setfacl -m u:1000:rw l2/attributes
         find l1 l2 -exec touch -h -d '2010-01-02 03:04:05' {} +",
    )
    .ok();
    let path = |name: &str| scratch.join(name);
    Stack {
        lowers: vec![path("l1"), path("l2")],
        upper: Some((path("upper"), path("work"))),
    }
}

/// Changes that leave every kind of marker: whiteouts, opaque directories, redirects, metacopies.
const CHANGES: &str = "
    mv dir renamed; mv renamed/sub moved; mv moved/deep both/deep; echo x >> both/deep/three
    chmod 600 big; chown 1000:1000 keep/file; touch -d '2011-01-01' keep
    mv big both/big; chmod 640 both/big
    rm -r gone; rm link fifo; rm -r replaced; mkdir replaced; echo new > replaced/new
    rm -r hidden; echo now a file > hidden
    setfattr -n user.a -v c attributes; setfattr -n user.d -v e attributes
    mkdir new; mv both new/both; rm new/both/below/file; mv new/both/below below; echo y > below/y
    echo appended >> moved/two; ln moved/two moved/alias; mkdir -p p/q; mv keep p/q/keep
    mknod null c 1 3; ln -s target symbolic";

#[test]
fn the_kernel_reads_layers_of_cowlfs() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::new("interop-ours");
    let stack = stack(&scratch);
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "");
    sh_in(mount.path(), CHANGES).ok();
    let ours = tree::read(mount.path()).unwrap();
    mount.unmount();

    let kernel = Overlay::kernel(&stack.read_only(), &scratch.make("kernel"));
    let theirs = tree::read(kernel.path()).unwrap();
    tree::assert_same("all layers as lowers", &theirs, &ours, Compare::READER);
    kernel.unmount();
    // The kernel can also continue to write to the upper layer.
    let kernel = Overlay::kernel(&stack, &scratch.make("kernel"));
    let theirs = tree::read(kernel.path()).unwrap();
    tree::assert_same("our upper as its upper", &theirs, &ours, Compare::READER);
    sh_in(kernel.path(), "mv moved back; echo z > back/z; rm -r p").ok();
    let theirs = tree::read(kernel.path()).unwrap();
    kernel.unmount();
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "");
    let ours = tree::read(mount.path()).unwrap();
    tree::assert_same("and we go on after it", &ours, &theirs, Compare::READER);
}

#[test]
fn cowlfs_reads_layers_of_the_kernel() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::new("interop-kernels");
    let stack = stack(&scratch);
    let kernel = Overlay::kernel(&stack, &scratch.make("kernel"));
    sh_in(kernel.path(), CHANGES).ok();
    let theirs = tree::read(kernel.path()).unwrap();
    kernel.unmount();
    let mount = Overlay::cowlfs(&stack.read_only(), &scratch.make("mount"), "");
    let ours = tree::read(mount.path()).unwrap();
    tree::assert_same("all layers as lowers", &ours, &theirs, Compare::READER);
    mount.unmount();
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "");
    let ours = tree::read(mount.path()).unwrap();
    tree::assert_same("its upper as our upper", &ours, &theirs, Compare::READER);
}

#[test]
fn a_debian_tree_changed_by_dpkg_is_identical_on_the_kernel() {
    if !can(&NEEDS) || !can(&[Need::Debian]) {
        return;
    }
    let scratch = Scratch::new("interop-debian");
    let (lower, empty) = (scratch.make("lower"), scratch.make("empty"));
    rootfs::unpack(&rootfs::debian_tar().unwrap(), &lower).unwrap();
    sh(&format!(
        "chmod --reference='{0}/lower' '{0}/empty'",
        scratch.display()
    ))
    .ok();
    let upper = (scratch.make("upper"), scratch.make("work"));
    let stack = Stack {
        lowers: vec![empty, lower],
        upper: Some(upper),
    };
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "dev,suid");
    install(mount.path());
    let ours = tree::read(mount.path()).unwrap();
    mount.unmount();
    let kernel = Overlay::kernel(&stack.read_only(), &scratch.make("kernel"));
    let theirs = tree::read(kernel.path()).unwrap();
    tree::assert_same("after dpkg", &theirs, &ours, Compare::READER);
}

fn install(root: &Path) {
    sh(&format!(
        "DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 chroot '{}' sh -euc '
             dpkg -i /root/debs/*.deb; hello; dpkg -P hello; mv /usr/share /usr/shared
             mv /usr/shared /usr/share; chown -R 1000:1000 /var/log'",
        root.display()
    ))
    .ok();
}

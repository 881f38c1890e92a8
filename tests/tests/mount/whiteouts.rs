//! Whiteouts are hard links to one inode, but never treated as names of one file. Where a link is impossible, a
//! separate whiteout is created.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cowl_tests::command::{self, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// Returns inode and link count of every whiteout below a directory.
fn whiteouts(root: &Path) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            if meta.is_dir() {
                todo.push(path);
            } else if meta.file_type().is_char_device() && meta.rdev() == 0 {
                found.push((meta.ino(), meta.nlink()));
            }
        }
    }
    found
}

fn inodes(found: &[(u64, u64)]) -> usize {
    let inodes: BTreeSet<u64> = found.iter().map(|(ino, _)| *ino).collect();
    inodes.len()
}

/// Creates files, some with several names, and directories, to be removed and renamed.
const FILL: &str = "mkdir -p d/e full empty
    for i in 1 2 3 4 5 6; do echo $i >f$i; echo $i >d/f$i; echo $i >d/e/f$i; done
    ln f1 alias; ln d/f1 d/e/alias; echo x >full/x";

/// All operations that create a whiteout.
const REMOVE: &str = "rm f2 d/f2 d/e/f2 alias; echo more >>d/f3; rm d/f3; chmod 600 f3; rm f3
    rmdir empty; rm -r full; mv f4 moved; mv d/f4 d/f5; mv d/e away; mkdir empty; rmdir empty";

#[test]
fn whiteouts_share_one_inode_and_the_kernel_interprets_them() {
    let needs = [NEEDS, &[Need::KernelOverlay]].concat();
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::new("whiteouts");
    let lower = scratch.make("lower");
    let plain = scratch.make("plain");
    for dir in [&lower, &plain] {
        sh_in(dir, FILL).ok();
    }
    let stack = Stack {
        lowers: vec![lower],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let mount_point = scratch.make("mount");
    let mount = Overlay::cowlfs(&stack, &mount_point, "");
    for dir in [&mount_point, &plain] {
        sh_in(dir, REMOVE).ok();
    }
    mount.unmount();
    let found = whiteouts(&scratch.join("upper"));
    assert!(found.len() > 9, "{found:?}");
    // In a rename, the file system below creates the whiteout.
    let shared = found.iter().filter(|(_, links)| *links > 1);
    assert!(shared.count() >= 7, "{found:?}");
    let mount = Overlay::cowlfs(&stack, &mount_point, "");
    let want = tree::read(&plain).unwrap();
    let ours = tree::read(&mount_point).unwrap();
    assert!(
        want.keys().eq(ours.keys()),
        "{:?} {:?}",
        want.keys(),
        ours.keys()
    );
    mount.unmount();
    let kernel = Overlay::kernel(&stack, &mount_point);
    let theirs = tree::read(&mount_point).unwrap();
    tree::assert_same("cowlfs, then the kernel", &ours, &theirs, Compare::READER);
    // Kernel overlayfs uses cowlfs's whiteouts, and cowlfs those of the kernel.
    sh_in(&mount_point, "rm d/f6 away/f6").ok();
    drop(kernel);
    let mount = Overlay::cowlfs(&stack, &mount_point, "");
    assert!(
        !mount_point.join("d/f6").try_exists().unwrap()
            && !mount_point.join("away/f6").try_exists().unwrap()
    );
    sh_in(&mount_point, "rm d/f5").ok();
    mount.unmount();
}

#[test]
fn commands_do_not_treat_whiteouts_as_hard_links() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let source = store.scratch().make("source");
    sh_in(&source, FILL).ok();
    store.create("web", &source);
    let inodes_of = |name: &str| {
        let output = store.cowl(["du", "--json", name]).ok();
        output.json().to_string()
    };
    let mount_point = store.mount("web");
    sh_in(&mount_point, REMOVE).ok();
    let want = tree::read(&mount_point).unwrap();
    store.cowl(["snapshot", "web"]).ok();
    assert!(!inodes_of("web").is_empty());
    // The digest of a layer does not depend on which of its whiteouts are linked.
    store.cowl(["check", "--deep"]).ok();
    let layers = store.path().join("layers");
    let mut parted = 0;
    for layer in fs::read_dir(&layers).unwrap() {
        let tree = layer.unwrap().path().join("tree");
        let found = whiteouts(&tree);
        if found.len() > 2 {
            parted += 1;
            assert!(inodes(&found) < found.len(), "{found:?}");
            part(&tree);
            let found = whiteouts(&tree);
            assert_eq!(inodes(&found), found.len());
        }
    }
    assert_eq!(parted, 1, "one layer has whiteouts");
    let checked = store.cowl(["check", "--deep"]).ok();
    assert!(!checked.report().contains("modified by another program"));

    // Create linked whiteouts again, and export and import them in every format.
    sh_in(&mount_point, "rm f5 d/f6; rm -r away; rm moved").ok();
    let now = tree::read(&mount_point).unwrap();
    store.cowl(["snapshot", "web"]).ok();
    let out = |name: &str| store.scratch().join(name).to_str().unwrap().to_owned();
    let listed = store.cowl(["diff", "web@snap0", "web@snap1"]).ok().out();
    for path in ["/away", "/d/f6", "/f5", "/moved"] {
        assert!(listed.contains(&format!("D {path}")), "{listed}");
    }
    store
        .cowl(["export", "web@snap0", "--dir", &out("zero")])
        .ok();
    store.cowl(["export", "web", "--dir", &out("one")]).ok();
    for (name, want) in [("zero", &want), ("one", &now)] {
        let got = tree::read(Path::new(&out(name))).unwrap();
        tree::assert_same(name, want, &got, Compare::READER);
    }
    store
        .cowl(["export", "web", "--with-snapshots", &out("all.tar")])
        .ok();
    let links = command::sh(&format!(
        "tar tvf {} | grep -a 'link to' || :",
        out("all.tar")
    ));
    for line in links.ok().out().lines() {
        assert!(line.contains("alias") || line.contains("f1"), "{line}");
    }
    store.cowl(["import", &out("all.tar"), "again"]).ok();
    store.cowl(["check", "--deep"]).ok();
    store.cowl(["umount", "web"]).ok();
    store.cowl(["flatten", "web"]).ok();
    store.cowl(["gc"]).ok();
    for name in ["web", "again"] {
        let mount_point = store.mount(name);
        let got = tree::read(&mount_point).unwrap();
        tree::assert_same(name, &now, &got, Compare::READER);
        store.restore(name, "snap0");
        let got = tree::read(&mount_point).unwrap();
        tree::assert_same(name, &want, &got, Compare::READER);
    }
    store.cowl(["check", "--deep"]).ok();
}

/// Replaces every whiteout by a separate one, with all times unchanged.
fn part(tree: &Path) {
    let script = r#"
import os, stat
for parent, dirs, files in os.walk("."):
    before = os.stat(parent)
    for name in files:
        path = os.path.join(parent, name)
        was = os.lstat(path)
        if stat.S_ISCHR(was.st_mode) and was.st_rdev == 0:
            os.unlink(path); os.mknod(path, was.st_mode, 0)
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    os.utime(parent, ns=(before.st_atime_ns, before.st_mtime_ns))
"#;
    sh_in(tree, &format!("python3 -c '{script}'")).ok();
}

/// Mounts a new disk with the layers of an overlay.
fn on_disk(scratch: &Scratch, mkfs: &str, mib: u64, fill: &str) -> PathBuf {
    let image = scratch.join("image");
    fs::File::create(&image)
        .unwrap()
        .set_len(mib << 20)
        .unwrap();
    command::run(mkfs, [Path::new("-q"), &image]).ok();
    let disk = scratch.make("disk");
    let args = [Path::new("-o"), Path::new("loop"), &image, &disk];
    command::run("mount", args).ok();
    sh_in(&disk, "mkdir lower upper work mount").ok();
    sh_in(&disk.join("lower"), fill).ok();
    disk
}

fn stack_on(disk: &Path) -> Stack {
    Stack {
        lowers: vec![disk.join("lower")],
        upper: Some((disk.join("upper"), disk.join("work"))),
    }
}

#[test]
fn a_new_shared_whiteout_is_created_at_the_link_limit() {
    let needs = [NEEDS, &[Need::Program("mkfs.ext4")]].concat();
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::new("whiteouts-many");
    let fill = "for i in $(seq 20); do echo x >$i; done; mkdir d; echo x >d/x";
    let disk = on_disk(&scratch, "mkfs.ext4", 128, fill);
    let stack = stack_on(&disk);
    let mount = Overlay::cowlfs(&stack, &disk.join("mount"), "");
    mount.unmount();
    // ext4 allows 65,000.
    let script = r#"
import os
os.mkdir("many")
for i in range(64990): os.link("work/whiteout", f"many/{i}")
"#;
    sh_in(&disk, &format!("python3 -c '{script}'")).ok();
    let mount = Overlay::cowlfs(&stack, &disk.join("mount"), "");
    sh_in(mount.path(), "rm -r d; rm *").ok();
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
    mount.unmount();
    let found = whiteouts(&disk.join("upper"));
    assert_eq!((found.len(), inodes(&found)), (21, 2), "{found:?}");
}

#[test]
fn a_separate_whiteout_is_created_if_linking_fails() {
    let needs = [
        NEEDS,
        &[Need::Program("mkfs.ext4"), Need::Program("strace")],
    ]
    .concat();
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::new("whiteouts-refused");
    let fill = "mkdir d; for i in 1 2 3; do echo x >d/$i; done";
    let disk = on_disk(&scratch, "mkfs.ext4", 128, fill);
    let stack = stack_on(&disk);
    // Links fail as between two projects with quotas.
    let refusing = scratch.join("refusing");
    let script = format!(
        "#!/bin/sh\nexec strace -f -o /dev/null -e trace=linkat -e inject=linkat:error=EXDEV '{}' \"$@\"\n",
        cowl_tests::programs::cowlfs().display()
    );
    fs::write(&refusing, script).unwrap();
    fs::set_permissions(&refusing, fs::Permissions::from_mode(0o755)).unwrap();
    let mount = Overlay::cowlfs_at(&refusing, &stack, &disk.join("mount"), "");
    sh_in(mount.path(), "touch d/new; rm d/1 d/2").ok();
    mount.unmount();
    let own = whiteouts(&disk.join("upper"));
    assert_eq!((own.len(), inodes(&own)), (2, 2), "{own:?}");
    let mount = Overlay::cowlfs(&stack, &disk.join("mount"), "");
    let listed = sh_in(mount.path(), "ls d").ok().out();
    assert_eq!(listed, "3\nnew");
    sh_in(mount.path(), "rm d/3").ok();
    mount.unmount();
    let own = whiteouts(&disk.join("upper"));
    assert_eq!((own.len(), inodes(&own)), (3, 3), "{own:?}");
}

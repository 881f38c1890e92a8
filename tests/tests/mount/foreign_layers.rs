//! Layers in formats that other programs write: data-only layers, devices 0:0 for an overlay above, layers of
//! fuse-overlayfs and of container images.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cowl_tests::command::{sh, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack, plain_unmount};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

/// Held by a test that creates a mount namespace, and by one that depends on when a kernel mount ends: the namespace
/// contains a copy of every mount, which keeps the mount alive.
static NAMESPACES: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    // Ignore poisoning: this test does not depend on the result of another.
    NAMESPACES.lock().unwrap_or_else(PoisonError::into_inner)
}

const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::KernelOverlay];

#[track_caller]
fn shows(mount_point: &Path) -> tree::Tree {
    tree::read(mount_point).unwrap()
}

#[test]
fn data_only_layers_are_read_as_by_the_kernel() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::new("data-only");
    sh_in(
        &scratch,
        "mkdir -p data/objects data2/objects meta/dir low m k; echo content > data/objects/aa
         echo hidden > data2/objects/aa; echo other > data2/objects/bb; echo low > low/low
         for f in dir/a:8:aa b:6:bb; do
             n=${f%%:*}; r=${f#*:}; truncate -s ${r%:*} meta/$n
             setfattr -n trusted.overlay.metacopy meta/$n
             setfattr -n trusted.overlay.redirect -v /objects/${r#*:} meta/$n
         done; chmod 640 meta/b",
    )
    .ok();
    let layers = "lowerdir=meta:low::data::data2";
    let dir = scratch.display();
    sh(&format!(
        "cd '{dir}' && mount -t overlay overlay -o {layers},redirect_dir=on,metacopy=on k"
    ))
    .ok();
    let theirs = shows(&scratch.join("k"));
    plain_unmount(&scratch.join("k")).unwrap();
    let program = cowl_tests::programs::cowlfs();
    sh(&format!(
        "cd '{dir}' && '{}' -o {layers} m",
        program.display()
    ))
    .ok();
    let ours = shows(&scratch.join("m"));
    let content = sh_in(&scratch, "cat m/dir/a m/b m/low").ok();
    plain_unmount(&scratch.join("m")).unwrap();
    tree::assert_same(
        "a stack with data-only layers",
        &ours,
        &theirs,
        Compare::READER,
    );
    assert_eq!(content.stdout, b"content\nother\nlow\n");
}

#[test]
fn a_zero_device_is_a_whiteout_to_an_overlay_above() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::new("nested-whiteout");
    sh_in(&scratch, "mkdir -p lower/in/d upper work below/d nested").ok();
    sh_in(&scratch, "for f in a b c; do echo $f > below/d/$f; done").ok();
    let path = |name: &str| scratch.join(name);
    let stack = Stack {
        lowers: vec![path("lower")],
        upper: Some((path("upper"), path("work"))),
    };
    // An overlay whose topmost layer lies inside another overlay.
    let nested = Stack::of(&[&path("m/in"), &path("below")]);
    let mount = Overlay::cowlfs(&stack, &scratch.make("m"), "");
    sh_in(
        mount.path(),
        "mknod in/d/a c 0 0; echo new > in/d/b; mknod in/d/x c 0 0",
    )
    .ok();
    let seen = sh_in(
        mount.path(),
        "stat -c '%F %t:%T %s' in/d/a; getfattr -d -m - -R in",
    )
    .ok();
    assert_eq!(seen.stdout, b"character special file 0:0 0\n");
    let over_ours = Overlay::kernel(&nested, &path("nested"));
    let expected = shows(over_ours.path());
    assert_eq!(sh_in(over_ours.path(), "ls d").ok().stdout, b"b\nc\n");
    over_ours.unmount();
    mount.unmount();
    // The kernel mounts our layers, and the same overlay above shows the same.
    let kernel = Overlay::kernel(&stack.read_only(), &path("m"));
    let over_kernels = Overlay::kernel(&nested, &path("nested"));
    let got = shows(over_kernels.path());
    tree::assert_same("an overlay above", &got, &expected, Compare::READER);
    over_kernels.unmount();
    kernel.unmount();
}

#[test]
fn layers_of_unprivileged_fuse_overlayfs_are_read() {
    let program = Need::Program("fuse-overlayfs");
    if !can(&[Need::Root, Need::Fuse, program]) {
        return;
    }
    let _alone = alone();
    let scratch = Scratch::new("fuse-overlayfs");
    sh_in(
        &scratch,
        "mkdir -p l/d l/e l/g u w m; touch l/d/x l/d/y l/e/z l/f l/g/q; touch -d @1000000000 l/e
         unshare -Urm sh -ec 'fuse-overlayfs -o lowerdir=l,upperdir=u,workdir=w m
             rm m/f m/d/x; rm -r m/e; mkdir m/e; touch m/e/new; rm -r m/g; touch m/k; ls -R m > shown
             umount m'",
    )
    .ok();
    // fuse-overlayfs writes opaque markers of this form.
    let marks = sh_in(&scratch, "getfattr -d -m - u/e; ls -A u/e").ok();
    let marks = String::from_utf8(marks.stdout).unwrap();
    assert!(marks.contains("user.fuseoverlayfs.opaque") && marks.contains(".wh..wh..opq"));
    let path = |name: &str| scratch.join(name);
    let theirs = std::fs::read_to_string(path("shown")).unwrap();
    let stack = Stack {
        lowers: vec![path("l")],
        upper: Some((path("u"), path("w"))),
    };
    for stack in [stack.read_only(), stack] {
        let mount = Overlay::cowlfs(&stack, &path("m"), "");
        let ours = sh_in(&scratch, "ls -R m").ok();
        assert_eq!(String::from_utf8(ours.stdout).unwrap(), theirs);
        mount.unmount();
    }
}

/// Layers with every kind of marker that a container image can have. No layer has both an object and its whiteout: the
/// specification of images then shows the object, and fuse-overlayfs hides it.
const IMAGE_LAYERS: &str = "
    mkdir u w m
    for d in a b c d e f g; do mkdir -p low/$d; echo $d > low/$d/old; done; echo x > low/file; echo x > low/other
    mkdir -p mid/a mid/b mid/c mid/d mid/e mid/.wh..wh.plnk
    touch mid/a/.wh..wh..opq mid/a/new mid/b/.wh..wh.aufs mid/c/.wh.old mid/.wh..wh.orph mid/.wh.f mid/b/.wh.
    mkdir mid/d/.wh..wh..opq; ln -s nowhere mid/.wh.file; mknod mid/other c 0 0; touch mid/.wh.other
    setfattr -n user.fuseoverlayfs.opaque -v y mid/e
    mkdir -p top/g top/f; touch top/.wh..wh..opq top/g/only";

#[test]
fn markers_of_container_images_are_read_as_by_fuse_overlayfs() {
    if !can(&[&NEEDS[..], &[Need::Program("fuse-overlayfs")]].concat()) {
        return;
    }
    let _alone = alone();
    let scratch = Scratch::new("image-layers");
    sh_in(&scratch, IMAGE_LAYERS).ok();
    let path = |name: &str| scratch.join(name);
    for lowers in [["mid", "low"].as_slice(), &["top", "mid", "low"]] {
        let lowers: Vec<_> = lowers.iter().map(|name| path(name)).collect();
        let upper = Some((path("u"), path("w")));
        let list = "find m -mindepth 1 | sort";
        for upper in [None, upper] {
            let stack = Stack {
                lowers: lowers.clone(),
                upper,
            };
            let options = stack.options("");
            let program = Command::new("fuse-overlayfs")
                .arg("-o")
                .arg(options)
                .arg(path("m"))
                .stderr(Stdio::null())
                .status();
            assert!(program.unwrap().success());
            let theirs = sh_in(&scratch, list).ok().out();
            plain_unmount(&path("m")).unwrap();
            let mount = Overlay::cowlfs(&stack, &path("m"), "");
            let ours = sh_in(&scratch, list).ok().out();
            if stack.upper.is_some() {
                for change in ["mkdir m/.wh.x", "touch m/.wh..wh..opq", "ln -s x m/.wh."] {
                    sh_in(&scratch, change).fails(1, &["invalid argument"]);
                }
            }
            mount.unmount();
            assert_eq!(ours, theirs, "{:?}", stack.lowers);
        }
    }
}

/// The kernel does not know these markers.
#[test]
fn without_foreign_markers_names_are_as_on_the_kernels_overlay() {
    if !can(&NEEDS) {
        return;
    }
    let _alone = alone();
    let scratch = Scratch::new("no-markers");
    sh_in(&scratch, IMAGE_LAYERS).ok();
    let path = |name: &str| scratch.join(name);
    let stack = Stack {
        lowers: vec![path("top"), path("mid"), path("low")],
        upper: Some((path("u"), path("w"))),
    };
    let mount = Overlay::cowlfs(&stack, &path("m"), "nofuse_overlayfs");
    sh_in(
        mount.path(),
        "mv .wh.f moved; mkdir .wh.new; touch a/.wh..wh..opq b/.wh.old; rm -r .wh..wh.plnk; ls -A",
    )
    .ok();
    let ours = shows(mount.path());
    mount.unmount();
    let kernel = Overlay::kernel(&stack, &path("m"));
    tree::assert_same("names", &shows(kernel.path()), &ours, Compare::READER);
    assert!(ours.contains_key(&b".wh.file"[..]) && ours.contains_key(&b"b/old"[..]));
    kernel.unmount();
}

#[test]
fn hard_links_known_only_to_the_kernels_index_remain_one_file() {
    if !can(&NEEDS) {
        return;
    }
    let _alone = alone();
    let scratch = Scratch::new("kernel-index");
    sh_in(
        &scratch,
        "mkdir -p l/d l/d2 u w m; echo one > l/a; for n in b c d/e d2/f d2/g; do ln l/a l/$n; done
         echo x > l/x; ln l/x l/d/y; ln l/x l/d2/z; ln -s to l/s; ln l/s l/t
         mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w,index=on,redirect_dir=on,metacopy=on m
         echo two >> m/a; rm m/c; mv m/d m/dd; rm -r m/d2; ln m/b m/new
         chmod 600 m/x; rm m/x; chown -h 5:5 m/s",
    )
    .ok();
    let path = |name: &str| scratch.join(name);
    let theirs = shows(&path("m"));
    plain_unmount(&path("m")).unwrap();
    let stack = Stack {
        lowers: vec![path("l")],
        upper: Some((path("u"), path("w"))),
    };
    // The second time there is nothing left to take over.
    for turn in ["first", "second"] {
        let mount = Overlay::cowlfs(&stack, &path("m"), "");
        tree::assert_same(turn, &shows(mount.path()), &theirs, Compare::READER);
        mount.unmount();
    }
    assert_eq!(
        sh_in(&scratch, "ls w/index | grep -c ^00fb || true")
            .ok()
            .stdout,
        b"0\n"
    );
    let mount = Overlay::cowlfs(&stack, &path("m"), "");
    sh_in(
        mount.path(),
        "echo three >> dd/e; test \"$(tail -n1 new)\" = three",
    )
    .ok();
    let ours = shows(mount.path());
    mount.unmount();
    // The kernel continues on the same layers, with and without an index.
    for index in ["on", "off"] {
        let options = format!("index={index},redirect_dir=on,metacopy=on");
        let layers = "lowerdir=l,upperdir=u,workdir=w";
        sh_in(
            &scratch,
            &format!("mount -t overlay overlay -o {layers},{options} m"),
        )
        .ok();
        let theirs = shows(&path("m"));
        plain_unmount(&path("m")).unwrap();
        tree::assert_same(&options, &theirs, &ours, Compare::READER);
    }
}

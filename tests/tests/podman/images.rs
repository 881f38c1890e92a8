//! Images that podman and buildah build, step by step.

use cowl_tests::command::sh_in;
use cowl_tests::conditions::can;
use cowl_tests::podman::{MountProgram, NEEDS, Podman, User};
use cowl_tests::rootfs;

/// Steps of a build, each of which becomes a layer. They create, replace, move and remove files and directories.
const STEPS: &str = r"
mkdir -p /d/sub /e /old/deep && for i in 1 2 3 4 5; do echo $i > /d/f$i; echo $i > /d/sub/s$i; echo $i > /old/deep/o$i; done
echo one > /file && ln /file /link && ln -s file /symbolic && chmod 4755 /d/f1 && chown 5:6 /d/f2 && mkfifo /e/fifo
rm /d/f3 /symbolic && mv /d/sub /d/moved && echo more >> /file
rm -r /d/moved && echo 'a file now' > /d/moved && rm /d/f4 && mkdir /d/f4 && echo x > /d/f4/x && mv /old /older && mv /e /d/e
echo again > /d/f3 && chmod 700 /older && rm /older/deep/o1 && touch /d/sub && mv /older/deep/o2 /o2
rm -r /d && mkdir -p /opt/tool && echo tool > /opt/tool/run
";

/// A directory is removed and created again in one step. After that, an image of fuse-overlayfs 1.10 still has the old
/// content.
const REPLACEMENT: &str = r"
rm -r /older && mkdir /older && echo new > /older/new
rm -r /older/new && mkdir /older/new && ln -s new /older/deep
";

/// Builds an image twice, the second time from the cache, and prints its tree.
const BUILD: &str = r"
cp ../rootfs.tar context
{ echo FROM scratch; echo ADD rootfs.tar /; grep . ../steps | sed 's/^/RUN /'; } > context/Containerfile
build --layers -t built context > /dev/null
podman build --layers --isolation chroot --network host -t again context 2>&1 | grep -c 'Using cache'
inside image_tree built
";

/// Runs the same steps in a plain directory.
const PLAIN: &str = r#"
mkdir plain; tar -C plain -xf rootfs.tar
grep . steps > lines; while read -r line; do chroot plain sh -euc "$line" < /dev/null; done < lines
bash -c '. user/functions; tree plain'
"#;

fn write_steps(podman: &Podman, steps: &str) {
    std::fs::copy(
        rootfs::busybox_tar().unwrap(),
        podman.scratch().join("rootfs.tar"),
    )
    .unwrap();
    std::fs::write(podman.scratch().join("steps"), steps).unwrap();
}

/// Returns a tree without what podman itself adds to an image.
fn without_additions(tree: &str) -> Vec<&str> {
    let is_added = |line: &&str| {
        [
            "./etc/hostname",
            "./etc/hosts",
            "./etc/resolv.conf",
            "./run",
        ]
        .iter()
        .any(|name| line.contains(name))
    };
    tree.lines().filter(|line| !is_added(line)).collect()
}

fn builds(user: User) {
    if !can(NEEDS) {
        return;
    }
    let podman = Podman::for_test(user);
    let steps = format!("{STEPS}{REPLACEMENT}");
    write_steps(&podman, &steps);
    let built = podman.script(MountProgram::Cowlfs, BUILD).ok().out();
    let (cached, tree) = built.split_once('\n').unwrap();
    // Each step, and the tar.
    let count = steps.lines().filter(|line| !line.is_empty()).count() + 1;
    assert_eq!(cached, count.to_string());
    let plain = sh_in(podman.scratch(), PLAIN).ok().out();
    assert_eq!(without_additions(tree), without_additions(&plain));
}

#[test]
fn images_built_by_root_are_the_same_as_plain_directories() {
    builds(User::Root);
}

#[test]
fn images_built_by_a_plain_user_are_the_same_as_plain_directories() {
    builds(User::Plain);
}

fn same_with_fuse_overlayfs(user: User) {
    if !can(NEEDS) {
        return;
    }
    let [theirs, ours] = [MountProgram::FuseOverlayfs, MountProgram::Cowlfs].map(|program| {
        let podman = Podman::for_test(user);
        write_steps(&podman, STEPS);
        podman.script(program, BUILD).ok().out()
    });
    assert_eq!(ours, theirs);
}

#[test]
fn images_built_by_root_are_the_same_as_with_fuse_overlayfs() {
    same_with_fuse_overlayfs(User::Root);
}

#[test]
fn images_built_by_a_plain_user_are_the_same_as_with_fuse_overlayfs() {
    same_with_fuse_overlayfs(User::Plain);
}

/// buildah commits a working container, whose layers it mounts itself.
const BUILDAH: &str = r"
podman import -q ../rootfs.tar base > /dev/null 2>&1
bud() {
    local c; c=$(buildah from --pull-never base)
    buildah run --isolation chroot $c -- sh -c 'mkdir -p /a/b && echo 1 > /a/b/c && echo 2 > /a/d'
    buildah commit -q $c one > /dev/null
    buildah run --isolation chroot $c -- sh -c 'rm -r /a/b && mv /a /z && rm /usr/bin/rpm'
    echo copied > copied; buildah copy -q $c copied /z/copied > /dev/null
    buildah commit -q $c two > /dev/null
    buildah rm $c > /dev/null
}
bud
inside image_tree one
inside image_tree two
";

#[test]
fn buildah_commits_the_same_layers_as_with_fuse_overlayfs() {
    if !can(NEEDS) {
        return;
    }
    for user in [User::Root, User::Plain] {
        let [theirs, ours] = [MountProgram::FuseOverlayfs, MountProgram::Cowlfs].map(|program| {
            let podman = Podman::for_test(user);
            write_steps(&podman, "");
            podman.script(program, BUILDAH).ok().out()
        });
        assert!(ours.contains("./z/copied") && !ours.ends_with("./usr/bin/rpm"));
        assert_eq!(ours, theirs, "{user:?}");
    }
}

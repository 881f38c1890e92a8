//! Images that are exchanged with podman, buildah, skopeo and umoci, in both directions.

use std::path::Path;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::podman::{MountProgram, NEEDS, Podman, User};
use cowl_tests::rootfs;

/// Builds an image and a second one on top of it, and saves them in all forms. Prints the tree of the second one.
const SAVE: &str = r#"
cp ../rootfs.tar context
cat > context/Containerfile <<'END'
FROM scratch
ADD rootfs.tar /
RUN echo 'web:x:1234:1235::/home/web:/bin/sh' >> /etc/passwd && echo 'more:x:77:web' >> /etc/group
RUN mkdir -p /srv/d/sub && echo 1 > /srv/d/f && ln /srv/d/f /srv/d/g && ln -s srv/d /link && chmod 1770 /srv/d
END
cat > context/Second <<'END'
FROM first
RUN rm /srv/d/f /link && mkdir /link && echo 2 > /link/x && chown 5:6 /srv/d/g
RUN rm -r /srv/d && mkdir /srv/d && echo 3 > /srv/d/only
ENV GREETING=hello
WORKDIR /srv
USER web
ENTRYPOINT ["/bin/sh", "-c"]
CMD ["echo $GREETING $(id -u) $(id -g) $(id -G) $(pwd) $HOME"]
END
build --layers -t first context > /dev/null
build --layers -t second -f Second context > /dev/null
podman save -q --format oci-archive -o "$D/first.tar" first
podman save -q --format oci-archive -o "$D/oci.tar" second
podman save -q --format docker-archive -o "$D/docker.tar" second
buildah push -q second "oci:$D/layout:1.0"
skopeo --insecure-policy copy -q --format v2s2 "oci:$D/layout:1.0" "dir:$D/v2s2"
skopeo --insecure-policy copy -q "dir:$D/v2s2" "oci-archive:$D/again.tar:x"
inside image_tree second
"#;

/// Loads exported images, and prints what their commands print, and the tree of one.
const LOAD: &str = r#"
podman load -q -i "$D/out.tar" > /dev/null
podman load -q -i "$D/zstd.tar" > /dev/null
run --rm localhost/second:latest
run --rm localhost/first:latest cat /etc/new
podman image inspect localhost/second:latest --format '{{len .RootFS.Layers}} {{.User}}'
skopeo --insecure-policy copy -q "oci-archive:$D/out.tar:latest" "oci:$D/copied:1"
skopeo inspect --format '{{.Digest}}' "oci-archive:$D/out.tar"
skopeo inspect --format '{{.Digest}}' "oci:$D/out:latest"
umoci unpack --image "$D/out:latest" "$D/bundle" > /dev/null 2>&1
umoci config --image "$D/out:latest" --tag outside --config.workingdir /proc/1/root
umoci config --image "$D/out:latest" --tag unknown --config.user unknown
rm -f "$D/bundle/rootfs/etc/resolv.conf"
echo ---
tree "$D/bundle/rootfs"
"#;

fn shown(podman: &Podman, dir: &Path) -> String {
    let script = format!(
        "bash -c '. {}/functions; tree {}'",
        podman.dir().display(),
        dir.display()
    );
    sh_in(podman.scratch(), &script).ok().out()
}

/// Returns a tree without the files that podman adds to each image.
fn without_additions(tree: &str) -> Vec<&str> {
    let added = [
        "etc/hostname",
        "etc/hosts",
        "etc/resolv.conf",
        "./run",
        "./proc",
        "./sys",
        "./dev",
    ];
    let is_added = |line: &&str| added.iter().any(|name| line.contains(name));
    tree.lines().filter(|line| !is_added(line)).collect()
}

#[test]
fn images_are_exchanged_with_other_programs() {
    let more = [Need::Program("skopeo"), Need::Program("umoci")];
    if !can(&[NEEDS, &more].concat()) {
        return;
    }
    let podman = Podman::for_test(User::Root);
    let rootfs = rootfs::busybox_tar().unwrap();
    std::fs::copy(rootfs, podman.scratch().join("rootfs.tar")).unwrap();
    let program = MountProgram::FuseOverlayfs;
    let want = podman.script(program, SAVE).ok().out();

    let store = Store::for_test();
    let at = |name: &str| podman.dir().join(name).display().to_string();
    let layers = || {
        std::fs::read_dir(store.path().join("layers"))
            .unwrap()
            .count()
    };
    store.ok(["create", "first", "--from", &at("first.tar")]);
    let base = layers();
    let sources = [
        at("oci.tar"),
        at("docker.tar"),
        at("layout"),
        at("again.tar"),
        format!("oci-archive:{}", at("oci.tar")),
        format!("docker-archive:{}", at("docker.tar")),
        format!("oci:{}:1.0", at("layout")),
    ];
    for (number, source) in sources.iter().enumerate() {
        let name = format!("c{number}");
        store.ok(["create", &name, "--from", source]);
        let dir = podman.scratch().join(&name).display().to_string();
        store.ok(["export", &name, "--dir", &dir]);
        let found = shown(&podman, Path::new(&dir));
        assert_eq!(
            without_additions(&found),
            without_additions(&want),
            "{source}"
        );
        let printed = store.ok(["exec", &name]);
        assert_eq!(
            printed.trim_end(),
            "hello 1234 1235 1235 77 /srv /home/web",
            "{source}"
        );
    }
    // All of them have the layers of the first image, and those of the second one once.
    let own = layers() - base - sources.len();
    assert!((1..=3).contains(&own), "{base} {own}");

    store.ok(["clone", "c0", "second"]);
    store.exec("second", "echo changed > /srv/d/only; rm /link/x");
    store.exec("first", "echo new > /etc/new");
    store.ok(["export", "second", "--oci", &at("out")]);
    store.ok(["export", "second", "--oci", &at("out.tar")]);
    store.ok([
        "export",
        "first",
        "--oci",
        "--compression",
        "zstd",
        &at("zstd.tar"),
    ]);
    let plain = podman.scratch().join("plain").display().to_string();
    store.ok(["export", "second", "--dir", &plain]);
    let want = shown(&podman, Path::new(&plain));
    let loaded = podman.script(program, LOAD).ok().out();
    let (lines, tree) = loaded.split_once("---\n").unwrap();
    let lines: Vec<_> = lines.lines().collect();
    let [greeting, new, inspected, one, two] = lines.as_slice() else {
        panic!("{lines:?}");
    };
    assert_eq!(*greeting, "hello 1234 1235 1235 77 /srv /home/web");
    assert_eq!(*new, "new");
    assert!(inspected.ends_with(" web"), "{inspected}");
    assert_eq!(one, two);
    assert_eq!(without_additions(tree), without_additions(&want));
    settings_do_not_lead_out_of_the_container(&store, &at("out"));
}

/// Runs the command of images with unusual settings.
fn settings_do_not_lead_out_of_the_container(store: &Store, layout: &str) {
    for (tag, message) in [
        ("outside", "directory of the image"),
        ("unknown", "/etc/passwd"),
    ] {
        store.ok(["create", tag, "--from", &format!("oci:{layout}:{tag}")]);
        store.cowl(["exec", tag]).fails(125, &[message]);
    }
}

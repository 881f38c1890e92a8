//! Containers that travel through a registry, between stores and to other programs.

use std::path::Path;

use cowl_tests::command::{Output, run_command, sh_in};
use cowl_tests::conditions::{Need, can, can_mount};
use cowl_tests::cowl::Store;
use cowl_tests::podman::{self, MountProgram, Podman, User};
use cowl_tests::registry::{NEEDS, PASSWORD, Protection, Registry, USER};
use cowl_tests::rootfs;
use cowl_tests::tree::{Compare, Tree, assert_same, read};
use serde_json::Value;

const OPEN: Protection = Protection {
    password: false,
    tls: false,
    clients: false,
};

fn registry(store: &Store, protection: Protection) -> Registry {
    Registry::start(&store.beside("registry"), protection)
}

/// Returns the tree of a state.
fn tree(store: &Store, state: &str) -> Tree {
    let dir = store.beside(format!("tree-{state}"));
    store.ok(["export", state, "--dir", &dir.display().to_string()]);
    let tree = read(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    tree
}

#[track_caller]
pub(crate) fn assert_equal(
    label: &str,
    (one, of_one): (&Store, &str),
    (two, of_two): (&Store, &str),
) {
    assert_same(label, &tree(one, of_one), &tree(two, of_two), Compare::SAME);
}

/// Returns names, times, comments and tags of the snapshots.
pub(crate) fn described(store: &Store, name: &str) -> Vec<[Value; 4]> {
    let list = store.cowl(["list", name, "--json"]).ok().json();
    let snapshots = list["snapshots"].as_array().unwrap();
    let fields = |s: &Value| ["name", "created", "comment", "tags"].map(|key| s[key].clone());
    snapshots.iter().map(fields).collect()
}

/// Host A takes three snapshots and pushes, B pulls, changes and pushes, and A updates. Only new layers are sent.
#[test]
fn snapshots_travel_between_two_stores() {
    if !can_mount(&[NEEDS, &[Need::Program("busybox")]].concat()) {
        return;
    }
    let (a, b) = (Store::for_test(), Store::for_test());
    let registry = registry(&a, OPEN);
    let reference = format!("{}/team/web:prod", registry.name());
    a.create("web", &rootfs::busybox_tar().unwrap());
    a.exec(
        "web",
        "mkdir /srv; echo 1 > /srv/one; ln /srv/one /srv/link",
    );
    a.ok([
        "snapshot",
        "web",
        "-m",
        "first\nof three",
        "--tag",
        "stage=test",
    ]);
    a.exec("web", "rm /srv/link; echo 2 > /srv/two; chmod 1770 /srv");
    a.ok(["snapshot", "web", "--name", "middle"]);
    a.exec("web", "rm -r /srv; mkdir /srv; echo 3 > /srv/three");
    let pushed = a
        .cowl(["push", "web", &reference, "-m", "pushed", "--json"])
        .ok()
        .json();
    assert_eq!(pushed["snapshot"], "snap1");
    assert_eq!(pushed["layers"], 4);
    assert_eq!(pushed["sent"]["blobs"], 5);
    assert_eq!(a.snapshots("web"), ["snap0", "middle", "snap1"]);
    let uploads = registry.count("PATCH");
    assert_eq!(uploads, 5, "{}", registry.log());
    // Nothing is sent again.
    let again = a.ok(["push", "web", &reference]);
    assert_eq!(a.snapshots("web").len(), 3);
    assert!(
        again.contains(pushed["digest"].as_str().unwrap()),
        "{again}"
    );
    assert_eq!(
        (registry.count("PATCH"), registry.count("POST")),
        (uploads, uploads)
    );

    b.ok(["pull", &reference]);
    assert_eq!(described(&b, "web"), described(&a, "web"));
    for snapshot in ["snap0", "middle", "snap1"] {
        let state = format!("web@{snapshot}");
        assert_equal(snapshot, (&a, &state), (&b, &state));
    }
    b.exec("web", "echo 4 > /srv/four; rm /srv/three");
    let pushed = b.cowl(["push", "web", &reference, "--json"]).ok().json();
    assert_eq!(pushed["snapshot"], "snap2");
    assert_eq!(pushed["present"], 4);
    assert_eq!(
        registry.count("PATCH"),
        uploads + 2,
        "a layer and the config"
    );

    let updated = a
        .cowl(["pull", "--update", &reference, "--json"])
        .ok()
        .json();
    assert_eq!(updated["state"], "replaced");
    assert_eq!(updated["downloaded"]["layers"], 1);
    assert_eq!(updated["snapshots"], serde_json::json!(["snap2"]));
    assert_eq!(described(&b, "web"), described(&a, "web"));
    assert_equal("after the update", (&a, "web"), (&b, "web"));
    let updated = a
        .cowl(["pull", "--update", &reference, "--json"])
        .ok()
        .json();
    assert_eq!(updated["state"], "up-to-date");
    both_change(&a, &b, &reference);
    for store in [&a, &b] {
        store.ok(["check"]);
    }
}

/// Both stores change the same container: nothing of the target is lost, and the other state is a snapshot beside.
fn both_change(a: &Store, b: &Store, reference: &str) {
    a.exec("web", "echo a > /srv/own");
    a.ok(["snapshot", "web", "-m", "of a"]);
    a.exec("web", "echo later > /srv/later");
    b.exec("web", "echo b > /srv/own");
    b.ok(["push", "web", reference, "-m", "of b"]);
    let before = tree(a, "web@snap3");
    let updated = a.cowl(["pull", "--update", reference]).ok();
    // This number was used.
    assert_eq!(updated.out(), "snap4");
    assert!(updated.err().contains("retained"), "{}", updated.report());
    assert_eq!(
        a.snapshots("web"),
        ["snap0", "middle", "snap1", "snap2", "snap3", "snap4"]
    );
    assert_eq!(a.exec("web", "cat /srv/own /srv/later").out(), "a\nlater");
    assert_same(
        "own snapshot",
        &tree(a, "web@snap3"),
        &before,
        Compare::SAME,
    );
    assert_equal("branch", (a, "web@snap4"), (b, "web"));
    let comments: Vec<_> = described(a, "web").iter().map(|s| s[2].clone()).collect();
    assert_eq!(comments[4..], ["of a", "of b"]);
    a.restore("web", "snap4");
    assert_eq!(a.exec("web", "cat /srv/own").out(), "b");
    let auto = a.snapshots("web").pop().unwrap();
    a.restore("web", &auto);
    assert_eq!(a.exec("web", "cat /srv/later").out(), "later");
    // An image of something else.
    b.create("other", &rootfs::busybox_tar().unwrap());
    b.exec("other", "echo x > /x");
    let other = format!("{reference}-other");
    b.ok(["push", "other", &other]);
    let mount = a.mount("web");
    let updated = a.cowl(["pull", "--update", &other, "web"]).ok();
    assert!(
        updated.err().contains("it is mounted"),
        "{}",
        updated.report()
    );
    assert!(mount.join("srv/later").is_file() && !mount.join("x").is_file());
    a.ok(["umount", "web"]);
    std::fs::create_dir_all(b.beside("empty/etc")).unwrap();
    b.create("empty", &b.beside("empty"));
    // Nothing that only the registry has is replaced without a request.
    b.cowl(["push", "empty", &other])
        .fails(1, &["layers that the state lacks", "--force"]);
    b.ok(["push", "empty", &other, "--force"]);
    a.cowl(["pull", "--update", &other, "web"])
        .fails(1, &["no state in common"]);
}

/// Runs a command with a file of credentials, and the certificates of a registry.
fn with(store: &Store, registry: &Registry, args: &[&str]) -> Output {
    let auth = store.beside("auth.json").display().to_string();
    let certs = registry.cert_dir().display().to_string();
    let more = ["--authfile", &auth, "--cert-dir", &certs];
    store.cowl_with([args, &more].concat(), PASSWORD.as_bytes())
}

#[test]
fn registries_with_passwords_and_tls_are_used() {
    use std::os::unix::fs::PermissionsExt as _;
    if !can(&[NEEDS, &[Need::Root]].concat()) {
        return;
    }
    let store = Store::for_test();
    let protection = Protection {
        password: true,
        tls: true,
        clients: false,
    };
    let registry = registry(&store, protection);
    let name = registry.name();
    let reference = format!("{name}/web");
    let root = store.beside("root");
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::write(root.join("etc/hostname"), "web").unwrap();
    store.create("web", &root);
    store.ok(["snapshot", "web"]);
    store
        .cowl(["push", "web", &reference])
        .fails(1, &["cannot connect", "--cert-dir"]);
    store
        .cowl(["push", "web", &reference, "--tls-verify=false"])
        .fails(1, &["401", "cowl login"]);
    with(
        &store,
        &registry,
        &["login", &name, "-u", "other", "--password-stdin"],
    )
    .fails(1, &["does not accept"]);
    let auth = store.beside("auth.json");
    assert!(!auth.try_exists().unwrap());
    with(
        &store,
        &registry,
        &["login", &name, "-u", USER, "--password-stdin"],
    )
    .ok();
    assert_eq!(auth.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    with(&store, &registry, &["push", "web", &reference]).ok();
    with(&store, &registry, &["pull", &reference, "again"]).ok();
    with(
        &store,
        &registry,
        &["pull", &format!("{reference}:none"), "x"],
    )
    .fails(3, &["404"]);
    assert_eq!(store.ok(["cat", "again:etc/hostname"]), "web");
    // skopeo reads the same file of credentials.
    if cowl_tests::programs::in_path("skopeo").is_some() {
        let script = format!(
            "skopeo inspect --authfile auth.json --cert-dir {} docker://{reference}",
            registry.cert_dir().display()
        );
        sh_in(store.scratch(), &script).ok();
    }
    let auth_arg = auth.display().to_string();
    store.ok(["logout", &name, "--authfile", &auth_arg]);
    store
        .cowl(["logout", &name, "--authfile", &auth_arg])
        .fails(3, &["no credentials"]);
    with(&store, &registry, &["pull", &reference, "x"]).fails(1, &["401"]);
}

/// Runs programs of other projects on the image that cowl has pushed, and pushes one for cowl.
const EXCHANGE: &str = r#"
mkdir conf; printf '{"default":[{"type":"insecureAcceptAnything"}]}' > conf/policy.json
skopeo --policy conf/policy.json copy -q --src-tls-verify=false "docker://$R/web:1" oci:copied:1
podman pull -q --signature-policy conf/policy.json --tls-verify=false "$R/web:1" > /dev/null
run --rm "$R/web:1" cat /srv/file
printf 'FROM %s\nRUN echo more > /srv/more; rm /srv/file\n' "$R/web:1" > context/Containerfile
build --tls-verify=false --signature-policy conf/policy.json -t "$R/web:2" context > /dev/null
podman push -q --tls-verify=false "$R/web:2"
"#;

/// Pulls the image with containerd.
const CTR: &str = r#"
printf 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n' > ctr.toml
containerd --config "$PWD/ctr.toml" --root "$PWD/ctr" --state "$PWD/ctr-run" --address "$PWD/s" > ctr.log 2>&1 &
pid=$!
trap 'kill $pid; wait $pid || :' EXIT
for attempt in $(seq 100); do if ctr -a "$PWD/s" version > /dev/null 2>&1; then break; fi; sleep 0.2; done
ctr -a "$PWD/s" images pull --plain-http --snapshotter native "$R/web:1" > ctr.out 2>&1 || { cat ctr.out ctr.log; exit 1; }
ctr -a "$PWD/s" images check --snapshotter native | grep -q complete
ctr -a "$PWD/s" images tag "$R/web:1" "$R/web:ctr" > /dev/null
ctr -a "$PWD/s" images push --plain-http "$R/web:ctr" > /dev/null
"#;

#[test]
fn images_in_registries_are_exchanged_with_other_programs() {
    let more = [
        Need::Program("skopeo"),
        Need::Program("ctr"),
        Need::Program("containerd"),
    ];
    if !can(&[podman::NEEDS, NEEDS, &more].concat()) {
        return;
    }
    let (store, engine) = (Store::for_test(), Podman::for_test(User::Root));
    let registry = registry(&store, OPEN);
    let name = registry.name();
    let reference = |tag: &str| format!("{name}/web:{tag}");
    store.create("web", &rootfs::busybox_tar().unwrap());
    store.exec("web", "mkdir /srv; echo content > /srv/file");
    store.ok(["snapshot", "web", "-m", "with a file"]);
    store.ok(["push", "web@snap0", &reference("1")]);
    let script = format!("R={name}\n{EXCHANGE}");
    let done = engine.script(MountProgram::FuseOverlayfs, &script).ok();
    assert_eq!(done.out(), "content");
    store.ok(["pull", &reference("2"), "two"]);
    assert_eq!(store.ok(["ls", "two:srv"]), "more\n");
    // An image of another program on top of a container's own states.
    let updated = store
        .cowl(["pull", "--update", &reference("2"), "web"])
        .ok();
    assert_eq!(updated.out().lines().count(), 1, "{}", updated.report());
    assert_eq!(store.ok(["ls", "web:srv"]), "more\n");
    // skopeo preserves the annotations, so that the copy has the snapshots.
    let copied = engine.dir().join("copied").display().to_string();
    store.ok(["create", "copied", "--from", &format!("oci:{copied}:1")]);
    assert_eq!(described(&store, "copied"), described(&store, "web")[..1]);
    sh_in(engine.scratch(), &format!("R={name}\n{CTR}")).ok();
    store.ok(["pull", &reference("ctr"), "three"]);
    assert_equal("from containerd", (&store, "three"), (&store, "web@snap0"));
    store.ok(["check"]);
}

/// A layer that fits on no disk leaves the store as it was.
#[test]
fn a_full_disk_leaves_nothing() {
    if !can_mount(NEEDS) {
        return;
    }
    let from = Store::for_test();
    let registry = registry(&from, OPEN);
    let root = from.beside("root/etc");
    std::fs::create_dir_all(&root).unwrap();
    let noise = "head -c 40000000 /dev/urandom > root/etc/noise";
    sh_in(from.scratch(), noise).ok();
    from.create("web", root.parent().unwrap_or(Path::new("/")));
    let reference = format!("{}/web", registry.name());
    from.ok(["push", "web", &reference]);
    for size in ["20m", "60m"] {
        let small = small_store(size);
        small.cowl(["pull", &reference]).fails(1, &["no space"]);
        let left =
            |name: &str| std::fs::read_dir(small.path().join(name)).map_or(0, Iterator::count);
        assert_eq!(left("layers"), 0);
        assert_eq!(left("transfers"), 0);
        small.cowl(["list", "web"]).fails(3, &[]);
    }
}

/// Creates a store on a small file system.
fn small_store(size: &str) -> Store {
    Store::on(|scratch, name| {
        let dir = scratch.make(name);
        let script = format!("mount -t tmpfs -o size={size} none {}", dir.display());
        run_command(shell(&script), b"").ok();
        dir
    })
}

/// A push whose layers do not fit on the disk together sends them one after the other. One that does not fit alone is
/// refused, and leaves nothing.
#[test]
fn a_push_needs_space_for_few_layers_only() {
    if !can_mount(NEEDS) {
        return;
    }
    let store = small_store("112m");
    let registry = registry(&store, OPEN);
    let reference = format!("{}/web", registry.name());
    std::fs::create_dir_all(store.beside("root/etc")).unwrap();
    store.create("web", &store.beside("root"));
    let noise = |name: &str, size: u64| {
        let top = store.mount("web");
        let script = format!("head -c {size} /dev/urandom > {}/{name}", top.display());
        run_command(shell(&script), b"").ok();
        store.ok(["umount", "web"]);
        store.ok(["snapshot", "web"]);
    };
    // All layers occupy 80 MB, so that 32 MB are left for them in packed form, or for two of them.
    for number in 0..6 {
        noise(&format!("noise{number}"), 13_000_000);
    }
    let left = || std::fs::read_dir(store.path().join("transfers")).map_or(0, Iterator::count);
    let pushed = store
        .cowl(["push", "web", &reference, "--json"])
        .ok()
        .json();
    assert!(
        pushed["sent"]["bytes"].as_u64().unwrap() > 78_000_000,
        "{pushed}"
    );
    assert_eq!(left(), 0);
    let one = small_store("60m");
    std::fs::create_dir_all(one.beside("root")).unwrap();
    let script = "head -c 40000000 /dev/urandom > root/noise";
    sh_in(one.scratch(), script).ok();
    one.create("web", &one.beside("root"));
    one.ok(["snapshot", "web"]);
    let tag = format!("{reference}:large");
    let refused = one.cowl(["push", "web@snap0", &tag]);
    refused.fails(1, &["cannot push", "no space", "cowl gc"]);
    let left = std::fs::read_dir(one.path().join("transfers")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
    one.cowl(["pull", &tag, "again"]).fails(3, &["404"]);
    one.ok(["check"]);
}

/// A registry that requires a certificate of the client gets that of `--cert-dir`.
#[test]
fn registries_with_certificates_of_clients_are_used() {
    if !can(&[NEEDS, &[Need::Root]].concat()) {
        return;
    }
    let store = Store::for_test();
    let protection = Protection {
        password: false,
        tls: true,
        clients: true,
    };
    let registry = registry(&store, protection);
    let reference = format!("{}/web", registry.name());
    std::fs::create_dir_all(store.beside("root/etc")).unwrap();
    store.create("web", &store.beside("root"));
    store.ok(["snapshot", "web"]);
    let authority = store.beside("authority");
    std::fs::create_dir(&authority).unwrap();
    std::fs::copy(registry.cert_dir().join("ca.crt"), authority.join("ca.crt")).unwrap();
    let push = |dir: &Path| {
        let dir = dir.display().to_string();
        store.cowl(["push", "web@snap0", &reference, "--cert-dir", &dir])
    };
    push(&authority).fails(1, &["cannot connect", "certificate of the client"]);
    // The key of another certificate, and no key at all.
    let wrong = "cp registry/certs/client.cert authority/; cp registry/ca.key authority/client.key";
    sh_in(store.scratch(), wrong).ok();
    push(&authority).fails(1, &["cannot be the certificate of the client"]);
    std::fs::remove_file(authority.join("client.key")).unwrap();
    push(&authority).fails(1, &["has no key"]);
    push(&registry.cert_dir()).ok();
    let certs = registry.cert_dir().display().to_string();
    store.ok(["pull", &reference, "again", "--cert-dir", &certs]);
    // Any certificate of the registry is accepted, but it still requires that of the client.
    store.ok([
        "pull",
        &reference,
        "third",
        "--cert-dir",
        &certs,
        "--tls-verify=false",
    ]);
}

fn shell(script: &str) -> std::process::Command {
    let mut command = std::process::Command::new("sh");
    command.args(["-euc", script]);
    command
}

//! Images, containers and cowl's commands on them.

use cowl_tests::conditions::{Need, can};
use cowl_tests::containerd::{Containerd, LayerScript, NEEDS};

/// Changes of the base that need each kind of marker.
const LAYERS: &[LayerScript<'_>] = &[
    (
        "files",
        "mkdir -p data/sub; echo one > data/one; echo two > data/two; echo x > data/sub/x",
    ),
    (
        "changes",
        "mkdir data; echo more > data/three; : > data/.wh.two; mkdir data/sub; : > data/sub/.wh..wh..opq; echo y > data/sub/y",
    ),
];

/// Prints the names and content of /data in the container.
const SHOW: &str =
    "cd /data && find . -type f | sort | while read -r f; do echo \"$f $(cat $f)\"; done";

fn with_image() -> Containerd {
    let containerd = Containerd::for_test();
    containerd.make_image("app", LAYERS);
    containerd
}

#[test]
fn a_container_is_snapshotted_broken_and_restored() {
    if !can(NEEDS) {
        return;
    }
    let containerd = with_image();
    let script = format!(
        r#"
import app
start docker.io/test/app:latest web sleep 1000
SHOW='{SHOW}'
run_in web sh -c "$SHOW" > "$D/original"
run_in web sh -c 'echo mine > /data/mine'
cowl list --containerd
cowl snapshot "ctr.$NS.web" --name good
run_in web sh -c 'echo broken > /data/one; rm -r /data/sub /bin'
cowl diff "ctr.$NS.web@good" "ctr.$NS.web" > "$D/diff"
cowl list "ctr.$NS.web" --json > "$D/snapshots"
# A restore of a running container is refused, and changes nothing.
if cowl restore "ctr.$NS.web" good 2> "$D/refused"; then exit 7; fi
stop web
cowl restore "ctr.$NS.web" good
ctr task start -d web
run_in web sh -c "$SHOW" > "$D/restored"
remove web
ctr images rm docker.io/test/app:latest
await collected
echo "$(mounts) mounts, $(daemons) daemons, $(ls "$COWL_STORE/layers" | wc -l) layers, $(ls "$COWL_STORE/mnt" | wc -l) mount points"
cowl check
"#
    );
    let output = containerd.script(&script).ok();
    let text = output.out();
    assert!(text.contains("active"), "{text}");
    assert!(
        text.contains("0 mounts, 0 daemons, 0 layers, 0 mount points"),
        "{text}"
    );
    let read = |name: &str| std::fs::read_to_string(containerd.dir().join(name)).unwrap();
    assert_eq!(read("original"), "./one one\n./sub/y y\n./three more\n");
    assert_eq!(
        read("restored"),
        "./mine mine\n./one one\n./sub/y y\n./three more\n"
    );
    let diff = read("diff");
    for line in ["/data/one", "/data/sub", "/bin"] {
        assert!(diff.contains(line), "{diff}");
    }
    assert!(
        read("refused").contains("in use") || read("refused").contains("files open"),
        "{}",
        read("refused")
    );
    assert!(read("snapshots").contains("good"));
}

#[test]
fn a_live_container_is_compared_with_its_image() {
    if !can(NEEDS) {
        return;
    }
    let containerd = with_image();
    let script = r#"
import app
start docker.io/test/app:latest web sleep 1000
run_in web sh -c 'echo new > /data/new; rm /data/one'
ctr snapshots --snapshotter cowl diff web > "$D/diff.tar"
tar -tf "$D/diff.tar" | sort
ctr snapshots --snapshotter cowl usage web
remove web
"#;
    let text = containerd.script(script).ok().out();
    for line in ["data/new", "data/.wh.one"] {
        assert!(text.lines().any(|found| found == line), "{text}");
    }
    assert!(!text.contains("data/three"), "{text}");
}

#[test]
fn commands_do_not_remove_what_belongs_to_containerd() {
    if !can(NEEDS) {
        return;
    }
    let containerd = with_image();
    let script = r#"
import app
start docker.io/test/app:latest web sleep 1000
run_in web sh -c 'echo mine > /data/mine'
refused() {
    local code=0
    "$@" < /dev/null > /dev/null 2> "$D/err" || code=$?
    if [ "$code" = 0 ]; then echo "not refused: $*"; exit 7; fi
    grep -q 'containerd' "$D/err" || { echo "no reason: $*"; cat "$D/err"; exit 7; }
}
before=$(ctr snapshots --snapshotter cowl ls | sort)
layers=$(ls "$COWL_STORE/layers" | sort)
refused cowl destroy "ctr.$NS.web" --yes
refused cowl destroy "ctr.$NS.web" --yes --now
refused cowl rename "ctr.$NS.web" web
refused cowl clone "ctr.$NS.web" ctr.x
committed=$(cowl list --containerd=all --json | python3 -c 'import json,sys; print([c["name"] for c in json.load(sys.stdin)["containers"] if c["containerd"]["kind"] == "committed"][0])')
for verb in "mount $committed" "snapshot $committed" "destroy --yes --now $committed" "umount $committed" \
    "exec $committed -- true" "clone $committed new" "flatten $committed" "diff $committed" "rename $committed other"; do
    refused cowl $verb
done
cowl prune --all-containers
cowl gc --empty-trash
[ "$(cowl list --json | python3 -c 'import json,sys; print(len(json.load(sys.stdin)["containers"]))')" = 0 ]
[ "$(ctr snapshots --snapshotter cowl ls | sort)" = "$before" ]
[ "$(ls "$COWL_STORE/layers" | sort)" = "$layers" ]
# A clone shares the layers and survives the container.
cowl clone "ctr.$NS.web" saved
cowl snapshot "ctr.$NS.web" --name kept --protect
stop web
ctr containers rm web
# The snapshot remains because it is protected, and is removed after that.
ctr content prune references > /dev/null 2>&1 || :
cowl list --containerd --json | grep -q '"ctr.'
cowl protect "ctr.$NS.web@kept" --off
ctr images rm docker.io/test/app:latest
await collected
cowl exec saved -- cat /data/mine
cowl destroy saved --yes --now
ls "$COWL_STORE/layers" | wc -l
"#;
    let text = containerd.script(script).ok().out();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[lines.len() - 2..], ["mine", "0"], "{text}");
}

#[test]
fn a_snapshot_of_a_container_is_exported_and_runs_elsewhere() {
    if !can(&[NEEDS, &[Need::KernelOverlay]].concat()) {
        return;
    }
    let containerd = with_image();
    let script = r#"
import app
start docker.io/test/app:latest web sleep 1000
run_in web sh -c 'echo mine > /data/mine; rm -r /data/sub'
cowl snapshot "ctr.$NS.web" --name release
run_in web sh -c 'echo later > /data/mine'
cowl export "ctr.$NS.web@release" --oci "$D/release.tar"
# Another namespace of containerd with its own snapshotter has neither the image nor the store.
elsewhere() { command ctr --address /run/containerd/containerd.sock --namespace "$NS-elsewhere" "$@"; }
elsewhere images import --snapshotter overlayfs --digests --base-name localhost/release "$D/release.tar" > /dev/null
image=$(elsewhere images ls -q | grep -v sha256 | head -n 1)
elsewhere run --rm --snapshotter overlayfs "$image" other sh -c 'cat /data/mine; ls /data'
elsewhere images ls -q | while read -r image; do elsewhere images rm "$image" > /dev/null; done
remove web
"#;
    let text = containerd.script(script).ok().out();
    assert_eq!(
        text.lines().skip(1).collect::<Vec<_>>(),
        ["mine", "mine", "one", "three"],
        "{text}"
    );
}

#[test]
fn the_service_manager_passes_the_socket() {
    if !can(&[NEEDS, &[Need::Program("systemd-socket-activate")]].concat()) {
        return;
    }
    let containerd = with_image();
    let script = r#"
kill $SNAPSHOTTER; wait $SNAPSHOTTER
# The file remains: it may be the socket of the next process already.
if connects 2> /dev/null; then exit 7; fi
rm /run/containerd/cowl.sock
systemd-socket-activate -l /run/containerd/cowl.sock --setenv COWL_STORE --setenv PATH \
    "$(command -v cowl-snapshotter)" --address /nowhere/socket -v 2>> "$D/snapshotter.log" &
SNAPSHOTTER=$!
await import app
ctr run --rm --snapshotter cowl docker.io/test/app:latest one cat /data/one
ctr images rm docker.io/test/app:latest > /dev/null
"#;
    let text = containerd.script(script).ok().out();
    assert_eq!(text, "one");
}

#[test]
fn a_container_is_mounted_again_after_all_programs_have_ended() {
    if !can(NEEDS) {
        return;
    }
    let containerd = with_image();
    let first = r#"
import app
start docker.io/test/app:latest web sleep 1000
run_in web sh -c 'echo mine > /data/mine'
"#;
    // All processes and mounts end with the namespaces, as in a reboot.
    containerd.script(first).ok();
    let second = r#"
[ "$(mounts)" = 0 ]
ctr task rm web > /dev/null 2>&1 || :
ctr task start -d web
run_in web cat /data/mine
remove web
ctr images rm docker.io/test/app:latest > /dev/null
await collected
echo "$(mounts) mounts, $(daemons) daemons, $(ls "$COWL_STORE/layers" | wc -l) layers"
"#;
    let text = containerd.script(second).ok().out();
    assert_eq!(text, "mine\n0 mounts, 0 daemons, 0 layers");
}

#[test]
fn another_user_cannot_send_requests() {
    if !can(&[NEEDS, &[Need::Program("curl"), Need::Program("setpriv")]].concat()) {
        return;
    }
    let containerd = Containerd::for_test();
    let script = r#"
cd /run/containerd
# An empty message of gRPC.
printf '\0\0\0\0\0' > message
chmod 644 message
request() { "$@" env PATH=/usr/bin:/bin curl -sS --unix-socket cowl.sock --http2-prior-knowledge -D - -o /dev/null \
    -H 'content-type: application/grpc' -H 'te: trailers' --data-binary @message \
    http://x/containerd.services.snapshots.v1.Snapshots/Stat; }
user="setpriv --reuid 54321 --regid 54321 --clear-groups"
if request $user > /dev/null 2>&1; then exit 7; fi
# curl may report a reset of the stream instead of the reply, which comes before curl has sent the body.
status() { for i in $(seq 50); do if request "$@" 2> /dev/null | grep -o 'grpc-status: [0-9]*'; then return; fi; done; return 1; }
# The mode of a socket that another program has created may be wrong.
chmod 666 cowl.sock
status $user
status env
"#;
    // Permission denied, and not found.
    let text = containerd.script(script).ok().out();
    assert_eq!(text, "grpc-status: 7\ngrpc-status: 5");
}

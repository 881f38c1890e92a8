//! The layers that containerd writes: what their content means, and when they can be committed.

use cowl_tests::conditions::{Need, can};
use cowl_tests::containerd::{Containerd, NEEDS};

fn run(script: &str) -> String {
    let containerd = Containerd::for_test();
    containerd.script(script).ok().out()
}

#[test]
fn a_bottom_layer_is_not_committed_while_a_process_uses_it() {
    if !can(NEEDS) {
        return;
    }
    run(r#"
prepare bottom
mount_at bottom bottom
exec 5> "$D/bottom/file"
if commit base bottom 2> "$D/err"; then echo "committed while a file was open"; exit 7; fi
grep -q "in use" "$D/err" || { cat "$D/err" >&2; exit 7; }
echo complete >&5
exec 5>&-
commit base bottom
prepare upper base
mount_at upper upper
grep -q complete "$D/upper/file"
cowl check
"#);
}

#[test]
fn markers_in_a_bottom_layer_have_no_meaning() {
    if !can(NEEDS) {
        return;
    }
    for key in ["bottom", "extract-1-x"] {
        run(&format!(
            "K={key}\n{}",
            r#"
prepare $K
mount_at bottom $K
mkdir "$D/bottom/dir"
echo x > "$D/bottom/dir/file"
# Kernel overlayfs may refuse these; then they do not exist either.
python3 - "$D/bottom" <<'PYTHON'
import os, stat, sys
at = sys.argv[1]
for name, value in [("opaque", b"y"), ("redirect", b"/dir"), ("metacopy", b""), ("cowl.ino", b"x"), ("cowl.recorded", b"x")]:
    for path in ["dir", "dir/file"]:
        try: os.setxattr(f"{at}/{path}", f"trusted.overlay.{name}", value)
        except OSError as error: print(name, error)
try: os.mknod(f"{at}/device", 0o600 | stat.S_IFCHR, os.makedev(0, 0))
except OSError as error: print("device", error)
def show():
    for dir, dirs, files in os.walk(at):
        for name in sorted(dirs + files):
            path = os.path.join(dir, name)
            yield os.path.relpath(path, at), os.lstat(path).st_mode, {x: os.getxattr(path, x) for x in os.listxattr(path)}
open(os.environ["D"] + "/expected", "w").write(repr(sorted(show(), key=lambda one: one[0])))
PYTHON
commit base $K
prepare upper base
mount_at upper upper
python3 - "$D/upper" <<'PYTHON'
import os, sys
at = sys.argv[1]
def show():
    for dir, dirs, files in os.walk(at):
        for name in sorted(dirs + files):
            path = os.path.join(dir, name)
            yield os.path.relpath(path, at), os.lstat(path).st_mode, {x: os.getxattr(path, x) for x in os.listxattr(path)}
found = repr(sorted(show(), key=lambda one: one[0]))
expected = open(os.environ["D"] + "/expected").read()
assert found == expected, f"{found}\n{expected}"
PYTHON
test "$(cat "$D/upper/dir/file")" = x
cowl check
"#
        ));
    }
}

#[test]
fn a_layer_is_not_committed_while_a_hidden_daemon_writes_to_it() {
    if !can(NEEDS) {
        return;
    }
    run(r#"
prepare bottom
commit base bottom
prepare upper base
mount_at upper upper
echo x > "$D/upper/file"
umount "$D/upper"
mount -t tmpfs -o mode=755 none /run/cowl
if commit top upper 2> "$D/err"; then echo "committed beside a daemon"; exit 7; fi
grep -q "in use" "$D/err" || { cat "$D/err" >&2; exit 7; }
umount /run/cowl
commit top upper
# A client that repeats a commit learns that it is in effect.
if commit top upper 2> "$D/err"; then exit 7; fi
grep -q "already exists" "$D/err" || { cat "$D/err" >&2; exit 7; }
cowl check
"#);
}

#[test]
fn a_restart_beside_a_damaged_container_serves_the_others() {
    if !can(NEEDS) {
        return;
    }
    run(r#"
prepare bottom
commit base bottom
mkdir "$D/files"
cowl create plain --from "$D/files"
manifest=$(grep -l '"plain"' "$COWL_STORE"/containers/*/container.json)
sed -i 's/"next_snap": 0/"next_snap": 7/; s/"created": "2/"created": "3/' "$manifest"
old=$SNAPSHOTTER
kill $old
start_snapshotter
wait $old || :
connects
prepare upper base
mount_at upper upper
"#);
}

/// A mount that must not be unmounted with the container prevents a commit and a removal, and all mounts remain.
#[test]
fn mounts_remain_if_a_commit_or_a_removal_fails() {
    if !can(&[NEEDS, &[Need::Program("losetup")]].concat()) {
        return;
    }
    run(r#"
prepare bottom
commit base bottom
prepare upper base
mount_at upper upper
mkdir "$D/upper/part" "$D/upper/below" "$D/read" "$D/part"
echo x > "$D/upper/part/file"
mount -o bind "$D/upper" "$D/read"
mount -o remount,bind,ro,nosuid,nodev,noexec,noatime,nosymfollow "$D/read"
show() { grep " $D/" /proc/self/mountinfo | grep fuse.cowlfs | cut -d ' ' -f 4-6 | sort; }
refused() {
    local before=$(show)
    [ "$(show | wc -l)" -ge 2 ]
    if commit top upper 2> "$D/err"; then echo "committed while $1"; exit 7; fi
    grep -q "in use" "$D/err" || { cat "$D/err" >&2; exit 7; }
    [ "$(show)" = "$before" ] || { echo "$1: $before; $(show)"; exit 7; }
    [ "$(cat "$D/upper/part/file" "$D/read/part/file" | tr -d '\n')" = xx ]
    ctr snapshots --snapshotter cowl rm upper-unknown 2> /dev/null && exit 7
    cowl check -q
}
mount -o bind "$D/upper/part" "$D/part"
refused "a part is mounted"
grep " $D/read " /proc/self/mountinfo | grep -q ' ro,nosuid,nodev,noexec,noatime,nosymfollow '
umount "$D/part"
mount -t tmpfs none "$D/upper/below"
refused "another file system is mounted in it"
umount "$D/upper/below"
# No process holds the file open, so that only the unmount itself finds it.
truncate -s 1M "$D/upper/part/image"
loop=$(losetup -f --show "$D/upper/part/image")
refused "a loop device uses a file"
losetup -d "$loop"
# Another mount namespace has a copy that a process did not inherit.
unshare -m --propagation private sh -c "mkdir -p '$D/elsewhere'; mount -o bind '$D/upper' '$D/elsewhere'; exec sleep 1000" & holder=$!
await grep -q "$D/elsewhere" /proc/$holder/mountinfo
refused "it is mounted in another namespace"
kill $holder; wait $holder || :
echo y > "$D/upper/part/file"
if echo y > "$D/read/part/file" 2> /dev/null; then echo "not read-only"; exit 7; fi
await commit top upper
[ "$(show)" = "" ]
cowl check
"#);
}

#[test]
fn mounts_remain_while_the_garbage_collection_cannot_remove_a_snapshot() {
    if !can(&[NEEDS, &[Need::Program("losetup")]].concat()) {
        return;
    }
    run(r#"
prepare bottom
commit base bottom
prepare upper base
mount_at upper upper
mkdir "$D/upper/part" "$D/part"
echo x > "$D/upper/part/file"
truncate -s 1M "$D/upper/part/image"
show() { grep " $D/" /proc/self/mountinfo | grep fuse.cowlfs | cut -d ' ' -f 4-6 | sort; }
# containerd collects snapshots only after the removal of one.
collect() {
    prepare another base > /dev/null
    ctr snapshots --snapshotter cowl rm another
    ctr content prune references > /dev/null
}
remains() { grep -c 'upper.* remains: ' "$D/snapshotter.log" || :; }
refused() {
    local before=$(show) times=$(remains)
    collect
    [ "$(remains)" -gt "$times" ] || { echo "removed while $1"; exit 7; }
    [ "$(show)" = "$before" ] || { echo "$1: $before; $(show)"; exit 7; }
    [ "$(cat "$D/upper/part/file")" = x ]
    cowl check -q
}
ctr snapshots --snapshotter cowl rm upper
mount -o bind "$D/upper/part" "$D/part"
refused "a part is mounted"
umount "$D/part"
loop=$(losetup -f --show "$D/upper/part/image")
refused "a loop device uses a file"
losetup -d "$loop"
collect
[ "$(show)" = "" ] || { show; exit 7; }
if cowl list --containerd=all --json | grep -q /upper; then exit 7; fi
cowl check
"#);
}

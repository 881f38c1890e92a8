//! The layers that containerd writes: what their content means, and when they can be committed.

use cowl_tests::conditions::can;
use cowl_tests::containerd::{Containerd, NEEDS};

/// Mounts the active snapshot `$1` at `$D/$1`.
const MOUNT: &str = r#"
mount_at() { mkdir -p "$D/$1"; eval "$(ctr snapshots --snapshotter cowl mounts "$D/$1" "$2")"; }
commit() { ctr snapshots --snapshotter cowl commit "$@"; }
prepare() { ctr snapshots --snapshotter cowl prepare "$@"; }
"#;

fn run(script: &str) -> String {
    let containerd = Containerd::for_test();
    containerd.script(&format!("{MOUNT}{script}")).ok().out()
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

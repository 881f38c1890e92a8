//! Mounts that other programs made or ended, their flags, and several stores on one machine.

use cowl_tests::conditions::{Need, can};
use cowl_tests::containerd::{Containerd, NEEDS};

/// Prepares `upper`, whose file contains `x`. `source` prints the directory of its mount in the store.
const UPPER: &str = r#"
prepare bottom
commit base bottom
prepare upper base
mount_at upper upper
echo x > "$D/upper/file"
source_of() { ctr snapshots --snapshotter cowl mounts "$D/x" "$1" | awk '{ print $4 }'; }
source=$(source_of upper)
show() { grep -e " $D/" -e " $COWL_STORE/mnt/" /proc/self/mountinfo | grep fuse.cowlfs | cut -d ' ' -f 4-6 | sort; }
"#;

fn run(script: &str) -> String {
    let containerd = Containerd::for_test();
    containerd.script(&format!("{UPPER}{script}")).ok().out()
}

#[test]
fn a_mount_that_another_program_replaced_is_neither_used_nor_unmounted() {
    if !can(NEEDS) {
        return;
    }
    run(r#"
umount "$D/upper"
refused() {
    if "$@" > "$D/out" 2>&1; then echo "not refused: $*"; cat "$D/out"; exit 7; fi
    [ "$(cat "$source/theirs")" = theirs ]
    cowl check -q
}
theirs() { mount -t tmpfs none "$source"; echo theirs > "$source/theirs"; }
# Over the mount of the container.
theirs
for request in "source_of upper" "commit top upper"; do
    refused $request
    grep -q "another file system is mounted over $source" "$D/out" || { cat "$D/out"; exit 7; }
done
umount "$source"
mount_at upper upper
[ "$(cat "$D/upper/file")" = x ]
umount "$D/upper"
# Unmounted, and mounted again by the next request.
umount "$source"
mount_at upper upper
[ "$(cat "$D/upper/file")" = x ]
[ "$(show | wc -l)" = 2 ]
# Unmounted and mounted by a command.
umount "$D/upper" "$source"
cowl mount "ctr.$NS.upper" > /dev/null
[ "$(source_of upper)" = "$source" ]
mount_at upper upper
echo y >> "$D/upper/file"
umount "$D/upper"
# Instead of the mount of the container.
umount "$source"
theirs
refused source_of upper
commit top upper
[ "$(cat "$source/theirs")" = theirs ]
umount "$source"
prepare again top
mount_at again again
[ "$(tr -d '\n' < "$D/again/file")" = xy ]
umount "$D/again"
# A removal.
source=$(source_of again)
theirs
ctr snapshots --snapshotter cowl rm again
ctr content prune references > /dev/null
[ "$(cat "$source/theirs")" = theirs ]
umount "$source"
ctr snapshots --snapshotter cowl rm top
ctr snapshots --snapshotter cowl rm base
await collected
kill $SNAPSHOTTER; wait $SNAPSHOTTER || :
cowl gc > /dev/null 2>&1
for dir in layers containers mnt trash; do
    [ -z "$(ls "$COWL_STORE/$dir")" ] || { ls "$COWL_STORE/$dir"; exit 7; }
done
"#);
}

#[test]
fn mounts_are_restored_if_the_sync_of_a_commit_fails() {
    if !can(&[NEEDS, &[Need::Program("strace")]].concat()) {
        return;
    }
    run(r#"
before=$(show)
[ "$(echo "$before" | wc -l)" = 2 ]
strace -qq -f -o "$D/trace" -p $SNAPSHOTTER -e trace=syncfs -e inject=syncfs:error=EIO & tracer=$!
# Each thread is traced: one of them syncs.
traced() { [ -z "$(grep -L 'TracerPid:.*[1-9]' /proc/$SNAPSHOTTER/task/*/status)" ]; }
await traced
if commit top upper 2> "$D/err"; then echo "committed without a sync"; exit 7; fi
kill -INT $tracer; wait $tracer || :
grep -q 'INJECTED' "$D/trace"
grep -q 'sync' "$D/err"
[ "$(show)" = "$before" ] || { show; exit 7; }
[ "$(mounts)" = 1 ]
echo y >> "$D/upper/file"
# The kernel reports an error once, but any snapshot may be incomplete.
if commit top upper 2> "$D/err"; then echo "committed after a failed sync"; exit 7; fi
grep -q 'restart cowl-snapshotter' "$D/err"
[ "$(show)" = "$before" ] || { show; exit 7; }
kill_snapshotter
start_snapshotter
commit top upper
if grep " $D/upper " /proc/mounts; then exit 7; fi
prepare again top
mount_at again again
[ "$(tr -d '\n' < "$D/again/file")" = xy ]
cowl check
"#);
}

#[test]
fn mounts_have_the_flags_of_those_of_other_snapshotters() {
    if !can(NEEDS) {
        return;
    }
    run(r#"
options() { ctr snapshots --snapshotter $1 mounts AT "$2" | sed 's/^mount -t bind [^ ]* AT -o //' | tr , '\n' | sort | tr '\n' ' '; }
ctr snapshots --snapshotter native prepare bottom > /dev/null
ctr snapshots --snapshotter native commit base bottom
ctr snapshots --snapshotter native prepare upper base > /dev/null
for snapshotter in cowl native; do ctr snapshots --snapshotter $snapshotter view seen base > /dev/null; done
for key in upper seen; do
    [ "$(options cowl $key)" = "$(options native $key)" ] || { options cowl $key; options native $key; exit 7; }
done
[ "$(options cowl upper)" = "rbind rw " ]
mount_at seen seen
if : > "$D/seen/file" 2> /dev/null; then echo "a view is writable"; exit 7; fi
flags() { grep " $1 " /proc/self/mountinfo | cut -d ' ' -f 6; }
for at in "$source" "$D/upper"; do
    found=,$(flags "$at"),
    case $found in
        *,ro,* | *,nosuid,* | *,nodev,* | *,noexec,* | *,nosymfollow,*) echo "$at: $found"; exit 7 ;;
        *,rw,*) ;;
        *) echo "$at is not mounted"; exit 7 ;;
    esac
done
# Programs with the set-user-ID bit, devices and symbolic links take effect, as in an image.
mkdir /run/containerd/at
mount --bind "$D/upper" /run/containerd/at
chmod 755 /run/containerd/at
cp /usr/bin/id /run/containerd/at/id
chmod 4755 /run/containerd/at/id
ln -s id /run/containerd/at/link
[ "$(setpriv --reuid 65534 --clear-groups /run/containerd/at/link -u)" = 0 ]
mknod -m 666 /run/containerd/at/null c 1 3
setpriv --reuid 65534 --clear-groups sh -c 'echo x > /run/containerd/at/null'
"#);
}

#[test]
fn two_containerds_with_a_store_each_do_not_disturb_each_other() {
    if !can(NEEDS) {
        return;
    }
    run(r#"
umount "$D/upper"
if cowl-snapshotter --address /run/containerd/third.sock 2> "$D/err"; then echo "two on one store"; exit 7; else [ $? = 4 ]; fi
sed "s|$D/|$D/second-|; s|containerd/containerd.sock|containerd/second.sock|; s|containerd/cowl.sock|containerd/second-cowl.sock|" "$D/containerd.toml" > "$D/second.toml"
start_second() {
    cowl-snapshotter --store "$D/second-store" --address /run/containerd/second-cowl.sock 2>> "$D/second-snapshotter.log" &
    SECOND=$!
}
start_second
containerd --config "$D/second.toml" --log-level warn 2>> "$D/second-containerd.log" &
second() { command ctr --address /run/containerd/second.sock --namespace "$NS" "$@"; }
await second version
await second snapshots --snapshotter cowl prepare bottom
# The same keys.
second snapshots --snapshotter cowl commit base bottom
second snapshots --snapshotter cowl prepare upper base > /dev/null
mkdir "$D/second"
eval "$(second snapshots --snapshotter cowl mounts "$D/second" upper)"
echo second > "$D/second/file"
umount "$D/second"
cowl snapshot "ctr.$NS.upper" --name good > /dev/null
listed=$(cowl --store "$D/second-store" list "ctr.$NS.upper" --json)
case $listed in *good*) echo "$listed"; exit 7 ;; esac
listed=$(cowl list "ctr.$NS.upper" --json)
case $listed in *good*) ;; *) echo "$listed"; exit 7 ;; esac
# The end of one snapshotter, and the collection of its containerd, do not concern the other one.
kill -9 $SECOND; wait $SECOND || :
mount_at upper upper
[ "$(cat "$D/upper/file")" = x ]
umount "$D/upper"
ctr snapshots --snapshotter cowl rm upper
ctr snapshots --snapshotter cowl rm base
await collected
[ "$(mounts) $(ls "$COWL_STORE/layers" | wc -l)" = "0 0" ]
start_second
await second snapshots --snapshotter cowl info upper
eval "$(second snapshots --snapshotter cowl mounts "$D/second" upper)"
[ "$(cat "$D/second/file")" = second ]
cowl --store "$D/second-store" check
"#);
}

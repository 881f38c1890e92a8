//! Containers of containerd, addressed by their ids, and removed without containerd.

use cowl_tests::conditions::can;
use cowl_tests::containerd::{Containerd, NEEDS};

/// Prepares the committed snapshot `base`, and snapshots of containers with these ids.
const CONTAINERS: &str = r#"
fails() {
    local code=0 expected=$1; shift
    "$@" < /dev/null > "$D/out" 2> "$D/err" || code=$?
    [ $code = $expected ] || { echo "$code instead of $expected: $*"; cat "$D/out" "$D/err"; exit 7; }
}
elsewhere() { command ctr --address /run/containerd/containerd.sock --namespace "$NS-b" snapshots --snapshotter cowl "$@"; }
mounts_of() { ctr snapshots --snapshotter cowl mounts "$D/at" "$1" > /dev/null; }
prepare bottom
mount_at bottom bottom
echo base > "$D/bottom/file"
umount "$D/bottom"
commit base bottom
LONG=abcdef$(printf '0%.0s' $(seq 58)) OTHER=abc123$(printf '0%.0s' $(seq 58))
BOTH=abcabc$(printf '0%.0s' $(seq 56))
mkdir "$D/seen"
for id in web db $LONG $OTHER ${BOTH}11 ${BOTH}22; do prepare $id base; done
elsewhere prepare bottom
elsewhere commit base bottom
elsewhere prepare db base
"#;

#[test]
fn every_command_accepts_the_id_of_a_container() {
    if !can(NEEDS) {
        return;
    }
    let containerd = Containerd::for_test();
    let script = format!(
        "{CONTAINERS}{}",
        r#"
[ "$(cowl snapshot web --name one)" = one ]
cowl snapshot "$NS/web" --name two > /dev/null
cowl snapshot ${LONG:0:12} --name long > /dev/null
cowl snapshot $OTHER --name other > /dev/null
cowl mount "$NS/web@one" "$D/seen" > /dev/null
cowl umount "$NS/web@one"
if mountpoint -q "$D/seen"; then echo "still mounted"; exit 7; fi
# The name of each container, as lists show it.
cowl show web | grep -q "ctr.$NS.web"
cowl list web | grep -q two
for verb in "show web" "show web@one" "status web" "stats web" "diff web" "diff web@one web@two" "ls web:/" "cat web:file" \
    "du web" "check web" "comment web@one x" "tag web@one a=b" "protect web@one" "protect web@one --off" \
    "rename web@two three" "undo web --dry-run" "restore web one --dry-run" "prune web --keep-last 9 --dry-run" \
    "exec web -- true" "snapshot $NS/web --name four" "rm web four" "rm web@three" "restore web one" \
    "export web@one $D/one.tar" "flatten web --dry-run" "clone web@one copy" "upgrade web" "umount web" "mount web" \
    "umount $NS/web" "cat $NS/web@one:file" "send web@one"; do
    cowl $verb > "$D/out" 2> "$D/err" < /dev/null || {
        # exec needs a shell, which the container does not have; a flatten may have nothing to do.
        case $verb in exec*|upgrade*|flatten*) ! grep -q 'no container named' "$D/err" && continue ;; esac
        echo "cowl $verb"; cat "$D/err"; exit 7
    }
done
[ "$(cowl cat copy:file)" = base ]
# Two namespaces have this id.
fails 2 cowl snapshot db
grep -q "ctr.$NS.db ($NS/db)" "$D/err"
grep -q "ctr.$NS-b.db ($NS-b/db)" "$D/err"
cowl snapshot "$NS-b/db" > /dev/null
cowl snapshot "$NS/db" > /dev/null
# Two containers have ids with this beginning.
fails 2 cowl snapshot ${BOTH:0:12}
# Others are typed too easily, and no timer or removal uses an abbreviation.
fails 3 cowl snapshot abcdef
fails 3 cowl snapshot ${LONG:0:12} --scheduled
fails 3 cowl destroy --containerd ${LONG:0:12} --yes
cowl snapshot $LONG --scheduled > /dev/null
# Only long ids are abbreviated.
fails 3 cowl snapshot we
fails 3 cowl snapshot extract
fails 2 cowl snapshot "$NS/none"
# A container of cowl with this name has precedence, and its removal concerns no other one.
cowl clone web@one db > /dev/null
[ "$(cowl snapshot db --name own)" = own ]
cowl list db | grep -q own
cowl destroy db --yes --now
fails 1 cowl destroy web --yes
grep -q "belongs to containerd" "$D/err"
cowl list --containerd | grep -q "ctr.$NS.web"
cowl check
"#
    );
    containerd.script(&script).ok();
}

#[test]
fn what_containerd_has_left_is_removed_when_it_does_not_run() {
    if !can(NEEDS) {
        return;
    }
    let containerd = Containerd::for_test();
    let script = format!(
        "{CONTAINERS}{}",
        r#"
# Of a shell that has it from elsewhere.
export CONTAINERD_ADDRESS=/run/old.sock
cowl snapshot web --name kept --protect > /dev/null
cowl clone web@kept saved > /dev/null
count() { cowl list --containerd=all --json | python3 -c 'import json,sys; print(len(json.load(sys.stdin)["containers"]))'; }
fails 4 cowl destroy --containerd --all --yes
grep -q cowl-snapshotter "$D/err"
kill $SNAPSHOTTER; wait $SNAPSHOTTER || :
fails 4 cowl destroy --containerd --all --yes
grep -q "containerd runs" "$D/err"
# Its socket is at another path, as that of k3s.
mkdir "$D/k3s"
mount --move /run/containerd "$D/k3s"
fails 4 cowl destroy --containerd --all --yes
grep -q "containerd runs" "$D/err"
kill $CONTAINERD; wait $CONTAINERD || :
fails 2 cowl destroy --containerd --all --now --yes
before=$(count)
fails 2 cowl destroy --containerd --yes
fails 2 cowl destroy --all --yes
fails 2 cowl destroy --containerd --all web --yes
fails 2 cowl destroy web saved --yes
fails 2 cowl destroy --containerd saved --yes
fails 2 cowl destroy --containerd --all
# A parent of others.
parent=$(cowl list --containerd=all --json | python3 -c 'import json,os,sys; print([c["name"] for c in json.load(sys.stdin)["containers"] if c.get("containerd", {}).get("kind") == "committed" and not c["containerd"]["key"].split("/")[0].endswith("-b")][0])')
fails 1 cowl destroy --containerd $parent --yes
cowl destroy --containerd --all --dry-run 2> "$D/err"
grep -q "would remove" "$D/err"
[ "$(count)" = "$before" ]
cowl destroy --containerd $LONG "ctr.$NS.db" --yes
[ "$(count)" = $((before - 2)) ]
# The others are removed, and this one and its parent remain.
fails 4 cowl destroy --containerd --all --yes
grep -q "protect" "$D/err"
[ "$(count)" = 2 ]
cowl destroy --containerd --all --yes --protected
[ "$(count)" = 0 ]
[ "$(cowl cat saved:file)" = base ]
cowl destroy saved --yes --now
cowl check
echo "$(mounts) mounts, $(daemons) daemons, $(ls "$COWL_STORE/layers" | wc -l) layers, $(ls "$COWL_STORE/mnt" | wc -l) mount points"
"#
    );
    let text = containerd.script(&script).ok().out();
    assert!(
        text.ends_with("0 mounts, 0 daemons, 0 layers, 0 mount points"),
        "{text}"
    );
}

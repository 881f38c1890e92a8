//! Commits whose reply containerd did not receive: the content remains, under the key that containerd knows.

use cowl_tests::conditions::can;
use cowl_tests::containerd::{Containerd, NEEDS};

use crate::kills::{BASE, NOTHING_LEFT};

/// The programs that end while a commit is in effect and its reply was not sent, and what happens before the client
/// continues.
const CASES: &[(&str, &str)] = &[
    ("client", "collect_twice"),
    ("containerd", "collect_twice"),
    ("snapshotter", "collect_twice"),
    ("containerd snapshotter", "collect_twice"),
    // The snapshotter is killed while it restores the active snapshot.
    ("snapshotter", "collect_killed 'commit undone'"),
    ("client", "collect_killed 'removal in effect'"),
    ("snapshotter", "use_it"),
];

#[test]
fn a_commit_without_a_reply_is_not_lost_if_containerd_collects() {
    if !can(NEEDS) {
        return;
    }
    let cases = CASES
        .iter()
        .map(|(victims, then)| format!("interrupted '{victims}' \"{then}\"\n"));
    let script = format!(
        "{BASE}{FUNCTIONS}{}used_at_once\nabandoned\nanswered\nunprotected\nshow_left\n",
        cases.collect::<String>()
    );
    let containerd = Containerd::for_test();
    let text = containerd.script(&script).ok().out();
    assert_eq!(text, NOTHING_LEFT);
}

const FUNCTIONS: &str = r#"
number=0
info() { ctr snapshots --snapshotter cowl info "$1" > "$D/info" 2>&1; }
# Starts the snapshotter with variables in its environment.
serve_with() {
    kill_snapshotter
    env "$@" cowl-snapshotter --address /run/containerd/cowl.sock -v 2>> "$D/snapshotter.log" &
    SNAPSHOTTER=$!
    await connects
    await info base
}
is_committed() { grep -qr "/$kept\"" "$COWL_STORE/containers"; }
# containerd has noticed the end of its client once it permits another transaction.
kill_client() { kill -9 $client; ctr leases create > /dev/null; }
start_client() { :; }
collect_twice() { for round in 1 2; do remove_another; collect; done; }
# Kills the snapshotter at a point of the collection, and collects again.
collect_killed() {
    serve_with COWL_KILL="$1/1000/1/$D/passed$number"
    prepare "other$number" base > /dev/null
    rm_snapshot "other$number"
    collect 2> /dev/null || :
    [ -e "$D/passed$number" ] || { echo "never passed: $1"; exit 7; }
    wait $SNAPSHOTTER 2> /dev/null || :
    start_snapshotter
    collect_twice
}
# The client uses the active snapshot before a collection.
use_it() { [ "$(read_file $key)" = mine ]; collect_twice; }
# Ends programs while a commit is in effect.
interrupt() {
    key=c$((number += 1)) kept=kept$number hold=$D/hold$number
    touch "$hold"
    serve_with COWL_DELAY="commit done/$hold" "${@:2}"
    prepare $key base
    write $key old
    cowl snapshot "ctr.$NS.$key" --name taken > /dev/null
    write $key mine
    env ctr --address /run/containerd/containerd.sock --namespace "$NS" snapshots --snapshotter cowl commit $kept $key > "$D/out" 2>&1 & client=$!
    await is_committed
    for victim in $1; do kill_$victim; done
    rm "$hold"
    wait $client 2> /dev/null || :
    for victim in $1; do start_$victim; done
    cowl check -q > "$D/check"
    ! info $kept || { echo "known: $kept, $1"; exit 7; }
    info $key || { echo "not known after $1:"; cat "$D/info"; exit 7; }
}
interrupted() {
    interrupt "$1"
    eval "$2"
    # containerd knows the active snapshot, and nothing else of the commit is left.
    info $key || { echo "lost: $key, $1, $2"; cat "$D/info"; exit 7; }
    grep -q '"Kind": "Active"' "$D/info"
    [ "$(read_file $key)" = mine ] || { echo "content of $key"; exit 7; }
    ! is_committed || { echo "left: $kept"; exit 7; }
    cowl check -q > "$D/check"
    # The restored snapshot remains without the committed one.
    [ "$(taken)" = 1 ]
    cowl gc > /dev/null 2>&1
    cowl cat "ctr.$NS.$key@taken:file" | grep -qx old
    cowl snapshot "ctr.$NS.$key" --name good > /dev/null
    cowl cat "ctr.$NS.$key@good:file" | grep -qx mine
    finish
}
# Prints the number of snapshots that commands have taken.
taken() { find "$COWL_STORE/containers" -path '*/snapshots/*.json' | wc -l; }
# Commits the active snapshot after a change, and removes it.
finish() {
    write $key more
    commit $kept $key
    collect_twice
    # containerd has recorded the commit.
    [ "$(taken)" = 0 ] || { echo "snapshots of $kept are left"; exit 7; }
    ctr snapshots --snapshotter cowl view seen$number $kept > /dev/null
    [ "$(read_file seen$number)" = more ]
    rm_snapshot seen$number
    rm_snapshot $kept
    collect
}
# The client uses the snapshot and repeats the commit before a collection: its new key is the one of the first commit.
used_at_once() {
    interrupt client
    info $key
    write $key mine
    is_committed
    replaced
}
replaced() {
    finish
    grep -q "/$kept is replaced" "$D/snapshotter.log" || { echo "another key: $kept"; exit 7; }
}
# A client ends while its commit still runs, and another one uses the snapshot.
abandoned() {
    key=c$((number += 1)) kept=kept$number hold=$D/hold$number
    touch "$hold"
    serve_with COWL_DELAY="commit unmounted/$hold"
    prepare $key base
    write $key mine
    [ "$(mounts)" = 1 ]
    env ctr --address /run/containerd/containerd.sock --namespace "$NS" snapshots --snapshotter cowl commit $kept $key > "$D/out" 2>&1 & client=$!
    unmounted() { [ "$(mounts)" = 0 ]; }
    await unmounted
    kill_client
    wait $client 2> /dev/null || :
    read_file $key > "$D/read" & reader=$!
    # Long enough for its request to arrive. If it arrives later, this does not fail.
    sleep 0.5
    rm "$hold"
    wait $reader || { echo "not mounted: $key"; exit 7; }
    [ "$(cat "$D/read")" = mine ]
    is_committed
    # The image is still what it is compared with.
    cowl diff "ctr.$NS.$key" > "$D/diff"
    grep -q file "$D/diff" || { echo "no change in $key"; exit 7; }
    replaced
}
# A snapshot that is removed immediately after its commit is collected at once.
answered() {
    key=c$((number += 1)) kept=kept$number
    prepare $key base
    write $key mine
    commit $kept $key
    is_committed
    rm_snapshot $kept
    restored=$(grep -c 'exists again' "$D/snapshotter.log")
    collect
    # The active snapshot is not restored, only to be removed.
    [ "$(grep -c 'exists again' "$D/snapshotter.log")" = "$restored" ]
    ! grep -r -e "/$kept\"" -e "/$key\"" "$COWL_STORE/containers" || { echo "left: $kept"; exit 7; }
}
# Without the safeguard, the collection loses the content, so that this test would find its absence.
unprotected() {
    interrupt client COWL_DISABLE="split of an unanswered commit"
    collect_twice
    if is_committed; then echo "left: $kept"; exit 7; fi
    if info $key; then echo "$key is safe nevertheless"; exit 7; fi
    rm_snapshot $key 2> /dev/null || :
    kill_snapshotter
    start_snapshotter
}
"#;

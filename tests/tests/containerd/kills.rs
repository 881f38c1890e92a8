//! Programs that are killed at any moment: nothing is lost, and nothing is left.

use cowl_tests::conditions::can;
use cowl_tests::containerd::{Containerd, LayerScript, NEEDS};

const LAYERS: &[LayerScript<'_>] = &[
    (
        "a",
        "mkdir -p a; for i in $(seq 50); do echo $i > a/$i; done",
    ),
    (
        "b",
        "mkdir -p a; for i in $(seq 50); do echo b > a/$i; done",
    ),
    (
        "c",
        "mkdir -p c; for i in $(seq 50); do echo c > c/$i; done; : > .wh.a",
    ),
];

#[test]
fn a_container_continues_while_the_programs_are_killed() {
    if !can(NEEDS) {
        return;
    }
    let containerd = Containerd::for_test();
    containerd.make_image("app", LAYERS);
    let script = r#"
export COWL_KEEPER=on
import app
# The snapshotter has to pass the setting on.
kill -9 $SNAPSHOTTER; wait $SNAPSHOTTER || :
start_snapshotter
start docker.io/test/app:latest web sh -c 'while :; do echo x >> /log; sleep 0.05; done'
run_in web sh -c 'echo 1 > /one'
kill -9 $SNAPSHOTTER; wait $SNAPSHOTTER || :
run_in web sh -c 'echo 2 > /two'
start_snapshotter
run_in web sh -c 'echo 3 > /three'
kill -9 $CONTAINERD; wait $CONTAINERD || :
start_containerd
run_in web sh -c 'echo 4 > /four'
daemon=$(cowl status "ctr.$NS.web" --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["pid"])')
kill -9 $daemon
run_in web sh -c 'cat /one /two /three /four | tr "\n" " "'
cowl snapshot "ctr.$NS.web" --name late
remove web
ctr images rm docker.io/test/app:latest > /dev/null
await collected
echo "$(mounts) mounts, $(daemons) daemons, $(ls "$COWL_STORE/layers" | wc -l) layers"
"#;
    let text = containerd.script(script).ok().out();
    assert!(text.contains("1 2 3 4"), "{text}");
    assert!(text.ends_with("0 mounts, 0 daemons, 0 layers"), "{text}");
}

#[test]
fn an_import_is_repeated_after_a_program_was_killed_at_any_moment() {
    if !can(NEEDS) {
        return;
    }
    let containerd = Containerd::for_test();
    containerd.make_image("app", LAYERS);
    // The import takes about a second.
    for delays in delays(100, 900).chunks(10) {
        let script = format!("DELAYS='{}'\n{IMPORT_AND_KILL}", delays.join(" "));
        let text = containerd.script(&script).ok().out();
        assert_eq!(text, "50\n1\n0 mounts, 0 daemons, 0 layers, 0 containers");
    }
}

/// Returns the delays in seconds from 0 to a maximum in milliseconds. Their step in milliseconds is `COWL_KILL_STEP`.
fn delays(step: usize, maximum: usize) -> Vec<String> {
    let step = match std::env::var("COWL_KILL_STEP") {
        Ok(text) => text.parse().expect("COWL_KILL_STEP is a number"),
        Err(_) => step,
    };
    let delays = (0..=maximum).step_by(step);
    delays
        .map(|delay| format!("{}.{:03}", delay / 1000, delay % 1000))
        .collect()
}

/// Imports an image, and kills the snapshotter or containerd after each of `$DELAYS`. The next import must succeed.
///
/// The program is started again before the interrupted import ends: a client that has just started waits for containerd.
const IMPORT_AND_KILL: &str = r#"
killed=0
for delay in $DELAYS; do
  for victim in snapshotter containerd; do
    import app 2> /dev/null & importing=$!
    sleep $delay
    kill_$victim
    start_$victim
    wait $importing || killed=$((killed + 1))
    cowl check -q > "$D/check"
    # containerd may collect a layer that it has just found: it removes what the failed import has left.
    import app 2> /dev/null || { sleep 1; import app; }
    ctr run --rm --snapshotter cowl docker.io/test/app:latest "c$RANDOM" sh -c 'ls /c | wc -l; [ ! -e /a ]' >> "$D/counts"
    ctr images rm docker.io/test/app:latest > /dev/null
    remove_leases
    await collected
  done
done
sort -u "$D/counts"
echo "$killed killed" >&2
[ $killed -gt 0 ]
ctr snapshots --snapshotter cowl ls | wc -l
cowl gc > /dev/null 2>&1
echo "$(mounts) mounts, $(daemons) daemons, $(ls "$COWL_STORE/layers" | wc -l) layers, $(ls "$COWL_STORE/containers" | wc -l) containers"
"#;

/// Prepares `base`, the parent of all snapshots below, with one file.
pub(crate) const BASE: &str = r#"
rm_snapshot() { ctr snapshots --snapshotter cowl rm "$1"; }
collect() { ctr content prune references > /dev/null; }
# containerd collects snapshots only after the removal of one, and forgets that if the snapshotter does not answer.
remove_another() { prepare "another$((RANDOM * RANDOM))" base 2> /dev/null || :; for one in $(ctr snapshots --snapshotter cowl ls | grep -o '^another[0-9]*'); do rm_snapshot $one || :; done; }
# Writes $2 to the file of the snapshot $1.
write() { mount_at at "$1"; echo "$2" > "$D/at/file"; umount "$D/at"; }
read_file() { mount_at at "$1"; cat "$D/at/file"; umount "$D/at"; }
# Prints everything that must not remain.
show_left() {
    rm_snapshot base
    remove_leases
    await collected
    kill $SNAPSHOTTER; wait $SNAPSHOTTER || :
    cowl gc > /dev/null 2>&1
    cowl check -q > "$D/check"
    for dir in layers containers mnt trash; do
        echo "$(ls "$COWL_STORE/$dir" 2> /dev/null | wc -l) $dir"
    done
    echo "$(mounts) mounts, $(daemons) daemons, $(ctr leases ls -q | wc -l) leases"
    grep " $D/at " /proc/mounts || :
}
prepare bottom
write bottom base
commit base bottom
# Waits until containerd is connected, without a removal, so that the tests decide when containerd collects.
start_snapshotter() {
    cowl-snapshotter --address /run/containerd/cowl.sock -v 2>> "$D/snapshotter.log" &
    SNAPSHOTTER=$!
    await connects
    await ctr snapshots --snapshotter cowl info base
}
"#;

pub(crate) const NOTHING_LEFT: &str =
    "0 layers\n0 containers\n0 mnt\n0 trash\n0 mounts, 0 daemons, 0 leases";

/// The points of [`cowl_layers::points`] in the snapshotter, with the request that passes them.
const POINTS: &[(&str, &str)] = &[
    ("prepare", "preparation begun"),
    ("prepare", "preparation in effect"),
    ("prepare", "preparation mounted"),
    ("commit", "commit opened"),
    ("commit", "commit unmounted"),
    ("commit", "commit synced"),
    ("commit", "commit written"),
    ("commit", "commit in effect"),
    ("commit", "commit done"),
    ("remove", "removal unmounted"),
    ("remove", "removal in effect"),
];

#[test]
fn requests_take_effect_completely_or_not_at_all_if_the_snapshotter_is_killed_during_them() {
    if !can(NEEDS) {
        return;
    }
    let points = POINTS
        .iter()
        .map(|(request, point)| format!("at_point {request} '{point}'\n"));
    let script = format!("{BASE}{AT_POINT}{}show_left\n", points.collect::<String>());
    let containerd = Containerd::for_test();
    let text = containerd.script(&script).ok().out();
    assert_eq!(text, NOTHING_LEFT);
}

/// Kills the snapshotter at a point of a request, starts it again, and repeats the request until it has taken effect.
const AT_POINT: &str = r#"
number=0
at_point() {
    local request=$1 point=$2 key=c$((number += 1))
    if [ $request != prepare ]; then prepare $key base; write $key mine; fi
    perform() {
        case $request in
            prepare) prepare $key base ;;
            commit) commit kept$number $key ;;
            remove) rm_snapshot $key || :; remove_another; collect ;;
        esac
    }
    kill_snapshotter
    COWL_KILL="$point/1000/1/$D/passed$number" cowl-snapshotter --address /run/containerd/cowl.sock 2>> "$D/snapshotter.log" &
    SNAPSHOTTER=$!
    await connects
    # containerd may need a moment to connect again.
    for attempt in $(seq 100); do
        perform > "$D/out" 2>&1 || :
        if [ -e "$D/passed$number" ]; then break; fi
        sleep 0.1
    done
    [ -e "$D/passed$number" ] || { echo "never passed: $point"; cat "$D/out"; exit 7; }
    wait $SNAPSHOTTER 2> /dev/null || :
    start_snapshotter
    cowl check -q > "$D/check"
    case $request in
        prepare)
            perform > "$D/out" 2>&1 || grep -q 'already exists' "$D/out" || { cat "$D/out"; exit 7; }
            [ "$(read_file $key)" = base ]
            rm_snapshot $key
            ;;
        commit)
            # If it is in effect already, containerd has not recorded it.
            remove_another
            collect
            perform > "$D/out" 2>&1 || { echo "not repeated: $point"; cat "$D/out"; exit 7; }
            ctr snapshots --snapshotter cowl view seen$number kept$number > /dev/null
            [ "$(read_file seen$number)" = mine ]
            rm_snapshot seen$number
            rm_snapshot kept$number
            ;;
        remove)
            if [ "$point" = "removal unmounted" ]; then
                # The snapshotter has not removed anything.
                one=$(cowl list --containerd=all --json | python3 -c 'import json,sys; print([c["name"] for c in json.load(sys.stdin)["containers"] if c["containerd"]["key"].endswith("/" + sys.argv[1])][0])' $key)
                [ "$(cowl cat $one:file)" = mine ]
            fi
            rm_snapshot $key 2> /dev/null || :
            # Also what the interrupted attempts have left.
            remove_another
            ;;
    esac
    collect
}
"#;

#[test]
fn nothing_is_lost_or_left_if_programs_are_killed_during_commits_removals_and_restores() {
    if !can(NEEDS) {
        return;
    }
    let containerd = Containerd::for_test();
    for delays in delays(60, 100).chunks(2) {
        let delays = delays.join(" ");
        let script = format!("{BASE}DELAYS='{delays}'\n{WORK_AND_KILL}show_left\n");
        let output = containerd.script(&script).ok();
        assert_eq!(output.out(), NOTHING_LEFT);
        eprintln!("{}", output.err());
    }
}

/// The mount of the dead daemon must not remain, and must not be replaced: the layers are frozen.
#[test]
fn a_daemon_that_dies_during_a_commit_leaves_no_mount() {
    if !can(NEEDS) {
        return;
    }
    let script = r#"
hold=$D/hold
touch "$hold"
kill_snapshotter
export COWL_DELAY="commit opened/$hold"
start_snapshotter
prepare c1 base
write c1 one
cowl snapshot "ctr.$NS.c1" --name good > /dev/null
write c1 two
id=$(grep -o " $COWL_STORE/mnt/[^ ]*" /proc/mounts | sed 's,.*/,,')
commit kept c1 & committing=$!
lock=$COWL_STORE/locks/container-$id.lock
locked() { [ -e "$lock" ] && ! flock -n "$lock" true; }
await locked
pkill -9 -f "cowl --store $COWL_STORE serve"
rm "$hold"
wait $committing
none() { [ "$(mounts) $(daemons)" = "0 0" ] || { echo "mounted $1"; cat "$D/snapshotter.log"; exit 7; }; }
none "after the commit"
for seen in one two; do
    ctr snapshots --snapshotter cowl view $seen kept > /dev/null
    [ "$(read_file $seen)" = two ]
    rm_snapshot $seen
    # The snapshotter opens the container to remove the snapshot of the command.
    collect
    none "after a collection"
done
rm_snapshot kept
"#;
    let containerd = Containerd::for_test();
    let output = containerd
        .script(&format!("{BASE}{script}show_left\n"))
        .ok();
    assert_eq!(output.out(), NOTHING_LEFT);
}

/// Kills each program after each of `$DELAYS` during each operation, and repeats the operation until it has taken effect.
const WORK_AND_KILL: &str = r#"
start_daemon() { :; }
# All processes that serve a mount of this test, which has a pid namespace of its own.
kill_daemon() { pkill -9 -f "cowl --store $COWL_STORE serve" || :; }
commit_it() { commit kept$number $key; }
remove_it() { rm_snapshot $key || :; remove_another; collect; }
restore_it() { cowl restore "ctr.$NS.$key" good; }
check_commit() {
    ctr snapshots --snapshotter cowl info kept$number > /dev/null || { echo "lost: kept$number"; cat "$D/out"; exit 7; }
    ctr snapshots --snapshotter cowl view seen$number kept$number > /dev/null
    [ "$(read_file seen$number)" = two ]
    rm_snapshot seen$number
    rm_snapshot kept$number
}
check_remove() { if ctr snapshots --snapshotter cowl info $key > /dev/null 2>&1; then echo "remains: $key"; exit 7; fi; }
check_restore() { [ "$(read_file $key)" = one ]; rm_snapshot $key; }
number=0 interrupted=0
for delay in $DELAYS; do
  for victim in snapshotter containerd daemon; do
    for operation in commit remove restore; do
      key=c$((number += 1))
      prepare $key base
      write $key one
      cowl snapshot "ctr.$NS.$key" --name good > /dev/null
      write $key two
      ${operation}_it > "$D/out" 2>&1 & working=$!
      sleep $delay
      kill_$victim
      start_$victim
      wait $working || interrupted=$((interrupted + 1))
      cowl check -q > "$D/check"
      # A collection before the commit is repeated must not remove its result.
      if [ $operation = commit ]; then remove_another; collect; fi
      for attempt in $(seq 50); do
        if ${operation}_it > "$D/out" 2>&1 || grep -q -e 'already exists' -e 'not found' -e 'does not exist' "$D/out"; then break; fi
        [ $attempt -lt 50 ] || { cat "$D/out"; exit 7; }
        sleep 0.1
      done
      check_$operation
      collect
    done
  done
done
echo "$number operations, $interrupted interrupted" >&2
"#;

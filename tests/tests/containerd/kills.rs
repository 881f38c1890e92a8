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
    let step = std::env::var("COWL_KILL_STEP").unwrap_or_else(|_| "0.1".to_owned());
    let script = format!("DELAYS=$(seq 0 {step} 0.9)\n{IMPORT_AND_KILL}");
    let text = containerd.script(&script).ok().out();
    assert_eq!(text, "50\n1\n0 mounts, 0 daemons, 0 layers, 0 containers");
}

/// Imports an image, and kills the snapshotter or containerd after each of `$DELAYS`. The next import must succeed.
///
/// The program is started again before the interrupted import ends: a client that has just started waits for containerd.
const IMPORT_AND_KILL: &str = r#"
kill_snapshotter() { kill -9 $SNAPSHOTTER; wait $SNAPSHOTTER 2> /dev/null || :; }
kill_containerd() { kill -9 $CONTAINERD; wait $CONTAINERD 2> /dev/null || :; }
# The lease of a client that has lost its connection retains snapshots for a day.
remove_leases() { for lease in $(ctr leases ls -q); do ctr leases rm $lease > /dev/null; done; }
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

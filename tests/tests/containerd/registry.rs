//! A container travels from one host to another through a registry. Each host is a network namespace with a containerd and
//! a store of its own.

use cowl_tests::conditions::{Need, can};
use cowl_tests::containerd::{Containerd, LayerScript, NEEDS};
use cowl_tests::hosts;
use cowl_tests::registry::{self, Protection, Registry};
use cowl_tests::scratch::Scratch;

const LAYERS: &[LayerScript<'_>] = &[(
    "files",
    "mkdir data; echo one > data/one; echo two > data/two",
)];

/// Breaks and restores a container, and pushes it in three ways: a snapshot, an image made of one, a committed snapshot.
const ORIGIN: &str = r#"
import app
start docker.io/test/app:latest web sleep 1000
run_in web sh -c 'echo mine > /data/mine; rm /data/two'
cowl snapshot "$NS/web" --name good > /dev/null
run_in web sh -c 'rm -r /data; echo broken > /broken'
cowl diff web@good web | grep -q /broken
stop web
cowl restore web good
ctr task start -d web
run_in web cat /data/mine
cowl push --tls-verify=false web@good "$R/app:pushed" > /dev/null
cowl export web@good --oci "$D/image.tar"
ctr images import --snapshotter cowl --no-unpack --base-name "$R/app" --digests "$D/image.tar" > /dev/null
image=$(ctr images ls -q | grep "^$R/app" | head -n 1)
ctr images tag "$image" "$R/app:exported" > /dev/null
ctr images push --plain-http "$R/app:exported" > /dev/null
# What commit does in clients that have the command: the container's snapshot becomes an image layer's.
stop web
commit kept web
prepare again kept
mount_at again again
cat "$D/again/data/mine"
umount "$D/again"
ctr snapshots --snapshotter cowl rm again
ctr snapshots --snapshotter cowl rm kept
ctr containers rm web
for image in $(ctr images ls -q); do ctr images rm "$image" > /dev/null; done
await collected
echo "$(mounts) mounts, $(daemons) daemons, $(ls "$COWL_STORE/layers" | wc -l) layers"
"#;

/// Runs both images.
const ELSEWHERE: &str = r#"
for tag in pushed exported; do
    ctr images pull --plain-http --snapshotter cowl "$R/app:$tag" > "$D/pull" 2>&1 || { cat "$D/pull"; exit 7; }
    ctr run --rm --snapshotter cowl "$R/app:$tag" run-$tag sh -c 'cat /data/mine; ls /data; ls / | grep -c broken || :'
done
start "$R/app:pushed" web sleep 1000
run_in web sh -c 'echo further > /data/further'
cowl snapshot web --name there > /dev/null
cowl diff web@there --name-only
remove web
for image in $(ctr images ls -q); do ctr images rm "$image" > /dev/null; done
await collected
echo "$(mounts) mounts, $(daemons) daemons, $(ls "$COWL_STORE/layers" | wc -l) layers"
"#;

#[test]
fn a_restored_container_runs_on_another_host() {
    let more = [Need::Program("ip")];
    if !can(&[NEEDS, hosts::NEEDS, registry::NEEDS, &more].concat()) {
        return;
    }
    let (here, there) = hosts::pair();
    let scratch = Scratch::for_test();
    let protection = Protection {
        password: false,
        tls: false,
        clients: false,
    };
    let registry = Registry::start_on(&here, &scratch, protection);
    let with_registry = |script: &str| format!("R={}\n{script}", registry.name());
    let first = Containerd::for_test();
    first.make_image("app", LAYERS);
    let text = first.script_on(&here, &with_registry(ORIGIN)).ok().out();
    let nothing = "0 mounts, 0 daemons, 0 layers";
    assert_eq!(text, format!("mine\nmine\n{nothing}"));
    let second = Containerd::for_test();
    let text = second
        .script_on(&there, &with_registry(ELSEWHERE))
        .ok()
        .out();
    let content = "mine\nmine\none\n0";
    assert_eq!(
        text,
        format!("{content}\n{content}\ndata/further\n{nothing}")
    );
}

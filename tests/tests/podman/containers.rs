//! Containers that podman runs.

use cowl_tests::command::sh_in;
use cowl_tests::conditions::can;
use cowl_tests::killer::Killer;
use cowl_tests::podman::{MountProgram, NEEDS, Podman, User};
use cowl_tests::rootfs;

/// Makes an image with files of several owners. The files in `/etc` and `/run` are those that podman mounts over.
const IMAGE: &str = r#"
mkdir add; tar -C add -xf "$TAR"
mkdir -p add/d/sub add/home/user add/run
for i in 1 2 3 4 5; do echo $i > add/d/f$i; echo $i > add/d/sub/s$i; done
touch add/etc/hosts add/etc/hostname add/etc/resolv.conf add/run/.containerenv
chown -R 1000:1000 add/home
# Podman takes a file of the same size and time, to the second, for unchanged.
find add -exec touch -h -d '2020-01-02 03:04:05' {} +
tar -C add --numeric-owner -cf rootfs.tar .
"#;

/// Imports the image.
const IMPORT: &str = "podman import -q ../rootfs.tar base > /dev/null 2>&1\n";

/// Returns the outputs of a script with fuse-overlayfs and with cowlfs.
fn outputs(user: User, text: &str) -> [String; 2] {
    [MountProgram::FuseOverlayfs, MountProgram::Cowlfs].map(|program| {
        let podman = storage(user);
        let output = podman.script(program, &format!("{IMPORT}{text}")).ok();
        output.out()
    })
}

fn storage(user: User) -> Podman {
    let podman = Podman::for_test(user);
    let tar = rootfs::busybox_tar().unwrap();
    let script = format!("TAR='{}'\n{IMAGE}", tar.display());
    sh_in(podman.scratch(), &script).ok();
    podman
}

/// Committed layers contain whiteouts of container images, which hide names in the containers above.
///
/// `podman diff` takes a name of hexadecimal digits, such as `c`, for the beginning of an image's id.
const COMMIT: &str = r"
run --name box base sh -c 'rm /d/f1; mv /d/sub /d/sub2; echo n > /d/f2; rm -r /home; mkdir /home; touch /home/x'
podman diff box | sort
podman commit -q box next > /dev/null 2>&1
ls storage/overlay/*/diff/d/.wh.f1 | wc -l
run --rm next sh -c 'find /d /home | sort; echo back > /d/f1; mkdir /d/sub; touch /d/.wh.x || ls -A /d /d/sub'
run --name box2 next sh -c 'echo back > /d/f1; mkdir /d/sub; rm -r /d/sub2; mv /home /house'
podman diff box2 | sort
podman commit -q box2 third > /dev/null 2>&1
inside image_tree third
podman export box2 | tar -t | sort
";

#[test]
fn commit_and_diff_are_the_same_as_with_fuse_overlayfs() {
    if !can(NEEDS) {
        return;
    }
    for user in [User::Root, User::Plain] {
        let [theirs, ours] = outputs(user, COMMIT);
        assert!(ours.contains("D /d/f1\nD /d/sub\n"), "{ours}");
        assert_eq!(ours, theirs, "{user:?}");
    }
}

/// Read-only containers, volumes, copies, mounted images, several containers at once, and removal of everything.
const USE: &str = r#"
run --rm --read-only base sh -c 'cat /d/f1; echo x > /d/f1 || echo refused; echo t > /tmp/t; cat /tmp/t'
run --rm -v data:/d base sh -c 'rm /d/f1; echo kept > /d/f6; mkdir /d/.wh.f2'
run --rm -v data:/d base sh -c 'ls -A /d; cat /d/f6'
run --rm -v data:/v:ro base sh -c 'echo x > /v/x || ls -A /v'
run --name box base true
echo in > file; podman cp file box:/d/file; podman cp box:/d/f3 out; cat out
podman start -a box
podman diff box | sort
for i in 1 2 3 4 5 6; do
    run --rm base sh -c "echo $i > /d/f1; rm -r /d/sub; ls /d; cat /d/f1" > parallel.$i & pids="${pids:-} $!"
done
for pid in $pids; do wait $pid; done
cat parallel.*
inside image_tree base | md5sum
remove_all
podman volume prune -f > /dev/null
podman image prune -a -f > /dev/null
podman images -q | wc -l
inside ls storage/overlay
inside grep -c storage/overlay/ /proc/mounts || :
"#;

#[test]
fn containers_volumes_and_prune_are_the_same_as_with_fuse_overlayfs() {
    if !can(NEEDS) {
        return;
    }
    for user in [User::Root, User::Plain] {
        let [theirs, ours] = outputs(user, USE);
        assert!(ours.contains("refused"), "{ours}");
        assert_eq!(ours, theirs, "{user:?}");
    }
}

/// Podman creates objects in an id-mapped root filesystem with its own ids, which the map may not contain.
const MODES: &str = r#"
for mode in $MODES; do
    echo "== $mode"
    run --rm ${mode//,/ } base sh -c 'id; ls -ln / /home | grep -v -e dev -e proc -e sys -e total | sed "s/ [A-Z][a-z][a-z] .*:.. / /"
        for file in /home/user/x /tmp/y; do touch $file; stat -c "%n %u %g" $file; done 2>&1
        chown 7:8 /tmp/y; stat -c "%u %g" /tmp/y; mkdir -p /tmp/z/z; mv /tmp/z /tmp/q; rm -r /tmp/q' 2>&1 |
        sed 's/drwxr-xr-x *[0-9]*/drwxr-xr-x/'
done
"#;

#[test]
fn id_maps_of_a_plain_user_are_the_same_as_with_fuse_overlayfs() {
    if !can(NEEDS) {
        return;
    }
    let modes = "--userns=keep-id --userns=auto --userns=nomap --uidmap=0:1:1000,--gidmap=0:1:1000 \
                 --uidmap=0:1:65536";
    let [theirs, ours] = outputs(User::Plain, &format!("MODES='{modes}'\n{MODES}"));
    assert!(ours.contains("uid="), "{ours}");
    assert_eq!(ours, theirs);
}

/// Commits a container with an id map.
const MAPPED: &str = r#"
for mode in --userns=host --userns=auto --uidmap=0:100000:65536; do
    c=c${mode//[^a-z]/}
    run --name $c $mode base sh -c 'rm /d/f1; mv /d/sub /moved; touch /home/user/x; chown 7:8 /moved/s1; id'
    podman commit -q $c mapped > /dev/null 2>&1
    inside image_tree mapped
    echo ==
done
"#;

/// Podman passes idmapped mounts of the layers, together with the same id map as an option. fuse-overlayfs, and cowlfs
/// before Linux 6.15, apply both, so that all files of the image have the overflow id.
#[test]
fn id_maps_of_root_change_no_owner_inside_of_the_container() {
    if !can(NEEDS) {
        return;
    }
    let modes = "--userns=host --userns=auto --uidmap=0:100000:65536";
    let script = format!("{IMPORT}MODES='{modes}'\n{MODES}");
    if can_remove_id_maps() {
        let podman = storage(User::Root);
        let seen = podman.script(MountProgram::Cowlfs, &script).ok().out();
        let results = seen
            .split("== --")
            .skip(1)
            .map(|part| part.split_once('\n').unwrap().1.trim());
        let results: Vec<_> = results.collect();
        assert!(
            results[0].contains("1000") && !results[0].contains("65534"),
            "{seen}"
        );
        assert_eq!(results[1], results[0]);
        assert_eq!(results[2], results[0]);
        let trees = podman.script(MountProgram::Cowlfs, MAPPED).ok().out();
        let trees: Vec<_> = trees.split("==\n").collect();
        assert_eq!(trees[1], trees[0]);
        assert_eq!(trees[2].trim_end_matches("=="), trees[0]);
    } else {
        let modes = modes.replace("--userns=host ", "");
        let [theirs, ours] = outputs(User::Root, &format!("MODES='{modes}'\n{MODES}"));
        assert_eq!(ours, theirs);
    }
}

/// Whether the kernel has open_tree_attr(2), from Linux 6.15.
fn can_remove_id_maps() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.trim().parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (6, 15)
}

/// The keeper starts another daemon each time, and the container does not notice.
#[test]
fn a_container_continues_when_its_daemon_is_killed() {
    if !can(NEEDS) {
        return;
    }
    for (user, mode) in [(User::Root, "--userns=auto"), (User::Plain, "")] {
        let podman = storage(user);
        let work = r"
            run --rm $MODE base sh -euc 'i=0; mkdir /w
                while [ $i -lt 400 ]; do
                    i=$((i + 1)); echo $i > /w/f$i; mv /w/f$i /w/g$i; test $(cat /w/g$i) = $i
                    if [ $((i % 3)) = 0 ]; then rm /w/g$i; fi; sleep 0.01
                done; ls /w | wc -l; cat /w/* | sort -n | md5sum; rm -r /d; ls /'";
        let killer = Killer::start(&podman.dir(), 100..=300);
        let output = podman.script(
            MountProgram::Cowlfs,
            &format!("MODE={mode}\n{IMPORT}{work}"),
        );
        let kills = killer.stop();
        let output = output.ok().out();
        let expected = "267\n";
        assert!(output.starts_with(expected), "{output}");
        assert!(!output.contains("\nd\n"), "{output}");
        assert!(kills >= 3, "only {kills} kills");
    }
}

/// The files of docs/hosts.md, with the paths of the test.
const DOCUMENTED: &str = r#"
mkdir containers
sed "s|/usr/local/bin/cowlfs|$PROGRAM|; s|/var/lib/containers/storage|$D/storage|; s|/run/containers/storage|$D/run|" \
    ../storage.conf > containers/storage.conf
export CONTAINERS_STORAGE_CONF=$D/containers/storage.conf
plain() { command podman --cgroup-manager cgroupfs --events-backend none "$@"; }
plain import -q ../rootfs.tar base > /dev/null 2>&1
plain run --rm --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 --cgroups=disabled --network=none base \
    grep ' / ' /proc/mounts
pid=$(find "$D" -name pause.pid); if [ -n "$pid" ]; then kill -9 "$(cat "$pid")"; fi
"#;

#[test]
fn the_documented_configuration_selects_cowlfs() {
    if !can(NEEDS) {
        return;
    }
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/hosts.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    let files = docs.split("```toml\n").skip(1);
    let files: Vec<_> = files
        .map(|rest| rest.split("```").next().unwrap())
        .collect();
    let expected = docs
        .lines()
        .find(|line| line.starts_with("cowlfs / "))
        .unwrap();
    for (user, file) in [User::Root, User::Plain].into_iter().zip(&files) {
        let podman = storage(user);
        std::fs::write(podman.scratch().join("storage.conf"), file).unwrap();
        let output = podman.script(MountProgram::Cowlfs, DOCUMENTED).ok().out();
        assert_eq!(output, expected, "{user:?}");
    }
}

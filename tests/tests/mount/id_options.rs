//! `uidmapping`, `gidmapping` and `squash_*`: owners that a mount shows and stores, compared with fuse-overlayfs.

use cowl_tests::command::{Output, sh_in};
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::scratch::Scratch;

/// Options, owners that files can be given (`UID:GID`), and owners with ids that the map does not contain.
const CASES: [(&str, &str, &str); 9] = [
    ("", "0:0 5:6 1000:1000 100005:100006 4000000:1", ""),
    (
        "uidmapping=0:100000:65536,gidmapping=0:100000:65536",
        "100000:100000 100005:100006 165535:165535",
        "0:0 5:100006 100005:6 165536:165535 4000000:1",
    ),
    (
        "uidmapping=:100000:0:65536,gidmapping=:100000:0:65536",
        "0:0 5:6 1000:1000 65534:65534",
        "100005:100006 65536:0 4000000:1",
    ),
    (
        "uidmapping=0:100000:65536:100000:0:65536,gidmapping=0:100000:65536:100000:0:65536",
        "0:0 5:6 100005:100006 65534:65534",
        "4000000:1 0:4000000",
    ),
    (
        "uidmapping=0:1:1000:1000:0:1,gidmapping=0:1:1000:1000:0:1",
        "0:0 5:6 1000:1000",
        "1001:0 65534:65534",
    ),
    ("squash_to_root", "0:0 5:6 4000000:1", ""),
    ("squash_to_uid=7,squash_to_gid=8", "0:0 5:6 4000000:1", ""),
    ("squash_to_gid=8", "0:0 5:6 4000000:1", ""),
    (
        "squash_to_root,uidmapping=0:100000:65536,gidmapping=0:100000:65536",
        "100000:100000 100005:100006",
        "0:0",
    ),
];

/// `$PROGRAM` mounts with `$OPTIONS`. Prints the owners that the mount shows, then those on disk.
const OWNERS: &str = r#"
rm -rf l u w m; mkdir l u w m
for owner in 0:0 5:6 1000:1000 65534:65534 70000:70000 100000:100000 100005:100006 0:1000 165534:165535; do
    echo x > l/$owner; chown $owner l/$owner
done
mkdir -m 1777 l/d
$PROGRAM -o "lowerdir=l,upperdir=u,workdir=w,$OPTIONS" m 2> messages
cd m
stat -c '%n %u %g' *
for user in 0:0 5:6 1000:1000 100005:100006 65534:65534 4000000:0; do
    setpriv --reuid ${user%:*} --regid ${user#*:} --clear-groups \
        sh -c "touch d/f$user; mkdir d/d$user; ln -s x d/l$user; mkfifo d/p$user" || :
done
stat -c '%n %u %g' d/*
for owner in $MAPPED; do touch d/$owner; chown $owner d/$owner; stat -c 'chown %n %u %g' d/$owner; done
# Copies up a file of each owner.
chmod 600 *:*
stat -c '%n %u %g' *
cd ..
umount m
cd u
find . -mindepth 1 ! -name '.wh.*' -printf '%p %U %G\n' | sort
"#;

fn owners(program: &str, options: &str, mapped: &str) -> Output {
    let scratch = Scratch::for_test();
    let variables = format!("PROGRAM='{program}'\nOPTIONS='{options}'\nMAPPED='{mapped}'\n");
    sh_in(&scratch, &format!("{variables}{OWNERS}")).ok()
}

#[test]
fn owners_are_shown_and_stored_as_by_fuse_overlayfs() {
    let programs = ["fuse-overlayfs", "setpriv"].map(Need::Program);
    if !can_mount(&programs) {
        return;
    }
    let ours = cowl_tests::programs::cowlfs();
    for (options, mapped, _) in CASES {
        let [theirs, ours] = ["fuse-overlayfs", ours.to_str().unwrap()]
            .map(|program| owners(program, options, mapped).out());
        assert_eq!(ours, theirs, "{options}");
    }
}

/// fuse-overlayfs stores the overflow id, and the caller does not notice.
#[test]
fn an_owner_that_is_not_mapped_is_refused() {
    if !can_mount(&[]) {
        return;
    }
    let program = cowl_tests::programs::cowlfs();
    for (options, _, unmapped) in CASES {
        let scratch = Scratch::for_test();
        let script = format!(
            "mkdir l u w m; touch l/file; '{}' -o lowerdir=l,upperdir=u,workdir=w,{options} m 2> messages
             before=$(stat -c '%u %g' m/file)
             for owner in {unmapped}; do
                 ! chown $owner m/file 2> message; grep -q 'Value too large' message
                 test \"$(stat -c '%u %g' m/file)\" = \"$before\"
             done; test ! -e u/file; umount m",
            program.display()
        );
        sh_in(&scratch, &script).ok();
    }
}

#[test]
fn the_root_of_file_capabilities_is_mapped() {
    if !can_mount(&[Need::Program("setcap")]) {
        return;
    }
    let scratch = Scratch::for_test();
    let script = format!(
        "mkdir l u w m; touch l/lower l/copied; setcap -n 1000 cap_net_raw=ep l/lower; setcap -n 1005 cap_kill=ep l/copied
         '{}' -o lowerdir=l,upperdir=u,workdir=w,uidmapping=1000:0:10,gidmapping=1000:0:10 m
         touch m/root m/other m/refused; setcap cap_kill=ep m/root; setcap -n 7 cap_kill=ep m/other
         setcap -n 10 cap_kill=ep m/refused 2> message && exit 1; chmod 711 m/copied
         getcap -n m/lower m/copied m/root m/other m/refused; umount m; getcap -n u/copied u/root u/other u/refused",
        cowl_tests::programs::cowlfs().display()
    );
    let output = sh_in(&scratch, &script).ok();
    assert_eq!(
        output.out(),
        "m/lower cap_net_raw=ep\nm/copied cap_kill=ep [rootid=5]\nm/root cap_kill=ep\nm/other cap_kill=ep [rootid=7]\n\
         u/copied cap_kill=ep [rootid=1005]\nu/root cap_kill=ep [rootid=1000]\nu/other cap_kill=ep [rootid=1007]"
    );
}

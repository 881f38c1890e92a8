//! Programs that copy and compare trees (tar, rsync, cp, find) read the same from a mount as from a plain directory
//! with the same content, also during a copy-up.

use std::path::{Path, PathBuf};

use cowl_tests::command::{sh, sh_in};
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::layers;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

/// Three layers with a complete tree in the lowest, an empty upper layer, and the plain directory.
struct Pair {
    scratch: Scratch,
    stack: Stack,
    plain: PathBuf,
}

const EVERYTHING: &str = "
    mkdir all; chown 0:0 all; chmod 00755 all; cd all; mkdir -p a/b/c links acl
    for n in $(seq 100); do echo $n > a/f$n; done; seq 100000 > a/b/big; echo deep > a/b/c/deep
    for n in 1 2 3 4; do echo several > links/s$n; ln links/s$n links/t$n; ln links/s$n a/b/u$n; done
    ln -s a/f1 symbolic; mkfifo fifo; mknod null c 1 3; mknod block b 7 200
    truncate -s 5M sparse; echo end >> sparse; printf middle | dd of=sparse bs=1 seek=2M conv=notrunc status=none
    setfattr -n user.note -v text a/f1; setfattr -n trusted.note -v text a/b; setfattr -h -n trusted.l -v x symbolic
    setfacl -m u:1000:rw a/f2; setfacl -m d:g:1001:rx,g:1001:rx acl; touch acl/inherits
    chown 1000:1001 a/f3; chmod 4755 a/f4; chmod 2711 a/f5; chmod 1777 acl; chown -h 7:8 symbolic
    cp a/f6 able; setcap cap_net_raw=ep able; touch \"$(printf 'a\\n\\377 b')\" ' leading' -- -dash
    find . -exec touch -h -d '2014-05-06 07:08:09.123456789' {} +; touch -d '1960-01-02 03:04:05.5' a/f7";

impl Pair {
    fn new(seed: u64) -> Pair {
        let scratch = Scratch::for_test();
        let (lowers, plain) = layers::make_three(&scratch, layers::LayerSpec::of(seed)).unwrap();
        sh_in(lowers.last().unwrap(), EVERYTHING).ok();
        sh_in(&plain, EVERYTHING).ok();
        let (upper, work) = (scratch.make("upper"), scratch.make("work"));
        layers::copy_root(&lowers[0], &upper).unwrap();
        layers::copy_root(&lowers[0], &plain).unwrap();
        let stack = Stack {
            lowers,
            upper: Some((upper, work)),
        };
        Pair {
            scratch,
            stack,
            plain,
        }
    }

    fn mount(&self) -> Overlay {
        Overlay::cowlfs(&self.stack, &self.scratch.make("tested"), "dev,suid")
    }

    #[track_caller]
    fn same(&self, label: &str, mount_point: &Path, compare: Compare) {
        let found = tree::read(mount_point).unwrap();
        let expected = tree::read(&self.plain).unwrap();
        tree::assert_same(label, &found, &expected, compare);
    }
}

/// Brings everything up and changes nothing but change times: files opened for writing, the times set
/// that are there.
const BRING_UP: &str = "find . -type f -exec sh -c 'for f; do : >> \"$f\"; done' sh {} +
    find . -depth -print0 | xargs -0 -n 50 sh -c 'for f; do touch -h -r \"$f\" -- \"$f\"; done' sh";

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string().replace("\\n", "\n")
}

#[test]
fn tar_round_trips_all_metadata() {
    if !can_mount(&[]) {
        return;
    }
    let pair = Pair::new(21);
    let mounted = pair.mount();
    let (from, scratch) = (mounted.path().display(), pair.scratch.display());
    let pack = "tar --numeric-owner --xattrs --xattrs-include='*' --acls --sparse --format=posix";
    // Any message of tar is an error, in particular "file changed as we read it".
    let packed = sh(&format!("{pack} -C '{from}' -cf '{scratch}/one.tar' .")).ok();
    assert_eq!(packed.err(), "");
    let unpacked = pair.scratch.make("unpacked");
    sh(&format!(
        "{pack} -C '{}' -xpf '{scratch}/one.tar'",
        unpacked.display()
    ))
    .ok();
    pair.same("packed on the mount", &unpacked, Compare::SAME);

    // A copy-up of the files that tar reads changes nothing that it can detect.
    let both = sh(&format!(
        "cd '{from}'
         for round in 1 2 3; do {pack} -cf '{scratch}/two.tar' . || exit 1; done &
         {{ find . -type f -exec sh -c 'for f; do : >> \"$f\"; done' sh {{}} +; }}
         wait $!"
    ))
    .ok();
    assert_eq!(both.err(), "");
    pair.same("brought up", mounted.path(), Compare::SAME);

    // Both in a directory that passes its group on if the root does.
    let inside = mounted.path().join("unpacked");
    let beside = pair.plain.join("unpacked");
    for dir in [&inside, &beside] {
        std::fs::create_dir(dir).unwrap();
        sh(&format!(
            "{pack} -C '{}' -xpf '{scratch}/two.tar'",
            dir.display()
        ))
        .ok();
    }
    let from_inside = tree::read(&inside).unwrap();
    let expected = tree::read(&beside).unwrap();
    tree::assert_same("unpacked", &from_inside, &expected, Compare::SAME);
    mounted.unmount();
    let mounted = pair.mount();
    let again = tree::read(&inside).unwrap();
    tree::assert_same("a new mount", &from_inside, &again, Compare::IDENTICAL);
    mounted.unmount();
}

/// tar compares the change time of a file before and after it reads the file. A copy-up of attributes alone, and of
/// content after it, must not change it.
#[test]
fn copy_up_changes_no_ctime() {
    if !can_mount(&[]) {
        return;
    }
    let pair = Pair::new(22);
    let mounted = pair.mount();
    let times = || {
        sh_in(
            mounted.path(),
            "{ find . -type d -printf '%p %i %C@ %T@ %m %u %g\\n'
               find . ! -type d -printf '%p %i %C@ %T@ %m %u %g %n %s\\n'; } | sort",
        )
        .ok()
        .stdout
    };
    let before = times();
    // Only operations that change nothing: touch updates the change time anywhere.
    sh_in(
        mounted.path(),
        "find . -type f -exec sh -c 'for f; do : >> \"$f\"; done' sh {} +",
    )
    .ok();
    let same = |label: &str| {
        let (before, after) = (text(&before), text(&times()));
        for (before, after) in before.lines().zip(after.lines()) {
            assert_eq!(before, after, "{label}");
        }
    };
    same("a copy-up shows");
    // Drop the caches, as under memory pressure.
    std::fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    same("a copy-up shows when the kernel has forgotten the files");
    sh_in(mounted.path(), BRING_UP).ok();
    pair.same(
        "after bringing everything up",
        mounted.path(),
        Compare::SAME,
    );
    mounted.unmount();
}

#[test]
fn rsync_finds_no_difference() {
    if !can_mount(&[Need::Program("rsync")]) {
        return;
    }
    let pair = Pair::new(23);
    let mounted = pair.mount();
    // Without the window rsync takes times of one second for the same.
    let rsync = "rsync -aHAX --numeric-ids --checksum --itemize-changes --modify-window=-1";
    let nothing = |label: &str, from: &Path, to: &Path| {
        let line = format!("{rsync} --delete '{}/' '{}/'", from.display(), to.display());
        assert_eq!(sh(&line).ok().out(), "", "{label}");
    };
    nothing("plain to mount", &pair.plain, mounted.path());
    nothing("mount to plain", mounted.path(), &pair.plain);
    sh_in(mounted.path(), BRING_UP).ok();
    nothing("everything brought up", &pair.plain, mounted.path());

    let out = pair.scratch.make("out");
    let copied = format!(
        "{rsync} --sparse '{}/' '{}/'",
        mounted.path().display(),
        out.display()
    );
    assert_ne!(sh(&copied).ok().out(), "");
    pair.same("copied out", &out, Compare::SAME);
    nothing("copied out", mounted.path(), &out);
    // Into the mount: over existing files, and into a new directory.
    sh_in(
        &pair.plain,
        "echo x >> all/a/f9; rm -r all/acl; mv all/links all/moved; chmod 600 all/a/f8",
    )
    .ok();
    let line = format!(
        "{rsync} --delete '{}/' '{}/'",
        pair.plain.display(),
        mounted.path().display()
    );
    assert_ne!(sh(&line).ok().out(), "");
    nothing("changes copied in", &pair.plain, mounted.path());
    pair.same("changes copied in", mounted.path(), Compare::SAME);
    mounted.unmount();
    let mounted = pair.mount();
    nothing("a new mount", &pair.plain, mounted.path());
    mounted.unmount();
}

#[test]
fn find_and_cp_recognize_hard_links() {
    if !can_mount(&[]) {
        return;
    }
    let pair = Pair::new(24);
    let mounted = pair.mount();
    let same_file = |root: &Path| {
        sh_in(
            root,
            "cd all; for n in 1 3; do find . -samefile links/s$n | sort; done",
        )
        .ok()
        .out()
    };
    let expected = same_file(&pair.plain);
    assert_eq!(expected.lines().count(), 6);
    let on_both = |script: &str| {
        sh_in(mounted.path(), script).ok();
        sh_in(&pair.plain, script).ok();
        pair.same(script, mounted.path(), Compare::HISTORY);
    };
    assert_eq!(same_file(mounted.path()), expected);
    on_both("echo more >> all/a/b/u1; chmod 600 all/links/t3");
    assert_eq!(same_file(mounted.path()), expected);
    on_both("mv all/a/b all/moved; mv all/moved all/a/b");
    assert_eq!(same_file(mounted.path()), expected);
    on_both("cp -al all linked; echo x >> linked/a/f10; chmod 640 all/a/f11");
    on_both("cp -a all copied; cp -a --sparse=always all/sparse copied/sparser");
    on_both("mkdir into; mv all linked into; mv copied into/linked/copied");
    on_both(
        "mv into/all/a/f1 into/all/a/f2; mv into/all/able into/all/symbolic; mv -T into/all/links into/links",
    );
    on_both(
        "mkdir over; mv -T into/links over; rm -rf into/linked/a; cp -a into/all/a into/linked/a",
    );
    mounted.unmount();
    let mounted = pair.mount();
    pair.same("a new mount", mounted.path(), Compare::HISTORY);
    for root in [mounted.path(), &pair.plain] {
        sh_in(root, "find . -mindepth 1 -maxdepth 1 -exec rm -rf {} +").ok();
        assert_eq!(sh_in(root, "ls -A").ok().out(), "");
    }
    mounted.unmount();
    let mounted = pair.mount();
    pair.same("all removed", mounted.path(), Compare::HISTORY);
    mounted.unmount();
}

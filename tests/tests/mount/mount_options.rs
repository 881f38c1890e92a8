//! Mount options have the same effect as on other file systems: a read-only mount refuses every change as a plain
//! directory on a read-only mount does; ro, nosuid, nodev, noexec, noatime, fsname= and subtype= are shown and work;
//! statfs reports the file system that is written.

use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use cowl_tests::command::{run, run_command, sh, sh_in};
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::images::{self, Kind};
use cowl_tests::layers;
use cowl_tests::mount::{self, Overlay, Stack};
use cowl_tests::random::{Caller, Generator, Op, Outcome, Side};
use cowl_tests::requests::Counted;
use cowl_tests::scratch::Scratch;
use rustix::fs::{OFlags, RenameFlags};
use rustix::io::Errno;

fn upper_of(scratch: &Scratch) -> (PathBuf, PathBuf) {
    (scratch.make("upper"), scratch.make("work"))
}

/// Operations that must fail with EROFS, each on an object that exists and on which it would succeed otherwise.
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn changes() -> Vec<Op> {
    let path = |text: &str| text.as_bytes().to_vec();
    let file = || path("known/append");
    let open = |flags| Op::Hold {
        slot: 0,
        path: file(),
        flags,
    };
    vec![
        open(OFlags::RDWR),
        open(OFlags::WRONLY),
        open(OFlags::WRONLY | OFlags::APPEND),
        open(OFlags::RDWR | OFlags::TRUNC),
        Op::Create {
            path: path("known/created"),
            flags: OFlags::CREATE | OFlags::RDWR,
            mode: 0o644,
            data: (1, 1),
        },
        Op::Mkdir {
            path: path("known/made"),
            mode: 0o755,
        },
        Op::Rmdir {
            path: path("known/gone/below"),
        },
        Op::Unlink { path: file() },
        Op::Rename {
            from: file(),
            to: path("known/renamed"),
            flags: RenameFlags::empty(),
        },
        Op::Rename {
            from: path("known/dir"),
            to: path("known/gone"),
            flags: RenameFlags::EXCHANGE,
        },
        Op::Link {
            from: file(),
            to: path("known/linked"),
        },
        Op::Symlink {
            target: path("x"),
            path: path("known/symbolic"),
        },
        Op::Mkfifo {
            path: path("known/made"),
            mode: 0o644,
        },
        Op::Mknod {
            path: path("known/made"),
            mode: 0o644,
            device: (1, 3),
        },
        Op::Chmod {
            path: file(),
            mode: 0o600,
        },
        Op::Chown {
            path: path("known/link"),
            uid: Some(1),
            gid: None,
            follow: false,
        },
        Op::Utimens {
            path: file(),
            seconds: Some(1),
            follow: true,
        },
        Op::Setxattr {
            path: file(),
            name: "user.x",
            value: b"y".to_vec(),
            flags: 0,
        },
        Op::Removexattr {
            path: path("known/attribute"),
            name: "user.one",
        },
        Op::Truncate {
            path: file(),
            len: 1,
        },
    ]
}

/// Verifies that every operation returns the same as in a plain directory that is mounted read-only.
fn refuses_like(mount_point: &Path, plain: &Path, seed: u64) {
    let (mut ours, mut theirs) = (Side::new(mount_point), Side::new(plain));
    for op in changes() {
        let got = ours.perform(&op, Caller::user(0));
        assert_eq!(got, Outcome::Failed(Errno::ROFS), "{op:?}");
        assert_eq!(got, theirs.perform(&op, Caller::user(0)), "{op:?}");
    }
    let known = cowl_tests::tree::paths(plain).unwrap();
    let mut generator = Generator::new(seed).portable();
    for step in 0..400 {
        let op = generator.next(&known);
        let user = if generator.rng().chance(15) { 1000 } else { 0 };
        let (got, expected) = (
            ours.perform(&op, Caller::user(user)),
            theirs.perform(&op, Caller::user(user)),
        );
        assert_eq!(got, expected, "mounted, then plain, {step}: {user}: {op:?}");
    }
}

#[test]
fn a_read_only_mount_refuses_every_change() {
    if !can_mount(&Kind::Tmpfs.needs()) {
        return;
    }
    let scratch = Scratch::new("read-only");
    let (lowers, plain) = layers::make_three(&scratch, layers::LayerSpec::of(31)).unwrap();
    cowl_tests::workload::plant(lowers.last().unwrap(), &plain);
    for dir in [lowers.last().unwrap(), &plain] {
        sh_in(dir, "setfattr -n user.one -v 1 known/attribute").ok();
    }
    // Two kinds of read-only mounts, which differ in the error for a user without write permission.
    let whole = Kind::Tmpfs.mount(&scratch, "whole");
    images::copy(&plain, &whole, "mode,ownership,timestamps,links,xattr");
    remount(&whole, "remount,ro");
    let plain = images::read_only_bind(&plain, &scratch, "plain-ro");
    let tested = scratch.make("tested");
    let without = Stack {
        lowers: lowers.clone(),
        upper: None,
    };
    let upper = upper_of(&scratch);
    layers::copy_root(&lowers[0], &upper.0).unwrap();
    let with = Stack {
        lowers,
        upper: Some(upper.clone()),
    };

    let mounted = Overlay::cowlfs(&without, &tested, "dev,suid");
    refuses_like(&tested, &plain, 32);
    // Without an upper layer nothing can be written, whatever a later remount requests.
    remount(&tested, "remount,bind,rw");
    let writing = std::fs::write(tested.join("known/append"), "x").unwrap_err();
    assert_eq!(writing.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    mounted.unmount();

    let mounted = Overlay::cowlfs(&with, &tested, "dev,suid,ro");
    refuses_like(&tested, &plain, 33);
    mounted.unmount();

    let mounted = Overlay::cowlfs(&with, &tested, "dev,suid");
    let file = tested.join("known/append");
    let writer = std::fs::File::options().append(true).open(&file).unwrap();
    let busy = remounted(&tested, "remount,ro");
    assert_ne!(busy, 0, "remounted while a file is open for writing");
    drop(writer);
    remount(&tested, "remount,ro");
    refuses_like(&tested, &whole, 34);
    remount(&tested, "remount,rw");
    std::fs::write(&file, "written again").unwrap();
    mounted.unmount();
    assert_eq!(
        std::fs::read_to_string(upper.0.join("known/append")).unwrap(),
        "written again"
    );
}

/// `-i`: by the system call alone, no helper program.
fn remounted(mount_point: &Path, options: &str) -> i32 {
    run(
        "mount",
        ["-i", "-o", options, mount_point.to_str().unwrap()],
    )
    .code
}

#[track_caller]
fn remount(mount_point: &Path, options: &str) {
    // A child of another test that has forked but not yet exec'd holds copies of the descriptors of this process.
    mount::wait_until(options, || remounted(mount_point, options) == 0);
}

/// mount(8) has a helper program do it, which calls the file system's own program.
#[test]
fn a_mount_can_be_remounted_through_mount_fuse() {
    if !can_mount(&[Need::Program("mount.fuse")]) {
        return;
    }
    let scratch = Scratch::new("remount");
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some(upper_of(&scratch)),
    };
    let mounted = Overlay::cowlfs(&stack, &scratch.make("tested"), "nosuid");
    let mount_point = mounted.path().to_str().unwrap().to_owned();
    let program = cowl_tests::programs::cowlfs();
    let ask = |options: &str| {
        let all = format!("{options},remount,user_id=0,group_id=0,default_permissions,allow_other");
        let source = format!("{}#cowlfs", program.display());
        run("mount.fuse", [&source, &mount_point, "-o", &all])
    };
    let writer = std::fs::File::create(mounted.path().join("file")).unwrap();
    ask("ro").fails(4, &["open for writing"]);
    drop(writer);
    let flags = || mount::at(mounted.path()).unwrap().options;
    ask("ro,nosuid,nodev,noatime").ok();
    assert!(
        flags().starts_with("ro,nosuid,nodev,noatime"),
        "{}",
        flags()
    );
    assert!(std::fs::write(mounted.path().join("file"), "x").is_err());
    ask("rw").ok();
    assert!(flags().starts_with("rw,noatime"), "{}", flags());
    std::fs::write(mounted.path().join("file"), "x").unwrap();
    mounted.unmount();
    ask("ro").fails(2, &["nothing is mounted"]);
}

/// A shell line as user 1000.
fn as_user(dir: &Path, line: &str) -> cowl_tests::command::Output {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=1000", "--regid=1000", "--clear-groups"])
        .args(["sh", "-euc", line])
        .current_dir(dir);
    run_command(command, b"")
}

#[test]
fn mount_flags_are_reported_and_enforced() {
    if !can_mount(&[]) {
        return;
    }
    let scratch = Scratch::new("flags");
    let lower = scratch.make("lower");
    sh_in(
        &lower,
        "cp /usr/bin/id id; chmod 4755 id; mknod -m 666 null c 1 3; chmod 755 .; echo text > file",
    )
    .ok();
    let stack = Stack {
        lowers: vec![lower.clone()],
        upper: Some(upper_of(&scratch)),
    };
    sh(&format!(
        "chmod -R 755 '{}'",
        scratch.join("upper").display()
    ))
    .ok();
    // Others must be able to walk here.
    std::fs::set_permissions(&*scratch, std::fs::Permissions::from_mode(0o755)).unwrap();
    let tested = scratch.make("tested");
    for option in [
        "nosuid",
        "nodev",
        "noexec",
        "nosymfollow",
        "noatime",
        "nodiratime",
        "ro",
    ] {
        for on in [true, false] {
            let opposite = option.strip_prefix("no").unwrap_or("rw");
            let word = if on { option } else { opposite };
            let others = ["suid", "dev", "exec"].join(",");
            let mounted = Overlay::cowlfs(&stack, &tested, &format!("{others},{word}"));
            let shown = mount::at(&tested).unwrap().options;
            let shows = shown.split(',').any(|found| found == option);
            assert_eq!(shows, on, "{word} in {shown}");
            assert_eq!(works(option, &tested), on, "{word}");
            mounted.unmount();
        }
    }
    for (options, kind, source) in [
        ("", "fuse.cowlfs", "cowlfs"),
        ("fsname=a source", "fuse.cowlfs", "a\\\\040source"),
        ("subtype=other,fsname=b", "fuse.other", "b"),
    ] {
        let mounted = Overlay::cowlfs(&stack, &tested, options);
        let shown = mount::at(&tested).unwrap();
        assert_eq!((&*shown.kind, &*shown.source), (kind, source));
        mounted.unmount();
    }
}

#[test]
fn strictatime_updates_atime_at_every_read() {
    if !can_mount(&[]) {
        return;
    }
    let scratch = Scratch::new("strictatime");
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some(upper_of(&scratch)),
    };
    for passthrough in ["all", "off"] {
        for (option, is_updated) in [("strictatime", true), ("relatime", false)] {
            let options = format!("{option},passthrough={passthrough}");
            let mounted = Overlay::cowlfs(&stack, &scratch.make("tested"), &options);
            let path = mounted.path();
            let shows_relatime = mount::at(path).unwrap().options.contains("relatime");
            assert_eq!(shows_relatime, !is_updated);
            // Later than the last change, but not older than a day.
            sh_in(path, "echo text > f; mkdir -p d; touch -a -d '+1 hour' f d").ok();
            let atimes = || ["f", "d"].map(|name| path.join(name).metadata().unwrap().atime());
            let before = atimes();
            // Read with O_DIRECT, because only a read of the layer updates the atime.
            sh_in(path, "dd if=f of=/dev/null iflag=direct status=none; ls d").ok();
            let after = atimes();
            for (before, after) in before.into_iter().zip(after) {
                assert_eq!(before != after, is_updated, "{options}");
            }
            mounted.unmount();
        }
    }
}

#[test]
fn sync_makes_each_write_durable() {
    if !can_mount(&[]) {
        return;
    }
    let scratch = Scratch::new("sync");
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some(upper_of(&scratch)),
    };
    for (options, syncs) in [
        ("passthrough=off", 0),
        ("sync", 3),
        ("passthrough=all,sync", 3),
    ] {
        let mounted = Counted::mount(&stack, &scratch.make("tested"), options);
        let path = mounted.overlay().path().to_owned();
        let is_shown = || mount::at(&path).unwrap().options.contains(",sync");
        assert_eq!(is_shown(), syncs > 0, "{options}");
        let counts = mounted.during(|| {
            let mut file = std::fs::File::create(path.join("file")).unwrap();
            for _ in 0..3 {
                std::io::Write::write_all(&mut file, b"text").unwrap();
            }
        });
        assert_eq!(
            counts.get("fsync").copied().unwrap_or(0),
            syncs,
            "{options}"
        );
        // Files may be open for passthrough, so a remount can neither set nor clear it.
        let program = cowl_tests::programs::cowlfs();
        for word in ["remount,sync", "remount,async"] {
            let arguments: [&OsStr; 3] = ["-o".as_ref(), word.as_ref(), path.as_ref()];
            let done = run(program.to_str().unwrap(), arguments).ok();
            let is_refused = word == "remount,sync" && syncs == 0;
            assert_eq!(done.err().contains("option sync is ignored"), is_refused);
            assert_eq!(is_shown(), syncs > 0, "{options}, {word}");
        }
        mounted.unmount();
    }
}

/// fuse-overlayfs ignores unknown options as well.
#[test]
fn options_without_effect_are_ignored_with_a_warning() {
    if !can_mount(&[]) {
        return;
    }
    let scratch = Scratch::new("ignored");
    let options = format!(
        "lowerdir={},bogus=1,dirsync,lazytime,mand,async,x-mount.mkdir",
        scratch.make("lower").display()
    );
    let mount_point = scratch.make("tested");
    let program = cowl_tests::programs::cowlfs();
    let arguments: [&OsStr; 3] = ["-o".as_ref(), options.as_ref(), mount_point.as_ref()];
    let started = run(program.to_str().unwrap(), arguments).ok();
    for word in ["'bogus' is ignored", "dirsync", "lazytime", "mand"] {
        assert!(started.err().contains(word), "{}", started.err());
    }
    assert_eq!(started.err().lines().count(), 4, "{}", started.err());
    mount::unmount_free(&mount_point);
}

/// Whether the option is in force at `mount_point`.
fn works(option: &str, mount_point: &Path) -> bool {
    match option {
        "nosuid" => {
            // The real user is 1000, the effective one root's where setuid works.
            let output = as_user(mount_point, "./id -u").ok().out();
            assert!(["0", "1000"].contains(&&*output), "{output}");
            output == "1000"
        }
        "nodev" => as_user(mount_point, "echo x > null").code != 0,
        "noexec" => as_user(mount_point, "./id").code == 126,
        "nosymfollow" => {
            sh_in(mount_point, "ln -sf file link").ok();
            std::fs::read(mount_point.join("link")).is_err()
        }
        "nodiratime" => {
            sh_in(mount_point, "mkdir -p dir; touch -a -d 2001-01-01 dir").ok();
            let atime = || mount_point.join("dir").metadata().unwrap().atime();
            let before = atime();
            sh_in(mount_point, "ls dir").ok();
            before == atime()
        }
        "ro" => as_root_fails(mount_point),
        "noatime" => {
            let file = mount_point.join("own");
            std::fs::write(&file, "text").unwrap();
            run("touch", ["-a", "-d", "2001-01-01", file.to_str().unwrap()]).ok();
            let before = file.metadata().unwrap().atime();
            assert_eq!(std::fs::read(&file).unwrap(), b"text");
            sh_in(mount_point, "ls -l; cat file").ok();
            before == file.metadata().unwrap().atime()
        }
        other => panic!("unknown option {other}"),
    }
}

fn as_root_fails(mount_point: &Path) -> bool {
    std::fs::write(mount_point.join("written"), "x").is_err()
}

/// A lower layer is only read, and reading it leaves no trace.
#[test]
fn reads_do_not_update_atime_of_lower_layers() {
    if !can_mount(&[]) {
        return;
    }
    let scratch = Scratch::new("atime");
    let lower = scratch.make("lower");
    sh_in(
        &lower,
        "mkdir dir; echo text > dir/file; ln -s file dir/link; echo changed > other
         find . -exec touch -h -a -d '2001-02-03 04:05:06' {} +",
    )
    .ok();
    let times = || {
        let names = ["dir", "dir/file", "dir/link", "other", "."];
        names.map(|name| lower.join(name).symlink_metadata().unwrap().atime())
    };
    let before = times();
    let stack = Stack {
        lowers: vec![lower.clone()],
        upper: Some(upper_of(&scratch)),
    };
    let mounted = Overlay::cowlfs(&stack, &scratch.make("tested"), "");
    sh_in(
        mounted.path(),
        "ls -lR; cat dir/file; readlink dir/link; echo x >> other; mv dir moved; cat moved/link",
    )
    .ok();
    mounted.unmount();
    assert_eq!(times(), before);
}

#[test]
fn statfs_reports_the_upper_file_system() {
    if !can_mount(&Kind::Tmpfs.needs()) {
        return;
    }
    let scratch = Scratch::new("statfs");
    // A base of its own, to which no other process writes meanwhile.
    let base = Kind::Tmpfs.mount(&scratch, "base");
    let (upper, work) = (base.join("upper"), base.join("work"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some((upper, work)),
    };
    let mounted = Overlay::cowlfs(&stack, &scratch.make("tested"), "");
    let statvfs = |path: &Path| {
        let statvfs = rustix::fs::statvfs(path).unwrap();
        let sizes = [
            statvfs.f_bsize,
            statvfs.f_frsize,
            statvfs.f_blocks,
            statvfs.f_bfree,
        ];
        (
            sizes,
            [
                statvfs.f_bavail,
                statvfs.f_files,
                statvfs.f_ffree,
                statvfs.f_namemax,
            ],
        )
    };
    assert_eq!(statvfs(mounted.path()), statvfs(&base));
    std::fs::write(mounted.path().join("file"), vec![1; 1 << 20]).unwrap();
    let after = statvfs(mounted.path());
    assert_eq!(after, statvfs(&base));
    std::fs::remove_file(mounted.path().join("file")).unwrap();
    // The kernel reports a close after it is complete, not during it.
    mount::wait_until("the space of the file", || statvfs(mounted.path()) != after);
    assert_eq!(statvfs(mounted.path()), statvfs(&base));
    mounted.unmount();
}

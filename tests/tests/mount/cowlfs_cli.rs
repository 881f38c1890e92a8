//! The command line of cowlfs as podman, mount(8), containerd and users write it, and the messages for invalid ones.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use cowl_tests::command::{Output, run, run_command, sh, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{self, Overlay, Stack, wait_until};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

/// Creates the directories `a` over `b`, each with a file, `u`, `w`, and the mount point `m`.
fn layer_dirs() -> Scratch {
    let scratch = Scratch::for_test();
    sh_in(
        &scratch,
        "mkdir a b u w m; echo a > a/a; echo b > b/b; chmod 755 .",
    )
    .ok();
    scratch
}

/// Runs cowlfs in `dir`, as podman does.
#[track_caller]
fn cowlfs(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(programs::cowlfs());
    command.args(args).current_dir(dir);
    run_command(command, b"")
}

#[track_caller]
fn mounts(dir: &Path, args: &[&str]) -> PathBuf {
    cowlfs(dir, args).ok();
    let mount_point = dir.join("m");
    assert!(
        mount::at(&mount_point).is_some(),
        "{args:?}: nothing is mounted"
    );
    assert_eq!(
        std::fs::read_to_string(mount_point.join("b")).unwrap(),
        "b\n",
        "{args:?}"
    );
    mount_point
}

/// Unmounts and waits until the upper can be used again.
#[track_caller]
fn unmount(mount_point: &Path) {
    run("umount", [mount_point]).ok();
}

#[test]
fn every_form_of_the_command_line_mounts() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    for args in [
        &["-o", "lowerdir=a:b,upperdir=u,workdir=w", "m"][..],
        &["-o", "lowerdir=a:b,upperdir=u,workdir=w,", "m"],
        &["-o", "lowerdir=a:b,upperdir=u,workdir=w,,volatile", "m"],
        &["-o", "lowerdir=a:b", "-o", "upperdir=u,workdir=w", "m"],
        &["-olowerdir=a:b,upperdir=u,workdir=w", "m"],
        &["m", "-o", "lowerdir=a:b,upperdir=u,workdir=w"],
        &[
            "overlay",
            "m",
            "-o",
            "lowerdir=a:b,upperdir=u,workdir=w,dev,suid",
        ],
        &[
            "overlay",
            "m",
            "-o",
            "rw,lowerdir=a:b,upperdir=u,workdir=w,noatime,nodev,nosuid",
        ],
    ] {
        let mount_point = mounts(&dir, args);
        std::fs::write(mount_point.join("written"), "x")
            .unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert_eq!(std::fs::read_to_string(dir.join("u/written")).unwrap(), "x");
        unmount(&mount_point);
    }
    let version = cowlfs(&dir, &["--version"]).ok();
    assert!(
        version.out().contains(env!("CARGO_PKG_VERSION")),
        "{}",
        version.report()
    );
    let help = cowlfs(&dir, &["--help"]).ok();
    assert!(help.out().contains("lowerdir"), "{}", help.report());
}

#[test]
fn a_mount_without_upperdir_is_read_only() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    for options in [
        "lowerdir=a:b",
        "lowerdir=a:b,ro",
        "lowerdir=a:b,upperdir=u,workdir=w,ro",
    ] {
        let mount_point = mounts(&dir, &["-o", options, "m"]);
        let write = std::fs::write(mount_point.join("x"), "").unwrap_err();
        assert_eq!(
            write.raw_os_error(),
            Some(30),
            "EROFS with {options}: {write}"
        );
        let rename = std::fs::rename(mount_point.join("a"), mount_point.join("c")).unwrap_err();
        assert_eq!(
            rename.raw_os_error(),
            Some(30),
            "EROFS with {options}: {rename}"
        );
        unmount(&mount_point);
    }
}

#[test]
fn paths_with_colons_and_commas_can_be_escaped() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    sh_in(&dir, "mv a 'a:1'; mv b 'b \\x'; mv u 'u,3'; mv w 'w:4'").ok();
    let options = r"lowerdir=a\:1:b \\x,upperdir=u\,3,workdir=w\:4";
    let mount_point = mounts(&dir, &["-o", options, "m"]);
    std::fs::write(mount_point.join("x"), "").unwrap();
    assert!(dir.join("u,3/x").is_file());
    unmount(&mount_point);
}

#[test]
fn the_foreground_option_prevents_daemonization() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    let stack = Stack {
        lowers: vec![dir.join("a"), dir.join("b")],
        upper: Some((dir.join("u"), dir.join("w"))),
    };
    // The guard starts it with -f and fails unless it runs until the unmount and ends well.
    let overlay = Overlay::cowlfs(&stack, &dir.join("m"), "");
    let pid = overlay.pid().unwrap();
    assert!(Path::new(&format!("/proc/{pid}/exe")).is_symlink());
    overlay.unmount();
    // A signal ends it and takes the mount away.
    for signal in ["-TERM", "-INT"] {
        let overlay = Overlay::cowlfs(&stack, &dir.join("m"), "");
        run("kill", [signal, &overlay.pid().unwrap().to_string()]).ok();
        wait_until("unmounted after a signal", || {
            mount::at(overlay.path()).is_none()
        });
    }
}

#[test]
fn ids_can_be_mapped() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    // ID_ON_DISK:ID_SHOWN:COUNT, which shows an unshifted tree to a user namespace.
    sh_in(&dir, "chown 5:6 a/a").ok();
    let map = "0:100000:65536";
    for options in [
        format!("lowerdir=a:b,upperdir=u,workdir=w,uidmapping={map},gidmapping={map}"),
        format!("lowerdir=a:b,upperdir=u,workdir=w,,volatile,uidmapping=:{map},gidmapping=:{map}"),
    ] {
        let mount_point = mounts(&dir, &["-o", &options, "m"]);
        let shown = mount_point.join("a").metadata().unwrap();
        assert_eq!((shown.uid(), shown.gid()), (100_005, 100_006), "{options}");
        sh_in(
            &dir,
            "setpriv --reuid 100000 --regid 100000 --clear-groups touch m/made",
        )
        .ok();
        let stored = |id: (u32, u32)| {
            let made = dir.join("u/made").metadata().unwrap();
            assert_eq!((made.uid(), made.gid()), id, "{options}");
        };
        stored((0, 0));
        std::os::unix::fs::chown(mount_point.join("made"), Some(100_007), Some(100_008)).unwrap();
        stored((7, 8));
        std::fs::remove_file(mount_point.join("made")).unwrap();
        unmount(&mount_point);
    }
    let mount_point = mounts(&dir, &["-o", "lowerdir=a:b,squash_to_root", "m"]);
    assert_eq!(mount_point.join("a").metadata().unwrap().uid(), 0);
    unmount(&mount_point);
    let mount_point = mounts(
        &dir,
        &["-o", "lowerdir=a:b,squash_to_uid=12,squash_to_gid=13", "m"],
    );
    let shown = mount_point.join("a").metadata().unwrap();
    assert_eq!((shown.uid(), shown.gid()), (12, 13));
    unmount(&mount_point);
}

#[test]
fn o_tmpfile_is_refused() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    let mount_point = mounts(&dir, &["-o", "lowerdir=a:b,upperdir=u,workdir=w", "m"]);
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(CWD, &mount_point, flags, Mode::from_raw_mode(0o600));
    assert_eq!(opened.unwrap_err(), Errno::OPNOTSUPP);
    unmount(&mount_point);
}

#[test]
fn a_mount_point_need_not_be_empty() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    std::fs::write(dir.join("m/hidden"), "").unwrap();
    let mount_point = mounts(&dir, &["-o", "lowerdir=a:b,upperdir=u,workdir=w", "m"]);
    assert!(mount_point.join("hidden").symlink_metadata().is_err());
    unmount(&mount_point);
    assert!(mount_point.join("hidden").is_file());
}

/// Runs it, and expects a message with these words, no mount, and nothing written anywhere.
#[track_caller]
fn refused(dir: &Path, args: &[&str], words: &[&str]) {
    let before = tree::read(dir).unwrap();
    let output = cowlfs(dir, args);
    assert!(
        matches!(output.code, 1 | 2),
        "must be refused: {}",
        output.report()
    );
    let output_code = output.code;
    output.fails(output_code, words);
    let after = tree::read(dir).unwrap();
    let label = format!("{args:?} must change nothing");
    tree::assert_same(&label, &after, &before, Compare::SAME);
}

#[test]
fn invalid_command_lines_print_a_message_and_change_nothing() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    std::fs::write(dir.join("file"), "").unwrap();
    let all = "lowerdir=a:b,upperdir=u,workdir=w";
    for (args, words) in [
        (&["-o", all][..], &[][..]),
        (&["m"], &["lowerdir"]),
        (&["-o", "upperdir=u,workdir=w", "m"], &["lowerdir"]),
        (
            &["-o", "lowerdir=,upperdir=u,workdir=w", "m"],
            &["lowerdir"],
        ),
        (
            &["-o", "lowerdir=a:absent,upperdir=u,workdir=w", "m"],
            &["absent"],
        ),
        (
            &["-o", "lowerdir=a:file,upperdir=u,workdir=w", "m"],
            &["file"],
        ),
        (
            &["-o", "lowerdir=a:b,upperdir=absent,workdir=w", "m"],
            &["absent"],
        ),
        (&["-o", "lowerdir=a:b,upperdir=u", "m"], &["workdir"]),
        (&["-o", "lowerdir=a:b,workdir=w", "m"], &["upperdir"]),
        (
            &["-o", "lowerdir=a:b,upperdir=u,workdir=absent", "m"],
            &["absent"],
        ),
        (
            &["-o", "lowerdir=a:b,upperdir=u,workdir=u", "m"],
            &["workdir"],
        ),
        (&["-o", all, "absent"], &["absent"]),
        (&["-o", all, "file"], &["file"]),
        (
            &["-o", &format!("{all},uidmapping=1:2"), "m"],
            &["uidmapping"],
        ),
        (
            &["-o", &format!("{all},uidmapping=a:b:c"), "m"],
            &["uidmapping"],
        ),
        (&["-o", &format!("{all},timeout=soon"), "m"], &["timeout"]),
        (&["-o", &format!("{all},plugins=x"), "m"], &["plugins"]),
        (&["--frobnicate", "-o", all, "m"], &["frobnicate"]),
    ] {
        refused(&dir, args, words);
    }
    assert!(mount::at(&dir.join("m")).is_none());
}

#[test]
fn upper_and_work_must_lie_on_one_filesystem() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    let other = dir.make("other");
    run("mount", ["-t", "tmpfs", "tmpfs", other.to_str().unwrap()]).ok();
    std::fs::create_dir(other.join("w")).unwrap();
    let options = "lowerdir=a:b,upperdir=u,workdir=other/w";
    refused(&dir, &["-o", options, "m"], &["different file"]);
}

#[test]
fn an_upper_directory_is_mounted_only_once() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    let (second, work) = (dir.make("m2"), dir.make("w2"));
    let mount_point = mounts(&dir, &["-o", "lowerdir=a:b,upperdir=u,workdir=w", "m"]);
    for options in [
        "lowerdir=a:b,upperdir=u,workdir=w",
        "lowerdir=a:b,upperdir=u,workdir=w2",
        "lowerdir=a:b,upperdir=w2,workdir=w",
    ] {
        let output = cowlfs(&dir, &["-o", options, "m2"]);
        assert_ne!(output.code, 0, "{options}: {}", output.report());
        assert!(
            output.err().contains("mounted") || output.err().contains("use"),
            "{}",
            output.err()
        );
        assert!(mount::at(&second).is_none());
    }
    std::fs::write(mount_point.join("still"), "works").unwrap();
    assert!(dir.join("u/still").is_file() && work.read_dir().unwrap().next().is_none());
    // Mount again immediately after the unmount, without waiting or retrying.
    for _ in 0..10 {
        unmount(&mount_point);
        mounts(&dir, &["-o", "lowerdir=a:b,upperdir=u,workdir=w", "m"]);
    }
    unmount(&mount_point);
}

#[test]
fn a_missing_dev_fuse_is_reported() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    let script = format!(
        "mount -t tmpfs tmpfs /dev; mknod /dev/null c 1 3
         exec '{}' -o lowerdir=a:b,upperdir=u,workdir=w m",
        programs::cowlfs().display()
    );
    let mut command = Command::new("unshare");
    command
        .args(["-m", "--propagation", "private", "sh", "-euc", &script])
        .current_dir(&*dir);
    run_command(command, b"").fails(1, &["/dev/fuse"]);
}

/// Runs a script and then mounts, in a mount namespace of its own. Nothing may be mounted.
#[track_caller]
fn refused_after(script: &str, words: &[&str]) {
    let dir = layer_dirs();
    let script = format!(
        "{script}
         '{}' -o lowerdir=a:b,upperdir=u,workdir=w m || {{ code=$?; touch m/written; exit $code; }}",
        programs::cowlfs().display()
    );
    let mut command = Command::new("unshare");
    command
        .args(["-m", "--propagation", "private", "sh", "-euc", &script])
        .current_dir(&*dir);
    run_command(command, b"").fails(1, words);
    assert!(dir.join("m/written").is_file() && !dir.join("u/written").is_file());
}

#[test]
fn a_missing_proc_is_reported() {
    if !can(&NEEDS) {
        return;
    }
    let words = ["/proc is not mounted", "mount -t proc"];
    refused_after("umount -l /proc", &words);
    refused_after("mount -t tmpfs tmpfs /proc", &words);
}

#[test]
fn a_missing_dev_null_prevents_the_mount() {
    if !can(&NEEDS) {
        return;
    }
    let script = "mount -t tmpfs tmpfs /dev; mknod /dev/fuse c 10 229";
    refused_after(script, &["/dev/null"]);
}

#[test]
fn a_mount_does_not_need_its_control_socket() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    std::fs::write(dir.join("file"), "").unwrap();
    let layers = "lowerdir=a:b,upperdir=u,workdir=w";
    for socket in ["absent/socket", "file"] {
        let options = format!("{layers},control={socket}");
        let started = cowlfs(&dir, &["-o", &options, "m"]).ok();
        let message = started.err();
        assert!(
            message.contains(&format!("cannot listen on {socket}"))
                && message.contains("the mount has no control socket"),
            "{message}"
        );
        std::fs::write(dir.join("m/new"), "works").unwrap();
        unmount(&dir.join("m"));
    }
    assert!(dir.join("u/new").is_file());
}

#[test]
fn missing_permission_is_reported() {
    if !can(&NEEDS) {
        return;
    }
    let dir = layer_dirs();
    let program = dir.join("cowlfs");
    std::fs::copy(programs::cowlfs(), &program).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let user = "setpriv --reuid 65534 --regid 65534 --clear-groups ./cowlfs";
    let as_nobody = |options: &str| {
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{user} -o {options} m")])
            .current_dir(&*dir);
        run_command(command, b"")
    };
    // Neither may it write the upper, nor open the device.
    as_nobody("lowerdir=a:b,upperdir=u,workdir=w").fails(1, &["permission denied"]);
    as_nobody("lowerdir=a:b").fails(1, &["/dev/fuse"]);
    sh_in(&dir, "chmod 700 b; chown 65534 u w m").ok();
    as_nobody("lowerdir=a:b").fails(1, &[]);
    sh(&format!(
        "! grep -q '{}' /proc/self/mountinfo",
        dir.join("m").display()
    ))
    .ok();
}

//! File content is read from regular files only: a marker that leads to a device, a FIFO, a socket, a link or a
//! directory exposes nothing and blocks nothing.

use std::path::{Path, PathBuf};

use cowl_tests::command::{self, Output, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::layout;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("losetup")];

const SECRET: &str = "a secret of the host";

/// The targets of markers, each created as `p` by a shell line. `$DISK` is a block device with the secret.
const TARGETS: &[&str] = &[
    "mknod p b 7 $DISK",
    "mknod p c 1 5",
    "mkfifo p",
    "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"p\")'",
    "ln -s ../secret p",
    "mkdir p",
];

/// A block device with the secret, detached when dropped.
struct Disk {
    device: String,
}

impl Disk {
    fn new(scratch: &Scratch) -> Self {
        let image = scratch.join("secret");
        let mut content = SECRET.as_bytes().to_vec();
        content.resize(1 << 20, 0);
        std::fs::write(&image, content).unwrap();
        let args = [Path::new("-f"), Path::new("--show"), &image];
        let device = command::run("losetup", args).ok().out();
        let device = device.trim_end().to_owned();
        Self { device }
    }

    fn minor(&self) -> &str {
        self.device.trim_start_matches("/dev/loop")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        command::run("losetup", ["-d", &self.device]);
    }
}

/// Creates the layers `top`, with markers that lead to `p`, and `base`, which contains `p`.
fn layers(dir: &Path, disk: &Disk, target: &str) -> [PathBuf; 2] {
    let line = format!(
        "DISK={}; mkdir -p top/dir base/dir; echo good >base/dir/good; cd base; {target}; cd ..
         for name in whole part; do
           truncate -s 64 top/$name; setfattr -n trusted.overlay.metacopy top/$name
           setfattr -n trusted.overlay.redirect -v /p top/$name; chmod 644 top/$name
         done",
        disk.minor()
    );
    sh_in(dir, &line).ok();
    ["top", "base"].map(|name| dir.join(name))
}

/// Asserts that a command failed, without blocking, and revealed nothing.
#[track_caller]
fn refused(label: &str, output: &Output) {
    assert_ne!(output.code, 0, "{label}: {}", output.report());
    assert_ne!(output.code, 124, "{label} hangs: {}", output.report());
    let secret = SECRET.as_bytes();
    let gave = output
        .stdout
        .windows(secret.len())
        .any(|part| part == secret);
    assert!(!gave, "{label} gave it away");
    assert!(output.stdout.len() < 64, "{label}: {}", output.report());
}

#[test]
fn a_mount_serves_content_of_regular_files_only() {
    if !can(NEEDS) {
        return;
    }
    let scratch = Scratch::new("content-mount");
    let disk = Disk::new(&scratch);
    for (number, target) in TARGETS.iter().enumerate() {
        let dir = scratch.make(&number.to_string());
        let [top, base] = layers(&dir, &disk, target);
        for data_only in [false, true] {
            let lower = match data_only {
                false => format!("{}:{}", top.display(), base.display()),
                true => format!("{}::{}", top.display(), base.display()),
            };
            let names = ["upper", "work", "mount"].map(|name| dir.make(name, data_only));
            let [upper, work, mount] = &names;
            let options = format!(
                "lowerdir={lower},upperdir={},workdir={},nodev",
                upper.display(),
                work.display()
            );
            let mut daemon = command::run(
                cowl_tests::programs::cowlfs(),
                ["-o".as_ref(), options.as_ref(), mount.as_os_str()],
            );
            daemon = daemon.ok();
            assert!(daemon.stderr.is_empty(), "{}", daemon.report());
            for line in [
                "cat whole",
                "setpriv --reuid 65534 --clear-groups cat whole",
                "dd if=whole iflag=direct status=none",
                "echo more >>whole",
                "truncate -s 1 part",
                "cp whole copy; cat copy",
                "chmod 600 whole; cat whole",
                "mv part moved; cat moved",
                "ln part alias; cat alias",
            ] {
                let line = format!("exec timeout 10 sh -c '{line}'");
                refused(&format!("{line} ({target})"), &sh_in(mount, &line));
            }
            cowl_tests::mount::unmount_free(mount);
        }
    }
}

trait Make {
    fn make(&self, name: &str, data_only: bool) -> PathBuf;
}

impl Make for PathBuf {
    fn make(&self, name: &str, data_only: bool) -> PathBuf {
        let path = self.join(format!("{name}-{data_only}"));
        std::fs::create_dir(&path).unwrap();
        path
    }
}

/// Runs `cowl` with a timeout.
fn cowl(store: &Store, args: &[&str]) -> Output {
    let mut command = std::process::Command::new("timeout");
    command.arg("20").arg(cowl_tests::programs::cowl());
    command.arg("--store").arg(store.path()).args(args);
    command::run_command(command, b"")
}

#[test]
fn commands_read_content_of_regular_files_only() {
    if !can(NEEDS) {
        return;
    }
    let disk_at = Scratch::new("content-disk");
    let disk = Disk::new(&disk_at);
    for target in TARGETS {
        let store = Store::for_test();
        let dir = store.scratch().make("layers");
        let layers = layers(&dir, &disk, target);
        layout::make(store.path(), "web", &layers, true).unwrap();
        let out = |name: &str| store.scratch().join(name).to_str().unwrap().to_owned();
        for args in [
            &["cat", "web:/whole"][..],
            &["diff", "web", "-p"],
            &["export", "web", "--dir", &out("dir")],
            &["export", "web", &out("web.tar")],
            &["export", "web", "--format", "oci", &out("web.oci")],
        ] {
            let output = cowl(&store, args);
            if args[0] == "diff" && output.code == 0 {
                // Nothing differs from the base state.
                assert!(output.stdout.is_empty(), "{}", output.report());
                continue;
            }
            refused(&format!("{args:?} ({target})"), &output);
        }
        // An exported bundle has the same layers, and importing it is no way around the check.
        let bundle = out("whole.tar");
        cowl(&store, &["export", "web", "--with-snapshots", &bundle]).ok();
        cowl(&store, &["import", &bundle, "again"]).ok();
        refused("an import", &cowl(&store, &["cat", "again:/whole"]));
        for args in [
            &["check", "--deep"][..],
            &["flatten", "web"],
            &["snapshot", "web"],
            &["diff", "web@snap0", "web", "-p"],
            &["du", "web"],
            &["ls", "web:/"],
        ] {
            let output = cowl(&store, args);
            assert_ne!(output.code, 124, "{args:?} hangs: {}", output.report());
            let shown = [output.stdout.clone(), output.stderr.clone()].concat();
            let secret = SECRET.as_bytes();
            assert!(!shown.windows(secret.len()).any(|part| part == secret));
        }
        assert!(!holds_secret(store.path()), "a layer has it ({target})");
        // Intact files next to the damage remain readable.
        assert_eq!(cowl(&store, &["cat", "web:/dir/good"]).ok().out(), "good");
    }
}

/// Whether a regular file below `root` contains the secret.
fn holds_secret(root: &Path) -> bool {
    let line = format!("grep -rqsF --devices=skip '{SECRET}' .");
    sh_in(root, &line).code == 0
}

/// Kernel overlayfs refuses the same markers.
#[test]
fn kernel_overlayfs_refuses_the_same_content() {
    let needs = [NEEDS, &[Need::KernelOverlay]].concat();
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::new("content-kernel");
    let disk = Disk::new(&scratch);
    let [top, base] = layers(&scratch, &disk, TARGETS[0]);
    let stack = Stack::of(&[&top, &base]);
    let kernel = Overlay::kernel(&stack, &scratch.make("kernel"));
    let ours = Overlay::cowlfs(&stack, &scratch.make("ours"), "");
    for mount in [kernel.path(), ours.path()] {
        let error = std::fs::read(mount.join("whole")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{}", mount.display());
    }
    ours.unmount();
}

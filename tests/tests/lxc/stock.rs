//! LXC's own lxc-snapshot, lxc-copy and lxc-destroy on a container of cowl's: none of them destroys files
//! through the mount, shares the head, or stores an empty snapshot that is listed as one.

use cowl_tests::conditions::{Need, can};
use cowl_tests::lxc::{Lxc, NEEDS};

const NOTHING: [&str; 0] = [];

/// LXC refuses a copy when the root's path does not hold the container's name. This name is in the path of
/// every mount, so that LXC goes as far as it ever does.
const NAME: &str = "mnt";

fn container() -> Lxc {
    let lxc = Lxc::for_test();
    lxc.create(NAME);
    lxc.adopt(NAME).ok();
    lxc.store().cowl(["snapshot", NAME]).ok();
    lxc
}

#[track_caller]
fn is_whole(lxc: &Lxc) {
    lxc.start(NAME);
    assert_eq!(lxc.run(NAME, "cat /etc/hostname"), NAME);
    lxc.kill(NAME);
    lxc.unmounted(NAME);
    assert_eq!(
        lxc.store().snapshots(NAME).first().map(String::as_str),
        Some("snap0")
    );
}

#[test]
fn lxc_tools_neither_store_nor_restore_an_empty_snapshot() {
    let needs = [
        NEEDS,
        &[Need::Program("lxc-snapshot"), Need::Program("rsync")],
    ]
    .concat();
    if !can(&needs) {
        return;
    }
    let lxc = container();
    // Stopped, and after it ran once.
    for _ in 0..2 {
        let output = lxc.tool("snapshot", NAME, NOTHING);
        assert_ne!(output.code, 0, "{}", output.report());
        let list = lxc.tool("snapshot", NAME, ["-L"]).out();
        assert!(list.contains("No snapshots"), "{list}");
        is_whole(&lxc);
    }
    // A snapshot by LXC from before the adoption: to restore it, LXC would destroy the container first.
    let snap = lxc.dir(NAME).join("snaps/snap0");
    std::fs::create_dir_all(snap.join("rootfs")).unwrap();
    std::fs::copy(lxc.dir(NAME).join("config"), snap.join("config")).unwrap();
    std::fs::write(snap.join("ts"), "2026:11:23 13:02:05").unwrap();
    let output = lxc.tool("snapshot", NAME, ["-r", "snap0"]);
    assert_ne!(output.code, 0, "{}", output.report());
    is_whole(&lxc);
    // lxc-destroy takes it with the rest, and cowl's trash has the container.
    lxc.tool("destroy", NAME, ["-s"]).ok();
    lxc.store().cowl(["undelete", NAME]).ok();
    is_whole(&lxc);
}

#[test]
fn copies_by_lxc_tools_do_not_share_files() {
    let needs = [NEEDS, &[Need::Program("lxc-copy"), Need::Program("rsync")]].concat();
    if !can(&needs) {
        return;
    }
    let lxc = container();
    let copy = |more: &[&str]| {
        let args = [more, &["-N", "copy"]].concat();
        lxc.tool("copy", NAME, args)
    };
    // Unmounted there is nothing to copy, and nothing is left of the attempt.
    for more in [&[][..], &["-e"], &["-R"]] {
        let output = copy(more);
        assert_ne!(output.code, 0, "{}", output.report());
        assert!(!lxc.dir("copy").try_exists().unwrap(), "{more:?}");
        is_whole(&lxc);
    }
    // Mounted a full copy is made, which has its own files.
    let mount_point = lxc.store().mount(NAME);
    copy(&[]).ok();
    lxc.start("copy");
    lxc.run("copy", "rm -r /etc/init.d; echo copy > /etc/hostname");
    assert!(mount_point.join("etc/init.d").try_exists().unwrap());
    lxc.kill("copy");
    assert!(
        lxc.store()
            .cowl(["status", NAME])
            .ok()
            .out()
            .contains("mounted")
    );
    lxc.tool("destroy", "copy", NOTHING).ok();
    is_whole(&lxc);

    // A manually copied config refers to the same head.
    let dir = lxc.dir("thief");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(lxc.dir(NAME).join("config"), dir.join("config")).unwrap();
    let output = lxc.tool("start", "thief", ["-F", "-l", "DEBUG", "-o", "/dev/stderr"]);
    assert_ne!(output.code, 0);
    let output = output.err();
    assert!(
        output.contains("would write to the files of mnt"),
        "{output}"
    );
    assert!(output.contains("cowl clone mnt thief"), "{output}");
    lxc.tool("destroy", "thief", NOTHING).ok();
    assert!(!dir.try_exists().unwrap());
    is_whole(&lxc);
}

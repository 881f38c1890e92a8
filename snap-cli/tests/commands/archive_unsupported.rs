//! Archives with what the store's file system, or the user, cannot store.

use std::path::PathBuf;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree;

use super::archive_programs::cowl;

/// Creates an archive with objects and attributes that only root can store.
fn privileged_archive(scratch: &Scratch) -> PathBuf {
    sh_in(
        scratch,
        "mkdir -p tree/dev tree/bin; echo x > tree/bin/program; mknod tree/dev/null c 1 3
         ln tree/dev/null tree/dev/null2; chown 7:8 tree/bin/program; chmod 6755 tree/bin/program
         setfattr -n trusted.note -v t tree/bin/program; setfattr -n user.note -v u tree/bin/program
         tar --xattrs --xattrs-include='*' -cf a.tar -C tree .; chmod 755 .; chmod 644 a.tar",
    )
    .ok();
    scratch.join("a.tar")
}

#[test]
fn what_only_root_can_store_is_recorded_for_a_user_without_privileges() {
    let programs = ["setpriv", "setfattr"].map(Need::Program);
    if !can(&[&[Need::Root], programs.as_slice()].concat()) {
        return;
    }
    let scratch = Scratch::for_test();
    let archive = privileged_archive(&scratch);
    let own = scratch.make("own");
    std::os::unix::fs::chown(&own, Some(65_534), Some(65_534)).unwrap();
    // The program may be in a directory that the user cannot search.
    std::fs::copy(programs::cowl(), scratch.join("cowl")).unwrap();
    let as_user = |args: &str| {
        let line = format!(
            "XDG_RUNTIME_DIR=\"$PWD/own\" HOME=\"$PWD/own\" setpriv --reuid 65534 --regid 65534 --clear-groups \
             sh -c 'exec ./cowl --store own/store {args}'"
        );
        sh_in(&scratch, &line)
    };
    for (source, name) in [("a.tar", "one"), ("tree", "two")] {
        let made = as_user(&format!("create {name} --from {source}")).ok();
        let notes = made.err();
        for note in [
            match source {
                "tree" => "skipped an owner without an id in this user namespace",
                _ => "recorded an owner that this user cannot set",
            },
            // Its two names are in any order in the archive.
            ": recorded a device that this user cannot create",
        ] {
            assert!(notes.contains(note), "no {note:?} in {notes}");
        }
        let export = as_user(&format!("export {name} --dir own/{name}")).ok();
        let note = "dev/null, dev/null2: skipped a device that this user cannot create";
        assert!(export.err().contains(note), "{}", export.report());
        let tree = tree::read(&own.join(name)).unwrap();
        let program = &tree[&b"bin/program"[..]];
        // Without its owner, the program would run with the privileges of the caller.
        assert_eq!((program.uid, program.mode), (65_534, 0o755), "{source}");
        assert_eq!(program.xattrs[&b"user.note"[..]], b"u", "{source}");
        let names: Vec<_> = tree
            .keys()
            .map(|path| path.escape_ascii().to_string())
            .collect();
        assert_eq!(names, ["", "bin", "bin/program", "dev"], "{source}");
    }
    let import = as_user("import a.tar three --quiet").ok();
    assert_eq!(import.err(), "");
    assert!(archive.is_file());
    // The commands have created a namespace.
    as_user("unshare --stop").ok();
}

#[test]
fn the_hint_for_an_unsupported_attribute_depends_on_its_cause() {
    let needs = [Need::Root, Need::Program("python3")];
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::for_test();
    let make = "
import tarfile, io
for name, key, size in (('large', 'user.x', 60000), ('nfs', 'system.nfs4_acl', 3)):
    with tarfile.open(name + '.tar', 'w', format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo('f')
        info.pax_headers = {'SCHILY.xattr.' + key: 'x' * size}
        archive.addfile(info)
";
    std::fs::write(scratch.join("make.py"), make).unwrap();
    sh_in(&scratch, "python3 make.py").ok();
    for (name, is_everywhere) in [("nfs", true), ("large", false)] {
        let path = scratch.join(format!("{name}.tar"));
        let path = path.to_str().unwrap();
        let refused = cowl(&scratch, &["create", name, "--from", path]);
        if refused.code == 0 {
            // XFS stores xattrs of 64 KiB.
            assert!(!is_everywhere, "{}", refused.report());
            continue;
        }
        let refused = refused.fails(1, &["cannot set the xattr", "--skip-unsupported"]);
        for wrong in ["free some space", "as root"] {
            assert!(!refused.err().contains(wrong), "{}", refused.report());
        }
        let args = ["create", name, "--from", path, "--skip-unsupported"];
        let made = cowl(&scratch, &args).ok();
        let note = "skipped an xattr that this file system or user cannot store";
        assert!(made.err().contains(note), "{}", made.report());
    }
}

//! Archives with what a plain user cannot store: it is recorded, and exports contain it.

use cowl_tests::conditions::{Need, can};
use cowl_tests::plain_user::{Ids, NEEDS, as_user};
use cowl_tests::rootfs;

/// Writes the archive `full.tar`, and describes archives: one line for each entry and attribute.
const ARCHIVES: &str = r#"
import hashlib, struct, sys, tarfile
def build(path):
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    acl = "user::rwx,user:1234:rw-,group::r--,mask::rwx,other::---"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        def add(name, kind=tarfile.REGTYPE, mode=0o644, owner=(0, 0), link="", dev=(0, 0), data=b"", **pax):
            info = tarfile.TarInfo("./" + name)
            info.type, info.mode, (info.uid, info.gid), info.linkname = kind, mode, owner, link
            (info.devmajor, info.devminor), info.size, info.mtime = dev, len(data), 1e9 + 0.5
            info.pax_headers = {"SCHILY." + key.replace("__", "."): value for key, value in pax.items()}
            import io
            tar.addfile(info, io.BytesIO(data))
        bytes_ = lambda value: value.decode("utf-8", "surrogateescape")
        add("", tarfile.DIRTYPE, 0o755, **{"xattr__trusted__root": "r"})
        for name in ("bin", "dev", "etc", "proc", "var"): add(name, tarfile.DIRTYPE, 0o755)
        for name in ("sh", "cat", "id", "ls"): add("bin/" + name, tarfile.SYMTYPE, 0o777, link="busybox")
        add("bin/busybox", mode=0o755, data=open(sys.argv[2], "rb").read())
        add("bin/ping", mode=0o755, data=b"ping", **{"xattr__security__capability": bytes_(capability)})
        add("bin/su", mode=0o4755, data=b"su")
        add("bin/at", mode=0o6755, owner=(1, 2), data=b"at", **{"xattr__security__capability": bytes_(capability)})
        add("dev/null", tarfile.CHRTYPE, 0o666, dev=(1, 3))
        add("dev/null2", tarfile.LNKTYPE, 0o666, link="./dev/null")
        add("dev/sda", tarfile.BLKTYPE, 0o660, (0, 6), dev=(8, 0), **{"xattr__security__note": "s"})
        add("dev/pipe", tarfile.FIFOTYPE, 0o600)
        add("etc/shadow", mode=0o640, owner=(0, 42), data=b"shadow", **{"xattr__trusted__note": "t", "xattr__user__note": "u"})
        add("etc/acl", mode=0o770, owner=(3000000, 7), data=b"acl", **{"acl__access": acl})
        record = struct.pack("<BIIIQqIIIIQ", 1, 0o100644, 0, 0, 0, 0, 0, 0o060666, 0, 0, 0x800)
        add("etc/hostile", **{"xattr__user__overlay__cowl__recorded": bytes_(record)})
        add("etc/passwd", data=b"root:x:0:0::/:/bin/sh\n")
        add("etc/shadow-", tarfile.LNKTYPE, link="./etc/shadow")
        add("var/mail", tarfile.DIRTYPE, 0o2775, (0, 8), **{"acl__default": acl, "xattr__trusted__x": "y"})
        add("var/mail/one", mode=0o600, owner=(33, 33), data=b"one")
        add("var/www", tarfile.DIRTYPE, 0o1777, (33, 33))
        add("var/www/two", mode=0o664, owner=(33, 34), data=b"two")
def describe(path):
    lines = []
    with tarfile.open(path, "r:*") as tar:
        for entry in tar:
            name = entry.name.removeprefix("./").rstrip("/") or "."
            link = entry.linkname.removeprefix("./")
            content = hashlib.sha256(tar.extractfile(entry).read()).hexdigest()[:8] if entry.isreg() else ""
            dev = (entry.devmajor, entry.devminor) if entry.isdev() and not entry.isfifo() else ""
            if entry.islnk(): lines.append(f"{name} link to {link}"); continue
            lines.append(f"{name} {entry.type} {entry.mode:o} {entry.uid}:{entry.gid} {link} {dev} {content} {entry.mtime}")
            for key, value in sorted(entry.pax_headers.items()):
                if key.startswith("SCHILY."):
                    lines.append(f"{name} {key}={value!r}")
    print("\n".join(sorted(lines)))
build(sys.argv[3]) if sys.argv[1] == "build" else describe(sys.argv[2])
"#;

/// Creates the archive, and the commands of the scripts.
const BEFORE: &str = r#"
printf '%s\n' "$ARCHIVES" > $D/user/archives.py
python3 $D/user/archives.py build "$(command -v busybox)" $D/user/home/full.tar
cat > $D/describe <<'END'
#!/bin/sh
exec python3 "$D/user/archives.py" describe "$1"
END
cat > $D/same <<'END'
#!/bin/sh
describe "$1" > one.txt && describe "$2" > two.txt && diff one.txt two.txt
END
cat > $D/changed <<'END'
#!/bin/sh
describe "$1" > one.txt; describe "$2" > two.txt; diff one.txt two.txt | grep '^[<>]' | sed 's/ [0-9.]*$//'
END
chmod 755 $D/describe $D/same $D/changed
"#;

fn run(ids: Ids, script: &str) -> cowl_tests::command::Output {
    let before = format!("ARCHIVES='{}'\n{BEFORE}", ARCHIVES.replace('\'', r"'\''"));
    as_user(ids, &before, script)
}

#[test]
fn every_export_of_a_plain_user_equals_the_imported_archive() {
    if !can(&[NEEDS, &[Need::Program("python3")]].concat()) {
        return;
    }
    for ids in [Ids::Own, Ids::Ranges] {
        let output = run(
            ids,
            "cowl create web --from full.tar 2> notes; cat notes >&2
             cowl export web plain.tar; same full.tar plain.tar
             cowl -q snapshot web; cowl -q exec web -- /bin/sh -c 'echo x > /dev/null; echo > /proc/self/comm'
             cowl export web after.tar; same full.tar after.tar
             cowl flatten web 2> /dev/null; cowl export web flat.tar; same full.tar flat.tar
             cowl export web --with-snapshots all.tar; cowl import all.tar again 2> /dev/null
             cowl export again again.tar; same full.tar again.tar
             cowl create third --from again.tar 2> /dev/null; cowl export third third.tar; same full.tar third.tar
             cowl export web --dir plain 2> notes; cat notes >&2; [ ! -e plain/dev/null ]
             cowl export web --oci image > /dev/null
             for blob in image/blobs/sha256/*; do ! gzip -t $blob 2> /dev/null || describe $blob; done > all
             for line in \"dev/null b'3' 666 0:0\" \"etc/shadow b'0' 640 0:42\" 'trusted.note'; do
                 grep -q \"$line\" all || echo \"no $line\"; done
             cowl check; echo end",
        )
        .ok();
        assert!(output.out().ends_with("end"), "{}", output.report());
        let notes = output.err();
        for note in [
            "dev/null, dev/sda: recorded a device that this user cannot create",
            "recorded an xattr that this user cannot set",
        ] {
            assert!(notes.contains(note), "no {note:?} in {notes}");
        }
        assert_eq!(
            notes.contains("recorded an owner that this user cannot set"),
            ids == Ids::Own || notes.contains("etc/acl: recorded an owner"),
            "{notes}"
        );
    }
}

/// The archive of another store, in which everything could be stored.
#[test]
fn a_whole_container_of_root_is_imported_by_a_plain_user() {
    if !can(&[NEEDS, &[Need::Program("python3")]].concat()) {
        return;
    }
    let before = format!(
        "ARCHIVES='{}'\n{BEFORE}
         cowl --store $D/root create web --from $D/user/home/full.tar; cowl --store $D/root -q snapshot web
         cowl --store $D/root export web --with-snapshots $D/user/home/whole.tar",
        ARCHIVES.replace('\'', r"'\''")
    );
    let output = as_user(
        Ids::Own,
        &before,
        "cowl import whole.tar 2> notes; grep -c 'recorded a device' notes; cowl export web out.tar; same full.tar out.tar
         cowl export web@snap0 snap.tar; same full.tar snap.tar",
    )
    .ok();
    assert_eq!(output.out(), "snap0\n1", "{}", output.report());
}

#[test]
fn debian_is_imported_with_a_single_id_and_exported_unchanged() {
    if !can(&[NEEDS, &[Need::Program("python3")]].concat()) {
        return;
    }
    let tar = rootfs::debian_tar().expect("the Debian tar");
    let before = format!(
        "ARCHIVES='{}'\n{BEFORE}\ncp {} $D/user/home/debian.tar",
        ARCHIVES.replace('\'', r"'\''"),
        tar.display()
    );
    let output = as_user(
        Ids::Own,
        &before,
        "cowl create web --from debian.tar 2> notes; cat notes >&2
         cowl export web out.tar; same debian.tar out.tar; grep -c 'recorded an owner' notes",
    )
    .ok();
    assert_eq!(output.out(), "1", "{}", output.report());
}

/// Changes through a mount, and the lines of the archive that differ: `<` is the original.
const CHANGES: &str = r#"
    cowl create web --from full.tar 2> /dev/null; M=$(cowl -q mount web)
    cowl unshare sh -euc "cd $M
        stat -c '%F %a %u' dev/sda
        touch -d @5 etc/shadow bin/at; chmod 600 var/www/two; mv dev/null2 dev/zero; echo x > dev/sda
        ln var/mail/one var/mail/hard; mv var/www var/web; rm etc/acl; touch -d @5 etc/acl
        touch -d @1000000000.5 dev etc var var/mail var/web . var/web/two"
    cat > forge.py <<'END'
import glob, os, struct, sys
record = struct.pack("<BIIIQqIIIIQ", 1, 0o100644, 0, 0, 0, 5, 0, 0o060666, 0, 0, os.makedev(8, 0))
if sys.argv[1] == "mount":
    os.setxattr(sys.argv[2] + "/etc/acl", "user.overlay.cowl.recorded", record)
else:
    for path in glob.glob(os.path.expanduser("~/.local/share/cowl/layers/*/tree/bin/su")):
        os.setxattr(path, "user.overlay.cowl.recorded", b"\1garbage")
END
    cowl unshare python3 forge.py mount $M; cowl unshare python3 forge.py layers
    cowl -q snapshot web; cowl umount web
    cowl export web out.tar; changed full.tar out.tar
    cowl -q flatten web 2> /dev/null; cowl export web flat.tar; same out.tar flat.tar
    cowl export web --with-snapshots all.tar; cowl -q import all.tar again; cowl export again again.tar; same out.tar again.tar
    cowl export web --oci oci.tar
"#;

#[test]
fn changes_in_a_container_take_precedence_over_the_record() {
    if !can(&[NEEDS, &[Need::Program("python3")]].concat()) {
        return;
    }
    let output = run(Ids::Own, CHANGES).ok();
    let out = output.out();
    let expected = [
        "regular empty file 0 0",
        // Setuid ends with the original content; the owner remains.
        "< bin/at b'0' 6755 1:2",
        "> bin/at b'0' 755 1:2",
        "> dev/sda b'0' 0 0:6   ",
        "< dev/null2 link to dev/null",
        "> dev/zero link to dev/null",
        "> var/web/two b'0' 600 33:34",
        "> var/web b'5' 1777 33:33",
        "> var/mail/one link to var/mail/hard",
        "> etc/acl b'0' 644 0:0",
        "> etc/acl SCHILY.xattr.user.overlay.cowl.recorded=",
    ];
    for line in expected {
        assert!(out.contains(line), "no {line:?}: {}", output.report());
    }
    let unexpected = [
        "bin/su",
        "> bin/at SCHILY",
        "> etc/shadow SCHILY",
        "> dev/sda b'4'",
    ];
    for line in unexpected {
        assert!(!out.contains(line), "{line:?}: {}", output.report());
    }
}

#[test]
fn a_changed_owner_takes_precedence_over_the_record() {
    if !can(&[NEEDS, &[Need::Program("python3")]].concat()) {
        return;
    }
    let output = run(
        Ids::Ranges,
        "cowl create web --from full.tar 2> /dev/null; M=$(cowl -q mount web)
         cowl unshare chown 5:7 $M/etc/acl; cowl unshare touch -d @1000000000.5 $M/etc
         cowl export web out.tar; changed full.tar out.tar",
    )
    .ok();
    let out = output.out();
    let want = ["< etc/acl b'0' 770 3000000:7", "> etc/acl b'0' 770 5:7"];
    for line in want {
        assert!(out.contains(line), "no {line:?}: {}", output.report());
    }
    assert_eq!(out.lines().count(), 2, "{}", output.report());
}

#[test]
fn restored_files_have_their_record_again() {
    if !can(&[NEEDS, &[Need::Program("python3")]].concat()) {
        return;
    }
    let output = run(
        Ids::Own,
        "cowl create web --from full.tar 2> /dev/null; cowl -q snapshot web > /dev/null; M=$(cowl -q mount web)
         destroy() { cowl unshare sh -euc \"cd $M; rm -r dev etc/acl var/www; : > bin/at; chmod 0 var/mail\"; }
         destroy; cowl -q restore web snap0 -- / > /dev/null; cowl export web mounted.tar; same full.tar mounted.tar
         destroy; cowl umount web; cowl -q restore web snap0 -- / > /dev/null
         cowl export web unmounted.tar; same full.tar unmounted.tar",
    )
    .ok();
    assert_eq!(output.out(), "", "{}", output.report());
}

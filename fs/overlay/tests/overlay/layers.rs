//! Writes go only to the upper layer: never to a frozen one, and nowhere without an upper layer.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use crate::common::{Fs, Lab, R, READ, WRITE, caller, create_files, disk, is_root};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_overlay::idmap::{IdMap, IdRange, OVERFLOW};
use cowl_overlay::{Caller, OverlayOptions, PushError, SetAttr};

/// A deterministic pseudorandom number generator.
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// Returns the number of runs, which COWL_SEEDS sets.
fn seeds() -> u64 {
    std::env::var("COWL_SEEDS").map_or(3, |seeds| seeds.parse().unwrap())
}

/// Runs a random operation on an existing path, and returns whether it succeeded. Most do.
fn random_change(fs: &Fs, rng: &mut Rng, turn: usize) -> bool {
    let tree = fs.tree();
    let paths: Vec<&String> = tree.keys().collect();
    let path = paths[rng.below(paths.len())].as_str();
    let other = paths[rng.below(paths.len())];
    let dir = other.rsplit_once('/').map_or("", |(dir, _)| dir);
    let new = format!("{dir}/n{turn}").trim_start_matches('/').to_owned();
    let kind = rng.below(12);
    let done = match kind {
        0 => fs.append(path, b"+"),
        1 => fs.overwrite(path, b"new"),
        2 => fs.chmod(path, 0o700 | u32::try_from(turn % 64).unwrap()),
        3 => fs.unlink(path),
        4 => fs.rmdir(path),
        5 | 6 => fs.rename(path, &new),
        7 => fs.rename(path, other),
        8 => fs.exchange(path, other),
        9 => fs.link(path, &new),
        10 => fs.mkdir(&new),
        _ => fs.create(&new, b"made"),
    };
    // cargo prints this only if the test fails.
    println!("{turn}: {kind} {path} {other} {new}: {done:?}");
    done.is_ok()
}

#[test]
fn frozen_layer_is_never_written() {
    for seed in 0..seeds() {
        let lab = Lab::new(|top| {
            create_files(top, &["a", "d/b", "d/s/c", "d/s/t/u", "e/f", "g/"]);
            std::fs::hard_link(top.join("a"), top.join("e/h")).unwrap();
            std::fs::hard_link(top.join("a"), top.join("d/s/i")).unwrap();
        })
        .with(OverlayOptions {
            metacopy: seed % 3 != 2,
            ..OverlayOptions::default()
        })
        .in_space(
            crate::common::spaces()[usize::try_from(seed).unwrap() % crate::common::spaces().len()],
        );
        let base = disk(&lab.lower());
        let bottom = lab.lower();
        let fs = lab.open();
        let mut rng = Rng(seed);
        let mut frozen = Vec::new();
        for round in 0..3 {
            let worked = (0..70)
                .filter(|turn| random_change(&fs, &mut rng, round * 100 + turn))
                .count();
            assert!(worked > 20, "{worked}");
            let shown = fs.tree();
            println!("seed {seed}: push");
            let old = lab.push(&fs).unwrap();
            assert!(fs.tree() == shown, "seed {seed}: another tree after a push");
            let digest = disk(&old);
            frozen.push((old, digest, shown));
        }
        // Change every object.
        for (path, object) in fs.tree() {
            println!("chmod {path}");
            fs.chmod(&path, object.perm ^ 0o001).unwrap();
        }
        for turn in 0..60 {
            random_change(&fs, &mut rng, 1000 + turn);
        }
        let shown = fs.tree();
        let numbers = |fs: &Fs| -> Vec<u64> { shown.keys().map(|path| fs.number(path)).collect() };
        let before = numbers(&fs);
        drop(fs);
        let fs = lab.open();
        assert!(
            fs.tree() == shown,
            "seed {seed}: another tree after a new mount"
        );
        assert_eq!(numbers(&fs), before, "seed {seed}");
        for (path, digest, _) in &frozen {
            assert_eq!(disk(path), *digest, "seed {seed}: {}", path.display());
        }
        assert_eq!(disk(&bottom), base);
    }
}

#[test]
fn open_writers_continue_in_the_new_layer() {
    let lab = Lab::new(|top| create_files(top, &["f", "g", "h"]));
    let fs = lab.open();
    let reader = fs.open("f", READ).unwrap();
    let writer = fs.open("f", WRITE).unwrap();
    let other = fs.open("f", WRITE).unwrap();
    fs.write_handle(&writer, 0, b"C").unwrap();
    // A file with two names, one without a name, and one whose attributes are copied up before its content.
    fs.link("g", "alias").unwrap();
    let linked = fs.open("alias", WRITE).unwrap();
    let nameless = fs.open("h", WRITE).unwrap();
    fs.unlink("h").unwrap();
    fs.create("new", b"new").unwrap();
    let touched = fs.open("new", WRITE).unwrap();
    let numbers: Vec<_> = ["f", "g", "new"].map(|path| fs.number(path)).into();

    let before = fs.tree();
    let old = lab.push(&fs).unwrap();
    let digest = disk(&old);
    assert!(fs.tree() == before, "a push is not visible");
    assert_eq!(lab.describe_upper(), [""; 0], "a push copies nothing");

    for (handle, at, data) in [
        (&writer, 1, b"O"),
        (&other, 2, b"N"),
        (&linked, 0, b"G"),
        (&nameless, 0, b"H"),
    ] {
        fs.write_handle(handle, at, data).unwrap();
    }
    fs.chmod("new", 0o600).unwrap();
    fs.write_handle(&touched, 0, b"N").unwrap();
    assert_eq!(fs.read_handle(&reader).unwrap(), b"CONtent of f");
    assert_eq!(fs.read("f").unwrap(), b"CONtent of f");
    assert_eq!(fs.read("g").unwrap(), b"Gontent of g");
    assert_eq!(fs.read_handle(&nameless).unwrap(), b"Hontent of h");
    assert_eq!(fs.read("new").unwrap(), b"New");
    let now: Vec<_> = ["f", "g", "new"].map(|path| fs.number(path)).into();
    assert_eq!(now, numbers);
    assert_eq!(fs.number("alias"), fs.number("g"));
    assert_eq!(disk(&old), digest, "the frozen layer was written");

    // Push a second layer.
    let second = lab.push(&fs).unwrap();
    let second_digest = disk(&second);
    fs.write_handle(&writer, 0, b"c").unwrap();
    assert_eq!(fs.read("f").unwrap(), b"cONtent of f");
    assert_eq!((disk(&old), disk(&second)), (digest, second_digest));
    for handle in [&reader, &writer, &other, &linked, &nameless, &touched] {
        fs.overlay.close(handle);
    }
}

#[test]
fn push_cost_is_independent_of_tree_size() {
    let lab = Lab::new(|top| create_files(top, &["f"]));
    let fs = lab.open();
    for at in 0..500 {
        fs.create(&format!("n{at}"), b"x").unwrap();
    }
    let old = lab.push(&fs).unwrap();
    assert_eq!(std::fs::read_dir(&old).unwrap().count(), 500);
    assert_eq!(lab.describe_upper(), [""; 0]);
    assert_eq!(
        std::fs::read_dir(lab.work().join("work")).unwrap().count(),
        0
    );
}

#[test]
fn changes_without_an_upper_layer_return_erofs() {
    let lab = Lab::new(|top| create_files(top, &["f", "d/x", "e/"]));
    let acts: [fn(&Fs) -> R<()>; 19] = [
        |fs| fs.append("f", b"+"),
        |fs| fs.overwrite("f", b""),
        |fs| fs.truncate("f", 1),
        |fs| fs.chmod("f", 0o600),
        |fs| fs.chmod("d", 0o700),
        |fs| fs.chmod("", 0o700),
        |fs| fs.set("f", &SetAttr::default()).map(drop),
        |fs| fs.create("n", b""),
        |fs| fs.mkdir("d/n"),
        |fs| fs.symlink("n", "f"),
        |fs| fs.mkfifo("n"),
        |fs| fs.link("f", "n"),
        |fs| fs.unlink("f"),
        |fs| fs.rmdir("e"),
        |fs| fs.rename("f", "n"),
        |fs| fs.rename("d", "e/d"),
        |fs| fs.exchange("f", "d"),
        |fs| fs.set_xattr("f", "user.x", b""),
        |fs| fs.remove_xattr("f", "user.x"),
    ];
    let fs = lab.open_read_only();
    let (lower, upper, shown) = (disk(&lab.lower()), disk(&lab.upper()), fs.tree());
    for (at, act) in acts.iter().enumerate() {
        assert_eq!(act(&fs), Err(Errno::ROFS), "act {at}");
    }
    assert_eq!(fs.tree(), shown);
    assert_eq!((disk(&lab.lower()), disk(&lab.upper())), (lower, upper));
    assert_eq!(fs.read("d/x").unwrap(), b"content of d/x");
}

#[test]
fn markers_of_a_nested_overlay_are_stored_escaped() {
    for &space in crate::common::spaces() {
        let mut lab = Lab::new(|top| create_files(top, &["d/x"]));
        lab.space = space;
        let fs = lab.open();
        for marker in [space.opaque(), space.redirect(), space.ino()] {
            fs.set_xattr("d", marker, b"y").unwrap();
            assert_eq!(fs.get_xattr("d", marker).unwrap(), b"y");
            let inner = marker.strip_prefix(space.prefix()).unwrap();
            let stored = format!("{}{inner}", space.escaped());
            let on_disk = crate::common::xattrs(&lab.upper().join("d"));
            assert!(on_disk.contains(&(stored, b"y".to_vec())), "{on_disk:?}");
        }
        assert_eq!(fs.xattr_names(&fs.find("d").unwrap()).len(), 3);
        drop(fs);
        let fs = lab.open();
        assert_eq!(
            fs.names("d").unwrap(),
            ["x"],
            "it was interpreted as a marker"
        );
        fs.remove_xattr("d", space.opaque()).unwrap();
        assert_eq!(fs.get_xattr("d", space.opaque()), Err(Errno::NODATA));
        // Markers of another namespace are ordinary xattrs.
        if space == XattrSpace::Trusted {
            fs.set_xattr("d", "user.overlay.opaque", b"y").unwrap();
            let on_disk = crate::common::xattrs(&lab.upper().join("d"));
            assert!(
                on_disk
                    .iter()
                    .any(|(name, _)| name == "user.overlay.opaque")
            );
        }
    }
}

#[test]
fn ids_are_mapped_both_ways() {
    if !is_root() {
        return;
    }
    let map = || {
        let range = IdRange {
            mount: 0,
            disk: 100_000,
            count: 1000,
        };
        IdMap::new(vec![range], None)
    };
    let lab = Lab::new(|top| {
        create_files(top, &["mine", "foreign"]);
        std::os::unix::fs::chown(top.join("mine"), Some(100_005), Some(100_006)).unwrap();
    })
    .with(OverlayOptions {
        uids: map(),
        gids: map(),
        ..crate::common::metacopy()
    });
    let owner = |fs: &Fs, path: &str| {
        let stat = fs.attr(path).unwrap().stat;
        (stat.uid, stat.gid)
    };
    let on_disk = |path: &str| {
        let stat = crate::common::lstat(&lab.upper().join(path));
        (stat.uid, stat.gid)
    };
    let fs = lab.open();
    assert_eq!(owner(&fs, "mine"), (5, 6));
    assert_eq!(owner(&fs, "foreign"), (OVERFLOW, OVERFLOW));
    let set = |uid| SetAttr {
        uid: Some(uid),
        ..SetAttr::default()
    };
    fs.set("mine", &set(7)).unwrap();
    assert_eq!(
        (owner(&fs, "mine"), on_disk("mine")),
        ((7, 6), (100_007, 100_006))
    );
    assert_eq!(fs.set("mine", &set(1000)).unwrap_err(), Errno::OVERFLOW);
    // A copy-up preserves an owner that is not mapped.
    fs.chmod("foreign", 0o600).unwrap();
    assert_eq!(
        (owner(&fs, "foreign"), on_disk("foreign")),
        ((OVERFLOW, OVERFLOW), (0, 0))
    );
    cowl_layers::sys::attr::chown(
        cowl_layers::sys::dir::open_root(&lab.upper())
            .unwrap()
            .as_fd(),
        Some(100_008),
        Some(100_009),
    )
    .unwrap();
    let mapped_caller = Caller {
        pid: 0,
        uid: 8,
        gid: 9,
        ..caller()
    };
    let root = fs.find("").unwrap();
    let name = cowl_layers::Name::new("new").unwrap();
    fs.overlay
        .begin()
        .mkdir(mapped_caller, &root, &name, 0o755)
        .unwrap();
    assert_eq!(
        (owner(&fs, "new"), on_disk("new")),
        ((8, 9), (100_008, 100_009))
    );
}

#[test]
fn objects_of_a_caller_without_a_mapped_id_have_the_overflow_id() {
    let map = IdMap::new(IdMap::parse("100000:0:1000").unwrap(), None);
    let lab = Lab::new(|top| create_files(top, &["dir/"])).with(OverlayOptions {
        uids: map.clone(),
        gids: map,
        ..crate::common::metacopy()
    });
    let fs = lab.open();
    let unmapped = Caller {
        pid: 0,
        uid: 5000,
        gid: 9,
        ..caller()
    };
    // The parent directory is copied up as well.
    let dir = fs.find("dir").unwrap();
    let name = cowl_layers::Name::new("theirs").unwrap();
    fs.overlay
        .begin()
        .mkdir(unmapped, &dir, &name, 0o755)
        .unwrap();
    let shown = fs.attr("dir/theirs").unwrap().stat;
    assert_eq!((shown.uid, shown.gid), (OVERFLOW, 9));
    let stored = crate::common::lstat(&lab.upper().join("dir/theirs"));
    assert_eq!((stored.uid, stored.gid), (OVERFLOW, 100_009));
}

/// With passthrough, the kernel writes without requests, so a push would let it write to a frozen layer.
#[test]
fn push_fails_while_files_may_be_written_without_requests() {
    let lab = Lab::new(|_| {});
    let fs = lab.open();
    fs.create("file", b"content").unwrap();
    let passthrough_writers = fs.overlay.passthrough_writers();
    passthrough_writers.fetch_add(1, Ordering::AcqRel);
    let refused = lab.push(&fs);
    assert!(
        matches!(&refused, Err(PushError::Unattended(files)) if files.count == 1),
        "{refused:?}"
    );
    fs.append("file", b"!").unwrap();
    passthrough_writers.fetch_sub(1, Ordering::AcqRel);
    lab.push(&fs).unwrap();
    assert_eq!(fs.read("file").unwrap(), b"content!");
}

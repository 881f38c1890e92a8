//! A file with several names stays one file: through a change, a new mount, a frozen upper.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod common;

use common::{Fs, Lab, plant};

const NAMES: [&str; 3] = ["a", "d/b", "e/f/c"];

fn lab() -> Lab {
    Lab::new(|top| {
        plant(top, &["a", "d/x", "e/f/y"]);
        std::fs::hard_link(top.join("a"), top.join("d/b")).unwrap();
        std::fs::hard_link(top.join("a"), top.join("e/f/c")).unwrap();
    })
}

fn one_file(fs: &Fs, names: &[&str], content: &[u8], perm: u32) {
    let number = fs.number(names[0]);
    for name in names {
        let attr = fs.attr(name).unwrap();
        assert_eq!(attr.ino, number, "{name}");
        assert_eq!(attr.stat.nlink, names.len() as u64, "{name}");
        assert_eq!(attr.stat.perm(), perm, "{name}");
        assert_eq!(fs.read(name).unwrap(), content, "{name}");
    }
    fs.tree();
}

type Act = fn(&Fs, &str);

/// What is done through one name, and what content and mode show through all then.
const ACTS: [(Act, &[u8], u32); 4] = [
    (
        |fs, name| fs.chmod(name, 0o600).unwrap(),
        b"content of a",
        0o600,
    ),
    (
        |fs, name| fs.append(name, b"+").unwrap(),
        b"content of a+",
        0o644,
    ),
    (
        |fs, name| fs.overwrite(name, b"new").unwrap(),
        b"new",
        0o644,
    ),
    (
        |fs, name| {
            fs.chmod(name, 0o600).unwrap();
            fs.append(name, b"+").unwrap();
        },
        b"content of a+",
        0o600,
    ),
];

#[test]
fn a_change_through_one_shows_through_all() {
    for (act, content, perm) in ACTS {
        for name in NAMES {
            let lab = lab();
            let fs = lab.open();
            let number = fs.number(name);
            one_file(&fs, &NAMES, b"content of a", 0o644);
            act(&fs, name);
            one_file(&fs, &NAMES, content, perm);
            drop(fs);
            let fs = lab.open();
            one_file(&fs, &NAMES, content, perm);
            assert_eq!(fs.number(name), number);
            // Frozen, and changed once more, through another name.
            lab.push(&fs).unwrap();
            one_file(&fs, &NAMES, content, perm);
            fs.chmod(NAMES[1], 0o640).unwrap();
            one_file(&fs, &NAMES, content, 0o640);
            lab.push(&fs).unwrap();
            fs.overwrite(NAMES[2], b"last").unwrap();
            one_file(&fs, &NAMES, b"last", 0o640);
            drop(fs);
            let fs = lab.open();
            one_file(&fs, &NAMES, b"last", 0o640);
            assert_eq!(fs.number(name), number);
        }
    }
}

/// Folders above the names are moved before the file comes up, in this mount, an earlier one, or a
/// frozen layer.
#[test]
fn names_in_moved_folders() {
    for (act, content, perm) in ACTS {
        for way in 0..3 {
            let lab = lab();
            let mut fs = lab.open();
            fs.rename("e", "moved").unwrap();
            fs.rename("moved/f", "d/g").unwrap();
            fs.rename("d", "h").unwrap();
            match way {
                0 => {}
                1 => {
                    drop(fs);
                    fs = lab.open();
                }
                _ => {
                    lab.push(&fs).unwrap();
                    drop(fs);
                    fs = lab.open();
                    fs.rename("h", "i").unwrap();
                    fs.rename("i", "h").unwrap();
                }
            }
            let names = ["a", "h/b", "h/g/c"];
            act(&fs, "h/g/c");
            one_file(&fs, &names, content, perm);
            drop(fs);
            one_file(&lab.open(), &names, content, perm);
        }
    }
}

#[test]
fn names_come_and_go() {
    let lab = lab();
    let fs = lab.open();
    fs.unlink("a").unwrap();
    one_file(&fs, &NAMES[1..], b"content of a", 0o644);
    fs.link("d/b", "n").unwrap();
    one_file(&fs, &["d/b", "e/f/c", "n"], b"content of a", 0o644);
    fs.rename("e/f/c", "a").unwrap();
    one_file(&fs, &["a", "d/b", "n"], b"content of a", 0o644);
    // Two names of one file: nothing happens.
    fs.rename("a", "n").unwrap();
    one_file(&fs, &["a", "d/b", "n"], b"content of a", 0o644);
    fs.append("n", b"+").unwrap();
    one_file(&fs, &["a", "d/b", "n"], b"content of a+", 0o644);
    fs.rename("d/x", "n").unwrap();
    one_file(&fs, &["a", "d/b"], b"content of a+", 0o644);
    lab.push(&fs).unwrap();
    fs.unlink("d/b").unwrap();
    one_file(&fs, &["a"], b"content of a+", 0o644);
    drop(fs);
    let fs = lab.open();
    one_file(&fs, &["a"], b"content of a+", 0o644);
    assert_eq!(fs.read("n").unwrap(), b"content of d/x");
}

/// A name that an upper layer of another program hides does not come back with the others.
#[test]
fn hidden_names_are_not_linked() {
    let lab = lab();
    lab.add_lower(|top| {
        plant(top, &["d/"]);
        let device = rustix::fs::FileType::CharacterDevice;
        let mode = rustix::fs::Mode::empty();
        rustix::fs::mknodat(rustix::fs::CWD, top.join("a"), device, mode, 0).unwrap();
        std::fs::write(top.join("d/b"), "another").unwrap();
    });
    let fs = lab.open();
    one_file(&fs, &["e/f/c"], b"content of a", 0o644);
    fs.chmod("e/f/c", 0o600).unwrap();
    one_file(&fs, &["e/f/c"], b"content of a", 0o600);
    one_file(&fs, &["d/b"], b"another", 0o644);
    assert_eq!(lab.marks(), ["e dir", "e/f dir", "e/f/c file metacopy"]);
}

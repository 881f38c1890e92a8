//! Hard links are never broken: by a change, a new mount, or a frozen upper layer.

use crate::common::{Fs, Lab, WRITE, create_files};

const NAMES: [&str; 3] = ["a", "d/b", "e/f/c"];

fn lab() -> Lab {
    Lab::new(|top| {
        create_files(top, &["a", "d/x", "e/f/y"]);
        std::fs::hard_link(top.join("a"), top.join("d/b")).unwrap();
        std::fs::hard_link(top.join("a"), top.join("e/f/c")).unwrap();
    })
}

fn assert_one_file(fs: &Fs, names: &[&str], content: &[u8], perm: u32) {
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

type Change = fn(&Fs, &str);

/// A change through one name, with the expected content and mode through all names.
const CHANGES: [(Change, &[u8], u32); 4] = [
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
fn change_through_one_name_is_visible_through_all() {
    for (act, content, perm) in CHANGES {
        for name in NAMES {
            let lab = lab();
            let fs = lab.open();
            let number = fs.number(name);
            assert_one_file(&fs, &NAMES, b"content of a", 0o644);
            act(&fs, name);
            assert_one_file(&fs, &NAMES, content, perm);
            drop(fs);
            let fs = lab.open();
            assert_one_file(&fs, &NAMES, content, perm);
            assert_eq!(fs.number(name), number);
            // Freeze the layer, and change the file through another name.
            lab.push(&fs).unwrap();
            assert_one_file(&fs, &NAMES, content, perm);
            fs.chmod(NAMES[1], 0o640).unwrap();
            assert_one_file(&fs, &NAMES, content, 0o640);
            lab.push(&fs).unwrap();
            fs.overwrite(NAMES[2], b"last").unwrap();
            assert_one_file(&fs, &NAMES, b"last", 0o640);
            drop(fs);
            let fs = lab.open();
            assert_one_file(&fs, &NAMES, b"last", 0o640);
            assert_eq!(fs.number(name), number);
        }
    }
}

/// Parents of the names are moved before the copy-up: in this mount, an earlier one, or a frozen layer.
#[test]
fn hard_links_in_moved_directories_are_preserved() {
    for (act, content, perm) in CHANGES {
        for scenario in 0..3 {
            let lab = lab();
            let mut fs = lab.open();
            fs.rename("e", "moved").unwrap();
            fs.rename("moved/f", "d/g").unwrap();
            fs.rename("d", "h").unwrap();
            match scenario {
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
            assert_one_file(&fs, &names, content, perm);
            drop(fs);
            assert_one_file(&lab.open(), &names, content, perm);
        }
    }
}

#[test]
fn link_unlink_and_rename_preserve_hard_links() {
    let lab = lab();
    let fs = lab.open();
    fs.unlink("a").unwrap();
    assert_one_file(&fs, &NAMES[1..], b"content of a", 0o644);
    fs.link("d/b", "n").unwrap();
    assert_one_file(&fs, &["d/b", "e/f/c", "n"], b"content of a", 0o644);
    fs.rename("e/f/c", "a").unwrap();
    assert_one_file(&fs, &["a", "d/b", "n"], b"content of a", 0o644);
    // Renaming between two names of one file does nothing.
    fs.rename("a", "n").unwrap();
    assert_one_file(&fs, &["a", "d/b", "n"], b"content of a", 0o644);
    fs.append("n", b"+").unwrap();
    assert_one_file(&fs, &["a", "d/b", "n"], b"content of a+", 0o644);
    fs.rename("d/x", "n").unwrap();
    assert_one_file(&fs, &["a", "d/b"], b"content of a+", 0o644);
    lab.push(&fs).unwrap();
    fs.unlink("d/b").unwrap();
    assert_one_file(&fs, &["a"], b"content of a+", 0o644);
    drop(fs);
    let fs = lab.open();
    assert_one_file(&fs, &["a"], b"content of a+", 0o644);
    assert_eq!(fs.read("n").unwrap(), b"content of d/x");
}

/// A name that is hidden by a layer of another program does not reappear in a copy-up.
#[test]
fn hidden_names_are_not_copied_up() {
    let lab = lab();
    lab.add_lower(|top| {
        create_files(top, &["d/"]);
        let device = rustix::fs::FileType::CharacterDevice;
        let mode = rustix::fs::Mode::empty();
        rustix::fs::mknodat(rustix::fs::CWD, top.join("a"), device, mode, 0).unwrap();
        std::fs::write(top.join("d/b"), "another").unwrap();
    });
    let fs = lab.open();
    assert_one_file(&fs, &["e/f/c"], b"content of a", 0o644);
    fs.chmod("e/f/c", 0o600).unwrap();
    assert_one_file(&fs, &["e/f/c"], b"content of a", 0o600);
    assert_one_file(&fs, &["d/b"], b"another", 0o644);
    assert_eq!(
        lab.describe_upper(),
        ["e dir", "e/f dir", "e/f/c file metacopy"]
    );
}

#[test]
fn removal_of_all_known_names_keeps_the_others() {
    let lab = Lab::new(|_| {});
    let upper = lab.upper();
    std::fs::write(upper.join("a"), b"text").unwrap();
    for name in ["b", "c", "d"] {
        std::fs::hard_link(upper.join("a"), upper.join(name)).unwrap();
    }
    let fs = lab.open();
    // The other names were not looked up yet.
    let inode = fs.find("a").unwrap();
    let handle = fs.open("a", WRITE).unwrap();
    fs.unlink("a").unwrap();
    assert_eq!(fs.attr_of_inode(&inode).unwrap().stat.nlink, 3);
    fs.write_handle(&handle, 0, b"more").unwrap();
    assert_eq!(fs.attr("b").unwrap().stat.nlink, 3);
    assert_eq!(fs.attr("b").unwrap().ino, inode.ino());
    fs.link("b", "e").unwrap();
    fs.rename("b", "f").unwrap();
    assert_eq!(fs.read("c").unwrap(), b"more");
    assert_eq!(fs.attr_of_inode(&inode).unwrap().stat.nlink, 4);
    fs.overlay.close(&handle);
    lab.push(&fs).unwrap();
    // The file is copied up under all names, although one was never looked up.
    fs.append("c", b"!").unwrap();
    for name in ["c", "d", "e", "f"] {
        assert_eq!(fs.read(name).unwrap(), b"more!", "{name}");
    }
    let handle = fs.open("c", WRITE).unwrap();
    for (name, left) in [("c", 3), ("d", 2), ("e", 1), ("f", 0)] {
        fs.unlink(name).unwrap();
        assert_eq!(fs.attr_of_inode(&inode).unwrap().stat.nlink, left, "{name}");
    }
    assert_eq!(fs.read_handle(&handle).unwrap(), b"more!");
    fs.overlay.close(&handle);
}

#[test]
fn file_with_ten_thousand_names_stays_one_file() {
    const NAMES: usize = 10_000;
    let lab = Lab::new(|top| {
        create_files(top, &["d/0", "e/"]);
        for number in 1..NAMES {
            let dir = if number % 2 == 0 { "d" } else { "e" };
            let name = top.join(dir).join(number.to_string());
            std::fs::hard_link(top.join("d/0"), name).unwrap();
        }
    });
    let fs = lab.open();
    fs.overwrite("e/1", b"new").unwrap();
    for number in (0..NAMES).step_by(997) {
        let dir = if number % 2 == 0 { "d" } else { "e" };
        let path = format!("{dir}/{number}");
        assert_eq!(fs.read(&path).unwrap(), b"new", "{path}");
        assert_eq!(fs.attr(&path).unwrap().stat.nlink, NAMES as u64);
    }
    fs.unlink("d/0").unwrap();
    assert_eq!(fs.attr("e/9999").unwrap().stat.nlink, NAMES as u64 - 1);
}

/// A file has more names than the inode records; all recorded ones are removed, and then the layer is frozen.
#[test]
fn unknown_names_are_counted_after_a_snapshot() {
    let names: Vec<String> = (0..12).map(|number| format!("n{number:02}")).collect();
    let lab = Lab::new(|_| {});
    let fs = lab.open();
    fs.create(&names[0], b"content").unwrap();
    let number = fs.number(&names[0]);
    for pair in names.windows(2) {
        fs.link(&pair[0], &pair[1]).unwrap();
    }
    // Remove the eight recorded names.
    for name in &names[4..] {
        fs.unlink(name).unwrap();
    }
    lab.push(&fs).unwrap();
    for left in (1..4).rev() {
        fs.unlink(&names[left]).unwrap();
        for name in &names[..left] {
            let attr = fs.attr(name).unwrap();
            assert_eq!((attr.ino, attr.stat.nlink), (number, left as u64), "{name}");
        }
    }
    let inode = fs.find(&names[0]).unwrap();
    fs.unlink(&names[0]).unwrap();
    assert_eq!(fs.attr_of_inode(&inode).unwrap().stat.nlink, 0);
    assert_eq!(fs.names("").unwrap(), [""; 0]);
}

//! An overlay that continues from the ledger of a killed process locates most objects when they are first used. So
//! requests can change names before. `model.rs` applies random operations before and after a kill.

use std::sync::Arc;

use cowl_layers::error::Errno;
use cowl_layers::layer::{Layer, lock};
use cowl_overlay::inode::Inode;
use cowl_overlay::unopened::{possibly_mapped, set_opens_unknown};
use cowl_overlay::{FileHandle, Overlay};

use crate::common::{Fs, Kept, Lab, R, READ, WRITE, caller, create_files};

/// A mount with a keeper.
struct Mount {
    lab: Lab,
    fs: Fs,
    kept: Kept,
}

impl Mount {
    /// Mounts a lower layer with these files.
    fn new(files: &[&str]) -> Self {
        Self::over(Lab::new(|top| create_files(top, files)))
    }

    fn over(lab: Lab) -> Self {
        let fs = lab.open();
        let kept = Kept::new();
        fs.overlay.attach(&kept.ledger);
        Self { lab, fs, kept }
    }

    /// Kills the process. Returns the number of inodes that were not found.
    fn kill(&mut self) -> usize {
        let (overlay, next, lost) = self.kept.recover(&self.fs.overlay, &mut []);
        self.fs = Fs::new(overlay);
        self.kept = next;
        lost
    }

    /// Returns the number of an object, which the kernel knows from here on.
    fn know(&self, path: &str) -> u64 {
        self.fs.find(path).unwrap().ino()
    }

    /// Returns an inode by its number, as a request does.
    fn inode(&self, ino: u64) -> R<Arc<Inode>> {
        let found = self.fs.overlay.begin().inode(ino);
        found.map_err(|error| error.errno())
    }

    fn read(&self, ino: u64) -> R<Vec<u8>> {
        self.fs.read_handle(&*self.open(ino)?)
    }

    fn open(&self, ino: u64) -> R<Arc<FileHandle>> {
        let inode = self.inode(ino)?;
        let op = self.fs.overlay.begin();
        let opened = op.open(caller(), &inode, READ);
        opened.map_err(|error| error.errno())
    }

    fn links(&self, ino: u64) -> u64 {
        let inode = self.inode(ino).unwrap();
        self.fs.attr_of_inode(&inode).unwrap().stat.nlink
    }

    /// Verifies that the inode with this number is the object at this path.
    fn check_at(&self, ino: u64, path: &str) {
        let by_number = self.inode(ino).unwrap();
        assert!(
            Arc::ptr_eq(&by_number, &self.fs.find(path).unwrap()),
            "{path}"
        );
    }
}

#[test]
fn objects_below_a_renamed_directory_are_located() {
    let mut mount = Mount::new(&["a/b/file", "a/b/other"]);
    mount.know("a");
    mount.know("a/b");
    let (file, other) = (mount.know("a/b/file"), mount.know("a/b/other"));
    mount.kill();
    mount.fs.rename("a", "c").unwrap();
    assert_eq!(mount.read(file).unwrap(), b"content of a/b/file");
    mount.check_at(file, "c/b/file");
    mount.kill();
    mount.fs.rename("c/b", "d").unwrap();
    mount.check_at(other, "d/other");
    mount.check_at(file, "d/file");
}

#[test]
fn renamed_objects_are_located() {
    let mut mount = Mount::new(&["d/f", "g"]);
    mount.fs.create("h", b"h").unwrap();
    let (f, g, h) = (mount.know("d/f"), mount.know("g"), mount.know("h"));
    mount.kill();
    mount.fs.rename("d/f", "new").unwrap();
    mount.fs.exchange("g", "h").unwrap();
    mount.check_at(f, "new");
    mount.check_at(g, "h");
    mount.check_at(h, "g");
    // The successor of a successor.
    mount.kill();
    mount.fs.rename("h", "g").unwrap();
    mount.check_at(g, "g");
    assert_eq!(mount.read(h).unwrap(), b"h");
    assert_eq!((mount.links(h), mount.links(g), mount.links(f)), (0, 1, 1));
}

#[test]
fn removed_objects_are_located() {
    let mut mount = Mount::new(&["lower", "d/", "replaced", "over"]);
    mount.fs.create("upper", b"upper").unwrap();
    let (lower, upper, d) = (mount.know("lower"), mount.know("upper"), mount.know("d"));
    let (replaced, over) = (mount.know("replaced"), mount.know("over"));
    mount.kill();
    mount.fs.unlink("lower").unwrap();
    mount.fs.unlink("upper").unwrap();
    mount.fs.rmdir("d").unwrap();
    mount.fs.rename("over", "replaced").unwrap();
    for _ in 0..2 {
        assert_eq!(mount.read(lower).unwrap(), b"content of lower");
        assert_eq!(mount.read(upper).unwrap(), b"upper");
        assert_eq!(mount.read(replaced).unwrap(), b"content of replaced");
        let all = [lower, upper, d, replaced];
        assert_eq!(all.map(|ino| mount.links(ino)), [0; 4]);
        mount.check_at(over, "replaced");
        // They have no names now, and are located before the first request.
        assert_eq!(mount.kill(), 0);
    }
}

#[test]
fn hard_links_are_located_by_each_name() {
    let mut mount = Mount::new(&["one", "single"]);
    std::fs::hard_link(mount.lab.lower().join("one"), mount.lab.lower().join("two")).unwrap();
    std::fs::hard_link(
        mount.lab.lower().join("one"),
        mount.lab.lower().join("three"),
    )
    .unwrap();
    let one = mount.know("one");
    assert_eq!(mount.know("two"), one);
    mount.fs.link("single", "another").unwrap();
    let single = mount.know("single");
    mount.kill();
    // A name that the kernel did not know.
    mount.fs.unlink("three").unwrap();
    mount.check_at(one, "one");
    mount.kill();
    mount.fs.unlink("one").unwrap();
    mount.check_at(one, "two");
    assert_eq!(mount.read(one).unwrap(), b"content of one");
    mount.fs.rename("two", "again").unwrap();
    mount.check_at(one, "again");
    assert_eq!(mount.links(one), 1);
    mount.fs.unlink("another").unwrap();
    mount.check_at(single, "single");
    assert_eq!(mount.links(single), 1);
}

/// At the end of the mount, what programs have stored in them through mappings must be written back.
#[test]
fn inodes_that_are_not_located_yet_may_be_mapped() {
    let mut mount = Mount::new(&["d/f", "g"]);
    set_opens_unknown(&mount.fs.overlay);
    let (f, g) = (mount.know("d/f"), mount.know("g"));
    mount.kill();
    assert!(possibly_mapped(&mount.fs.overlay).is_empty(), "no writers");
    set_opens_unknown(&mount.fs.overlay);
    let mapped = possibly_mapped(&mount.fs.overlay);
    assert!(mapped.contains(&f) && mapped.contains(&g), "{mapped:?}");
    mount.check_at(g, "g");
    mount.fs.overlay.forget(f, u64::from(u32::MAX));
    let mapped = possibly_mapped(&mount.fs.overlay);
    assert!(!mapped.contains(&f) && mapped.contains(&g), "{mapped:?}");
}

#[test]
fn forgotten_inodes_are_dropped_without_being_located() {
    let mut mount = Mount::new(&["d/f", "d/g"]);
    let (d, f, g) = (mount.know("d"), mount.know("d/f"), mount.know("d/g"));
    let all = mount.fs.overlay.inodes().len();
    mount.kill();
    mount.fs.overlay.forget(f, 1);
    assert_eq!(mount.inode(f).unwrap_err(), Errno::STALE);
    // The file inside is known: by a watch, for example.
    mount.fs.overlay.forget(d, u64::from(u32::MAX));
    assert!(mount.fs.overlay.inodes().is_forgotten(d));
    assert_eq!(mount.fs.overlay.inodes().len(), all - 1);
    mount.kill();
    // The directory is dropped with the reference, and found again for the file.
    drop(mount.inode(d).unwrap());
    mount.fs.overlay.forget(mount.know("d"), 1);
    mount.check_at(g, "d/g");
    mount.fs.overlay.forget(g, u64::from(u32::MAX));
    assert_eq!(mount.inode(g).unwrap_err(), Errno::STALE);
    mount.fs.overlay.locate_all().unwrap();
    assert_eq!(mount.fs.overlay.inodes().len(), 1);
}

#[test]
fn nothing_is_lost_by_kills_in_a_row() {
    let mut mount = Mount::new(&["d/f", "kept"]);
    let (d, f) = (mount.know("d"), mount.know("d/f"));
    let kept = mount.know("kept");
    // Copied up without a visible change.
    let writer = mount.fs.open("kept", WRITE).unwrap();
    mount.fs.overlay.close(&writer);
    drop(writer);
    let before = mount.fs.attr("kept").unwrap();
    for _ in 0..3 {
        assert_eq!(mount.kill(), 0);
    }
    let inode = mount.inode(kept).unwrap();
    let after = mount.fs.attr_of_inode(&inode).unwrap();
    assert_eq!(after.stat.ctime, before.stat.ctime);
    mount.check_at(f, "d/f");
    mount.check_at(d, "d");
    mount.fs.overlay.locate_all().unwrap();
    mount.check_at(f, "d/f");
    mount.kill();
    assert_eq!(mount.read(f).unwrap(), b"content of d/f");
}

#[test]
fn pushed_layers_and_records_contain_objects_that_were_not_located() {
    let mut mount = Mount::new(&["d/f", "g"]);
    mount.fs.create("upper", b"upper").unwrap();
    let (f, g, upper) = (mount.know("d/f"), mount.know("g"), mount.know("upper"));
    mount.kill();
    mount.lab.push(&mount.fs).unwrap();
    mount.fs.append("upper", b" and more").unwrap();
    mount.check_at(upper, "upper");
    assert_eq!(mount.read(upper).unwrap(), b"upper and more");
    mount.fs.rename("d", "e").unwrap();
    mount.check_at(f, "e/f");
    mount.kill();
    let rebuilt = Overlay::rebuild(mount.fs.overlay.record(&[]).unwrap()).unwrap();
    mount.fs = Fs::new(rebuilt.overlay);
    for (ino, path) in [(f, "e/f"), (g, "g"), (upper, "upper")] {
        mount.check_at(ino, path);
    }
}

#[test]
fn layers_are_replaced_below_objects_that_were_not_located() {
    let lab = Lab::new(|top| create_files(top, &["d/below", "moved"]));
    lab.add_lower(|top| create_files(top, &["d/above"]));
    let mut mount = Mount::over(lab);
    let paths = ["d/below", "d/above", "moved"];
    let known = paths.map(|path| mount.know(path));
    mount.fs.rename("moved", "there").unwrap();
    let (_, lowers) = mount.fs.overlay.layer_paths();
    let merged = mount.lab.path().join("merged");
    for layer in lowers.iter().rev() {
        let copied = std::process::Command::new("cp")
            .args(["-a", "-T"])
            .args([layer, &merged])
            .status();
        assert!(copied.unwrap().success());
    }
    mount.kill();
    let space = mount.lab.space;
    let replaced = mount.fs.overlay.replace_layers(&[merged], |path| {
        let layer = Layer::open(path, space);
        lock::for_reading(layer?)
    });
    assert_eq!(replaced.unwrap().moved, 5);
    for ino in known {
        assert!(mount.inode(ino).is_ok());
    }
    for _ in 0..2 {
        mount.check_at(known[0], "d/below");
        mount.check_at(known[1], "d/above");
        mount.check_at(known[2], "there");
        assert_eq!(mount.read(known[0]).unwrap(), b"content of d/below");
        assert_eq!(mount.kill(), 0);
    }
}

/// Each thread locates the same objects, by numbers and by names, while others rename them.
#[test]
fn objects_are_located_once() {
    let names: Vec<String> = (0..200).map(|number| format!("d/f{number}")).collect();
    let mut mount = Mount::new(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let known: Vec<u64> = names.iter().map(|name| mount.know(name)).collect();
    for round in 0..4 {
        mount.kill();
        let to = |name: &str| name.replace("d/", "e/");
        if round == 0 {
            mount.fs.mkdir("e").unwrap();
        }
        std::thread::scope(|scope| {
            let overlay = &mount.fs.overlay;
            scope.spawn(|| overlay.locate_all().unwrap());
            scope.spawn(|| {
                for ino in known.iter().rev() {
                    overlay.begin().inode(*ino).unwrap();
                }
            });
            for name in &names {
                let (from, to) = match round % 2 {
                    0 => (name.clone(), to(name)),
                    _ => (to(name), name.clone()),
                };
                mount.fs.rename(&from, &to).unwrap();
            }
        });
        for (ino, name) in known.iter().zip(&names) {
            match round % 2 {
                0 => mount.check_at(*ino, &to(name)),
                _ => mount.check_at(*ino, name),
            }
        }
    }
}

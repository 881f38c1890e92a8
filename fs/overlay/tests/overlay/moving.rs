//! Files that are written without requests move to a pushed layer (docs/decisions/0043).
//!
//! Programs are stopped in these tests, so that the copies need no file system with shared blocks.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::common::{Fs, Kept, Lab, READ, WRITE, create_files, lstat};
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::sys::fault::{arm_once, disarm};
use cowl_overlay::inode::Inode;
use cowl_overlay::{
    FileHandle, Overlay, PassthroughFile, PushError, PushRequest, UnattendedCause, Writers,
};

const STOPPED: Writers = Writers::Stopped { max_bytes: 1 << 20 };

/// A file of the upper layer that is open by passthrough: in the overlay, and as the kernel has it open.
struct Open {
    inode: Arc<Inode>,
    handle: Arc<FileHandle>,
    kernel: File,
}

/// An overlay with open files.
struct Scene {
    lab: Lab,
    fs: Fs,
    open: Vec<Open>,
}

const NAMES: [&str; 3] = ["a", "d/sub/b", "gone"];

impl Scene {
    fn new() -> Self {
        let lab = Lab::new(|top| create_files(top, &["d/", "d/lower"]));
        let fs = lab.open();
        fs.mkdir("d/sub").unwrap();
        for name in NAMES {
            fs.create(name, b"old").unwrap();
        }
        fs.chmod("a", 0o4711).unwrap();
        fs.set_xattr("a", "user.x", b"value").unwrap();
        fs.link("d/sub/b", "d/c").unwrap();
        let open = NAMES.map(|name| Open {
            inode: fs.find(name).unwrap(),
            handle: fs.open(name, WRITE).unwrap(),
            kernel: open_to_write(&lab.upper().join(name)),
        });
        fs.unlink("gone").unwrap();
        let writers = fs.overlay.passthrough_writers();
        writers.fetch_add(3, Ordering::AcqRel);
        Self {
            lab,
            fs,
            open: open.into(),
        }
    }

    fn push(&self, writers: Writers) -> Result<PathBuf, PushError> {
        self.push_with(writers, || ())
    }

    /// Pushes a layer, and calls `begin` when the new layer is open.
    fn push_with(&self, writers: Writers, begin: impl Fn()) -> Result<PathBuf, PushError> {
        let list = || {
            begin();
            let listed = |file: &Open| PassthroughFile {
                version: None,
                node_id: file.inode.ino(),
                is_written: true,
                is_mapped: true,
            };
            self.open.iter().map(listed).collect()
        };
        let request = PushRequest {
            passthrough: &list,
            writers,
        };
        self.lab.push_with(&self.fs, &request)
    }

    fn write(&self, content: &[u8]) {
        for file in &self.open {
            file.kernel.write_all_at(content, 0).unwrap();
        }
    }

    fn assert_content(&self, content: &[u8], context: &str) {
        for name in ["a", "d/sub/b", "d/c"] {
            assert_eq!(self.fs.read(name).unwrap(), content, "{name}, {context}");
        }
        for file in &self.open {
            let read = self.fs.read_handle(&file.handle).unwrap();
            assert_eq!(read, content, "{context}");
        }
        let b = self.fs.attr("d/c").unwrap();
        assert_eq!(
            (b.ino, b.stat.nlink),
            (self.open[1].inode.ino(), 2),
            "{context}"
        );
    }
}

fn open_to_write(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

#[test]
fn open_files_move_and_copies_stay() {
    let scene = Scene::new();
    let attributes = |name: &str| {
        let attr = scene.fs.attr(name).unwrap();
        (attr.ino, attr.stat.mode, attr.stat.mtime, attr.stat.ctime)
    };
    let paths = ["", "a", "d", "d/sub", "d/sub/b", "d/c"];
    let before = paths.map(attributes);
    let lower = scene.lab.lower();
    let frozen = scene.push(STOPPED).unwrap();
    assert_eq!(paths.map(attributes), before);
    for (name, file) in ["a", "d/sub/b"].iter().zip(&scene.open) {
        let on_disk = file.kernel.metadata().unwrap().ino();
        assert_eq!(lstat(&scene.lab.upper().join(name)).ino, on_disk);
        assert_ne!(lstat(&frozen.join(name)).ino, on_disk);
    }
    scene.write(b"new");
    scene.assert_content(b"new", "after the push");
    // A write by the daemon goes to the same file.
    scene
        .fs
        .write_handle(&scene.open[0].handle, 0, b"NEW")
        .unwrap();
    let mut read = [0; 3];
    scene.open[0].kernel.read_exact_at(&mut read, 0).unwrap();
    assert_eq!(&read, b"NEW");

    let layers = [frozen, lower];
    let open = |path: &PathBuf| Layer::open(path, XattrSpace::detect()).unwrap();
    let snapshot = Fs::new(
        Overlay::new(
            None,
            layers.iter().map(open).collect(),
            crate::common::metacopy(),
        )
        .unwrap(),
    );
    for (path, before) in paths.iter().zip(before).skip(1) {
        let attr = snapshot.attr(path).unwrap();
        let shown = (attr.ino, attr.stat.mode, attr.stat.mtime);
        assert_eq!(shown, (before.0, before.1, before.2), "{path}");
    }
    for name in ["a", "d/sub/b", "d/c"] {
        assert_eq!(snapshot.read(name).unwrap(), b"old");
    }
    assert_eq!(snapshot.get_xattr("a", "user.x").unwrap(), b"value");
    assert_eq!(snapshot.attr("d/c").unwrap().stat.nlink, 2);
}

#[test]
fn several_layers_can_be_pushed() {
    let scene = Scene::new();
    let mut frozen = Vec::new();
    for round in 0..4_u8 {
        scene.write(&[b'0' + round; 3]);
        scene.assert_content(&[b'0' + round; 3], "in a round");
        frozen.push(scene.push(STOPPED).unwrap());
    }
    scene.write(b"end");
    scene.assert_content(b"end", "at the end");
    for (round, layer) in frozen.iter().enumerate() {
        let content = std::fs::read(layer.join("d/c")).unwrap();
        assert_eq!(content, [b'0' + u8::try_from(round).unwrap(); 3]);
    }
}

/// After an error the old layer is the upper one, and another push succeeds.
#[test]
fn an_error_of_any_change_undoes_the_push() {
    let mut refused = 0;
    for good in 0.. {
        let scene = Scene::new();
        let context = format!("after {good} changes");
        disarm();
        let is_armed = Cell::new(false);
        let pushed = scene.push_with(STOPPED, || {
            if !is_armed.replace(true) {
                arm_once(good);
            }
        });
        let is_last = disarm() <= good;
        if pushed.is_err() {
            refused += 1;
            scene.assert_content(b"old", &context);
            scene.write(b"mid");
            scene.assert_content(b"mid", &context);
            let a = scene.lab.upper().join("a");
            assert_eq!(lstat(&a).nlink, 1, "{context}");
            scene.push(STOPPED).unwrap();
        }
        scene.write(b"new");
        scene.assert_content(b"new", &context);
        if is_last {
            break;
        }
    }
    assert!(refused > 20, "{refused}");
}

#[test]
fn files_that_cannot_be_copied_prevent_a_push() {
    let scene = Scene::new();
    let cause = |pushed: Result<_, PushError>| match pushed {
        Err(PushError::Unattended(files)) => files,
        other => panic!("{other:?}"),
    };
    let large = scene.push(Writers::Stopped { max_bytes: 5 });
    if large.is_ok() {
        // On a file system that shares blocks, there is no limit.
        return;
    }
    let large = cause(large);
    assert_eq!(large.cause, UnattendedCause::TooLarge(6));
    assert_eq!(large.names.len(), 2);
    assert!(large.names.contains(&b"a".to_vec()), "{large:?}");
    let running = cause(scene.push(Writers::Running));
    assert_eq!(running.cause, UnattendedCause::NoSharedBlocks);
    assert!(running.to_string().contains("(/"), "{running}");
    let unknown = cause(scene.lab.push(&scene.fs));
    assert_eq!(unknown.cause, UnattendedCause::Unknown);
    scene.assert_content(b"old", "after refused pushes");
    scene.push(STOPPED).unwrap();
}

#[test]
fn moved_files_are_found_by_a_successor() {
    let scene = Scene::new();
    let kept = Kept::new();
    scene.fs.overlay.attach(&kept.ledger);
    scene.push(STOPPED).unwrap();
    let mut handles: Vec<_> = scene.open.iter().map(|open| open.handle.clone()).collect();
    let mut open: Vec<_> = handles.iter_mut().collect();
    let (overlay, _, lost) = kept.recover(&scene.fs.overlay, &mut open);
    assert_eq!(lost, 0);
    let fs = Fs::new(overlay);
    scene.write(b"new");
    for name in ["a", "d/sub/b", "d/c"] {
        assert_eq!(fs.read(name).unwrap(), b"new", "{name}");
    }
    for handle in &handles {
        assert_eq!(fs.read_handle(handle).unwrap(), b"new");
    }
    assert!(fs.open("gone", READ).is_err());
}

//! Random operations on an overlay in process and on a model in memory.
//!
//! Both must return the same results and have the same tree, across new mounts, new upper layers, forgotten inodes and
//! unlinked open files. `PROPTEST_CASES=N` runs more cases; a failure is shrunk to a minimal list of operations.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::common::{Fs, Kept, Lab, OpenOptions, READ, WRITE, disk};
use crate::model_tree::{Model, Node, Rename, assert_same};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::stat::FileKind;
use cowl_overlay::{FileHandle, Overlay, OverlayOptions};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;

const SLOTS: usize = 2;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const MODES: [u32; 4] = [0o644, 0o600, 0o755, 0o4755];

/// A choice of a path, resolved when the operation runs, so that a shrunk list of operations remains valid.
#[derive(Clone, Copy, Debug)]
enum PathChoice {
    /// An existing path.
    Existing(u16),
    /// A name in an existing directory.
    InDir(u16, usize),
    /// A path that existed before.
    Former(u16),
}

#[derive(Clone, Debug)]
enum Operation {
    Create(PathChoice, u8),
    Mkdir(PathChoice),
    Symlink(PathChoice),
    Mkfifo(PathChoice),
    Unlink(PathChoice),
    Rmdir(PathChoice),
    /// Removes a directory recursively.
    RemoveTree(PathChoice),
    Rename(PathChoice, PathChoice, Rename),
    Link(PathChoice, PathChoice),
    Append(PathChoice, u8),
    Overwrite(PathChoice, u8),
    Truncate(PathChoice, u64),
    Chmod(PathChoice, u32),
    SetXattr(PathChoice, u8),
    RemoveXattr(PathChoice),
    Open(usize, PathChoice, bool),
    ReadOpen(usize),
    WriteOpen(usize, u64, u8),
    StatOpen(usize),
    /// Appends to an open file through one of its names.
    AppendOpen(usize, u8),
    /// Removes a directory recursively, and moves a new one to its path.
    Replace(PathChoice, PathChoice),
    Close(usize),
    /// Opens a new overlay over the same layers.
    Mount,
    /// Pushes a new upper layer.
    Push,
    /// Hands the state over to a new overlay.
    Rebuild,
    /// Recovers the state from the ledger, as after the end of the process.
    Kill,
    /// Forgets all inodes that are not open, as the kernel does.
    Forget,
    Compare,
}

fn existing_path() -> impl Strategy<Value = PathChoice> {
    prop_oneof![
        12 => any::<u16>().prop_map(PathChoice::Existing),
        1 => new_path(),
    ]
}

fn new_path() -> impl Strategy<Value = PathChoice> {
    prop_oneof![
        3 => (any::<u16>(), 0..NAMES.len()).prop_map(|(dir, name)| PathChoice::InDir(dir, name)),
        2 => any::<u16>().prop_map(PathChoice::Former),
    ]
}

fn rename_target() -> impl Strategy<Value = PathChoice> {
    prop_oneof![3 => new_path(), 1 => existing_path()]
}

fn creation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => (new_path(), any::<u8>()).prop_map(|(p, b)| Operation::Create(p, b)),
        4 => new_path().prop_map(Operation::Mkdir),
        1 => new_path().prop_map(Operation::Symlink),
        1 => new_path().prop_map(Operation::Mkfifo),
        2 => (existing_path(), new_path()).prop_map(|(a, b)| Operation::Link(a, b)),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let slot = || 0..SLOTS;
    let rename = prop_oneof![
        3 => Just(Rename::Replace),
        1 => Just(Rename::NoReplace),
        1 => Just(Rename::Exchange),
    ];
    prop_oneof![
        12 => creation(),
        4 => existing_path().prop_map(Operation::Unlink),
        2 => existing_path().prop_map(Operation::Rmdir),
        2 => existing_path().prop_map(Operation::RemoveTree),
        9 => (existing_path(), rename_target(), rename).prop_map(|(a, b, how)| Operation::Rename(a, b, how)),
        4 => (existing_path(), any::<u8>()).prop_map(|(p, b)| Operation::Append(p, b)),
        2 => (existing_path(), any::<u8>()).prop_map(|(p, b)| Operation::Overwrite(p, b)),
        2 => (existing_path(), 0..9u64).prop_map(|(p, size)| Operation::Truncate(p, size)),
        4 => (existing_path(), 0..MODES.len()).prop_map(|(p, m)| Operation::Chmod(p, MODES[m])),
        2 => (existing_path(), any::<u8>()).prop_map(|(p, b)| Operation::SetXattr(p, b)),
        1 => existing_path().prop_map(Operation::RemoveXattr),
        3 => (slot(), existing_path(), any::<bool>()).prop_map(|(s, p, w)| Operation::Open(s, p, w)),
        3 => slot().prop_map(Operation::ReadOpen),
        2 => (slot(), 0..9u64, any::<u8>()).prop_map(|(s, at, b)| Operation::WriteOpen(s, at, b)),
        2 => slot().prop_map(Operation::StatOpen),
        3 => (slot(), any::<u8>()).prop_map(|(s, b)| Operation::AppendOpen(s, b)),
        2 => (existing_path(), new_path()).prop_map(|(target, new)| Operation::Replace(target, new)),
        1 => slot().prop_map(Operation::Close),
        2 => Just(Operation::Mount),
        2 => Just(Operation::Push),
        2 => Just(Operation::Rebuild),
        4 => Just(Operation::Kill),
        2 => Just(Operation::Forget),
        1 => Just(Operation::Compare),
    ]
}

/// An open file: the handle, the node of the model, and whether it is open for writing.
type Open = (Arc<FileHandle>, usize, bool);

struct OverlayAndModel {
    lab: Lab,
    fs: Option<Fs>,
    model: Model,
    open: [Option<Open>; SLOTS],
    /// The ledger of the overlay, if it has one.
    kept: Option<Kept>,
    former_names: Vec<String>,
    /// The frozen layers, with their state on disk at the push.
    frozen: Vec<(PathBuf, BTreeMap<String, String>)>,
}

impl OverlayAndModel {
    fn new(lab: Lab) -> Self {
        let fs = Some(lab.open());
        Self {
            lab,
            fs,
            model: Model::new(),
            open: Default::default(),
            kept: None,
            former_names: Vec::new(),
            frozen: Vec::new(),
        }
    }

    /// Verifies that no frozen layer was written.
    fn check_frozen(&self) {
        for (path, digest) in &self.frozen {
            assert!(disk(path) == *digest, "{} was written", path.display());
        }
    }

    fn fs(&self) -> &Fs {
        self.fs.as_ref().unwrap()
    }

    fn path(&self, choice: PathChoice) -> String {
        let pick =
            |from: &[String], which: u16| from.get(usize::from(which) % from.len().max(1)).cloned();
        let found = match choice {
            PathChoice::Existing(which) => pick(&self.model.paths(), which),
            PathChoice::Former(which) => pick(&self.former_names, which),
            PathChoice::InDir(which, name) => {
                let dirs = self.model.dirs();
                pick(&dirs, which).map(|dir| join(&dir, NAMES[name]))
            }
        };
        found.unwrap_or_else(|| NAMES[0].to_owned())
    }

    fn record_former_name(&mut self, path: &str) {
        self.former_names.retain(|former| former != path);
        self.former_names.push(path.to_owned());
        if self.former_names.len() > 6 {
            self.former_names.remove(0);
        }
    }

    /// Removes a tree as `rm -r` does.
    fn remove_tree(&mut self, top: &str) {
        for path in self.model.paths().into_iter().rev() {
            if path != top && !self.model.is_inside(&path, top) {
                continue;
            }
            let (got, want) = match self.model.unlink(&path) {
                Err(Errno::ISDIR) => (self.fs().rmdir(&path), self.model.rmdir(&path)),
                done => (self.fs().unlink(&path), done),
            };
            assert_eq!(got, want, "rm -r {top}: {path}");
        }
    }

    fn close(&mut self, slot: usize) {
        if let Some((handle, _, _)) = self.open[slot].take() {
            self.fs().overlay.close(&handle);
        }
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each operation")]
    fn apply(&mut self, operation: &Operation) {
        if let Operation::Replace(target, new) = operation {
            let (target, new) = (self.path(*target), self.path(*new));
            self.remove_tree(&target);
            let made = (self.fs().mkdir(&new), self.model.make(&new, Node::dir()));
            assert_eq!(made.0, made.1, "{operation:?}: {new}");
            if self.model.is_inside(&new, &target) {
                return;
            }
            let how = Rename::Replace;
            let moved = (
                self.fs().rename_with(&new, &target, how.flags()),
                self.model.rename(&new, &target, how),
            );
            assert_eq!(moved.0, moved.1, "{operation:?}: {new} to {target}");
            return;
        }
        if let Operation::RemoveTree(choice) = operation {
            let path = self.path(*choice);
            self.record_former_name(&path);
            return self.remove_tree(&path);
        }
        if let Operation::Unlink(choice)
        | Operation::Rmdir(choice)
        | Operation::Rename(choice, _, _) = operation
        {
            let path = self.path(*choice);
            self.record_former_name(&path);
        }
        let (chosen, other) = match operation {
            Operation::Rename(from, to, _) | Operation::Link(from, to) => {
                (self.path(*from), self.path(*to))
            }
            Operation::Create(choice, _)
            | Operation::Mkdir(choice)
            | Operation::Symlink(choice)
            | Operation::Mkfifo(choice)
            | Operation::Unlink(choice)
            | Operation::Rmdir(choice)
            | Operation::Append(choice, _)
            | Operation::Overwrite(choice, _)
            | Operation::Truncate(choice, _)
            | Operation::Chmod(choice, _)
            | Operation::SetXattr(choice, _)
            | Operation::RemoveXattr(choice)
            | Operation::Open(_, choice, _) => (self.path(*choice), String::new()),
            _ => Default::default(),
        };
        let (path, other) = (chosen.as_str(), other.as_str());
        let (fs, model) = (self.fs.as_ref().unwrap(), &mut self.model);
        let (got, want) = match operation {
            Operation::Create(_, byte) => {
                let data = vec![*byte; usize::from(*byte % 7)];
                (
                    fs.create(path, &data),
                    model.make(path, Node::file(data.clone())),
                )
            }
            Operation::Mkdir(_) => (fs.mkdir(path), model.make(path, Node::dir())),
            Operation::Symlink(_) => (
                fs.symlink(path, "a/b"),
                model.make(path, Node::with_kind(FileKind::Symlink)),
            ),
            Operation::Mkfifo(_) => (
                fs.mkfifo(path),
                model.make(path, Node::with_kind(FileKind::Fifo)),
            ),
            Operation::Unlink(_) => (fs.unlink(path), model.unlink(path)),
            Operation::Rmdir(_) => (fs.rmdir(path), model.rmdir(path)),
            Operation::Rename(_, _, how) => {
                if model.is_inside(path, other) {
                    // The kernel refuses this without a request.
                    return;
                }
                (
                    fs.rename_with(path, other, how.flags()),
                    model.rename(path, other, *how),
                )
            }
            Operation::Link(..) => (fs.link(path, other), model.link(path, other)),
            Operation::Append(_, byte) => (fs.append(path, &[*byte]), model.append(path, *byte)),
            Operation::Overwrite(_, byte) => (
                fs.overwrite(path, &[*byte; 3]),
                model.set_content(path, |content| *content = vec![*byte; 3]),
            ),
            Operation::Truncate(_, size) => (
                fs.truncate(path, *size),
                model.truncate(path, usize::try_from(*size).unwrap()),
            ),
            Operation::Chmod(_, mode) => (fs.chmod(path, *mode), model.chmod(path, *mode)),
            Operation::SetXattr(_, byte) => (
                fs.set_xattr(path, "user.x", &[*byte]),
                model.set_xattr(path, Some(*byte)),
            ),
            Operation::RemoveXattr(_) => {
                (fs.remove_xattr(path, "user.x"), model.set_xattr(path, None))
            }
            _ => {
                let path = chosen.clone();
                return self.apply_to_open_file(operation, &path);
            }
        };
        assert_eq!(got, want, "{operation:?}: {path} {other}");
    }

    /// Returns a handle for one request to the file of another handle, as on a mount without open requests.
    fn for_request(&self, handle: &FileHandle, options: OpenOptions) -> Arc<FileHandle> {
        let op = self.fs().overlay.begin();
        cowl_overlay::unopened::file_for_request(&op, handle.inode(), options).unwrap()
    }

    fn apply_to_open_file(&mut self, operation: &Operation, path: &str) {
        match operation {
            Operation::Open(slot, _, write) => {
                self.close(*slot);
                let how: OpenOptions = if *write { WRITE } else { READ };
                let (got, want) = (self.fs().open(path, how), self.model.open(path));
                assert_eq!(got.as_ref().err(), want.as_ref().err(), "{operation:?}");
                if let (Ok(handle), Ok(node)) = (got, want) {
                    self.open[*slot] = Some((handle, node, *write));
                }
            }
            Operation::ReadOpen(slot) => {
                if let Some((handle, node, _)) = &self.open[*slot] {
                    let got = self.fs().read_handle(handle).unwrap();
                    assert_eq!(got, self.model.node(*node).content, "{operation:?}");
                    let unopened = self.for_request(handle, READ);
                    let got = self.fs().read_handle(&unopened).unwrap();
                    assert_eq!(got, self.model.node(*node).content, "{operation:?}");
                }
            }
            Operation::WriteOpen(slot, at, byte) => {
                if let Some((handle, node, true)) = &self.open[*slot] {
                    let unopened = self.for_request(handle, WRITE);
                    let handle = if byte % 2 == 0 { handle } else { &unopened };
                    self.fs().write_handle(handle, *at, &[*byte]).unwrap();
                    self.model
                        .write(*node, usize::try_from(*at).unwrap(), *byte);
                }
            }
            Operation::StatOpen(slot) => {
                if let Some((handle, node, _)) = &self.open[*slot] {
                    let stat = self.fs().attr_of_inode(handle.inode()).unwrap().stat;
                    let want = (
                        self.model.node(*node).content.len(),
                        self.model.links(*node),
                    );
                    assert_eq!(
                        (stat.size as usize, stat.nlink as usize),
                        want,
                        "{operation:?}"
                    );
                }
            }
            Operation::AppendOpen(slot, byte) => {
                if let Some((handle, node, _)) = &self.open[*slot]
                    && let Some(path) = self.model.path_to_node(*node)
                {
                    self.fs().append(&path, &[*byte]).unwrap();
                    self.model.append(&path, *byte).unwrap();
                    let got = self.fs().read_handle(handle).unwrap();
                    assert_eq!(got, self.model.node(*node).content, "{operation:?}: {path}");
                }
            }
            Operation::Close(slot) => self.close(*slot),
            Operation::Mount => {
                (0..SLOTS).for_each(|slot| self.close(slot));
                self.mount();
                self.compare();
            }
            Operation::Push => {
                let old = self.lab.push(self.fs()).unwrap();
                self.check_frozen();
                let digest = disk(&old);
                self.frozen.push((old, digest));
                self.compare();
            }
            Operation::Rebuild => self.rebuild(),
            Operation::Kill => self.kill(),
            Operation::Forget => self.forget(),
            _ => self.compare(),
        }
    }

    fn mount(&mut self) {
        // Drop the old overlay first, because it holds the locks of the layers.
        drop(self.fs.take());
        self.kept = None;
        self.fs = Some(self.lab.open());
        if self.lab.space == XattrSpace::User {
            // Other types cannot have the xattr that preserves the number.
            self.model
                .forget_numbers(|kind| !matches!(kind, FileKind::Regular | FileKind::Directory));
        }
    }

    /// Replaces the overlay by one that is recovered from its ledger, as after kill -9.
    fn kill(&mut self) {
        let old = self.fs.take().unwrap();
        let Some(kept) = self.kept.take() else {
            // It is attached from here on.
            let kept = Kept::new();
            old.overlay.attach(&kept.ledger);
            self.kept = Some(kept);
            self.fs = Some(old);
            return;
        };
        let seen = |fs: &Fs, open: &[Option<Open>]| {
            let handles = open.iter().flatten();
            let of_handle = |handle: &Arc<FileHandle>| {
                let attr = fs.attr_of_inode(handle.inode()).unwrap();
                let content = fs.read_handle(handle).unwrap();
                (
                    attr.ino,
                    attr.stat.nlink,
                    attr.stat.size,
                    attr.stat.ctime,
                    content,
                )
            };
            handles
                .map(|(handle, ..)| of_handle(handle))
                .collect::<Vec<_>>()
        };
        let before = seen(&old, &self.open);
        let known: Vec<_> = (old.tree().into_keys())
            .map(|path| (old.attr(&path).unwrap().ino, path))
            .collect();
        let mut open: Vec<_> = self
            .open
            .iter_mut()
            .flatten()
            .map(|open| &mut open.0)
            .collect();
        // Open files are known to the kernel.
        let (overlay, next, _) = kept.recover(&old.overlay, &mut open);
        let mut fs = Fs::new(overlay);
        fs.links_may_be_off = old.links_may_be_off;
        drop(old);
        assert_eq!(seen(&fs, &self.open), before);
        // Some objects are located by their numbers, the others by the next operations.
        for (ino, path) in known.iter().filter(|(ino, _)| ino % 3 == 0) {
            let inode = fs.overlay.begin().inode(*ino).unwrap();
            assert!(Arc::ptr_eq(&inode, &fs.find(path).unwrap()), "{path}");
        }
        self.fs = Some(fs);
        self.kept = Some(next);
    }

    /// Replaces the overlay by one that is created from the record of its state. Everything stays known and open.
    fn rebuild(&mut self) {
        let slots = self.open.iter().enumerate();
        let files: Vec<_> = slots
            .filter_map(|(slot, open)| Some((slot as u64, open.as_ref()?.0.clone())))
            .collect();
        let old = self.fs.take().unwrap();
        self.kept = None;
        let taken = old.overlay.record(&files).unwrap();
        drop(files);
        let bytes = taken.record.clone();
        let rebuilt = Overlay::rebuild(taken).unwrap();
        for (slot, open) in self.open.iter_mut().enumerate() {
            if let Some((handle, _, _)) = open {
                *handle = rebuilt.files[&(slot as u64)].clone();
            }
        }
        let mut fs = Fs::new(rebuilt.overlay);
        fs.links_may_be_off = old.links_may_be_off;
        drop(old);
        let mut files: Vec<_> = rebuilt.files.into_iter().collect();
        files.sort_by_key(|(slot, _)| *slot);
        let again = fs.overlay.record(&files).unwrap().record;
        assert!(again == bytes, "the new overlay has another record");
        self.fs = Some(fs);
    }

    /// Forgets all inodes except those of open files, which also hold their parents.
    fn forget(&mut self) {
        let held: Vec<u64> = self
            .open
            .iter()
            .flatten()
            .map(|(handle, _, _)| handle.inode().ino())
            .collect();
        for path in self.model.paths() {
            let number = self.fs().number(&path);
            if !held.contains(&number) {
                self.fs().overlay.forget(number, u64::MAX);
            }
        }
    }

    fn compare(&mut self) {
        let shown = self.fs().tree();
        assert_same(&shown, &self.model);
        for path in self.model.paths() {
            let number = self.fs().number(&path);
            self.model.check_number(&path, number);
        }
    }
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() {
        return name.to_owned();
    }
    format!("{dir}/{name}")
}

fn run(lab: Lab, operations: &[Operation]) {
    let mut pair = OverlayAndModel::new(lab);
    for operation in operations {
        pair.apply(operation);
    }
    pair.compare();
    (0..SLOTS).for_each(|slot| pair.close(slot));
    pair.mount();
    pair.compare();
    pair.check_frozen();
    drop(pair.fs.take());
    assert_same(&pair.lab.open_read_only().tree(), &pair.model);
}

fn lab(metacopy: bool, space: XattrSpace) -> Lab {
    let options = OverlayOptions {
        metacopy,
        // Skip syncs: no power cut is tested here.
        volatile: true,
        ..OverlayOptions::default()
    };
    Lab::new(|_| {}).with(options).in_space(space)
}

fn config() -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok();
    Config {
        cases: cases.map_or(100, |text| text.parse().unwrap()),
        max_shrink_iters: 4000,
        failure_persistence: None,
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn overlay_matches_model(
        made in vec(creation(), 6..24),
        operations in vec(operation(), 1..100),
        metacopy in any::<bool>(),
        space in 0..crate::common::spaces().len(),
    ) {
        let operations: Vec<Operation> = made.into_iter().chain([Operation::Push]).chain(operations).collect();
        run(lab(metacopy, crate::common::spaces()[space]), &operations);
    }
}

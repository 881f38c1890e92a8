//! Random operations on an overlay in process and on a tree in memory must give the same results and
//! leave the same tree: over new mounts, new layers on top, forgotten inodes, files that stay open
//! without a name. `PROPTEST_CASES=N` runs more; what fails is shrunk to the fewest operations.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod common;
mod model_tree;

use std::sync::Arc;

use common::{Fs, Lab, OpenHow, READ, Tree, WRITE};
use cowl_fs::format::XattrSpace;
use cowl_fs::overlay::{Behaviour, FileHandle, PushError};
use cowl_fs::sys::stat::FileKind;
use model_tree::{Model, Node, Rename};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;

const SLOTS: usize = 3;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const MODES: [u32; 4] = [0o644, 0o600, 0o755, 0o4755];

#[derive(Clone, Debug)]
enum Act {
    Create(String, u8),
    Mkdir(String),
    Symlink(String),
    Mkfifo(String),
    Unlink(String),
    Rmdir(String),
    Rename(String, String, Rename),
    Link(String, String),
    Append(String, u8),
    Overwrite(String, u8),
    Truncate(String, u64),
    Chmod(String, u32),
    SetXattr(String, u8),
    RemoveXattr(String),
    Open(usize, String, bool),
    ReadOpen(usize),
    WriteOpen(usize, u64, u8),
    StatOpen(usize),
    Close(usize),
    /// A new mount over the same layers.
    Mount,
    /// A new layer on top.
    Push,
    /// The kernel forgets everything that is not open.
    Forget,
    Compare,
}

fn path() -> impl Strategy<Value = String> {
    vec(0..NAMES.len(), 1..4).prop_map(|parts| {
        let names: Vec<&str> = parts.into_iter().map(|part| NAMES[part]).collect();
        names.join("/")
    })
}

fn act() -> impl Strategy<Value = Act> {
    let slot = || 0..SLOTS;
    let rename = prop_oneof![
        3 => Just(Rename::Replace),
        1 => Just(Rename::NoReplace),
        1 => Just(Rename::Exchange),
    ];
    prop_oneof![
        6 => (path(), any::<u8>()).prop_map(|(p, b)| Act::Create(p, b)),
        6 => path().prop_map(Act::Mkdir),
        1 => path().prop_map(Act::Symlink),
        1 => path().prop_map(Act::Mkfifo),
        4 => path().prop_map(Act::Unlink),
        3 => path().prop_map(Act::Rmdir),
        9 => (path(), path(), rename).prop_map(|(a, b, how)| Act::Rename(a, b, how)),
        4 => (path(), path()).prop_map(|(a, b)| Act::Link(a, b)),
        4 => (path(), any::<u8>()).prop_map(|(p, b)| Act::Append(p, b)),
        2 => (path(), any::<u8>()).prop_map(|(p, b)| Act::Overwrite(p, b)),
        2 => (path(), 0..9u64).prop_map(|(p, size)| Act::Truncate(p, size)),
        4 => (path(), 0..MODES.len()).prop_map(|(p, m)| Act::Chmod(p, MODES[m])),
        2 => (path(), any::<u8>()).prop_map(|(p, b)| Act::SetXattr(p, b)),
        1 => path().prop_map(Act::RemoveXattr),
        3 => (slot(), path(), any::<bool>()).prop_map(|(s, p, w)| Act::Open(s, p, w)),
        2 => slot().prop_map(Act::ReadOpen),
        2 => (slot(), 0..9u64, any::<u8>()).prop_map(|(s, at, b)| Act::WriteOpen(s, at, b)),
        2 => slot().prop_map(Act::StatOpen),
        1 => slot().prop_map(Act::Close),
        2 => Just(Act::Mount),
        3 => Just(Act::Push),
        2 => Just(Act::Forget),
        1 => Just(Act::Compare),
    ]
}

/// One open file, of the overlay and of the model.
type Open = (Arc<FileHandle>, usize, bool);

struct Pair {
    lab: Lab,
    fs: Option<Fs>,
    model: Model,
    open: [Option<Open>; SLOTS],
}

impl Pair {
    fn new(lab: Lab) -> Self {
        let fs = Some(lab.open());
        Self {
            lab,
            fs,
            model: Model::new(),
            open: Default::default(),
        }
    }

    fn fs(&self) -> &Fs {
        self.fs.as_ref().unwrap()
    }

    fn close(&mut self, slot: usize) {
        if let Some((handle, _, _)) = self.open[slot].take() {
            self.fs().overlay.close(&handle);
        }
    }

    fn act(&mut self, act: &Act) {
        let (fs, model) = (self.fs.as_ref().unwrap(), &mut self.model);
        let (got, want) = match act {
            Act::Create(path, byte) => {
                let data = vec![*byte; usize::from(*byte % 7)];
                (
                    fs.create(path, &data),
                    model.make(path, Node::file(data.clone())),
                )
            }
            Act::Mkdir(path) => (fs.mkdir(path), model.make(path, Node::folder())),
            Act::Symlink(path) => (
                fs.symlink(path, "a/b"),
                model.make(path, Node::other(FileKind::Symlink)),
            ),
            Act::Mkfifo(path) => (
                fs.mkfifo(path),
                model.make(path, Node::other(FileKind::Fifo)),
            ),
            Act::Unlink(path) => (fs.unlink(path), model.unlink(path)),
            Act::Rmdir(path) => (fs.rmdir(path), model.rmdir(path)),
            Act::Rename(from, to, how) => {
                if model.is_inside(from, to) {
                    // The kernel refuses it before anybody else is asked.
                    return;
                }
                (
                    fs.rename_with(from, to, how.flags()),
                    model.rename(from, to, *how),
                )
            }
            Act::Link(old, new) => (fs.link(old, new), model.link(old, new)),
            Act::Append(path, byte) => (fs.append(path, &[*byte]), model.append(path, *byte)),
            Act::Overwrite(path, byte) => (
                fs.overwrite(path, &[*byte; 3]),
                model.set_content(path, |content| *content = vec![*byte; 3]),
            ),
            Act::Truncate(path, size) => (
                fs.truncate(path, *size),
                model.truncate(path, usize::try_from(*size).unwrap()),
            ),
            Act::Chmod(path, mode) => (fs.chmod(path, *mode), model.chmod(path, *mode)),
            Act::SetXattr(path, byte) => (
                fs.set_xattr(path, "user.x", &[*byte]),
                model.set_xattr(path, Some(*byte)),
            ),
            Act::RemoveXattr(path) => {
                (fs.remove_xattr(path, "user.x"), model.set_xattr(path, None))
            }
            other => return self.act_open(other),
        };
        assert_eq!(got, want, "{act:?}");
    }

    fn act_open(&mut self, act: &Act) {
        match act {
            Act::Open(slot, path, write) => {
                self.close(*slot);
                let how: OpenHow = if *write { WRITE } else { READ };
                let (got, want) = (self.fs().open(path, how), self.model.open(path));
                assert_eq!(got.as_ref().err(), want.as_ref().err(), "{act:?}");
                if let (Ok(handle), Ok(node)) = (got, want) {
                    self.open[*slot] = Some((handle, node, *write));
                }
            }
            Act::ReadOpen(slot) => {
                if let Some((handle, node, _)) = &self.open[*slot] {
                    let got = self.fs().read_handle(handle).unwrap();
                    assert_eq!(got, self.model.node(*node).content, "{act:?}");
                }
            }
            Act::WriteOpen(slot, at, byte) => {
                if let Some((handle, node, true)) = &self.open[*slot] {
                    self.fs().write_handle(handle, *at, &[*byte]).unwrap();
                    self.model
                        .write(*node, usize::try_from(*at).unwrap(), *byte);
                }
            }
            Act::StatOpen(slot) => {
                if let Some((handle, node, _)) = &self.open[*slot] {
                    let stat = self.fs().attr_of(handle.inode()).unwrap().stat;
                    let want = (
                        self.model.node(*node).content.len(),
                        self.model.links(*node),
                    );
                    assert_eq!((stat.size as usize, stat.nlink as usize), want, "{act:?}");
                }
            }
            Act::Close(slot) => self.close(*slot),
            Act::Mount => {
                (0..SLOTS).for_each(|slot| self.close(slot));
                self.mount();
                self.compare();
            }
            Act::Push => {
                let writers = self.open.iter().flatten().filter(|(_, _, write)| *write);
                match (writers.count(), self.lab.push(self.fs())) {
                    (0, Ok(_)) => {}
                    (count, Err(PushError::Writers(said))) if count as u32 == said => {}
                    (count, other) => panic!("{count} writers, {other:?}"),
                }
                self.compare();
            }
            Act::Forget => self.forget(),
            _ => self.compare(),
        }
    }

    fn mount(&mut self) {
        // The locks on the layers go with the overlay that has them.
        drop(self.fs.take());
        self.fs = Some(self.lab.open());
        if self.lab.space == XattrSpace::User {
            // Nothing else can carry the mark that keeps a number.
            self.model
                .forget_numbers(|kind| !matches!(kind, FileKind::Regular | FileKind::Directory));
        }
    }

    /// What is open keeps its inode, and with it the folders above.
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
                self.fs().overlay.inodes().forget(number, u64::MAX);
            }
        }
    }

    fn compare(&mut self) {
        let shown = self.fs().tree();
        same(&shown, &self.model);
        for path in self.model.paths() {
            let number = self.fs().number(&path);
            self.model.check_number(&path, number);
        }
    }
}

fn same(shown: &Tree, model: &Model) {
    let got: Vec<_> = shown
        .iter()
        .map(|(path, shown)| {
            let content = match shown.kind {
                FileKind::Regular => shown.content.clone(),
                _ => Vec::new(),
            };
            let perm = match shown.kind {
                FileKind::Symlink => 0,
                _ => shown.perm,
            };
            let xattr = shown.xattrs.iter().find(|(name, _)| name == b"user.x");
            let names = match shown.kind {
                FileKind::Directory => vec![path.clone()],
                _ => shown.names.clone(),
            };
            let xattr = xattr.map(|(_, value)| value[0]);
            (path.clone(), shown.kind, perm, content, xattr, names)
        })
        .collect();
    assert_eq!(got, model.shown());
}

fn run(lab: Lab, acts: &[Act]) {
    let mut pair = Pair::new(lab);
    for act in acts {
        pair.act(act);
    }
    pair.compare();
    (0..SLOTS).for_each(|slot| pair.close(slot));
    pair.mount();
    pair.compare();
    drop(pair.fs.take());
    same(&pair.lab.open_read_only().tree(), &pair.model);
}

fn lab(metacopy: bool, space: XattrSpace) -> Lab {
    let behaviour = Behaviour {
        metacopy,
        // What a test does needs to survive no power cut.
        volatile: true,
        ..Behaviour::default()
    };
    Lab::new(|_| {}).with(behaviour).in_space(space)
}

fn config() -> Config {
    let cases = std::env::var("PROPTEST_CASES").ok();
    Config {
        cases: cases.map_or(150, |text| text.parse().unwrap()),
        max_shrink_iters: 4000,
        failure_persistence: None,
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn an_overlay_is_a_tree(
        acts in vec(act(), 1..120),
        metacopy in any::<bool>(),
        space in 0..common::spaces().len(),
    ) {
        run(lab(metacopy, common::spaces()[space]), &acts);
    }
}

//! Random operations on an overlay in process and on a tree in memory must give the same results and
//! leave the same tree: over new mounts, new layers on top, forgotten inodes, files that stay open
//! without a name. `PROPTEST_CASES=N` runs more; what fails is shrunk to the fewest operations.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::common::{Fs, Lab, OpenOptions, READ, WRITE, disk};
use crate::model_tree::{Model, Node, Rename, same};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::stat::FileKind;
use cowl_overlay::{FileHandle, OverlayOptions};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;

const SLOTS: usize = 2;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const MODES: [u32; 4] = [0o644, 0o600, 0o755, 0o4755];

/// A place in the tree, found when its turn comes: so that a shorter history still makes sense.
#[derive(Clone, Copy, Debug)]
enum Spot {
    /// Something that is there.
    There(u16),
    /// A name in a folder that is there.
    In(u16, usize),
    /// A name that something had before.
    Gone(u16),
}

#[derive(Clone, Debug)]
enum Act {
    Create(Spot, u8),
    Mkdir(Spot),
    Symlink(Spot),
    Mkfifo(Spot),
    Unlink(Spot),
    Rmdir(Spot),
    /// With all that is in it.
    RemoveTree(Spot),
    Rename(Spot, Spot, Rename),
    Link(Spot, Spot),
    Append(Spot, u8),
    Overwrite(Spot, u8),
    Truncate(Spot, u64),
    Chmod(Spot, u32),
    SetXattr(Spot, u8),
    RemoveXattr(Spot),
    Open(usize, Spot, bool),
    ReadOpen(usize),
    WriteOpen(usize, u64, u8),
    StatOpen(usize),
    /// What is open grows through one of its names.
    AppendOpen(usize, u8),
    /// A folder goes with all that is in it, and a new one is made elsewhere and moved there.
    Replace(Spot, Spot),
    Close(usize),
    /// A new mount over the same layers.
    Mount,
    /// A new layer on top.
    Push,
    /// The kernel forgets everything that is not open.
    Forget,
    Compare,
}

fn there() -> impl Strategy<Value = Spot> {
    prop_oneof![
        12 => any::<u16>().prop_map(Spot::There),
        1 => new(),
    ]
}

fn new() -> impl Strategy<Value = Spot> {
    prop_oneof![
        3 => (any::<u16>(), 0..NAMES.len()).prop_map(|(folder, name)| Spot::In(folder, name)),
        2 => any::<u16>().prop_map(Spot::Gone),
    ]
}

fn to() -> impl Strategy<Value = Spot> {
    prop_oneof![3 => new(), 1 => there()]
}

fn made() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (new(), any::<u8>()).prop_map(|(p, b)| Act::Create(p, b)),
        4 => new().prop_map(Act::Mkdir),
        1 => new().prop_map(Act::Symlink),
        1 => new().prop_map(Act::Mkfifo),
        2 => (there(), new()).prop_map(|(a, b)| Act::Link(a, b)),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let slot = || 0..SLOTS;
    let rename = prop_oneof![
        3 => Just(Rename::Replace),
        1 => Just(Rename::NoReplace),
        1 => Just(Rename::Exchange),
    ];
    prop_oneof![
        12 => made(),
        4 => there().prop_map(Act::Unlink),
        2 => there().prop_map(Act::Rmdir),
        2 => there().prop_map(Act::RemoveTree),
        9 => (there(), to(), rename).prop_map(|(a, b, how)| Act::Rename(a, b, how)),
        4 => (there(), any::<u8>()).prop_map(|(p, b)| Act::Append(p, b)),
        2 => (there(), any::<u8>()).prop_map(|(p, b)| Act::Overwrite(p, b)),
        2 => (there(), 0..9u64).prop_map(|(p, size)| Act::Truncate(p, size)),
        4 => (there(), 0..MODES.len()).prop_map(|(p, m)| Act::Chmod(p, MODES[m])),
        2 => (there(), any::<u8>()).prop_map(|(p, b)| Act::SetXattr(p, b)),
        1 => there().prop_map(Act::RemoveXattr),
        3 => (slot(), there(), any::<bool>()).prop_map(|(s, p, w)| Act::Open(s, p, w)),
        3 => slot().prop_map(Act::ReadOpen),
        2 => (slot(), 0..9u64, any::<u8>()).prop_map(|(s, at, b)| Act::WriteOpen(s, at, b)),
        2 => slot().prop_map(Act::StatOpen),
        3 => (slot(), any::<u8>()).prop_map(|(s, b)| Act::AppendOpen(s, b)),
        2 => (there(), new()).prop_map(|(place, new)| Act::Replace(place, new)),
        1 => slot().prop_map(Act::Close),
        2 => Just(Act::Mount),
        2 => Just(Act::Push),
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
    gone: Vec<String>,
    /// What was pushed down, as it was then.
    frozen: Vec<(PathBuf, BTreeMap<String, String>)>,
}

impl Pair {
    fn new(lab: Lab) -> Self {
        let fs = Some(lab.open());
        Self {
            lab,
            fs,
            model: Model::new(),
            open: Default::default(),
            gone: Vec::new(),
            frozen: Vec::new(),
        }
    }

    /// No layer that was pushed down is ever written again.
    fn check_frozen(&self) {
        for (path, digest) in &self.frozen {
            assert!(disk(path) == *digest, "{} was written", path.display());
        }
    }

    fn fs(&self) -> &Fs {
        self.fs.as_ref().unwrap()
    }

    fn path(&self, spot: Spot) -> String {
        let pick =
            |from: &[String], which: u16| from.get(usize::from(which) % from.len().max(1)).cloned();
        let found = match spot {
            Spot::There(which) => pick(&self.model.paths(), which),
            Spot::Gone(which) => pick(&self.gone, which),
            Spot::In(which, name) => {
                let folders = self.model.folders();
                pick(&folders, which).map(|folder| join(&folder, NAMES[name]))
            }
        };
        found.unwrap_or_else(|| NAMES[0].to_owned())
    }

    fn leaves(&mut self, path: &str) {
        self.gone.retain(|gone| gone != path);
        self.gone.push(path.to_owned());
        if self.gone.len() > 6 {
            self.gone.remove(0);
        }
    }

    /// As rm -r does.
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
    fn act(&mut self, act: &Act) {
        if let Act::Replace(place, new) = act {
            let (place, new) = (self.path(*place), self.path(*new));
            self.remove_tree(&place);
            let made = (self.fs().mkdir(&new), self.model.make(&new, Node::folder()));
            assert_eq!(made.0, made.1, "{act:?}: {new}");
            if self.model.is_inside(&new, &place) {
                return;
            }
            let how = Rename::Replace;
            let moved = (
                self.fs().rename_with(&new, &place, how.flags()),
                self.model.rename(&new, &place, how),
            );
            assert_eq!(moved.0, moved.1, "{act:?}: {new} to {place}");
            return;
        }
        if let Act::RemoveTree(spot) = act {
            let path = self.path(*spot);
            self.leaves(&path);
            return self.remove_tree(&path);
        }
        if let Act::Unlink(spot) | Act::Rmdir(spot) | Act::Rename(spot, _, _) = act {
            let path = self.path(*spot);
            self.leaves(&path);
        }
        let (place, other) = match act {
            Act::Rename(from, to, _) | Act::Link(from, to) => (self.path(*from), self.path(*to)),
            Act::Create(spot, _)
            | Act::Mkdir(spot)
            | Act::Symlink(spot)
            | Act::Mkfifo(spot)
            | Act::Unlink(spot)
            | Act::Rmdir(spot)
            | Act::Append(spot, _)
            | Act::Overwrite(spot, _)
            | Act::Truncate(spot, _)
            | Act::Chmod(spot, _)
            | Act::SetXattr(spot, _)
            | Act::RemoveXattr(spot)
            | Act::Open(_, spot, _) => (self.path(*spot), String::new()),
            _ => Default::default(),
        };
        let (path, other) = (place.as_str(), other.as_str());
        let (fs, model) = (self.fs.as_ref().unwrap(), &mut self.model);
        let (got, want) = match act {
            Act::Create(_, byte) => {
                let data = vec![*byte; usize::from(*byte % 7)];
                (
                    fs.create(path, &data),
                    model.make(path, Node::file(data.clone())),
                )
            }
            Act::Mkdir(_) => (fs.mkdir(path), model.make(path, Node::folder())),
            Act::Symlink(_) => (
                fs.symlink(path, "a/b"),
                model.make(path, Node::other(FileKind::Symlink)),
            ),
            Act::Mkfifo(_) => (
                fs.mkfifo(path),
                model.make(path, Node::other(FileKind::Fifo)),
            ),
            Act::Unlink(_) => (fs.unlink(path), model.unlink(path)),
            Act::Rmdir(_) => (fs.rmdir(path), model.rmdir(path)),
            Act::Rename(_, _, how) => {
                if model.is_inside(path, other) {
                    // The kernel refuses it before anybody else is asked.
                    return;
                }
                (
                    fs.rename_with(path, other, how.flags()),
                    model.rename(path, other, *how),
                )
            }
            Act::Link(..) => (fs.link(path, other), model.link(path, other)),
            Act::Append(_, byte) => (fs.append(path, &[*byte]), model.append(path, *byte)),
            Act::Overwrite(_, byte) => (
                fs.overwrite(path, &[*byte; 3]),
                model.set_content(path, |content| *content = vec![*byte; 3]),
            ),
            Act::Truncate(_, size) => (
                fs.truncate(path, *size),
                model.truncate(path, usize::try_from(*size).unwrap()),
            ),
            Act::Chmod(_, mode) => (fs.chmod(path, *mode), model.chmod(path, *mode)),
            Act::SetXattr(_, byte) => (
                fs.set_xattr(path, "user.x", &[*byte]),
                model.set_xattr(path, Some(*byte)),
            ),
            Act::RemoveXattr(_) => (fs.remove_xattr(path, "user.x"), model.set_xattr(path, None)),
            _ => {
                let path = place.clone();
                return self.act_open(act, &path);
            }
        };
        assert_eq!(got, want, "{act:?}: {path} {other}");
    }

    fn act_open(&mut self, act: &Act, path: &str) {
        match act {
            Act::Open(slot, _, write) => {
                self.close(*slot);
                let how: OpenOptions = if *write { WRITE } else { READ };
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
            Act::AppendOpen(slot, byte) => {
                if let Some((handle, node, _)) = &self.open[*slot]
                    && let Some(path) = self.model.path_of(*node)
                {
                    self.fs().append(&path, &[*byte]).unwrap();
                    self.model.append(&path, *byte).unwrap();
                    let got = self.fs().read_handle(handle).unwrap();
                    assert_eq!(got, self.model.node(*node).content, "{act:?}: {path}");
                }
            }
            Act::Close(slot) => self.close(*slot),
            Act::Mount => {
                (0..SLOTS).for_each(|slot| self.close(slot));
                self.mount();
                self.compare();
            }
            Act::Push => {
                let old = self.lab.push(self.fs()).unwrap();
                self.check_frozen();
                let digest = disk(&old);
                self.frozen.push((old, digest));
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

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() {
        return name.to_owned();
    }
    format!("{folder}/{name}")
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
    pair.check_frozen();
    drop(pair.fs.take());
    same(&pair.lab.open_read_only().tree(), &pair.model);
}

fn lab(metacopy: bool, space: XattrSpace) -> Lab {
    let options = OverlayOptions {
        metacopy,
        // What a test does needs to survive no power cut.
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
    fn an_overlay_is_a_tree(
        made in vec(made(), 6..24),
        acts in vec(act(), 1..100),
        metacopy in any::<bool>(),
        space in 0..crate::common::spaces().len(),
    ) {
        let acts: Vec<Act> = made.into_iter().chain([Act::Push]).chain(acts).collect();
        run(lab(metacopy, crate::common::spaces()[space]), &acts);
    }
}

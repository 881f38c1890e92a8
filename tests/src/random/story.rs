//! Short stories: operations that mean something only one after the other. Left to chance they would
//! hardly meet on one object; as it is, other operations come between them.

use rustix::fs::{OFlags, RenameFlags};

use super::generate::Generator;
use super::operation::{Op, RelPath};
use crate::tree::Paths;

fn within(path: &[u8], folder: &[u8]) -> bool {
    path.strip_prefix(folder)
        .is_some_and(|rest| rest.starts_with(b"/"))
}

impl Generator {
    /// The steps of one story.
    pub(super) fn story(&mut self, known: &Paths) -> Vec<Op> {
        match self.rng().below(5) {
            0 => self.another_folder_in_its_place(known),
            1 => self.what_is_open_sees_what_comes(known),
            2 => self.several_names(known),
            3 => self.in_a_moved_folder(known),
            _ => self.two_folders_change_places(known),
        }
    }

    fn write(&mut self, path: RelPath) -> Op {
        let flags = self.rng().pick(&[
            OFlags::WRONLY,
            OFlags::RDWR | OFlags::APPEND,
            OFlags::WRONLY | OFlags::TRUNC,
        ]);
        let data = (self.rng().number(), 300);
        let mode = 0o644;
        Op::Create {
            path,
            flags,
            mode,
            data,
        }
    }

    fn rename(from: RelPath, to: RelPath, flags: RenameFlags) -> Op {
        Op::Rename { from, to, flags }
    }

    /// A folder goes, and another one comes where layers below still have the first.
    fn another_folder_in_its_place(&mut self, known: &Paths) -> Vec<Op> {
        let (place, new) = (self.folder(known), self.new_path(known));
        let elsewhere = self.new_path(known);
        let mode = 0o755;
        let mut steps = Vec::new();
        steps.push(if self.rng().chance(50) {
            Op::RemoveTree {
                path: place.clone(),
            }
        } else {
            Self::rename(place.clone(), elsewhere.clone(), RenameFlags::empty())
        });
        match self.rng().below(4) {
            0 => steps.push(Op::Mkdir {
                path: place.clone(),
                mode,
            }),
            1 => {
                let path = new.clone();
                steps.push(Op::Mkdir { path, mode });
                steps.push(Self::rename(new, place.clone(), RenameFlags::empty()));
            }
            2 => {
                let other = self.folder(known);
                steps.push(Self::rename(other, place.clone(), RenameFlags::empty()));
            }
            _ => {
                let path = place.clone();
                steps.push(Op::Symlink {
                    target: b"a".to_vec(),
                    path,
                });
                steps.push(Op::Unlink {
                    path: place.clone(),
                });
                steps.push(Self::rename(elsewhere, place.clone(), RenameFlags::empty()));
            }
        }
        steps.push(Op::List { path: place });
        steps
    }

    /// A descriptor and a mapping from before a change, when the kernel has no page left to answer with.
    fn what_is_open_sees_what_comes(&mut self, known: &Paths) -> Vec<Op> {
        let (slot, map, path) = (self.slot(), self.map(), self.old(known));
        let mut steps = vec![
            Op::Hold {
                slot,
                path: path.clone(),
                flags: OFlags::RDONLY,
            },
            Op::Map {
                slot,
                map,
                write: false,
            },
        ];
        let changes = 1 + self.rng().below(3);
        for _ in 0..changes {
            let path = path.clone();
            steps.push(match self.rng().below(6) {
                0 => Op::Chmod { path, mode: 0o640 },
                1 => Op::Cut { path, len: 5 },
                2 => Op::Unlink { path },
                3 => Self::rename(path, self.new_path(known), RenameFlags::empty()),
                _ => self.write(path),
            });
        }
        let (offset, len) = (0, 8192);
        steps.push(Op::FdDropPages { slot });
        steps.push(Op::FdRead { slot, offset, len });
        steps.push(Op::MapRead { map, offset, len });
        steps.push(Op::FdStat { slot });
        steps
    }

    /// A file gets another name and changes through one of them.
    fn several_names(&mut self, known: &Paths) -> Vec<Op> {
        let (from, to) = (self.old(known), self.new_path(known));
        let (path, other) = if self.rng().chance(50) {
            (from.clone(), to.clone())
        } else {
            (to.clone(), from.clone())
        };
        let follow = false;
        let mut steps = vec![Op::Link { from, to }, self.write(path.clone())];
        steps.push(match self.rng().below(3) {
            0 => Op::Unlink { path: path.clone() },
            1 => Self::rename(path.clone(), self.new_path(known), RenameFlags::empty()),
            _ => Op::Chmod {
                path: path.clone(),
                mode: 0o604,
            },
        });
        for path in [path, other] {
            steps.push(Op::Stat {
                path: path.clone(),
                follow,
            });
            steps.push(Op::Read { path });
        }
        steps
    }

    /// A folder gets another place, and what is in it changes there.
    fn in_a_moved_folder(&mut self, known: &Paths) -> Vec<Op> {
        let (from, to) = (self.folder(known), self.new_path(known));
        let inside: Vec<RelPath> = known
            .all
            .iter()
            .filter(|path| within(path, &from))
            .map(|path| [&to, &path[from.len()..]].concat())
            .collect();
        let mut steps = vec![Self::rename(from.clone(), to, RenameFlags::empty())];
        for _ in 0..3 {
            if inside.is_empty() {
                break;
            }
            let path = self.rng().pick(&inside);
            steps.push(match self.rng().below(5) {
                0 => Op::Unlink { path },
                1 => Self::rename(path, self.new_path(known), RenameFlags::empty()),
                2 => Op::Chmod { path, mode: 0o711 },
                _ => self.write(path),
            });
        }
        if self.rng().chance(50) {
            steps.push(Op::Mkdir {
                path: from,
                mode: 0o755,
            });
        }
        steps
    }

    /// Two folders swap, each to be changed in its new place.
    fn two_folders_change_places(&mut self, known: &Paths) -> Vec<Op> {
        let (from, to) = (self.folder(known), self.folder(known));
        let name = b"/b".as_slice();
        let (inside, beside) = ([&from, name].concat(), [&to, name].concat());
        vec![
            Self::rename(from.clone(), to, RenameFlags::EXCHANGE),
            self.write(inside),
            Op::RemoveTree { path: beside },
            Op::List { path: from },
        ]
    }
}

//! Stories: sequences of operations that are only meaningful together. Independent random operations would rarely
//! affect the same object in this order. Other operations are interleaved.

use rustix::fs::{OFlags, RenameFlags};

use super::generate::Generator;
use super::operation::{Op, RelPath};
use crate::tree::Paths;

fn is_below(path: &[u8], directory: &[u8]) -> bool {
    path.strip_prefix(directory)
        .is_some_and(|rest| rest.starts_with(b"/"))
}

impl Generator {
    /// Returns the operations of one story.
    pub(super) fn story(&mut self, known: &Paths) -> Vec<Op> {
        match self.rng().below(5) {
            0 => self.replace_directory(known),
            1 => self.change_an_open_file(known),
            2 => self.change_a_hard_link(known),
            3 => self.change_in_a_moved_directory(known),
            _ => self.exchange_directories(known),
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

    /// Removes or moves a directory, and creates another object at its path, while the lower layers still contain the
    /// first.
    fn replace_directory(&mut self, known: &Paths) -> Vec<Op> {
        let (target, new) = (self.existing_dir(known), self.new_path(known));
        let elsewhere = self.new_path(known);
        let mode = 0o755;
        let mut steps = Vec::new();
        steps.push(if self.rng().chance(50) {
            Op::RemoveTree {
                path: target.clone(),
            }
        } else {
            Self::rename(target.clone(), elsewhere.clone(), RenameFlags::empty())
        });
        match self.rng().below(4) {
            0 => steps.push(Op::Mkdir {
                path: target.clone(),
                mode,
            }),
            1 => {
                let path = new.clone();
                steps.push(Op::Mkdir { path, mode });
                steps.push(Self::rename(new, target.clone(), RenameFlags::empty()));
            }
            2 => {
                let other = self.existing_dir(known);
                steps.push(Self::rename(other, target.clone(), RenameFlags::empty()));
            }
            _ => {
                let path = target.clone();
                steps.push(Op::Symlink {
                    target: b"a".to_vec(),
                    path,
                });
                steps.push(Op::Unlink {
                    path: target.clone(),
                });
                steps.push(Self::rename(
                    elsewhere,
                    target.clone(),
                    RenameFlags::empty(),
                ));
            }
        }
        steps.push(Op::List { path: target });
        steps
    }

    /// Opens and maps a file, changes it by path, and reads through the old descriptor and mapping after its pages were
    /// dropped.
    fn change_an_open_file(&mut self, known: &Paths) -> Vec<Op> {
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

    /// Creates a hard link to a file, and changes the file through one of its names.
    fn change_a_hard_link(&mut self, known: &Paths) -> Vec<Op> {
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

    /// Moves a directory, and changes objects in it at the new path.
    fn change_in_a_moved_directory(&mut self, known: &Paths) -> Vec<Op> {
        let (from, to) = (self.existing_dir(known), self.new_path(known));
        let inside: Vec<RelPath> = known
            .all
            .iter()
            .filter(|path| is_below(path, &from))
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

    /// Exchanges two directories, and changes each at its new path.
    fn exchange_directories(&mut self, known: &Paths) -> Vec<Op> {
        let (from, to) = (self.existing_dir(known), self.existing_dir(known));
        let name = b"/b".as_slice();
        let (first, second) = ([&from, name].concat(), [&to, name].concat());
        vec![
            Self::rename(from.clone(), to, RenameFlags::EXCHANGE),
            self.write(first),
            Op::RemoveTree { path: second },
            Op::List { path: from },
        ]
    }
}

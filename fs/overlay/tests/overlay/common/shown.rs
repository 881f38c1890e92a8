//! An overlay driven by paths, and its merged tree.

use std::collections::BTreeMap;
use std::sync::Arc;

use cowl_layers::name::Name;
use cowl_layers::sys::stat::{FileKind, Stat, Time};
use cowl_overlay::inode::Inode;
use cowl_overlay::{Attr, FileHandle, Overlay, RenameFlags, SetAttr, Writer};

use super::{OpenOptions, R, READ, TRUNCATE, WRITE, caller};

/// The visible properties of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisibleObject {
    pub kind: FileKind,
    pub perm: u32,
    pub owner: (u32, u32),
    pub rdev: u64,
    /// 0 for directories, as are `nlink` and, as `None`, `mtime`.
    pub size: u64,
    pub mtime: Option<Time>,
    pub nlink: u64,
    /// All paths of the same object.
    pub names: Vec<String>,
    pub content: Vec<u8>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub type Tree = BTreeMap<String, VisibleObject>;

/// One entry of a listing.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: Vec<u8>,
    pub kind: FileKind,
    pub ino: u64,
}

/// An overlay with operations on paths.
pub struct Fs {
    pub overlay: Overlay,
    /// [`Fs::tree`] does not verify link counts.
    pub links_may_be_off: bool,
}

impl Fs {
    pub fn new(overlay: Overlay) -> Self {
        Self {
            overlay,
            links_may_be_off: false,
        }
    }

    /// Looks up a path, and holds a reference to the inode as the kernel does.
    pub fn find(&self, path: &str) -> R<Arc<Inode>> {
        let inode = self.overlay.begin().lookup_path(path.as_bytes());
        let inode = inode.map_err(|error| error.errno())?;
        self.overlay.inodes().count_lookup(&inode);
        Ok(inode)
    }

    fn split(&self, path: &str) -> R<(Arc<Inode>, Name)> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.find(parent)?, Name::new(name).unwrap()))
    }

    pub fn open(&self, path: &str, how: OpenOptions) -> R<Arc<FileHandle>> {
        let inode = self.find(path)?;
        let opened = self.overlay.begin().open(caller(), &inode, how);
        opened.map_err(|error| error.errno())
    }

    pub fn read_handle(&self, handle: &FileHandle) -> R<Vec<u8>> {
        let mut buffer = vec![0; 1 << 16];
        let read = self.overlay.begin().read(handle, 0, &mut buffer);
        buffer.truncate(read.map_err(|error| error.errno())?);
        Ok(buffer)
    }

    pub fn write_handle(&self, handle: &FileHandle, at: u64, data: &[u8]) -> R<()> {
        let written = self
            .overlay
            .begin()
            .write(handle, at, data, Writer::Privileged);
        let written = written.map_err(|error| error.errno())?;
        assert_eq!(written, data.len());
        Ok(())
    }

    pub fn read(&self, path: &str) -> R<Vec<u8>> {
        let handle = self.open(path, READ)?;
        let read = self.read_handle(&handle);
        self.overlay.close(&handle);
        read
    }

    pub fn create(&self, path: &str, data: &[u8]) -> R<()> {
        let (parent, name) = self.split(path)?;
        let made = self
            .overlay
            .begin()
            .create(caller(), &parent, &name, 0o644, WRITE);
        let (_, handle) = made.map_err(|error| error.errno())?;
        let written = self.write_handle(&handle, 0, data);
        self.overlay.close(&handle);
        written
    }

    pub fn overwrite(&self, path: &str, data: &[u8]) -> R<()> {
        let handle = self.open(path, TRUNCATE)?;
        let written = self.write_handle(&handle, 0, data);
        self.overlay.close(&handle);
        written
    }

    pub fn append(&self, path: &str, data: &[u8]) -> R<()> {
        let handle = self.open(path, WRITE)?;
        let size = self.attr(path)?.stat.size;
        let written = self.write_handle(&handle, size, data);
        self.overlay.close(&handle);
        written
    }

    pub fn attr(&self, path: &str) -> R<Attr> {
        self.attr_of_inode(&self.find(path)?)
    }

    pub fn attr_of_inode(&self, inode: &Arc<Inode>) -> R<Attr> {
        self.overlay
            .begin()
            .attr(inode)
            .map_err(|error| error.errno())
    }

    pub fn set(&self, path: &str, set: &SetAttr) -> R<Attr> {
        let inode = self.find(path)?;
        let done = self.overlay.begin().set_attr(caller(), &inode, set, None);
        done.map_err(|error| error.errno())
    }

    pub fn chmod(&self, path: &str, mode: u32) -> R<()> {
        let mode = SetAttr {
            mode: Some(mode),
            ..SetAttr::default()
        };
        self.set(path, &mode).map(drop)
    }

    pub fn truncate(&self, path: &str, size: u64) -> R<()> {
        let size = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        self.set(path, &size).map(drop)
    }

    pub fn mkdir(&self, path: &str) -> R<()> {
        let (parent, name) = self.split(path)?;
        let made = self.overlay.begin().mkdir(caller(), &parent, &name, 0o755);
        made.map(drop).map_err(|error| error.errno())
    }

    pub fn symlink(&self, path: &str, target: &str) -> R<()> {
        let (parent, name) = self.split(path)?;
        let op = self.overlay.begin();
        let made = op.symlink(caller(), &parent, &name, target.as_bytes());
        made.map(drop).map_err(|error| error.errno())
    }

    pub fn mkfifo(&self, path: &str) -> R<()> {
        let (parent, name) = self.split(path)?;
        let made = self
            .overlay
            .begin()
            .mknod(caller(), &parent, &name, 0o010_644, 0);
        made.map(drop).map_err(|error| error.errno())
    }

    pub fn zero_device(&self, path: &str, perm: u32) -> R<()> {
        let (parent, name) = self.split(path)?;
        let mode = FileKind::CharDevice.mode_bits() | perm;
        let op = self.overlay.begin();
        let made = op.mknod(caller(), &parent, &name, mode, 0);
        made.map(drop).map_err(|error| error.errno())
    }

    pub fn link(&self, old: &str, new: &str) -> R<()> {
        let inode = self.find(old)?;
        let (parent, name) = self.split(new)?;
        let made = self.overlay.begin().link(&inode, &parent, &name);
        made.map(drop).map_err(|error| error.errno())
    }

    pub fn unlink(&self, path: &str) -> R<()> {
        let (parent, name) = self.split(path)?;
        let done = self.overlay.begin().unlink(&parent, &name);
        done.map_err(|error| error.errno())
    }

    pub fn rmdir(&self, path: &str) -> R<()> {
        let (parent, name) = self.split(path)?;
        let done = self.overlay.begin().rmdir(&parent, &name);
        done.map_err(|error| error.errno())
    }

    pub fn rename(&self, old: &str, new: &str) -> R<()> {
        self.rename_with(old, new, RenameFlags::default())
    }

    pub fn exchange(&self, old: &str, new: &str) -> R<()> {
        let flags = RenameFlags {
            exchange: true,
            ..RenameFlags::default()
        };
        self.rename_with(old, new, flags)
    }

    pub fn rename_with(&self, old: &str, new: &str, flags: RenameFlags) -> R<()> {
        let (parent, name) = self.split(old)?;
        let (new_parent, new_name) = self.split(new)?;
        let op = self.overlay.begin();
        let done = op.rename(caller(), &parent, &name, &new_parent, &new_name, flags);
        done.map_err(|error| error.errno())
    }

    pub fn set_xattr(&self, path: &str, name: &str, value: &[u8]) -> R<()> {
        let inode = self.find(path)?;
        let op = self.overlay.begin();
        let done = op.set_xattr(caller(), &inode, name.as_bytes(), value, 0);
        done.map_err(|error| error.errno())
    }

    pub fn get_xattr(&self, path: &str, name: &str) -> R<Vec<u8>> {
        let inode = self.find(path)?;
        let got = self.overlay.begin().get_xattr(&inode, name.as_bytes());
        got.map_err(|error| error.errno())
    }

    pub fn remove_xattr(&self, path: &str, name: &str) -> R<()> {
        let inode = self.find(path)?;
        let done = self.overlay.begin().remove_xattr(&inode, name.as_bytes());
        done.map_err(|error| error.errno())
    }

    pub fn xattr_names(&self, inode: &Arc<Inode>) -> Vec<Vec<u8>> {
        let raw = self.overlay.begin().list_xattr(caller(), inode).unwrap();
        let mut names: Vec<Vec<u8>> = raw
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec)
            .collect();
        names.sort();
        names
    }

    pub fn entries(&self, inode: &Arc<Inode>) -> Vec<Entry> {
        let op = self.overlay.begin();
        let listing = op.listing(inode, 0).unwrap();
        let entries = listing.iter().map(|entry| Entry {
            name: entry.name().to_vec(),
            kind: entry.kind(),
            ino: op.entry_ino(&listing, entry).unwrap(),
        });
        let entries = entries.collect();
        while op.read_ahead().unwrap() {}
        entries
    }

    /// Returns the sorted names in a directory, without `.` and `..`.
    pub fn names(&self, path: &str) -> R<Vec<String>> {
        let entries = self.entries(&self.find(path)?);
        let names = entries
            .iter()
            .map(|e| String::from_utf8(e.name.to_vec()).unwrap());
        let mut names: Vec<_> = names.filter(|name| name != "." && name != "..").collect();
        names.sort();
        Ok(names)
    }

    /// Returns the merged tree, and verifies that listings agree with lookups.
    pub fn tree(&self) -> Tree {
        let mut tree = Tree::new();
        let mut groups: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        let mut numbers = Vec::new();
        let mut open = vec![String::new()];
        while let Some(dir) = open.pop() {
            // In the order of a tree walk, for which the overlay reads ahead.
            let known = open.len();
            for entry in self.entries(&self.find(&dir).unwrap()).iter() {
                let name = std::str::from_utf8(&entry.name).unwrap();
                if name == "." || name == ".." {
                    continue;
                }
                let path = format!("{dir}/{name}").trim_start_matches('/').to_owned();
                let attr = self.attr(&path).unwrap();
                assert_eq!(
                    (entry.ino, entry.kind),
                    (attr.ino, attr.stat.kind()),
                    "{path}"
                );
                let shown = self.shown(&path, &attr.stat);
                if shown.kind == FileKind::Directory {
                    open.push(path.clone());
                }
                groups.entry(attr.ino).or_default().push(path.clone());
                numbers.push((path.clone(), attr.ino));
                assert!(tree.insert(path, shown).is_none(), "listed twice");
            }
            open[known..].reverse();
        }
        for (path, ino) in numbers {
            let mut names = groups[&ino].clone();
            names.sort();
            let shown = tree.get_mut(&path).unwrap();
            if shown.kind == FileKind::Directory {
                assert_eq!(names.len(), 1, "two directories with one number: {names:?}");
            } else if !self.links_may_be_off {
                assert_eq!(shown.nlink, names.len() as u64, "links of {names:?}");
            }
            shown.names = names;
        }
        tree
    }

    fn shown(&self, path: &str, stat: &Stat) -> VisibleObject {
        let inode = self.find(path).unwrap();
        let kind = stat.kind();
        let is_dir = kind == FileKind::Directory;
        let names = self.xattr_names(&inode);
        let op = self.overlay.begin();
        let xattrs = names
            .into_iter()
            .map(|name| (name.clone(), op.get_xattr(&inode, &name).unwrap()))
            .collect();
        let content = match kind {
            FileKind::Symlink => op.read_link(&inode).unwrap(),
            FileKind::Regular => {
                drop(op);
                self.read(path).unwrap()
            }
            _ => Vec::new(),
        };
        if kind == FileKind::Regular && content.len() < 1 << 16 {
            assert_eq!(content.len() as u64, stat.size, "the size of {path}");
        }
        VisibleObject {
            kind,
            perm: stat.perm(),
            owner: (stat.uid, stat.gid),
            rdev: stat.rdev,
            size: if is_dir { 0 } else { stat.size },
            mtime: (!is_dir).then_some(stat.mtime),
            nlink: if is_dir { 0 } else { stat.nlink },
            names: Vec::new(),
            content,
            xattrs,
        }
    }

    pub fn number(&self, path: &str) -> u64 {
        self.attr(path).unwrap().ino
    }
}

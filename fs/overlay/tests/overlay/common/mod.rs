//! Layers in a temporary directory, and an overlay over them in process, driven by paths. No mount.
//!
//! Also the states that tests compare: the merged tree ([`Fs::tree`]), a layer on disk ([`disk`]), and a short
//! description of the upper layer ([`Lab::describe_upper`]).
#![allow(dead_code, reason = "every test file uses a part")]
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod estate;
mod shown;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowl_layers::error::Errno;
use cowl_layers::format::{OPAQUE, XattrSpace};
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::private::Through;
use cowl_layers::sys::stat::{FileKind, Stat, Time};
pub use cowl_overlay::OpenOptions;
use cowl_overlay::{Caller, Overlay, OverlayOptions, PushError, PushRequest};

#[allow(unused_imports, reason = "every test file uses a part")]
pub use estate::Kept;
#[allow(unused_imports, reason = "every test file uses a part")]
pub use shown::{Fs, Tree, VisibleObject};

pub type R<T> = Result<T, Errno>;

/// The times of all objects in a new lower layer.
pub const FIXED_TIME: Time = Time {
    secs: 1_000_000_000,
    nanos: 123_456_789,
};

pub const READ: OpenOptions = OpenOptions::READ;
pub const WRITE: OpenOptions = OpenOptions::WRITE;
pub const TRUNCATE: OpenOptions = OpenOptions {
    keep_atime: false,
    write: true,
    truncate: true,
    exec: false,
};

pub fn caller() -> Caller {
    Caller {
        pid: std::process::id(),
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        umask: 0o022,
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns the xattr namespaces that this process can test.
pub fn spaces() -> &'static [XattrSpace] {
    if is_root() {
        &[XattrSpace::Trusted, XattrSpace::User]
    } else {
        &[XattrSpace::User]
    }
}

pub fn metacopy() -> OverlayOptions {
    OverlayOptions {
        metacopy: true,
        ..OverlayOptions::default()
    }
}

/// The layer directories of one test.
pub struct Lab {
    dir: tempfile::TempDir,
    /// Topmost first.
    lowers: RefCell<Vec<PathBuf>>,
    upper: RefCell<usize>,
    pub space: XattrSpace,
    pub options: OverlayOptions,
}

impl Lab {
    /// Creates a lower layer with the content that `build` creates, and an empty upper layer.
    pub fn new(build: impl FnOnce(&Path)) -> Self {
        let lab = Self {
            dir: tempfile::tempdir().unwrap(),
            lowers: RefCell::default(),
            upper: RefCell::new(0),
            space: XattrSpace::detect(),
            options: metacopy(),
        };
        lab.add_lower(build);
        lab.make_upper(0);
        lab
    }

    /// Uses existing lower layers, topmost first.
    pub fn over(layers: Vec<PathBuf>) -> Self {
        let lab = Self::new(|_| {});
        *lab.lowers.borrow_mut() = layers;
        lab
    }

    pub fn with(mut self, options: OverlayOptions) -> Self {
        self.options = options;
        self
    }

    pub fn in_space(mut self, space: XattrSpace) -> Self {
        self.space = space;
        self
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Adds a lower layer above the others.
    pub fn add_lower(&self, build: impl FnOnce(&Path)) {
        let path = self.path().join(format!("l{}", self.lowers.borrow().len()));
        std::fs::create_dir(&path).unwrap();
        build(&path);
        set_fixed_times(&path);
        self.lowers.borrow_mut().insert(0, path);
    }

    pub fn lower(&self) -> PathBuf {
        self.lowers.borrow().first().unwrap().clone()
    }

    pub fn upper(&self) -> PathBuf {
        self.path().join(format!("u{}", self.upper.borrow()))
    }

    pub fn work(&self) -> PathBuf {
        self.path().join(format!("w{}", self.upper.borrow()))
    }

    fn make_upper(&self, number: usize) {
        *self.upper.borrow_mut() = number;
        std::fs::create_dir(self.upper()).unwrap();
        std::fs::create_dir(self.work()).unwrap();
    }

    fn open_upper(&self) -> Arc<Upper> {
        Upper::open(&self.upper(), &self.work(), self.space).unwrap()
    }

    fn open_lowers(&self) -> Vec<Arc<Layer>> {
        let lowers = self.lowers.borrow();
        lowers
            .iter()
            .map(|path| Layer::open(path, self.space).unwrap())
            .collect()
    }

    /// Opens a new overlay over the layers, as a mount does.
    pub fn open(&self) -> Fs {
        let upper = Some(self.open_upper());
        Fs::new(Overlay::new(upper, self.open_lowers(), self.options.clone()).unwrap())
    }

    /// Opens a new overlay that interprets the markers of fuse-overlayfs.
    pub fn open_foreign(&self) -> Fs {
        let open = |path: &Path| Layer::open_foreign(path, self.space).unwrap();
        let upper = Upper::from_layer(Through::WRITING, open(&self.upper()), &self.work()).unwrap();
        let lowers = self.lowers.borrow().iter().map(|path| open(path)).collect();
        Fs::new(Overlay::new(Some(upper), lowers, self.options.clone()).unwrap())
    }

    /// Opens a new overlay with additional data-only layers, topmost first.
    pub fn open_over_data(&self, data: &[&Path]) -> Fs {
        let fs = self.open();
        let open = |path: &&Path| Layer::open(path, self.space).unwrap();
        Fs::new(fs.overlay.with_data_layers(data.iter().map(open).collect()))
    }

    /// Opens a read-only overlay of all layers, including the upper one.
    pub fn open_read_only(&self) -> Fs {
        let mut layers = vec![Layer::open(&self.upper(), self.space).unwrap()];
        layers.extend(self.open_lowers());
        Fs::new(Overlay::new(None, layers, self.options.clone()).unwrap())
    }

    /// Opens a read-only overlay of all layers, to whose upper one another overlay writes.
    pub fn open_live(&self) -> Fs {
        let mut layers = vec![Layer::open(&self.upper(), self.space).unwrap()];
        layers.extend(self.open_lowers());
        let options = OverlayOptions {
            live_layers: true,
            ..self.options.clone()
        };
        Fs::new(Overlay::new(None, layers, options).unwrap())
    }

    /// Pushes a new, empty upper layer, and returns the path of the old one.
    pub fn push(&self, fs: &Fs) -> Result<PathBuf, PushError> {
        self.push_with(fs, &PushRequest::default())
    }

    /// Like [`Self::push`], with files that are read or written without requests.
    pub fn push_with(&self, fs: &Fs, request: &PushRequest<'_>) -> Result<PathBuf, PushError> {
        let (old, old_number) = (self.upper(), *self.upper.borrow());
        self.make_upper(old_number + 1);
        match fs.overlay.push_layer(self.open_upper(), request) {
            Ok(_) => {
                let (_, lowers) = fs.overlay.layer_paths();
                assert_eq!(lowers.first(), Some(&old));
                self.lowers.borrow_mut().insert(0, old.clone());
                Ok(old)
            }
            Err(error) => {
                std::fs::remove_dir_all(self.upper()).unwrap();
                std::fs::remove_dir_all(self.work()).unwrap();
                *self.upper.borrow_mut() = old_number;
                Err(error)
            }
        }
    }

    /// Returns a short description of each object in the upper layer, without the markers of inode numbers.
    pub fn describe_upper(&self) -> Vec<String> {
        let mut lines = Vec::new();
        walk(&self.upper(), &mut |path, stat| {
            let word = match stat.kind() {
                FileKind::CharDevice if stat.rdev == 0 => "whiteout",
                FileKind::Directory => "dir",
                FileKind::Regular => "file",
                FileKind::Symlink => "symlink",
                _ => "node",
            };
            let mut line = format!("{} {word}", relative(&self.upper(), path));
            for (name, value) in xattrs(path) {
                let Some(marker) = name.strip_prefix(self.space.prefix()) else {
                    continue;
                };
                match marker {
                    "cowl.ino" => {}
                    "opaque" if value == OPAQUE => line += " opaque",
                    "metacopy" => line += " metacopy",
                    _ => line += &format!(" {marker}={}", value.escape_ascii()),
                }
            }
            lines.push(line);
        });
        lines
    }
}

pub fn relative(top: &Path, path: &Path) -> String {
    path.strip_prefix(top).unwrap().to_str().unwrap().to_owned()
}

/// Calls `visit` for every object below `top`, in sorted order.
pub fn walk(top: &Path, visit: &mut dyn FnMut(&Path, &Stat)) {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(top)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    for path in paths {
        let stat = lstat(&path);
        visit(&path, &stat);
        if stat.kind() == FileKind::Directory {
            walk(&path, visit);
        }
    }
}

fn open_path(path: &Path) -> std::os::fd::OwnedFd {
    let dir = sys::dir::open_root(path.parent().unwrap()).unwrap();
    sys::dir::open_path(dir.as_fd(), path.file_name().unwrap().as_bytes()).unwrap()
}

pub fn lstat(path: &Path) -> Stat {
    sys::stat::stat_fd(open_path(path)).unwrap()
}

pub fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let all = sys::xattr::all(open_path(path).as_fd()).unwrap();
    all.into_iter()
        .map(|(name, value)| (String::from_utf8(name).unwrap(), value))
        .collect()
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    sys::xattr::set(open_path(path).as_fd(), name.as_bytes(), value).unwrap();
}

/// Sets the times of all objects in a tree to [`FIXED_TIME`].
pub fn set_fixed_times(top: &Path) {
    let then = SetTime::At(FIXED_TIME);
    let mut paths = vec![top.to_path_buf()];
    walk(top, &mut |path, _| paths.push(path.to_path_buf()));
    for path in paths {
        sys::attr::utimens(open_path(&path).as_fd(), then, then).unwrap();
    }
}

/// Creates files whose content is derived from their paths, and directories for paths that end in a slash.
pub fn create_files(top: &Path, paths: &[impl AsRef<str>]) {
    for path in paths.iter().map(AsRef::as_ref) {
        let full = top.join(path);
        if path.ends_with('/') {
            std::fs::create_dir_all(full).unwrap();
        } else {
            std::fs::create_dir_all(full.parent().unwrap()).unwrap();
            std::fs::write(full, format!("content of {path}")).unwrap();
        }
    }
}

/// Returns a line for each object below `top` with all its properties on disk except the access time.
pub fn disk(top: &Path) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    walk(top, &mut |path, stat| {
        let stat = Stat {
            atime: Time::default(),
            ..*stat
        };
        let content = match stat.kind() {
            FileKind::Regular => std::fs::read(path).unwrap(),
            FileKind::Symlink => std::fs::read_link(path)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec(),
            _ => Vec::new(),
        };
        let line = format!("{stat:?} {:?} {}", xattrs(path), content.escape_ascii());
        lines.insert(relative(top, path), line);
    });
    lines
}

/// Sets the mode of a file on disk.
pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

pub fn blocks(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks()
}

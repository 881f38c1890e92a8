//! Shared code of the benchmarks: an in-process overlay over temporary directories, without a mount.

use std::path::Path;
use std::sync::Arc;

use cowl_layers::Name;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, Upper};
use cowl_overlay::{Caller, Overlay, OverlayOptions};
use tempfile::TempDir;

/// The caller of all operations.
pub const ROOT: Caller = Caller {
    pid: 0,
    uid: 0,
    gid: 0,
    umask: 0o022,
};

/// Error of setting up a benchmark.
pub type Failure = Box<dyn std::error::Error>;

/// An overlay over layers in a temporary directory.
#[derive(Debug)]
pub struct Stage {
    /// The overlay.
    pub overlay: Overlay,
    dir: TempDir,
    uppers: u32,
}

impl Stage {
    /// Creates an overlay with an empty upper layer over `layers` lower layers. `fill` fills each lower layer, by its
    /// number; 0 is the topmost.
    pub fn new(
        layers: usize,
        fill: impl Fn(usize, &Path) -> std::io::Result<()>,
    ) -> Result<Self, Failure> {
        Self::new_in(Path::new("/var/tmp"), layers, fill)
    }

    /// Like [`Stage::new`], in the directory `parent`.
    pub fn new_in(
        parent: &Path,
        layers: usize,
        fill: impl Fn(usize, &Path) -> std::io::Result<()>,
    ) -> Result<Self, Failure> {
        let dir = tempfile::tempdir_in(parent)?;
        let mut lowers = Vec::new();
        for number in 0..layers {
            let path = dir.path().join(format!("lower{number}"));
            std::fs::create_dir(&path)?;
            fill(number, &path)?;
            lowers.push(Layer::open(&path, XattrSpace::detect())?);
        }
        let options = OverlayOptions {
            metacopy: true,
            ..OverlayOptions::default()
        };
        let upper = make_upper(dir.path(), 0)?;
        let overlay = Overlay::new(Some(upper), lowers, options)?;
        Ok(Self {
            overlay,
            dir,
            uppers: 1,
        })
    }

    /// Creates an empty upper layer for `push_layer`.
    pub fn next_upper(&mut self) -> Result<Arc<Upper>, Failure> {
        let upper = make_upper(self.dir.path(), self.uppers)?;
        self.uppers += 1;
        Ok(upper)
    }
}

/// Returns a function for [`Stage::new`] that distributes `files` files over `layers` layers.
pub fn spread(layers: usize, files: usize) -> impl Fn(usize, &Path) -> std::io::Result<()> {
    move |number, path| {
        for file in (number..files).step_by(layers) {
            std::fs::write(path.join(format!("f{file}")), b"content")?;
        }
        Ok(())
    }
}

/// Converts text to a name.
///
/// # Panics
///
/// If `text` is not a valid name.
#[must_use]
#[allow(clippy::expect_used, reason = "the benchmarks use valid names only")]
pub fn name(text: &str) -> Name {
    Name::new(text).expect("a valid name")
}

fn make_upper(dir: &Path, number: u32) -> Result<Arc<Upper>, Failure> {
    let (tree, work) = (
        dir.join(format!("upper{number}")),
        dir.join(format!("work{number}")),
    );
    std::fs::create_dir(&tree)?;
    std::fs::create_dir(&work)?;
    Ok(Upper::open(&tree, &work, XattrSpace::detect())?)
}

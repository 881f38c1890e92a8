//! What the benchmarks share: an overlay on temporary folders, in process, without a mount.

use std::path::Path;
use std::sync::Arc;

use cowl_layers::Name;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, Upper};
use cowl_overlay::{Behaviour, Caller, Overlay};
use tempfile::TempDir;

/// Everybody's caller.
pub const ROOT: Caller = Caller {
    pid: 0,
    uid: 0,
    gid: 0,
    umask: 0o022,
};

/// An error of making a benchmark's stage.
pub type Failure = Box<dyn std::error::Error>;

/// Layers in a temporary folder, and an overlay over them.
#[derive(Debug)]
pub struct Stage {
    /// The overlay.
    pub overlay: Overlay,
    place: TempDir,
    uppers: u32,
}

impl Stage {
    /// `layers` lowers, filled by `fill` with their number (0 is the topmost), below a fresh upper.
    pub fn new(
        layers: usize,
        fill: impl Fn(usize, &Path) -> std::io::Result<()>,
    ) -> Result<Self, Failure> {
        Self::new_in(Path::new("/var/tmp"), layers, fill)
    }

    /// The same in another folder.
    pub fn new_in(
        parent: &Path,
        layers: usize,
        fill: impl Fn(usize, &Path) -> std::io::Result<()>,
    ) -> Result<Self, Failure> {
        let place = tempfile::tempdir_in(parent)?;
        let mut lowers = Vec::new();
        for number in 0..layers {
            let path = place.path().join(format!("lower{number}"));
            std::fs::create_dir(&path)?;
            fill(number, &path)?;
            lowers.push(Layer::open(&path, XattrSpace::detect())?);
        }
        let behaviour = Behaviour {
            metacopy: true,
            ..Behaviour::default()
        };
        let upper = make_upper(place.path(), 0)?;
        let overlay = Overlay::new(Some(upper), lowers, behaviour)?;
        Ok(Self {
            overlay,
            place,
            uppers: 1,
        })
    }

    /// A fresh upper, for a push.
    pub fn next_upper(&mut self) -> Result<Arc<Upper>, Failure> {
        let upper = make_upper(self.place.path(), self.uppers)?;
        self.uppers += 1;
        Ok(upper)
    }
}

/// So many files, spread over so many layers: what [`Stage::new`] fills them with.
pub fn spread(layers: usize, files: usize) -> impl Fn(usize, &Path) -> std::io::Result<()> {
    move |number, path| {
        for file in (number..files).step_by(layers) {
            std::fs::write(path.join(format!("f{file}")), b"content")?;
        }
        Ok(())
    }
}

/// A name.
///
/// # Panics
///
/// When it can't be one.
#[must_use]
#[allow(clippy::expect_used, reason = "of the benchmarks' own making")]
pub fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn make_upper(place: &Path, number: u32) -> Result<Arc<Upper>, Failure> {
    let (tree, work) = (
        place.join(format!("upper{number}")),
        place.join(format!("work{number}")),
    );
    std::fs::create_dir(&tree)?;
    std::fs::create_dir(&work)?;
    Ok(Upper::open(&tree, &work, XattrSpace::detect())?)
}

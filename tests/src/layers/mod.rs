//! Layers in kernel overlayfs's format, made by hand or by the kernel itself, and the plain tree that
//! they must look like when they are merged.

mod fill;
mod merge;

use std::ffi::OsStr;
use std::io::Result;
use std::path::{Path, PathBuf};

use crate::mount::{Overlay, Stack};
use crate::random::{Generator, Rng, Side};
use crate::{command, tree};

pub use merge::copy_root;

/// The marks, in the space that root uses.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";
pub(crate) const REDIRECT: &str = "trusted.overlay.redirect";
pub(crate) const METACOPY: &str = "trusted.overlay.metacopy";
pub(crate) const MARKS: &[u8] = b"trusted.overlay.";

/// How layers are to be.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Which ones.
    pub seed: u64,
    /// Whiteouts that hide nothing, too. They mean nothing, but the kernel lists them, so that such
    /// layers can't be compared with what it shows.
    pub stray: bool,
    /// Files with several names: in every layer, or in the topmost alone, so that none of those names
    /// is hidden by another layer.
    pub links: Links,
    /// With ACLs, sockets, odd names, moved objects and metacopies.
    pub rich: bool,
    /// The upper two layers come from random operations on a mount of the kernel's overlayfs.
    pub by_kernel: bool,
}

impl Wish {
    /// Layers made by hand, which the kernel shows too.
    #[must_use]
    pub fn of(seed: u64) -> Wish {
        Wish {
            seed,
            stray: false,
            links: if seed.is_multiple_of(3) {
                Links::Everywhere
            } else {
                Links::OnTop
            },
            rich: false,
            by_kernel: false,
        }
    }
}

/// Where files with several names may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Everywhere.
    Everywhere,
    /// In the topmost layer.
    OnTop,
}

/// Three lower layers, topmost first, and the merged plain tree.
pub fn make_three(dir: &Path, wish: Wish) -> Result<(Vec<PathBuf>, PathBuf)> {
    let mut rng = Rng::new(wish.seed ^ 0x6c61_7965_7273);
    let mut plain = make(dir, "plain");
    let mut layers: Vec<PathBuf> = Vec::new();
    for index in 0..3 {
        let layer = make(dir, &format!("lower{index}"));
        if wish.by_kernel && index > 0 {
            let seed = wish.seed * 8 + index;
            write_through_kernel(dir, &layers, &layer, seed)?;
        } else {
            let style = fill::Style {
                marks: index > 0,
                links: wish.links == Links::Everywhere
                    || (wish.links == Links::OnTop && index == 2),
                stray: wish.stray,
                rich: wish.rich,
            };
            fill::fill(&layer, &plain, style, &mut rng)?;
            let merged = make(dir, &format!("plain{index}"));
            merge::merge(&layer, &plain, &merged)?;
            std::fs::remove_dir_all(&plain)?;
            plain = merged;
        }
        layers.insert(0, layer);
    }
    if wish.by_kernel {
        std::fs::remove_dir_all(&plain)?;
        plain = make(dir, "plain-of-kernel");
        let stack = Stack {
            lowers: layers.clone(),
            upper: None,
        };
        let kernel = Overlay::kernel(&stack, &make(dir, "kernel-reads"));
        copy_tree(kernel.path(), &plain);
        kernel.unmount();
    }
    Ok((layers, plain))
}

/// Fills `layer` by random operations on a mount over `below`.
fn write_through_kernel(dir: &Path, below: &[PathBuf], layer: &Path, seed: u64) -> Result<()> {
    // The kernel takes the root's attributes from the upper.
    if let Some(top) = below.first() {
        copy_root(top, layer)?;
    }
    let stack = Stack {
        lowers: below.to_vec(),
        upper: Some((layer.to_owned(), make(dir, &format!("kernel-work{seed}")))),
    };
    let kernel = Overlay::kernel(&stack, &make(dir, "kernel-writes"));
    let mut generator = Generator::new(seed);
    let mut side = Side::new(kernel.path());
    let mut known = tree::Paths::default();
    for step in 0..120 {
        if step % 4 == 0 {
            known = tree::paths(kernel.path())?;
        }
        let who = generator.who(5);
        // What comes of it does not matter: the tree that is there at the end does.
        let outcome = side.perform(&generator.next(&known), who);
        if std::env::var_os("COWL_TRACE_LAYERS").is_some() {
            eprintln!("{outcome:?}");
        }
    }
    drop(side);
    kernel.unmount();
    Ok(())
}

fn make(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(&path)
        .unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
    path
}

/// A copy with everything that a tree has.
#[track_caller]
pub fn copy_tree(from: &Path, to: &Path) {
    command::run("cp", [OsStr::new("-aT"), from.as_ref(), to.as_ref()]).ok();
}

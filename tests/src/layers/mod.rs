//! Generates layers in the format of kernel overlayfs, directly or through the kernel itself, and the plain tree that
//! their merge must be equal to.

mod fill;
mod merge;

use std::ffi::OsStr;
use std::io::Result;
use std::path::{Path, PathBuf};

use crate::mount::{Overlay, Stack};
use crate::random::{Generator, Rng, Side};
use crate::{command, tree};

pub use merge::copy_root;

/// Marker xattrs, in the namespace that root uses.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";
pub(crate) const REDIRECT: &str = "trusted.overlay.redirect";
pub(crate) const METACOPY: &str = "trusted.overlay.metacopy";
pub(crate) const MARKS: &[u8] = b"trusted.overlay.";

/// Properties of the generated layers.
#[derive(Debug, Clone, Copy)]
pub struct LayerSpec {
    /// Seed.
    pub seed: u64,
    /// Whether to add whiteouts that hide no object. The kernel lists them, so such layers cannot be compared with a
    /// mount of kernel overlayfs.
    pub stray: bool,
    /// Where to create hard links: in every layer, or only in the topmost, so that no other layer hides one of the
    /// names.
    pub links: Links,
    /// Whether to add ACLs, sockets, unusual names, moved objects and metacopies.
    pub rich: bool,
    /// Whether random operations on a mount of kernel overlayfs create the two upper layers.
    pub by_kernel: bool,
}

impl LayerSpec {
    /// Returns the properties of directly written layers that the kernel can mount with the same result.
    #[must_use]
    pub fn of(seed: u64) -> LayerSpec {
        LayerSpec {
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

/// Location of hard links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// In all layers.
    Everywhere,
    /// In the topmost layer only.
    OnTop,
}

/// Creates three lower layers, topmost first, and the merged plain tree.
pub fn make_three(dir: &Path, spec: LayerSpec) -> Result<(Vec<PathBuf>, PathBuf)> {
    let mut rng = Rng::new(spec.seed ^ 0x6c61_7965_7273);
    let mut plain = make(dir, "plain");
    let mut layers: Vec<PathBuf> = Vec::new();
    for index in 0..3 {
        let layer = make(dir, &format!("lower{index}"));
        if spec.by_kernel && index > 0 {
            let seed = spec.seed * 8 + index;
            write_through_kernel(dir, &layers, &layer, seed)?;
        } else {
            let style = fill::Style {
                marks: index > 0,
                links: spec.links == Links::Everywhere
                    || (spec.links == Links::OnTop && index == 2),
                stray: spec.stray,
                rich: spec.rich,
            };
            fill::fill(&layer, &plain, style, &mut rng)?;
            let merged = make(dir, &format!("plain{index}"));
            merge::merge(&layer, &plain, &merged)?;
            std::fs::remove_dir_all(&plain)?;
            plain = merged;
        }
        layers.insert(0, layer);
    }
    if spec.by_kernel {
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
        let caller = generator.caller(5);
        // The outcome is irrelevant, only the final tree is used.
        let outcome = side.perform(&generator.next(&known), caller);
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
        .unwrap_or_else(|error| panic!("cannot create {}: {error}", path.display()));
    path
}

/// Copies a tree with all attributes.
#[track_caller]
pub fn copy_tree(from: &Path, to: &Path) {
    command::run("cp", [OsStr::new("-aT"), from.as_ref(), to.as_ref()]).ok();
}

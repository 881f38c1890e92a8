//! Tests of flatten on stacks of layers that kernel overlayfs wrote, and on layers with markers set by the test.

use cowl_layers::shown::Show as _;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;

use super::compare_tests::check_diff_of_every_pair;
use super::flatten;
use crate::tree::digest;
use crate::tree::testing::{self, assert_same, describe, is_root, one_of_everything, run};

/// A mount of kernel overlayfs, which is unmounted on drop.
struct Mount(PathBuf);

impl Mount {
    /// Mounts the layers, topmost first. The first one is the upper layer if there is a work directory.
    fn new(layers: &[PathBuf], work: Option<&Path>, at: &Path) -> Self {
        let (upper, lowers) = match work {
            Some(_) => layers
                .split_first()
                .map(|(upper, lowers)| (Some(upper), lowers))
                .unwrap(),
            None => (None, layers),
        };
        let lowers: Vec<&str> = lowers.iter().map(|path| path.to_str().unwrap()).collect();
        let mut options = format!(
            "redirect_dir=on,metacopy=on,xino=off,index=off,lowerdir={}",
            lowers.join(":")
        );
        if let (Some(upper), Some(work)) = (upper, work) {
            options += &format!(",upperdir={},workdir={}", upper.shown(), work.shown());
        } else {
            options = options.replace("redirect_dir=on", "redirect_dir=follow");
        }
        let args = ["-t", "overlay", "overlay", "-o", &options].map(OsStr::new);
        run("mount", &[&args[..], &[at.as_os_str()]].concat());
        Self(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Retry: a child that another test has forked but not yet exec'd inherits the descriptors.
        for _ in 0..100 {
            let output = std::process::Command::new("umount")
                .arg(&self.0)
                .output()
                .unwrap();
            if output.status.success() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        run("umount", &[self.0.as_os_str()]);
    }
}

/// The directories of a stack of layers, topmost last.
pub(crate) struct Stack {
    dir: tempfile::TempDir,
    pub(crate) layers: Vec<PathBuf>,
}

impl Stack {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            layers: Vec::new(),
        }
    }

    pub(crate) fn create_dir(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// Adds an empty layer on top.
    pub(crate) fn layer(&mut self) -> PathBuf {
        let path = self.create_dir(&format!("l{}", self.layers.len()));
        self.layers.push(path.clone());
        path
    }

    /// Adds a layer on top, which `change` writes through a kernel mount.
    pub(crate) fn write(&mut self, change: impl FnOnce(&Path)) {
        self.layer();
        let at = self.create_dir(&format!("m{}", self.layers.len()));
        let work = self.create_dir(&format!("w{}", self.layers.len()));
        let mount = Mount::new(&self.down(..), Some(&work), &at);
        change(&at);
        drop(mount);
    }

    /// Returns the layers of a range, topmost first.
    pub(crate) fn down(
        &self,
        range: impl std::slice::SliceIndex<[PathBuf], Output = [PathBuf]>,
    ) -> Vec<PathBuf> {
        self.layers[range].iter().rev().cloned().collect()
    }
}

fn open(layers: &[PathBuf]) -> Vec<std::sync::Arc<Layer>> {
    layers
        .iter()
        .map(|path| Layer::open(path, XattrSpace::Trusted).unwrap())
        .collect()
}

pub(crate) fn view(layers: &[PathBuf]) -> View {
    View::new(open(layers))
}

pub(super) fn kernel_shows(
    stack: &Stack,
    layers: &[PathBuf],
    name: &str,
) -> BTreeMap<String, String> {
    let at = stack.create_dir(name);
    // A read-only overlay needs two layers.
    let empty = stack.create_dir(&format!("{name}-empty"));
    let layers = [layers, &[empty]].concat();
    let _mount = Mount::new(&layers, None, &at);
    describe(&at)
}

/// Flattens every range of the stack, and verifies that the result is unchanged for the kernel and for `View`.
fn check_flatten_of_every_range(stack: &Stack, prefix: &str) {
    let all = stack.down(..);
    let want = kernel_shows(stack, &all, &format!("{prefix}-whole"));
    let want_digest = digest(&view(&all), &mut |_| {}).unwrap();
    let count = stack.layers.len();
    for low in 0..count {
        for high in low + 1..=count {
            let name = format!("{prefix}-{low}-{high}");
            let target = stack.create_dir(&name);
            let range = open(&stack.down(low..high));
            let (part, beneath) = if low > 0 {
                (View::part(range), Some(view(&stack.down(..low))))
            } else {
                (View::new(range), None)
            };
            flatten(&part, beneath.as_ref(), &target, &mut |_| {})
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            let layers = [stack.down(high..), vec![target.clone()], stack.down(..low)].concat();
            let at = stack.create_dir(&format!("{name}-m"));
            let empty = stack.create_dir(&format!("{name}-e"));
            let mount = Mount::new(&[&layers[..], &[empty]].concat(), None, &at);
            assert_same(&at, &want, &name);
            drop(mount);
            assert_eq!(
                digest(&view(&layers), &mut |_| {}).unwrap(),
                want_digest,
                "{name}"
            );
            if low == 0 {
                assert_no_markers(&target);
            }
        }
    }
}

fn assert_no_markers(tree: &Path) {
    for (path, line) in describe(tree) {
        assert!(!line.contains(".overlay."), "{path}: {line}");
        assert!(
            !(line.starts_with("20") && line.contains(" dev 0")),
            "{path}: {line}"
        );
    }
}

#[test]
fn layers_of_the_kernel_flatten_to_the_same_tree() {
    if !is_root() {
        return;
    }
    let mut stack = Stack::new();
    let base = stack.layer();
    one_of_everything(&base);
    for name in ["gone", "moved", "back", "refilled", "deep"] {
        fs::create_dir_all(base.join(name).join("inner/most")).unwrap();
        fs::write(base.join(name).join("inner/file"), name).unwrap();
        fs::write(base.join(name).join("file"), name).unwrap();
    }
    stack.write(|at| {
        fs::remove_dir_all(at.join("gone")).unwrap();
        fs::rename(at.join("moved"), at.join("moved2")).unwrap();
        fs::rename(at.join("back"), at.join("away")).unwrap();
        fs::remove_dir_all(at.join("refilled")).unwrap();
        fs::create_dir(at.join("refilled")).unwrap();
        fs::write(at.join("refilled/new"), b"n").unwrap();
        fs::rename(at.join("deep/inner"), at.join("refilled/from-deep")).unwrap();
        testing::chmod(&at.join("dir/big"), 0o600);
        fs::rename(at.join("dir/big"), at.join("big2")).unwrap();
        fs::remove_file(at.join("link")).unwrap();
        fs::create_dir(at.join("link")).unwrap();
    });
    stack.write(|at| {
        fs::create_dir(at.join("gone")).unwrap();
        fs::rename(at.join("moved2/inner"), at.join("gone/inner")).unwrap();
        fs::rename(at.join("away"), at.join("back")).unwrap();
        fs::remove_file(at.join("back/inner/file")).unwrap();
        testing::chown(&at.join("big2"), 5, 6);
        fs::rename(at.join("big2"), at.join("moved2/big3")).unwrap();
        fs::remove_dir(at.join("refilled/from-deep/most")).unwrap();
        fs::remove_dir(at.join("link")).unwrap();
        symlink("again", at.join("link")).unwrap();
        fs::write(at.join("h1"), b"hard").unwrap();
        fs::hard_link(at.join("h1"), at.join("back/h2")).unwrap();
    });
    stack.write(|at| {
        fs::rename(at.join("gone"), at.join("back/gone")).unwrap();
        testing::chmod(&at.join("moved2/big3"), 0o604);
        fs::write(at.join("back/gone/inner/file"), b"written").unwrap();
        fs::remove_file(at.join("h1")).unwrap();
    });
    check_flatten_of_every_range(&stack, "hand");
}

/// A pseudorandom number generator with a fixed sequence for each seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// Performs a random change. A change that is impossible in the current tree is skipped.
fn apply_random_change(at: &Path, random: &mut Random) {
    let mut paths: Vec<PathBuf> = testing::walk(at)
        .into_iter()
        .map(|path| at.join(OsString::from(String::from_utf8(path).unwrap())))
        .collect();
    paths.sort();
    let dirs: Vec<PathBuf> = paths
        .iter()
        .filter(|path| path.is_dir() && !path.is_symlink())
        .cloned()
        .collect();
    let mut dirs = dirs;
    dirs.push(at.to_owned());
    let any = paths
        .get(random.below(paths.len().max(1)))
        .cloned()
        .unwrap_or(at.join("none"));
    let new = dirs[random.below(dirs.len())].join(["a", "b", "c", "d", "e"][random.below(5)]);
    let done = match random.below(11) {
        0 | 1 => fs::create_dir(&new),
        2 => fs::write(&new, format!("content {}", random.below(1000))),
        3 => fs::remove_file(&any),
        4 => fs::remove_dir_all(&any),
        5..=7 => fs::rename(&any, &new),
        8 if !any.is_symlink() => fs::set_permissions(
            &any,
            std::os::unix::fs::PermissionsExt::from_mode(
                0o700 + u32::try_from(random.below(8)).unwrap(),
            ),
        ),
        9 => symlink("target", &new),
        _ => fs::hard_link(&any, &new),
    };
    if let Err(error) = done {
        use std::io::ErrorKind::*;
        let expected = [
            NotFound,
            AlreadyExists,
            IsADirectory,
            NotADirectory,
            DirectoryNotEmpty,
            InvalidInput,
            PermissionDenied,
        ];
        assert!(expected.contains(&error.kind()), "{error}");
    }
}

/// Returns the seeds of the random stacks: a few, and those that found an error; COWL_TEST_SEEDS sets how many.
pub(crate) fn seeds() -> impl Iterator<Item = u64> {
    let count = std::env::var("COWL_TEST_SEEDS").map_or(4, |count| count.parse().unwrap());
    // 2: names of one metacopy in two directories; 22: a redirect below an opaque directory.
    (0..count).chain([2, 22])
}

/// Returns a stack of four layers with random content, of which the kernel wrote the upper three.
pub(crate) fn random_stack(seed: u64) -> Stack {
    let mut random = Random(seed);
    let mut stack = Stack::new();
    let base = stack.layer();
    for _ in 0..40 {
        apply_random_change(&base, &mut random);
    }
    for _ in 0..3 {
        let mut inner = Random(random.below(1 << 20) as u64);
        stack.write(|at| {
            for _ in 0..15 {
                apply_random_change(at, &mut inner);
            }
        });
    }
    stack
}

#[test]
fn random_stacks_of_the_kernel_flatten_to_the_same_tree() {
    if !is_root() {
        return;
    }
    for seed in seeds() {
        let stack = random_stack(seed);
        check_flatten_of_every_range(&stack, &format!("seed{seed}"));
        check_diff_of_every_pair(&stack);
    }
}

#[test]
fn manually_set_markers_and_type_changes_flatten() {
    if !is_root() {
        return;
    }
    let mut stack = Stack::new();
    let base = stack.layer();
    fs::create_dir_all(base.join("d/sub")).unwrap();
    fs::write(base.join("d/low"), b"low").unwrap();
    fs::write(base.join("f"), b"f").unwrap();
    let middle = stack.layer();
    fs::create_dir(middle.join("d")).unwrap();
    testing::set_xattr(&middle.join("d"), "trusted.overlay.opaque", b"y");
    testing::set_xattr(
        &middle.join("d"),
        "trusted.overlay.overlay.opaque",
        b"a user's own",
    );
    fs::write(middle.join("d/mid"), b"mid").unwrap();
    testing::mknod(&middle.join("f"), FileKind::CharDevice, 0, 0);
    testing::mknod(&middle.join("never-was"), FileKind::CharDevice, 0, 0);
    let top = stack.layer();
    fs::create_dir_all(top.join("d/sub")).unwrap();
    fs::create_dir(top.join("f")).unwrap();
    check_view_of_every_range(&stack);
}

/// Flattens every range of the stack, and verifies that the result is unchanged for `View` only: the kernel treats
/// escaped xattrs differently.
fn check_view_of_every_range(stack: &Stack) {
    let want = digest(&view(&stack.down(..)), &mut |_| {}).unwrap();
    let count = stack.layers.len();
    for low in 0..count {
        for high in low + 1..=count {
            let target = stack.create_dir(&format!("us-{low}-{high}"));
            let range = open(&stack.down(low..high));
            let (part, beneath) = if low > 0 {
                (View::part(range), Some(view(&stack.down(..low))))
            } else {
                (View::new(range), None)
            };
            flatten(&part, beneath.as_ref(), &target, &mut |_| {}).unwrap();
            let layers = [stack.down(high..), vec![target], stack.down(..low)].concat();
            assert_eq!(
                digest(&view(&layers), &mut |_| {}).unwrap(),
                want,
                "{low}..{high}"
            );
        }
    }
}

#[test]
fn escaped_markers_and_inode_number_markers_are_copied() {
    let mut stack = Stack::new();
    let base = stack.layer();
    fs::create_dir_all(base.join("old/in")).unwrap();
    fs::write(base.join("old/in/file"), b"content").unwrap();
    let middle = stack.layer();
    fs::create_dir_all(middle.join("new/in")).unwrap();
    fs::create_dir(middle.join("shut")).unwrap();
    fs::write(middle.join("named"), b"own content").unwrap();
    testing::set_xattr(&middle.join("new"), "user.overlay.redirect", b"old");
    testing::set_xattr(&middle.join("shut"), "user.overlay.opaque", b"y");
    testing::set_xattr(&middle.join("named"), "user.overlay.overlay.x", b"u");
    let space = XattrSpace::User;
    let open = |path: &PathBuf| Layer::open(path, space).unwrap();
    let marker = cowl_layers::format::InodeNumberXattr {
        layer: open(&base).id(),
        ino: 4242,
    };
    testing::set_xattr(&middle.join("named"), space.ino(), &marker.to_value());
    testing::mknod(&middle.join("old"), FileKind::CharDevice, 0, 0);
    let top = stack.layer();
    let target = stack.create_dir("flat");
    let part = View::part(vec![open(&top), open(&middle)]);
    flatten(&part, None, &target, &mut |_| {}).unwrap();
    let old = View::new(vec![open(&top), open(&middle), open(&base)]);
    let new = View::new(vec![open(&target), open(&base)]);
    assert_eq!(
        digest(&old, &mut |_| {}).unwrap(),
        digest(&new, &mut |_| {}).unwrap()
    );
    let names = new.list(&new.root().unwrap()).unwrap();
    let named = names.iter().find(|entry| &*entry.name == b"named").unwrap();
    assert_eq!(named.ino, 4242);
    let lines = describe(&target);
    for (path, want) in [
        ("new", "[user.overlay.redirect=/old]"),
        ("shut", "[user.overlay.opaque=y]"),
        ("named", "[user.overlay.overlay.x=u]"),
        ("old", " dev 0"),
    ] {
        assert!(lines[path].contains(want), "{path}: {}", lines[path]);
    }
    assert!(!lines["new/in"].contains("overlay"), "{}", lines["new/in"]);
}

#[test]
fn a_whiteout_that_hides_nothing_is_omitted() {
    let mut stack = Stack::new();
    let base = stack.layer();
    fs::create_dir(base.join("both")).unwrap();
    fs::write(base.join("both/below"), b"").unwrap();
    let middle = stack.layer();
    for name in ["both", "only"] {
        fs::create_dir(middle.join(name)).unwrap();
        fs::write(middle.join(name).join("gone"), b"").unwrap();
    }
    let top = stack.layer();
    for name in ["both", "only"] {
        fs::create_dir(top.join(name)).unwrap();
        testing::mknod(&top.join(name).join("gone"), FileKind::CharDevice, 0, 0);
    }
    testing::mknod(&top.join("both/below"), FileKind::CharDevice, 0, 0);
    let target = stack.create_dir("flat");
    let part = View::part(open(&stack.down(1..)));
    let beneath = view(&stack.down(..1));
    flatten(&part, Some(&beneath), &target, &mut |_| {}).unwrap();
    let lines = describe(&target);
    assert!(lines["both/below"].contains(" dev 0"), "{lines:?}");
    assert!(!lines.contains_key("both/gone"), "{lines:?}");
    assert!(!lines.contains_key("only/gone"), "{lines:?}");
}

//! Runs the same work on a mounted stack and on a plain directory, for layers on any file system: scripted changes that
//! cover every name once, then random operations. Trees and inode numbers are compared after each part and after a new
//! mount.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::command::sh_in;
use crate::conditions::{Need, can_mount, test_name};
use crate::layers::LayerSpec;
use crate::mount::{Overlay, Stack};
use crate::random::{Caller, Generator, Op, Outcome, Side};
use crate::scratch::Scratch;
use crate::tree::{self, Compare, Tree};

/// A stack, and the plain directory that it must be equal to.
#[derive(Debug)]
struct Case<'a> {
    /// Description for messages.
    label: &'a str,
    /// The layers.
    stack: Stack,
    /// The plain directory, on a file system of the same type as the upper, so that the same limits apply to both.
    plain: PathBuf,
    /// Seed of the random operations.
    seed: u64,
    /// Number of random operations.
    steps: u64,
    /// Mount options in addition to the layers.
    options: &'a str,
}

/// Creates the same directory `known` in `layer` and in `plain`, which [`CHANGES`] changes.
#[track_caller]
pub fn plant(layer: &Path, plain: &Path) {
    for path in [layer, plain] {
        sh_in(path, KNOWN).ok();
    }
}

const KNOWN: &str = "
    mkdir known; chown 0:0 known; chmod 00755 known; cd known
    mkdir -p dir/sub/deep gone/below replaced keep into
    for f in append mode owner attribute times cut both gonefile becomes hard dir/one dir/sub/two \
             dir/sub/deep/three gone/four gone/below/five replaced/six keep/seven; do echo $f > $f; done
    ln hard hard2; ln hard dir/hard3; ln -s dir/one link; mkfifo fifo; mknod null c 1 3
    truncate -s 1M sparse; echo end >> sparse; seq 30000 > big
    find . -exec touch -h -d '2012-03-04 05:06:07' {} +";

/// Changes that leave every kind of marker and trigger every kind of copy-up.
const CHANGES: &str = "
    cd known
    echo more >> append; chmod 600 mode; chown 1000:1001 owner; touch -d '2001-02-03 04:05:06' times
    truncate -s 2 cut; echo x >> hard2; ln mode mode2; ln hard dir/sub/hard4; rm hard
    mv dir moved; mv moved/sub into/sub; echo y >> into/sub/two; mv into/sub/deep keep/deep
    rm gonefile link fifo; rm -r gone; mkdir gone; echo new > gone/new
    rm becomes; mkdir becomes; rm -r replaced; echo file > replaced
    mv both keep/both; mv keep kept; mkdir keep; echo 1 > keep/eight
    dd if=/dev/zero of=big bs=1000 seek=3 count=1 conv=notrunc status=none; mv big kept/big
    truncate -s 3M sparse; printf z | dd of=sparse bs=1 seek=2000000 conv=notrunc status=none
    mkfifo fifo; mknod full c 1 7; rm null; ln -s kept/big link; mkdir -p a/b/c; rmdir a/b/c
    touch -d '2013-01-01' kept moved";

/// Changes of extended attributes, for file systems that support them.
const XATTRS: &str = "
    cd known
    setfattr -n user.a -v b attribute; setfattr -n trusted.c -v d attribute
    setfattr -h -n trusted.e -v f link; setfattr -n trusted.overlay.opaque -v y kept
    setfattr -n user.g -v h moved; setfattr -x user.a attribute; setcap cap_net_raw=p owner";

fn seed_offset() -> u64 {
    std::env::var("COWL_OTHER").map_or(0, |text| text.parse().unwrap())
}

/// Generates three layers, topmost first, and the plain directory that they must be equal to.
#[track_caller]
#[must_use]
pub fn generated(scratch: &Scratch, seed: u64) -> (Vec<PathBuf>, PathBuf) {
    let seed = seed + seed_offset();
    let directory = scratch.make("generated");
    let (lowers, plain) = crate::layers::make_three(&directory, LayerSpec::of(seed)).unwrap();
    plant(lowers.last().unwrap(), &plain);
    crate::layers::copy_root(&lowers[0], &plain).unwrap();
    (lowers, plain)
}

/// Creates `upper` and `work` in `base`; the root of the upper gets the attributes of the topmost layer's root.
#[track_caller]
#[must_use]
pub fn upper_on(base: &Path, top: &Path) -> (PathBuf, PathBuf) {
    let (upper, work) = (base.join("upper"), base.join("work"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    crate::layers::copy_root(top, &upper).unwrap();
    (upper, work)
}

/// Runs the work on `stack` and on `plain`, and compares them after each part.
#[track_caller]
pub fn exercise(scratch: &Scratch, stack: Stack, plain: PathBuf, seed: u64) {
    let case = Case {
        label: &test_name(),
        stack,
        plain,
        seed: seed + seed_offset(),
        steps: 150,
        options: "dev,suid",
    };
    exercise_case(scratch, &case);
}

/// Returns whether the machine can mount layers and meets the requirements `more`.
#[must_use]
pub fn ready(more: &[Vec<Need>]) -> bool {
    can_mount(&more.concat())
}

/// Mounts, works, compares, mounts again, and compares. Everything is unmounted on return, so that the caller can
/// unmount the base.
#[track_caller]
fn exercise_case(scratch: &Scratch, case: &Case<'_>) {
    let tested = scratch.make("tested");
    let mount = || Overlay::cowlfs(&case.stack, &tested, case.options);
    let mounted = mount();
    let first = assert_equal(case, "before any change", &tested);
    copy_up_half(&first, &[&tested, &case.plain]);
    let second = assert_equal(case, "after copy-ups that change nothing", &tested);
    assert_identical(case, "over copy-ups", &first, &second);

    for script in [CHANGES, XATTRS] {
        sh_in(&tested, script).ok();
        sh_in(&case.plain, script).ok();
        assert_equal(case, "after the scripted changes", &tested);
    }
    random(case, &tested);
    let last = assert_equal(case, "after random operations", &tested);
    mounted.unmount();

    let mounted = mount();
    let again = assert_equal(case, "after a new mount", &tested);
    assert_identical(case, "over a new mount", &last, &again);
    // The random operations may have removed or replaced anything, so create a new directory.
    let on = "mkdir later; echo again > later/file; [ ! -d known ] || mv known later/known";
    sh_in(&tested, on).ok();
    sh_in(&case.plain, on).ok();
    assert_equal(case, "going on after a new mount", &tested);
    mounted.unmount();
}

/// Compares the mount with the plain directory, and checks its listed inode numbers and st_dev.
#[track_caller]
fn assert_equal(case: &Case<'_>, when: &str, mount: &Path) -> Tree {
    let found = tree::read(mount).expect("reading the mount");
    let plain = tree::read(&case.plain).expect("reading the plain directory");
    let label = format!("{}, {when}", case.label);
    tree::assert_same(&label, &found, &plain, Compare::HISTORY);
    let wrong = tree::wrong_listed_numbers(&found);
    assert!(wrong.is_empty(), "{label}: {wrong:?}");
    let device = |path: &Path| path.symlink_metadata().expect("a file in the mount").dev();
    let root = device(mount);
    for path in found.keys() {
        use std::os::unix::ffi::OsStrExt;
        let path = mount.join(std::ffi::OsStr::from_bytes(path));
        assert_eq!(device(&path), root, "{label}: st_dev of {}", path.display());
    }
    found
}

#[track_caller]
fn assert_identical(case: &Case<'_>, when: &str, before: &Tree, after: &Tree) {
    let label = format!("{}, numbers and times {when}", case.label);
    tree::assert_same(&label, before, after, Compare::IDENTICAL);
}

/// Copies up every second object without changing it: opens files for writing, and sets the current mode of
/// directories.
#[track_caller]
fn copy_up_half(tree: &Tree, roots: &[&Path]) {
    use std::os::unix::ffi::OsStrExt;
    for (path, entry) in tree.iter().step_by(2) {
        for root in roots {
            let path = root.join(std::ffi::OsStr::from_bytes(path));
            match entry.kind {
                rustix::fs::FileType::RegularFile => {
                    drop(
                        std::fs::File::options()
                            .write(true)
                            .open(&path)
                            .expect("opening for writing"),
                    );
                }
                rustix::fs::FileType::Directory => {
                    let mode = std::fs::Permissions::from_mode(entry.mode);
                    std::fs::set_permissions(&path, mode).expect("setting the same mode");
                }
                _ => {}
            }
        }
    }
}

#[track_caller]
fn random(case: &Case<'_>, tested: &Path) {
    let mut generator = Generator::new(case.seed).portable();
    let (mut one, mut two) = (Side::new(tested), Side::new(&case.plain));
    let mut known = tree::Paths::default();
    for step in 0..case.steps {
        if step.is_multiple_of(8) {
            known = tree::paths(&case.plain).expect("paths of the plain directory");
        }
        let op = generator.next(&known);
        // btrfs lists trusted.* xattrs to all users, who cannot read them.
        let lists = matches!(op, Op::Xattrs { .. } | Op::FdXattrs { .. });
        let user = if generator.rng().chance(15) && !lists {
            1000
        } else {
            0
        };
        let caller = Caller::user(user);
        let (got, expected) = (one.perform(&op, caller), two.perform(&op, caller));
        assert_eq!(
            normalize(&op, got),
            normalize(&op, expected),
            "{}: mounted, then plain, in step {step} as user {user}: {op:?}",
            case.label
        );
    }
}

/// Maps errors that differ between file systems to one value. A rename over a nonempty directory fails with ENOTEMPTY
/// or, on XFS, with EEXIST. On tmpfs, lseek to the end of a directory fails with EINVAL.
fn normalize(op: &Op, outcome: Outcome) -> Outcome {
    match (op, outcome) {
        (Op::Rename { flags, .. }, Outcome::Failed(Errno::EXIST)) if flags.is_empty() => {
            Outcome::Failed(Errno::NOTEMPTY)
        }
        (Op::FdAppend { .. }, Outcome::Failed(Errno::INVAL)) => Outcome::Failed(Errno::BADF),
        (_, other) => other,
    }
}

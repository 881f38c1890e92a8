//! The same work on a mounted stack and on a plain folder, whatever the layers lie on: everything
//! that touches a name once, then random operations; compared after each part, in numbers too, and
//! after a new mount.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::command::sh_in;
use crate::conditions::{Need, can_mount, test_name};
use crate::layers::Wish;
use crate::mount::{Overlay, Stack};
use crate::random::{Generator, Op, Outcome, Side, Who};
use crate::scratch::Scratch;
use crate::tree::{self, Compare, Tree};

/// A stack, and the plain folder that it must look like.
#[derive(Debug)]
struct Case<'a> {
    /// For messages.
    what: &'a str,
    /// The layers.
    stack: Stack,
    /// The plain folder; on the upper's kind of filesystem, whose limits hold for both.
    plain: PathBuf,
    /// Which random operations come.
    seed: u64,
    /// How many of them.
    steps: u64,
    /// Options of the mount beyond the layers.
    options: &'a str,
}

/// Puts a folder `known` into `layer` and the same into `plain`: what [`CHANGES`] works on.
#[track_caller]
pub fn plant(layer: &Path, plain: &Path) {
    for place in [layer, plain] {
        sh_in(place, KNOWN).ok();
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

/// What leaves every mark, and meets every way of bringing something up.
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

/// The same with extended attributes, for bases that have them.
const ATTRIBUTES: &str = "
    cd known
    setfattr -n user.a -v b attribute; setfattr -n trusted.c -v d attribute
    setfattr -h -n trusted.e -v f link; setfattr -n trusted.overlay.opaque -v y kept
    setfattr -n user.g -v h moved; setfattr -x user.a attribute; setcap cap_net_raw=p owner";

fn other() -> u64 {
    std::env::var("COWL_OTHER").map_or(0, |text| text.parse().unwrap())
}

/// Three generated layers, topmost first, and the plain folder that they must look like.
#[track_caller]
#[must_use]
pub fn generated(scratch: &Scratch, seed: u64) -> (Vec<PathBuf>, PathBuf) {
    let seed = seed + other();
    let place = scratch.make("generated");
    let (lowers, plain) = crate::layers::make_three(&place, Wish::of(seed)).unwrap();
    plant(lowers.last().unwrap(), &plain);
    crate::layers::copy_root(&lowers[0], &plain).unwrap();
    (lowers, plain)
}

/// `upper` and `work` in `base`; the upper's root has the attributes of the topmost layer's.
#[track_caller]
#[must_use]
pub fn upper_on(base: &Path, top: &Path) -> (PathBuf, PathBuf) {
    let (upper, work) = (base.join("upper"), base.join("work"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    crate::layers::copy_root(top, &upper).unwrap();
    (upper, work)
}

/// The same work on `stack` and on `plain`, seen to be the same after each part.
#[track_caller]
pub fn exercise(scratch: &Scratch, stack: Stack, plain: PathBuf, seed: u64) {
    let case = Case {
        what: &test_name(),
        stack,
        plain,
        seed: seed + other(),
        steps: 150,
        options: "dev,suid",
    };
    exercise_case(scratch, &case);
}

/// Whether the machine can mount layers, with what is needed `more`.
#[must_use]
pub fn ready(more: &[Vec<Need>]) -> bool {
    can_mount(&more.concat())
}

/// Mounts, works, compares, mounts anew, compares; leaves nothing mounted. The base can be unmounted
/// as soon as this returns.
#[track_caller]
fn exercise_case(scratch: &Scratch, case: &Case<'_>) {
    let tested = scratch.make("tested");
    let mount = || Overlay::cowlfs(&case.stack, &tested, case.options);
    let mounted = mount();
    let first = same(case, "before any change", &tested);
    touch_half(&first, &[&tested, &case.plain]);
    let second = same(case, "after copy-ups that change nothing", &tested);
    identical(case, "over copy-ups", &first, &second);

    for script in [CHANGES, ATTRIBUTES] {
        sh_in(&tested, script).ok();
        sh_in(&case.plain, script).ok();
        same(case, "after the scripted changes", &tested);
    }
    random(case, &tested);
    let last = same(case, "after random operations", &tested);
    mounted.unmount();

    let mounted = mount();
    let again = same(case, "after a new mount", &tested);
    identical(case, "over a new mount", &last, &again);
    // Random operations may have left anything.
    let on = "mkdir later; echo again > later/file; [ ! -d known ] || mv known later/known";
    sh_in(&tested, on).ok();
    sh_in(&case.plain, on).ok();
    same(case, "going on after a new mount", &tested);
    mounted.unmount();
}

/// Compares with the plain folder, and checks what a tree must keep to by itself.
#[track_caller]
fn same(case: &Case<'_>, when: &str, place: &Path) -> Tree {
    let found = tree::read(place).expect("reading the mount");
    let plain = tree::read(&case.plain).expect("reading the plain folder");
    let what = format!("{}, {when}", case.what);
    tree::assert_same(&what, &found, &plain, Compare::HISTORY);
    let wrong = tree::wrong_listed_numbers(&found);
    assert!(wrong.is_empty(), "{what}: {wrong:?}");
    let device = |path: &Path| path.symlink_metadata().expect("a file in the mount").dev();
    let root = device(place);
    for path in found.keys() {
        use std::os::unix::ffi::OsStrExt;
        let path = place.join(std::ffi::OsStr::from_bytes(path));
        assert_eq!(device(&path), root, "{what}: st_dev of {}", path.display());
    }
    found
}

#[track_caller]
fn identical(case: &Case<'_>, when: &str, before: &Tree, after: &Tree) {
    let what = format!("{}, numbers and times {when}", case.what);
    tree::assert_same(&what, before, after, Compare::IDENTICAL);
}

/// Every second object is brought up by something that changes nothing: files are opened for writing,
/// folders get the mode that they have.
#[track_caller]
fn touch_half(tree: &Tree, places: &[&Path]) {
    use std::os::unix::ffi::OsStrExt;
    for (path, entry) in tree.iter().step_by(2) {
        for place in places {
            let path = place.join(std::ffi::OsStr::from_bytes(path));
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
            known = tree::paths(&case.plain).expect("paths of the plain folder");
        }
        let op = generator.next(&known);
        // btrfs lists the names of trusted.* to everybody, who then can't read them.
        let lists = matches!(op, Op::Xattrs { .. } | Op::FdXattrs { .. });
        let user = if generator.rng().chance(15) && !lists {
            1000
        } else {
            0
        };
        let who = Who::user(user);
        let (got, expected) = (one.perform(&op, who), two.perform(&op, who));
        assert_eq!(
            alike(&op, got),
            alike(&op, expected),
            "{}: mounted, then plain, in step {step} as {user}: {op:?}",
            case.what
        );
    }
}

/// What file systems say differently: rename(2) over a folder with something in it may give either
/// error (XFS gives EEXIST); tmpfs knows no end of a folder to seek to.
fn alike(op: &Op, outcome: Outcome) -> Outcome {
    match (op, outcome) {
        (Op::Rename { flags, .. }, Outcome::Failed(Errno::EXIST)) if flags.is_empty() => {
            Outcome::Failed(Errno::NOTEMPTY)
        }
        (Op::FdAppend { .. }, Outcome::Failed(Errno::INVAL)) => Outcome::Failed(Errno::BADF),
        (_, other) => other,
    }
}

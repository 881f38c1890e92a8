//! Read-only mounts of layers to which another mount writes, as containerd creates them to compare snapshots.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowl_tests::command::{run, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::layers::{self, LayerSpec};
use cowl_tests::mount::{self, Overlay, Stack};
use cowl_tests::random::{Generator, Side};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

const NEEDS: [Need; 2] = [Need::Root, Need::Fuse];

const O_NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();

/// Longer than the kernel caches names and attributes of such a mount.
const EXPIRY: Duration = Duration::from_millis(1100);

/// A writing mount, and the layers for a read-only one.
struct Lab {
    writer: Overlay,
    stack: Stack,
    scratch: Scratch,
}

impl Lab {
    /// Creates the lower layer with the shell script `build`.
    fn new(build: &str) -> Option<Lab> {
        if !can(&NEEDS) {
            return None;
        }
        let scratch = Scratch::for_test();
        let stack = Stack {
            lowers: vec![scratch.make("lower")],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        sh_in(&stack.lowers[0], build).ok();
        let writer = Overlay::cowlfs(&stack, &scratch.make("writer"), "");
        Some(Lab {
            writer,
            stack,
            scratch,
        })
    }

    fn reader(&self) -> Overlay {
        Overlay::cowlfs(&self.stack.read_only(), &self.scratch.make("reader"), "")
    }
}

#[track_caller]
fn same(label: &str, reader: &Path, writer: &Path) {
    let trees = [reader, writer].map(|path| tree::read(path).unwrap());
    tree::assert_same(label, &trees[0], &trees[1], Compare::SAME);
}

/// Ends the walker, also after a panic.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Each step is a script for the writing mount. Programs on the reading mount have read everything before.
const STEPS: [&str; 12] = [
    "echo longer content > f; echo x >> d/g; : > empty",
    "echo new > new; mkdir dir; echo below > dir/below",
    "rm f; rm -r e; ln -s target f",
    "rm f; ln -s another f; mv new newer; mv dir d/moved",
    "mv d dd; mv dd/sub dd/sub2",
    "echo replaced > tmp; mv tmp dd/g",
    "chmod 600 dd/g; chown 1:2 dd/moved; setfattr -n user.a -v b dd/g",
    "ln dd/g linked; ln hard1 hard4; rm hard2",
    "echo same size 1 > size; echo same size 2 > size",
    "rm -r dd; mkdir dd; echo opaque > dd/g",
    "mv dd/g swap; rmdir dd; mv swap dd; mkdir linked2; mv linked linked2/linked",
    "rm -rf ./*; echo last > f",
];

#[test]
fn changes_of_the_writing_mount_appear_when_the_caches_expire() {
    let Some(lab) = Lab::new(
        "echo f > f; mkdir -p d/sub e/deep; echo g > d/g; echo s > d/sub/s; echo e > e/deep/e; echo x > empty
         echo hard > hard1; ln hard1 hard2; ln hard1 hard3; echo size > size",
    ) else {
        return;
    };
    let reader = lab.reader();
    same("at first", reader.path(), lab.writer.path());
    for step in STEPS {
        sh_in(lab.writer.path(), step).ok();
        std::thread::sleep(EXPIRY);
        same(step, reader.path(), lab.writer.path());
        // By path alone, without a listing before.
        let found = sh_in(reader.path(), "cat dd/g f newer size linked 2>&1 || :").ok();
        let expected = sh_in(lab.writer.path(), "cat dd/g f newer size linked 2>&1 || :").ok();
        assert_eq!(found.out(), expected.out(), "{step}");
    }
    reader.unmount();
    lab.writer.unmount();
}

#[test]
fn random_changes_appear_when_the_caches_expire() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::for_test();
    let (lowers, _) = layers::make_three(&scratch, LayerSpec::of(77)).unwrap();
    let (upper, work) = (scratch.make("upper"), scratch.make("work"));
    layers::copy_root(&lowers[0], &upper).unwrap();
    let stack = Stack {
        lowers,
        upper: Some((upper, work)),
    };
    let writer = Overlay::cowlfs(&stack, &scratch.make("writer"), "dev,suid");
    let reader = Overlay::cowlfs(&stack.read_only(), &scratch.make("reader"), "nodev");
    let mut generator = Generator::new(78);
    let mut side = Side::new(writer.path());
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Reads during the changes, so that it meets every intermediate state.
        let walker = scope.spawn(|| {
            let mut read = 0;
            while !is_done.load(Ordering::Relaxed) {
                for path in tree::paths(reader.path()).unwrap_or_default().all {
                    let path = reader.path().join(OsStr::from_bytes(&path));
                    // An open of a FIFO would block, also if it has just replaced a file.
                    let mut options = std::fs::File::options();
                    let options = options.read(true).custom_flags(O_NONBLOCK);
                    if let Ok(file) = options.open(&path)
                        && file.metadata().is_ok_and(|meta| meta.is_file())
                    {
                        read += u32::from(std::io::copy(&mut &file, &mut std::io::sink()).is_ok());
                    }
                }
            }
            read
        });
        let done = Done(&is_done);
        for round in 0..12 {
            let known = tree::paths(writer.path()).unwrap();
            for _ in 0..40 {
                let caller = generator.caller(10);
                side.perform(&generator.next(&known), caller);
            }
            std::thread::sleep(EXPIRY);
            same(&format!("round {round}"), reader.path(), writer.path());
        }
        drop(done);
        assert!(walker.join().unwrap() > 0);
    });
    drop(side);
    reader.unmount();
    writer.unmount();
}

#[test]
fn open_files_of_the_reading_mount_remain_readable() {
    let Some(lab) = Lab::new("echo removed > removed; echo before > changed; echo a > replaced")
    else {
        return;
    };
    sh_in(lab.writer.path(), "echo upper > upper").ok();
    let reader = lab.reader();
    let names = ["removed", "changed", "replaced", "upper"];
    let mut files = names.map(|name| std::fs::File::open(reader.path().join(name)).unwrap());
    sh_in(
        lab.writer.path(),
        "rm removed upper; echo after > changed; echo bb > tmp; mv tmp replaced; echo new > upper",
    )
    .ok();
    std::thread::sleep(EXPIRY);
    let mut contents = files.each_mut().map(|file| {
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    });
    // The open file may have either content; the file of the name has the new one.
    contents[1].clear();
    assert_eq!(contents, ["removed\n", "", "a\n", "upper\n"]);
    let now = sh_in(reader.path(), "cat changed replaced upper")
        .ok()
        .out();
    assert_eq!(now, "after\nbb\nnew");
    drop(files);
    reader.unmount();
    lab.writer.unmount();
}

/// containerd adds `ro` to the options of the writing mount.
#[test]
fn the_options_of_the_writing_mount_with_ro_mount_its_layers() {
    let Some(lab) = Lab::new("echo f > f") else {
        return;
    };
    sh_in(lab.writer.path(), "echo changed > f").ok();
    let reader = Overlay::cowlfs(&lab.stack, &lab.scratch.make("reader"), "ro");
    same("at first", reader.path(), lab.writer.path());
    sh_in(lab.writer.path(), "echo again > f; echo new > new").ok();
    std::thread::sleep(EXPIRY);
    same("after a change", reader.path(), lab.writer.path());
    // Nothing is written, even if the mount is made writable.
    let program = cowl_tests::programs::cowlfs();
    let remount: [&OsStr; 3] = ["-o".as_ref(), "remount,rw".as_ref(), reader.path().as_ref()];
    run(program.to_str().unwrap(), remount).ok();
    let error = std::fs::write(reader.path().join("f"), "x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    reader.unmount();
    lab.writer.unmount();
}

/// The reading mount holds no lock on the layer.
#[test]
fn the_layer_can_be_mounted_for_writing_again() {
    let Some(lab) = Lab::new("echo f > f") else {
        return;
    };
    let reader = lab.reader();
    let path = lab.writer.path().to_owned();
    lab.writer.unmount();
    let writer = Overlay::cowlfs(&lab.stack, &path, "");
    sh_in(writer.path(), "echo again > f").ok();
    std::thread::sleep(EXPIRY);
    same("mounted again", reader.path(), writer.path());
    writer.unmount();
    same("unmounted", reader.path(), reader.path());
    reader.unmount();
}

fn program(lowers: &[&PathBuf], more: &str, mount_point: &Path) -> cowl_tests::command::Output {
    let lowers: Vec<_> = lowers.iter().map(|path| path.to_str().unwrap()).collect();
    let options = format!("lowerdir={}{more}", lowers.join(":"));
    let arguments: [&OsStr; 3] = ["-o".as_ref(), options.as_ref(), mount_point.as_ref()];
    run(cowl_tests::programs::cowlfs().to_str().unwrap(), arguments)
}

#[test]
fn a_mount_reports_layers_that_change_and_refuses_to_write_above_them() {
    let Some(lab) = Lab::new("echo f > f") else {
        return;
    };
    let (upper, lower) = (&lab.stack.upper.as_ref().unwrap().0, &lab.stack.lowers[0]);
    let point = lab.scratch.make("second");
    let (other, work) = (lab.scratch.make("other"), lab.scratch.make("work2"));
    let more = format!(",upperdir={},workdir={}", other.display(), work.display());
    program(&[upper, lower], &more, &point).fails(4, &["another mount writes to the layer"]);
    let started = program(&[upper, lower], "", &point).ok();
    assert!(
        started
            .err()
            .contains("changes appear with a delay of up to 1 s"),
        "{}",
        started.err()
    );
    mount::unmount_free(&point);
    // The lower layer alone does not change.
    assert_eq!(program(&[lower], "", &point).ok().err(), "");
    mount::unmount_free(&point);
    lab.writer.unmount();
    assert_eq!(program(&[upper, lower], "", &point).ok().err(), "");
    mount::unmount_free(&point);
}

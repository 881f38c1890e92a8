//! Benchmarks of copy-up: with data, of attributes only, of sparse files, and with reflinks.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros write no docs"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use cowl_benches::{Failure, ROOT, Stage};
use cowl_overlay::{OpenOptions, SetAttr};
use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main,
};

const LARGE: usize = 16 << 20;

/// Creates an overlay in `directory` over one lower file; each copy-up needs a new one.
fn stage(directory: &Path, size: usize, sparse: bool) -> Stage {
    Stage::new_in(directory, 1, |_, path| {
        let path = path.join("file");
        match sparse {
            true => {
                let file = std::fs::File::create(path)?;
                file.set_len(size as u64)?;
                std::os::unix::fs::FileExt::write_all_at(&file, b"content", size as u64 / 2)
            }
            false => std::fs::write(path, vec![1; size]),
        }
    })
    .unwrap()
}

/// Opens the file for writing, which copies it up.
fn write(stage: Stage) -> Stage {
    let op = stage.overlay.begin();
    let file = op.lookup_path(b"file").unwrap();
    let how = OpenOptions {
        keep_atime: false,
        write: true,
        truncate: false,
        exec: false,
    };
    let handle = op.open(ROOT, &file, how).unwrap();
    stage.overlay.close(&handle);
    drop(op);
    stage
}

fn chmod(stage: Stage) -> Stage {
    let op = stage.overlay.begin();
    let file = op.lookup_path(b"file").unwrap();
    let set = SetAttr {
        mode: Some(0o600),
        ..SetAttr::default()
    };
    op.set_attr(ROOT, &file, &set, None).unwrap();
    drop(op);
    stage
}

fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    make: impl Fn() -> Stage,
    work: fn(Stage) -> Stage,
) {
    group.bench_function(id, |b| {
        b.iter_batched(&make, work, BatchSize::PerIteration);
    });
}

fn copy_up(c: &mut Criterion) {
    let disk = Path::new("/var/tmp");
    let mut group = c.benchmark_group("copy-up");
    group.sample_size(10);
    for size in [4 << 10, LARGE] {
        let make = || stage(disk, size, false);
        measure(&mut group, BenchmarkId::new("data", size), make, write);
        measure(&mut group, BenchmarkId::new("metadata", size), make, chmod);
    }
    let make = || stage(disk, LARGE, true);
    measure(&mut group, BenchmarkId::new("sparse", LARGE), make, write);
    match Reflinks::new() {
        Ok(reflinks) => {
            let make = || stage(&reflinks.mount_point(), LARGE, false);
            measure(&mut group, BenchmarkId::new("reflink", LARGE), make, write);
        }
        Err(error) => eprintln!("copy-up/reflink was LEFT OUT: {error}"),
    }
    group.finish();
}

fn run(command: &mut Command) -> Result<(), Failure> {
    match command.status()?.success() {
        true => Ok(()),
        false => Err(format!("{command:?} failed").into()),
    }
}

/// An XFS in an image file, which is mounted until this is dropped.
struct Reflinks {
    dir: tempfile::TempDir,
}

impl Reflinks {
    fn new() -> Result<Self, Failure> {
        let dir = tempfile::tempdir_in("/var/tmp")?;
        let made = Self { dir };
        let (mount_point, image) = (made.mount_point(), made.dir.path().join("image"));
        std::fs::create_dir(&mount_point)?;
        std::fs::File::create(&image)?.set_len(1 << 30)?;
        let mut mkfs = Command::new("mkfs.xfs");
        run(mkfs.arg("-q").arg(&image))?;
        let mut mount = Command::new("mount");
        run(mount.args(["-o", "loop"]).args([&image, &mount_point]))?;
        Ok(made)
    }

    fn mount_point(&self) -> PathBuf {
        self.dir.path().join("xfs")
    }
}

impl Drop for Reflinks {
    fn drop(&mut self) {
        let ended = Command::new("umount")
            .arg("-q")
            .arg(self.mount_point())
            .status();
        if let Err(error) = ended {
            eprintln!("cannot unmount {}: {error}", self.mount_point().display());
        }
    }
}

criterion_group!(benches, copy_up);
criterion_main!(benches);

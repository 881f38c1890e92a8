//! The overlay in process: names, listings, copy-ups, folder renames, snapshots.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros write no docs"
)]

use std::hint::black_box;
use std::path::Path;

use cowl_benches::{ROOT, Stage};
use cowl_fs::Name;
use cowl_fs::overlay::{OpenHow, RenameFlags, SetAttr};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A thousand files, spread over the layers.
fn spread(layers: usize) -> impl Fn(usize, &Path) -> std::io::Result<()> {
    move |number, path| {
        for file in (number..1000).step_by(layers) {
            std::fs::write(path.join(format!("f{file}")), b"content")?;
        }
        Ok(())
    }
}

fn names(c: &mut Criterion) {
    let mut group = c.benchmark_group("names");
    for layers in [1, 8, 64] {
        let stage = Stage::new(layers, spread(layers)).unwrap();
        let root = stage.overlay.root();
        group.bench_function(BenchmarkId::new("lookup", layers), |b| {
            b.iter(|| stage.overlay.begin().lookup(root, &name("f999")).unwrap());
        });
        group.bench_function(BenchmarkId::new("absent", layers), |b| {
            b.iter(|| stage.overlay.begin().lookup(root, &name("no")).unwrap());
        });
        group.bench_function(BenchmarkId::new("list-1000", layers), |b| {
            b.iter(|| {
                let op = stage.overlay.begin();
                black_box(op.listing(root, 0).unwrap())
            });
        });
    }
    group.finish();
}

/// One lower file of `size` bytes; a new stage for each copy-up.
fn one_file(size: usize) -> Stage {
    Stage::new(1, |_, path| {
        std::fs::write(path.join("file"), vec![1; size])
    })
    .unwrap()
}

fn copy_up(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy-up");
    group.sample_size(20);
    for size in [4 << 10, 16 << 20] {
        group.bench_function(BenchmarkId::new("data", size), |b| {
            b.iter_batched(
                || one_file(size),
                |stage| {
                    let op = stage.overlay.begin();
                    let file = op.find(b"file").unwrap();
                    let how = OpenHow {
                        keep_atime: false,
                        write: true,
                        truncate: false,
                        exec: false,
                    };
                    let handle = op.open(ROOT, &file, how).unwrap();
                    stage.overlay.close(&handle);
                    drop(op);
                    stage
                },
                BatchSize::PerIteration,
            );
        });
        group.bench_function(BenchmarkId::new("attributes", size), |b| {
            b.iter_batched(
                || one_file(size),
                |stage| {
                    let op = stage.overlay.begin();
                    let file = op.find(b"file").unwrap();
                    let set = SetAttr {
                        mode: Some(0o600),
                        ..SetAttr::default()
                    };
                    op.set_attr(ROOT, &file, &set, None).unwrap();
                    drop(op);
                    stage
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn whole_trees(c: &mut Criterion) {
    let mut group = c.benchmark_group("whole-trees");
    group.sample_size(20);
    for files in [10, 10_000] {
        group.bench_function(BenchmarkId::new("rename-folder", files), |b| {
            b.iter_batched(
                || {
                    Stage::new(1, |_, path| {
                        std::fs::create_dir(path.join("tree"))?;
                        (0..files).try_for_each(|file| {
                            std::fs::write(path.join(format!("tree/f{file}")), b"")
                        })
                    })
                    .unwrap()
                },
                |stage| {
                    let op = stage.overlay.begin();
                    let root = stage.overlay.root();
                    let (from, to) = (name("tree"), name("moved"));
                    op.rename(ROOT, root, &from, root, &to, RenameFlags::default())
                        .unwrap();
                    drop(op);
                    stage
                },
                BatchSize::PerIteration,
            );
        });
    }
    for known in [10, 1000] {
        group.bench_function(BenchmarkId::new("push-layer", known), |b| {
            b.iter_batched(
                || {
                    let mut stage = Stage::new(1, spread(1)).unwrap();
                    for file in 0..known {
                        let op = stage.overlay.begin();
                        let found = op.find(format!("f{file}").as_bytes()).unwrap();
                        stage.overlay.inodes().remember(&found);
                    }
                    let upper = stage.next_upper().unwrap();
                    (stage, upper)
                },
                |(stage, upper)| {
                    stage.overlay.push_layer(upper).unwrap();
                    stage
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, names, copy_up, whole_trees);
criterion_main!(benches);

//! Benchmarks of renames and `push_layer`, whose cost must not depend on the number of objects, and of the rename plan.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros write no docs"
)]

use std::hint::black_box;

use cowl_benches::{ROOT, Stage, name, spread};
use cowl_overlay::plan::{self, MovedObject, NameState, UpperEntry};
use cowl_overlay::{PushRequest, RenameFlags};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};

fn rename_directory(c: &mut Criterion) {
    let mut group = c.benchmark_group("rename-directory");
    group.sample_size(10);
    for files in [10, 10_000] {
        let make = || {
            Stage::new(1, |_, path| {
                std::fs::create_dir(path.join("tree"))?;
                (0..files)
                    .try_for_each(|file| std::fs::write(path.join(format!("tree/f{file}")), b""))
            })
            .unwrap()
        };
        group.bench_function(BenchmarkId::from_parameter(files), |b| {
            b.iter_batched(
                make,
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
    group.finish();
}

fn push_layer(c: &mut Criterion) {
    let mut group = c.benchmark_group("push-layer");
    group.sample_size(10);
    for known in [10, 1000] {
        let make = || {
            let mut stage = Stage::new(1, spread(1, 1000)).unwrap();
            for file in 0..known {
                let op = stage.overlay.begin();
                let found = op.lookup_path(format!("f{file}").as_bytes()).unwrap();
                stage.overlay.inodes().count_lookup(&found);
            }
            let upper = stage.next_upper().unwrap();
            (stage, upper)
        };
        group.bench_function(BenchmarkId::from_parameter(known), |b| {
            b.iter_batched(
                make,
                |(stage, upper)| {
                    stage
                        .overlay
                        .push_layer(upper, &PushRequest::default())
                        .unwrap();
                    stage
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// Measures the pure function, for every state of both names.
fn rename_plan(c: &mut Criterion) {
    let uppers = [
        UpperEntry::Nothing,
        UpperEntry::Whiteout,
        UpperEntry::Object,
    ];
    let states: Vec<NameState> = uppers
        .into_iter()
        .flat_map(|upper| [false, true].map(|below| NameState { upper, below }))
        .collect();
    c.bench_function("rename-plan/36-states", |b| {
        b.iter(|| {
            for from in &states {
                for to in &states {
                    black_box(plan::rename(
                        black_box(*from),
                        black_box(*to),
                        MovedObject::Directory,
                    ));
                }
            }
        });
    });
}

criterion_group!(benches, rename_directory, push_layer, rename_plan);
criterion_main!(benches);

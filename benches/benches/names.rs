//! Benchmarks of lookup, readdir, and the resolution of a name over the layers.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros write no docs"
)]

use std::hint::black_box;

use cowl_benches::{Stage, name, spread};
use cowl_layers::layer::LayerObject;
use cowl_layers::view::resolve::Fold;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup");
    for layers in [2, 64] {
        let stage = Stage::new(layers, spread(layers, 1000)).unwrap();
        let root = stage.overlay.root();
        for (case, text) in [("hit", "f999"), ("absent", "no")] {
            group.bench_function(BenchmarkId::new(case, layers), |b| {
                b.iter(|| black_box(stage.overlay.begin().lookup(root, &name(text)).unwrap()));
            });
        }
    }
    group.finish();
}

fn readdir(c: &mut Criterion) {
    let mut group = c.benchmark_group("readdir");
    group.sample_size(20);
    for layers in [2, 64] {
        for names in [100, 10_000] {
            let stage = Stage::new(layers, spread(layers, names)).unwrap();
            let root = stage.overlay.root();
            let id = BenchmarkId::new(format!("{names}-names"), layers);
            group.bench_function(id, |b| {
                b.iter(|| black_box(stage.overlay.begin().listing(root, 0).unwrap()));
            });
        }
    }
    group.finish();
}

/// Measures the pure resolution of a merged directory, without system calls.
fn fold(c: &mut Criterion) {
    let dir = LayerObject::Dir {
        opaque: false,
        redirect: None,
    };
    let mut group = c.benchmark_group("resolve");
    for layers in [2_usize, 64] {
        group.bench_function(BenchmarkId::new("merged-directory", layers), |b| {
            b.iter(|| {
                let mut fold = Fold::new(name("directory"));
                for _ in 0..layers {
                    black_box(fold.step(&dir));
                }
                fold.kind()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, lookup, readdir, fold);
criterion_main!(benches);

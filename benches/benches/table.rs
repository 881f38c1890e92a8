//! Benchmark of the inode table with several threads. Each thread looks names up, gets the inodes by number, and
//! forgets them, as the kernel's requests do. Contention shows as times that grow with the number of threads.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark; criterion's macros write no docs"
)]

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use cowl_benches::{Stage, name, spread};
use cowl_layers::Name;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

const NAMES: usize = 256;

/// Processes one thread's share of the names `rounds` times.
fn share(stage: &Stage, names: &[Name], rounds: u64) {
    let root = stage.overlay.root();
    for _ in 0..rounds {
        for name in names {
            let op = stage.overlay.begin();
            let inode = op.lookup(root, name).unwrap().unwrap();
            stage.overlay.inodes().count_lookup(&inode);
            black_box(stage.overlay.inodes().get(inode.ino()).unwrap());
            drop(op);
            stage.overlay.forget(inode.ino(), 1);
        }
    }
}

/// Measures the same total number of names for every number of threads.
fn table(c: &mut Criterion) {
    let stage = Stage::new(1, spread(1, NAMES)).unwrap();
    let names: Vec<Name> = (0..NAMES).map(|file| name(&format!("f{file}"))).collect();
    let mut group = c.benchmark_group("inode-table");
    group.sample_size(10);
    for threads in [1, 2, 4] {
        group.bench_function(BenchmarkId::new("intern-get-forget", threads), |b| {
            b.iter_custom(|rounds| -> Duration {
                let start = Instant::now();
                thread::scope(|scope| {
                    for names in names.chunks(NAMES / threads) {
                        scope.spawn(|| share(&stage, names, rounds));
                    }
                });
                start.elapsed()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, table);
criterion_main!(benches);

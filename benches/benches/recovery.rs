//! Measures the time from the end of a process to the first answer of its successor, by the number of known inodes.
//!
//! `COWL_SCALE_FILES` sets the number of files, by default 100,000. The files are in 64 layers.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark that runs once"
)]

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cowl_benches::{Stage, name};
use cowl_overlay::{Custodian, Estate, Inheritance, Ledger, Overlay};

const LAYERS: usize = 64;
const IN_DIR: usize = 1000;

/// Holds no descriptors.
#[derive(Debug)]
struct NoCustodian;

impl Custodian for NoCustodian {
    fn deposit(&self, _: u64, _: BorrowedFd<'_>) -> cowl_layers::error::Result<()> {
        Ok(())
    }

    fn release(&self, _: u64) {}
}

fn main() {
    let files = std::env::var("COWL_SCALE_FILES").map_or(100_000, |files| files.parse().unwrap());
    let stage = Stage::new(LAYERS, |layer, path| {
        for dir in (0..files / IN_DIR).filter(|dir| dir % LAYERS == layer) {
            let path = path.join(format!("d{dir}"));
            std::fs::create_dir(&path)?;
            for file in 0..IN_DIR {
                std::fs::File::create(path.join(format!("file{file}")))?;
            }
        }
        Ok(())
    })
    .unwrap();
    let old = &stage.overlay;
    let ledger = Arc::new(Ledger::create(Arc::new(NoCustodian)).unwrap());
    old.attach(&ledger);
    let mut last = 0;
    for dir in 0..files / IN_DIR {
        let op = old.begin();
        let found = op.lookup(old.root(), &name(&format!("d{dir}"))).unwrap();
        let parent = found.unwrap();
        old.inodes().count_lookup(&parent);
        for file in 0..IN_DIR {
            let found = op.lookup(&parent, &name(&format!("file{file}"))).unwrap();
            let inode = found.unwrap();
            old.inodes().count_lookup(&inode);
            last = inode.ino();
        }
    }
    println!(
        "{} known inodes, a ledger of {} KiB",
        old.inodes().len(),
        ledger.size() >> 10
    );
    let (upper, others) = old.layers();
    let layers = upper.iter().map(|upper| upper.layer.clone());
    let with = Inheritance {
        layers: layers.chain(others).collect(),
        upper,
        descriptors: HashMap::new(),
        locks: Vec::new(),
        retained: Vec::new(),
        options: old.options().clone(),
    };
    let copy = ledger.descriptor().try_clone_to_owned().unwrap();
    let (started, before) = (Instant::now(), cpu_time());
    let estate = Estate::read(copy).unwrap();
    let read = started.elapsed();
    let recovered = recover(estate, with);
    let ready = started.elapsed();
    recovered.begin().inode(last).unwrap();
    let (answered, spent) = (started.elapsed(), cpu_time() - before);
    println!("read {read:?}, ready {ready:?}, first answer {answered:?}; {spent:?} on a CPU");
    assert_eq!(recovered.inodes().len(), old.inodes().len());
}

fn recover(estate: Estate, with: Inheritance) -> Overlay {
    let custodian = Arc::new(NoCustodian);
    Overlay::recover(estate, with, custodian).unwrap().overlay
}

/// Returns the time that this thread was on a CPU, which does not depend on other processes.
fn cpu_time() -> Duration {
    let all = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(all.split(' ').next().unwrap().parse().unwrap())
}

//! Random system calls with unusual arguments in a mount and in a plain directory, compared call by call: results, error
//! numbers, returned data, and the trees afterwards. `differential` has the operations of programs; here are flags,
//! sizes, offsets and kinds of descriptors that programs rarely use. The calls, and the differences that FUSE imposes,
//! are in `syscalls.py`. Each row of its table of differences must apply in a run, so that the table lists nothing that
//! FUSE does not impose; the rare rows must apply in long runs.
//!
//! `COWL_SEEDS=N` runs N seeds from `COWL_FIRST`, `COWL_SEED=S` a single one, `COWL_STEPS=N` calls in each. `COWL_LOG=N`
//! prints the last N calls of a seed that fails.

use std::collections::BTreeSet;
use std::process::Command;

use cowl_tests::command::run_command;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::disk::Disk;
use cowl_tests::layers::{self, LayerSpec};
use cowl_tests::pair::{Pair, Under};
use cowl_tests::run::number;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::Compare;

const SCRIPT: &str = include_str!("syscalls.py");

/// Mount options, and the way in which files are written with them.
const MOUNTS: [(&str, &str); 4] = [
    ("dev,suid", "passthrough"),
    ("dev,suid,passthrough=off", "daemon"),
    ("dev,suid,passthrough=all,timeout=0", "passthrough"),
    ("dev,suid,passthrough=off,coherence=overlay", "daemon"),
];

#[test]
fn random_system_calls_have_the_results_of_a_plain_directory() {
    if !can(&[
        Need::Root,
        Need::Fuse,
        Need::Program("python3"),
        Need::Program("mkfs.ext4"),
    ]) {
        return;
    }
    let disk = Disk::new("syscalls");
    let (first, count) = match std::env::var("COWL_SEED") {
        Ok(seed) => (seed.parse().unwrap(), 1),
        Err(_) => (number("COWL_FIRST", 1), number("COWL_SEEDS", 16)),
    };
    let (mut failed, mut applied) = (Vec::new(), BTreeSet::new());
    for seed in first..first + count {
        match one_seed(&disk, seed) {
            Ok(rows) => applied.extend(rows),
            Err(error) => failed.push(error),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    let calls = count * number("COWL_STEPS", STEPS);
    if calls >= COMMON {
        let unused: Vec<String> = rows(calls >= RARE)
            .into_iter()
            .filter(|row| !applied.contains(row))
            .collect();
        assert!(unused.is_empty(), "no call needed {unused:?}");
    }
}

/// The number of calls for each seed.
const STEPS: u64 = 2000;
/// The number of calls after which each common row of the table of differences has applied.
const COMMON: u64 = 16 * STEPS;
/// The number of calls after which each rare row has applied, too.
const RARE: u64 = 500 * STEPS;

/// Returns the reasons in the table of differences.
fn rows(with_rare: bool) -> Vec<String> {
    let mut command = Command::new("python3");
    command.args(["-X", "utf8", "-", "rows"]);
    let output = run_command(command, SCRIPT.as_bytes()).ok();
    let all = output.out();
    all.lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(kind, _)| with_rare || *kind == "common")
        .map(|(_, reason)| reason.to_owned())
        .collect()
}

/// Performs the calls of a seed, and returns the rows of the table of differences that applied.
fn one_seed(disk: &Disk, seed: u64) -> Result<Vec<String>, String> {
    let store = Store::in_scratch(Scratch::new_in(&disk.path(), "syscalls"));
    let spec = LayerSpec {
        rich: seed % 3 == 1,
        ..LayerSpec::of(seed)
    };
    let (lowers, plain) = layers::make_three(store.scratch(), spec).unwrap();
    let (options, writes) = MOUNTS[usize::try_from(seed % 4).unwrap()];
    let mut pair = Pair::new(store, Under::Cowlfs(options), lowers, plain, true);
    pair.mount();
    let mut command = Command::new("python3");
    command
        .args(["-X", "utf8", "-"])
        .args([&pair.tested, &pair.plain])
        .args([&seed.to_string(), &number("COWL_STEPS", STEPS).to_string()])
        .arg(writes);
    let output = run_command(command, SCRIPT.as_bytes());
    let compared = if output.code == 0 {
        pair.compare("after the calls", &pair.tested, Compare::HISTORY)
            .and_then(|_| {
                pair.unmount();
                pair.mount();
                pair.compare("after a new mount", &pair.tested, Compare::HISTORY)
            })
            .map(drop)
    } else {
        Err(output.report())
    };
    pair.unmount();
    compared.map_err(|error| format!("seed {seed} ({options}): {error}"))?;
    let printed = output.out();
    let applied = printed.lines().filter_map(|line| {
        let (_, reason) = line.strip_prefix("expected: ")?.split_once(" x ")?;
        Some(reason.to_owned())
    });
    Ok(applied.collect())
}

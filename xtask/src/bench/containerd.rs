//! Measures containerd with cowl-snapshotter, compared with containerd's overlayfs snapshotter on the same file system.
//! Prints a table; asserts nothing.

use std::time::Duration;

use cowl_tests::containerd::{Containerd, LayerScript};
use cowl_tests::scratch::Scratch;

use crate::run::{Result, failure, note, target, title};

/// Options of `cargo xtask bench containerd`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of layers of the usual image, each with 100 files and 4 MiB
    #[arg(long, default_value_t = 20)]
    layers: usize,
    /// Number of layers of the deep image, each with one file; kernel overlayfs mounts at most 128 as pairs of paths
    #[arg(long, default_value_t = 120)]
    deep: usize,
    /// Number of times that each operation is measured; the median is reported
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

impl Options {
    /// Returns the default options; with `quick`, those of a smoke test.
    pub(super) fn usual(quick: bool) -> Self {
        let (layers, deep, rounds) = match quick {
            true => (2, 3, 1),
            false => (20, 120, 3),
        };
        Self {
            layers,
            deep,
            rounds,
        }
    }
}

/// The snapshotters, in the order of the table's columns.
const SNAPSHOTTERS: [&str; 2] = ["overlayfs", "cowl"];

/// Performs all operations with the snapshotter `$1` and the image `$2`, and prints the time of each in microseconds.
///
/// A command of containerd returns before the space of what it removes is free, so a removal ends with the garbage
/// collection.
const MEASURE: &str = r#"
all() { ctr snapshots --snapshotter $S "$@"; }
timed() {
    local label=$1 start end; shift
    start=$(date +%s%N); "$@" > /dev/null; end=$(date +%s%N)
    echo "$IMAGE|$label|$S|$(((end - start) / 1000))"
}
gone() { all ls | [ "$(wc -l)" = 1 ]; }
remove_image() {
    ctr images rm --sync "docker.io/test/$IMAGE:latest"
    ctr content prune references
    await gone
}
on() { local at="$D/at"; mkdir -p "$at"; eval "$(all mounts "$at" "$1")"; (cd "$at" && eval "$2"); umount "$at"; }
measure() {
    S=$1 IMAGE=$2
    timed "import" ctr images import --snapshotter $S "$D/$IMAGE.tar"
    timed "first run of a container" ctr run --rm --snapshotter $S "docker.io/test/$IMAGE:latest" one true
    timed "run of a container" ctr run --rm --snapshotter $S "docker.io/test/$IMAGE:latest" two true
    ctr run -d --snapshotter $S "docker.io/test/$IMAGE:latest" web sleep 1000
    ctr task exec --exec-id 1 web sh -c 'mkdir /new; for i in $(seq 100); do head -c 10000 /dev/urandom > /new/$i; done'
    timed "diff of a running container, 100 new files" sh -c "ctr --address /run/containerd/containerd.sock --namespace $NS \
        snapshots --snapshotter $S diff web"
    if [ $S = cowl ]; then timed "snapshot of a running container" cowl snapshot "$NS/web"; fi
    ctr task kill -s KILL web; await ctr task rm web
    timed "commit, 100 new files" all commit kept web
    all rm kept; ctr containers rm web
    timed "removal of the image" remove_image
}
"#;

/// Runs the benchmark with the release build of the programs.
pub(super) fn run(options: &Options) -> Result<()> {
    let scratch = Scratch::new("bench");
    let containerd = Containerd::with_programs(scratch, target()?.join("release"));
    title("containerd");
    let noise =
        "mkdir -p data; for i in $(seq 100); do head -c 40000 /dev/urandom > data/$NAME-$i; done";
    let small = "echo $NAME > $NAME";
    for (image, count, script) in [
        ("usual", options.layers, noise),
        ("deep", options.deep, small),
    ] {
        let layers: Vec<_> = (0..count)
            .map(|number| (format!("l{number}"), format!("NAME=l{number}; {script}")))
            .collect();
        let layers: Vec<LayerScript<'_>> = layers
            .iter()
            .map(|(name, script)| (name.as_str(), script.as_str()))
            .collect();
        containerd.make_image(image, &layers);
    }
    let mut script = MEASURE.to_owned();
    for round in 0..options.rounds.max(1) {
        for image in ["usual", "deep"] {
            for at in 0..SNAPSHOTTERS.len() {
                // Alternating, so that neither always has the warmer caches.
                let index = (at + round) % SNAPSHOTTERS.len();
                if let Some(snapshotter) = SNAPSHOTTERS.get(index) {
                    script.push_str(&format!("measure {snapshotter} {image}\n"));
                }
            }
        }
    }
    let output = containerd.script(&script);
    if output.code != 0 {
        return failure(output.report());
    }
    let times = Times::parse(&output.out())?;
    title("results");
    note(&format!(
        "usual: an image of {} layers with 100 files of 40 kB each; deep: of {} layers with one small file each; medians of \
         {} rounds",
        options.layers + 1,
        options.deep + 1,
        options.rounds.max(1)
    ));
    times.print();
    Ok(())
}

/// The times of an operation on an image: the operation, and the times with each snapshotter.
type Row = ((String, String), [Vec<Duration>; SNAPSHOTTERS.len()]);

/// The measured times, in the order of the operations.
#[derive(Debug, Default)]
struct Times(Vec<Row>);

impl Times {
    fn parse(text: &str) -> Result<Self> {
        let mut times = Self::default();
        for line in text.lines() {
            let fields: Vec<_> = line.split('|').collect();
            let [image, label, snapshotter, took] = fields[..] else {
                return failure(format!("unexpected output: {line:?}"));
            };
            let column = SNAPSHOTTERS.iter().position(|name| *name == snapshotter);
            let (Some(column), Ok(took)) = (column, took.parse()) else {
                return failure(format!("unexpected output: {line:?}"));
            };
            let key = (image.to_owned(), label.to_owned());
            let index = match times.0.iter().position(|(known, _)| *known == key) {
                Some(index) => index,
                None => {
                    times.0.push((key, Default::default()));
                    times.0.len() - 1
                }
            };
            let cell = times
                .0
                .get_mut(index)
                .and_then(|(_, cells)| cells.get_mut(column));
            cell.into_iter()
                .for_each(|cell| cell.push(Duration::from_micros(took)));
        }
        // The images in turn, each with its operations in the order of the first round.
        times.0.sort_by(|((one, _), _), ((two, _), _)| two.cmp(one));
        Ok(times)
    }

    fn print(&self) {
        println!("| image | operation | overlayfs | cowl | ratio |\n|---|---|---|---|---|");
        for ((image, label), cells) in &self.0 {
            let [overlayfs, cowl] = cells.each_ref().map(|all| median(all));
            let show = |time: Option<Duration>| match time {
                Some(time) => format!("{:.1} ms", time.as_secs_f64() * 1000.0),
                None => "-".to_owned(),
            };
            let ratio = match (overlayfs, cowl) {
                (Some(one), Some(two)) => {
                    format!("{:.2}", two.as_secs_f64() / one.as_secs_f64())
                }
                _ => "-".to_owned(),
            };
            println!(
                "| {image} | {label} | {} | {} | {ratio} |",
                show(overlayfs),
                show(cowl)
            );
        }
    }
}

fn median(times: &[Duration]) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_grouped_by_image_and_operation() {
        let text = "usual|import|cowl|30\ndeep|import|cowl|5\nusual|run|cowl|1\nusual|import|overlayfs|10\nusual|import|cowl|20\n\
                    usual|import|cowl|90";
        let times = Times::parse(text).unwrap();
        let keys: Vec<_> = times
            .0
            .iter()
            .map(|((image, label), _)| format!("{image} {label}"))
            .collect();
        assert_eq!(keys, ["usual import", "usual run", "deep import"]);
        let (_, [overlayfs, cowl]) = &times.0[0];
        assert_eq!(median(overlayfs), Some(Duration::from_micros(10)));
        assert_eq!(median(cowl), Some(Duration::from_micros(30)));
        assert_eq!(median(&[]), None);
        Times::parse("x").unwrap_err();
    }
}

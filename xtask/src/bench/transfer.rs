//! Measures transfers of a Debian container with three snapshots to another host: through a registry compared with
//! skopeo and umoci, and over ssh compared with rsync. Prints a table; asserts nothing.
//!
//! The hosts are two network namespaces, so that the bytes of each program on the network are counted.

mod table;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cowl_tests::registry::{Protection, Registry};
use cowl_tests::rootfs;
use cowl_tests::scratch::Scratch;
use cowl_tests::two_hosts::TwoHosts;

use self::table::Table;
use super::ground::clear;
use super::machine::Machine;
use crate::run::{Failure, Result, failure, note, target, title};

/// Options of `cargo xtask bench transfer`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of times that each transfer is measured; the median is reported
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

impl Options {
    /// Returns the default options; with `quick`, those of a smoke test.
    pub(super) fn usual(quick: bool) -> Self {
        Self {
            rounds: if quick { 1 } else { 3 },
        }
    }
}

/// One of the two states that are transferred one after the other.
struct Stage {
    at: usize,
    /// The snapshot with the state.
    state: &'static str,
    /// The states that are sent over ssh to a host that has those before.
    range: &'static str,
    push: &'static str,
    pull: &'static str,
    ssh: &'static str,
}

const STAGES: [Stage; 2] = [
    Stage {
        at: 0,
        state: "snap2",
        range: "web",
        push: "to a registry, first",
        pull: "from a registry, first",
        ssh: "over ssh, first",
    },
    Stage {
        at: 1,
        state: "snap3",
        range: "web@snap2..snap3",
        push: "to a registry, after a small change",
        pull: "from a registry, after a small change",
        ssh: "over ssh, after a small change",
    },
];

/// The number of random bytes in each snapshot of the first transfer, and in the small change.
const NOISE: [usize; 2] = [2_000_000, 1_000_000];

/// A registry that requires nothing.
const OPEN: Protection = Protection {
    password: false,
    tls: false,
    clients: false,
};

/// Runs the benchmark with the release build of cowl.
pub(super) fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return failure("only root can create network namespaces");
    }
    crate::namespace::enter();
    let cowl = target()?.join("release/cowl");
    let machine = Machine::look()?;
    title("preparing a container");
    let mut bench = Bench::prepare(cowl)?;
    for round in 0..options.rounds.max(1) {
        title(&format!("round {} of {}", round + 1, options.rounds.max(1)));
        bench.round(round)?;
    }
    title("results");
    note(&format!(
        "{}, {}, {} CPUs, {}, load {}, {} rounds\n",
        machine.date, machine.kernel, machine.cpus, machine.commit, machine.load, options.rounds
    ));
    note(&bench.table.markdown());
    Ok(())
}

struct Bench {
    scratch: Scratch,
    hosts: TwoHosts,
    cowl: PathBuf,
    table: Table,
}

/// The store, the image layout and the plain tree of each of the two states.
#[derive(Clone, Copy)]
enum Source {
    Store,
    Layout,
    Tree,
}

impl Bench {
    /// Creates the two states, as stores, as image layouts and as plain trees.
    fn prepare(cowl: PathBuf) -> Result<Self> {
        let tar = rootfs::debian_tar()?;
        let bench = Self {
            scratch: Scratch::new("transfer"),
            hosts: TwoHosts::start(),
            cowl,
            table: Table::default(),
        };
        let first = bench.path(Source::Store, 0);
        succeed(bench.on(&first).args(["create", "web", "--from"]).arg(&tar))?;
        let mut seed = 1;
        bench.change(&first, 3, NOISE[0], &mut seed)?;
        let second = bench.path(Source::Store, 1);
        succeed(Command::new("cp").arg("-a").arg(&first).arg(&second))?;
        bench.change(&second, 1, NOISE[1], &mut seed)?;
        for Stage { at, state, .. } in STAGES {
            let state = format!("web@{state}");
            for (option, source) in [("--oci", Source::Layout), ("--dir", Source::Tree)] {
                let to = bench.path(source, at);
                let mut command = bench.on(&bench.path(Source::Store, at));
                succeed(command.args(["export", option, &state]).arg(to))?;
            }
        }
        std::fs::write(
            bench.scratch.join("policy.json"),
            r#"{"default":[{"type":"insecureAcceptAnything"}]}"#,
        )?;
        Ok(bench)
    }

    /// Takes snapshots of the container in a store, each with new files and a changed line.
    fn change(&self, store: &Path, snapshots: usize, noise: usize, seed: &mut u64) -> Result<()> {
        let at = succeed(self.on(store).args(["mount", "web"]))?;
        let at = Path::new(at.trim_end());
        for _ in 0..snapshots {
            *seed += 1;
            std::fs::write(at.join(format!("srv/noise{seed}")), random(noise, *seed))?;
            std::fs::write(at.join("etc/hostname"), format!("web{seed}\n"))?;
            succeed(self.on(store).args(["snapshot", "web"]))?;
        }
        succeed(self.on(store).args(["umount", "web"])).map(drop)
    }

    fn path(&self, source: Source, at: usize) -> PathBuf {
        let name = match source {
            Source::Store => "store",
            Source::Layout => "layout",
            Source::Tree => "tree",
        };
        self.scratch.join(format!("{name}{at}"))
    }

    /// Returns a command line of cowl for a store.
    fn on(&self, store: &Path) -> Command {
        let mut command = Command::new(&self.cowl);
        command.arg("--store").arg(store);
        command
    }

    /// Returns a command line of cowl for a store that reaches the registry.
    fn near(&self, store: &Path) -> Command {
        let mut command = self.hosts.near("env");
        command.arg(&self.cowl).arg("--store").arg(store);
        command
    }

    /// Runs a command line. Returns its time and the number of bytes on the network.
    fn run(&self, command: &mut Command) -> Result<(Duration, u64)> {
        // The data of earlier steps is not written back meanwhile.
        rustix::fs::sync();
        let before = self.hosts.bytes();
        let start = Instant::now();
        succeed(command)?;
        Ok((start.elapsed(), self.hosts.bytes() - before))
    }

    fn record(
        &mut self,
        (transfer, program): (&'static str, &'static str),
        (took, bytes): (Duration, u64),
    ) {
        note(&format!("{transfer}: {program}: {took:.2?}, {bytes} bytes"));
        self.table.add(transfer, program, took, bytes);
    }

    /// Runs a command line, and records its time and the number of bytes on the network.
    fn measure(
        &mut self,
        transfer: &'static str,
        program: &'static str,
        mut command: Command,
    ) -> Result<()> {
        let measured = self.run(&mut command)?;
        self.record((transfer, program), measured);
        Ok(())
    }

    /// Runs two command lines. Records those of the first one as `programs[0]`, and the sum as `programs[1]`.
    fn measure_both(
        &mut self,
        transfer: &'static str,
        programs: [&'static str; 2],
        [mut first, mut second]: [Command; 2],
    ) -> Result<()> {
        let (took, bytes) = self.run(&mut first)?;
        let (more, _) = self.run(&mut second)?;
        self.record((transfer, programs[0]), (took, bytes));
        self.record((transfer, programs[1]), (took + more, bytes));
        Ok(())
    }

    /// Performs each transfer once, to empty destinations.
    fn round(&mut self, round: usize) -> Result<()> {
        let dir = self.scratch.make("round");
        self.through_registry(round, &dir)?;
        self.with_skopeo(round, &dir)?;
        self.over_ssh(&dir)?;
        // The disk needs the space for the next round.
        clear(&dir)
    }

    fn registry(&self, round: usize, number: u16, dir: &Path) -> Result<(Registry, String)> {
        // Programs remember the layers of a registry by its name.
        let port = u16::try_from(round)
            .ok()
            .and_then(|round| round.checked_mul(2)?.checked_add(5000 + number))
            .ok_or_else(|| Failure("there are too many rounds".to_owned()))?;
        let command = self.hosts.far("docker-registry");
        let address = (self.hosts.server(), port);
        let registry = Registry::start_at(dir, OPEN, address, command);
        let image = format!("{}/web:1", registry.name());
        Ok((registry, image))
    }

    fn through_registry(&mut self, round: usize, dir: &Path) -> Result<()> {
        let (_registry, image) = self.registry(round, 0, &dir.join("registry-cowl"))?;
        let there = dir.join("pulled");
        let mut store = self.path(Source::Store, 0);
        for Stage {
            at,
            state,
            push: to,
            pull: from,
            ..
        } in STAGES
        {
            if at > 0 {
                // The same container continues: the store knows what it has pushed.
                let continued = dir.join("continued");
                succeed(Command::new("cp").arg("-a").arg(&store).arg(&continued))?;
                store = continued;
                self.change(&store, 1, NOISE[1], &mut 100)?;
            }
            let state = format!("web@{state}");
            let mut push = self.near(&store);
            push.args(["push", &state, &image, "--tls-verify=false"]);
            self.measure(to, "`cowl push`", push)?;
            let mut pull = self.near(&there);
            pull.args(["pull", &image, "--tls-verify=false"]);
            if at > 0 {
                pull.arg("--update");
            }
            self.measure(from, "`cowl pull`", pull)?;
        }
        Ok(())
    }

    fn with_skopeo(&mut self, round: usize, dir: &Path) -> Result<()> {
        let (_registry, image) = self.registry(round, 1, &dir.join("registry-skopeo"))?;
        let copied = dir.join("copied");
        for Stage {
            at,
            state,
            push: to,
            pull: from,
            ..
        } in STAGES
        {
            let layout = format!("oci:{}:{state}", self.path(Source::Layout, at).display());
            let push = self.skopeo(
                "--dest-tls-verify=false",
                &layout,
                &format!("docker://{image}"),
            );
            let mut export = self.on(&self.path(Source::Store, at));
            export
                .args(["export", "--oci", &format!("web@{state}")])
                .arg(dir.join(format!("exported{at}")));
            let programs = [
                "`skopeo copy` of a finished image",
                "`cowl export --oci`, `skopeo copy`",
            ];
            self.measure_both(to, programs, [push, export])?;
            let pull = self.skopeo(
                "--src-tls-verify=false",
                &format!("docker://{image}"),
                &format!("oci:{}:1", copied.display()),
            );
            let mut unpack = Command::new("umoci");
            unpack
                .args(["unpack", "--image", &format!("{}:1", copied.display())])
                .arg(dir.join(format!("bundle{at}")));
            let programs = [
                "`skopeo copy`, not unpacked",
                "`skopeo copy`, `umoci unpack`",
            ];
            self.measure_both(from, programs, [pull, unpack])?;
        }
        Ok(())
    }

    fn skopeo(&self, option: &str, from: &str, to: &str) -> Command {
        let mut command = self.hosts.near("skopeo");
        let policy = self.scratch.join("policy.json");
        command.arg("--policy").arg(policy);
        command.args(["copy", "-q", option, from, to]);
        command
    }

    fn over_ssh(&mut self, dir: &Path) -> Result<()> {
        let (ssh, server) = (self.hosts.ssh(), self.hosts.server());
        let cowl = self.cowl.display().to_string();
        for Stage {
            at,
            range,
            ssh: transfer,
            ..
        } in STAGES
        {
            let store = self.path(Source::Store, at);
            let mut copy = self.on(&store);
            let url = self.hosts.url(&dir.join("copied-store"));
            copy.args(["copy", "--remote", &cowl, "web", &url]);
            copy.env("COWL_SSH", &ssh);
            self.measure(transfer, "`cowl copy`", copy)?;
            let line = format!(
                "{cowl} --store {store} send {range} | {ssh} {server} {cowl} --store {there} receive",
                store = store.display(),
                there = dir.join("received").display()
            );
            let program = "`cowl send`, ssh, `cowl receive`";
            self.measure(transfer, program, shell(&line))?;
            let line = format!(
                "rsync -aHAX --numeric-ids --delete -e '{ssh}' {from}/ {server}:{to}/",
                from = self.path(Source::Tree, at).display(),
                to = dir.join("synced").display()
            );
            self.measure(transfer, "`rsync -aHAX`, without snapshots", shell(&line))?;
        }
        Ok(())
    }
}

fn shell(line: &str) -> Command {
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", line]);
    command
}

/// Runs a command line that must succeed, and returns its standard output.
fn succeed(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failure(format!("cannot start {}: {error}", program.display())))?;
    if !output.status.success() {
        let text = output.stderr.trim_ascii();
        let end = text.len().saturating_sub(600);
        let text = text.get(end..).unwrap_or_default().escape_ascii();
        return failure(format!("{command:?} ended with {}: {text}", output.status));
    }
    String::from_utf8(output.stdout)
        .map_err(|_| Failure(format!("{} printed invalid UTF-8", program.display())))
}

/// Returns bytes that do not become smaller when they are compressed.
fn random(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

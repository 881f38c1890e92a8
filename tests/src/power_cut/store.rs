//! Runs all verbs on a store on the logged disk, concurrently with a writer, and records when each state was
//! acknowledged.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::disk::Log;
use super::work::{Base, commit_often};
use crate::command::{Output, run_command};
use crate::random::rng::Rng;
use crate::scratch::Scratch;

/// Number of file names that the writer uses.
const FILES: u64 = 50;
/// The container that stays mounted and is written to during the whole run.
pub const LIVE: &str = "live";
/// The container that is mounted only for single commands.
pub const IDLE: &str = "idle";

/// The mode in which the programs under test run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// Unmodified.
    Whole,
    /// With every syncfs(2) returning immediately without a sync, as if states were marked durable before their data
    /// is written.
    NoSync,
}

/// The content of a state, as the digest of its export.
pub type Content = [u8; 32];

/// The recorded facts about a snapshot or a container.
#[derive(Debug, Clone)]
pub struct Fact {
    /// NAME, or NAME@SNAP.
    pub address: String,
    /// Time of the acknowledgment.
    pub from: u64,
    /// Time at which a command began to remove or rename it.
    pub until: Option<u64>,
    /// Time of the acknowledgment as durable.
    pub durable: Option<u64>,
    /// Its content, unless that may change.
    pub content: Option<Content>,
}

/// All recorded facts, and the span of the run.
#[derive(Debug)]
pub struct Past {
    /// The facts.
    pub facts: Vec<Fact>,
    /// First and last time of the run.
    pub span: (u64, u64),
}

/// Returns the path of the store on a disk mounted at `mount_point`.
#[must_use]
pub fn store_on(mount_point: &Path) -> PathBuf {
    mount_point.join("store")
}

/// Returns the command `cowl --store STORE` without further arguments.
#[must_use]
pub fn cowl(store: &Path, care: Care) -> Command {
    let mut command = match care {
        Care::Whole => Command::new(crate::programs::cowl()),
        Care::NoSync => {
            // strace runs as a grandchild (-D), so that nothing waits for the daemons that it traces.
            let mut command = Command::new("strace");
            command.args(["-DDDqqf", "-o", "/dev/null", "-e", "trace=syncfs"]);
            command.args(["-e", "inject=syncfs:retval=0", "--seccomp-bpf"]);
            command.arg(crate::programs::cowl());
            command
        }
    };
    command.arg("--store").arg(store);
    command.env("COWL_CONFIG", "/dev/null");
    command
}

/// Returns the digest of an archive.
#[must_use]
pub fn content(archive: &[u8]) -> Content {
    Sha256::digest(archive).into()
}

/// Creates a store on a disk, runs the verbs on it, and detaches the disk. An image of the disk before the run is
/// written to `before`.
#[must_use]
pub fn run(
    scratch: &Scratch,
    base: &Base,
    (seed, care): (u64, Care),
    before: &Path,
) -> (Past, Arc<Log>) {
    let (disk, mount_point) = base.make(scratch);
    let mut work = Work {
        store: store_on(&mount_point),
        beside: scratch.make("beside"),
        log: disk.log(),
        rng: Rng::new(seed),
        care,
        facts: Vec::new(),
        made: 0,
    };
    work.plant();
    for name in [LIVE, IDLE] {
        work.create(name);
    }
    let mounted = PathBuf::from(work.cowl(["mount", LIVE]).ok().out());
    crate::command::run("sync", ["-f".as_ref(), mount_point.as_os_str()]).ok();
    disk.watch(before);
    let began = work.log.now();
    let finished = AtomicBool::new(false);
    let writer_lock = Mutex::new(());
    std::thread::scope(|scope| {
        scope.spawn(|| write_without_sync(&mounted, seed, &finished, &writer_lock));
        if seed % 2 == 0 {
            scope.spawn(|| commit_often(&mount_point, &finished));
        }
        let done =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work.all(&writer_lock)));
        finished.store(true, Ordering::SeqCst);
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
    });
    let span = (began, work.log.now());
    work.cowl(["umount", LIVE]).ok();
    crate::mount::unmount_free(&mount_point);
    let log = disk.log();
    disk.unplug();
    let facts = work.facts;
    (Past { facts, span }, log)
}

/// Writes, appends and renames in the container without a sync, as a program would.
fn write_without_sync(root: &Path, seed: u64, finished: &AtomicBool, writer_lock: &Mutex<()>) {
    let mut rng = Rng::new(seed ^ 77);
    while !finished.load(Ordering::SeqCst) {
        {
            let _guard = writer_lock.lock().unwrap_or_else(PoisonError::into_inner);
            let name = root.join(format!("n{}", rng.below(FILES)));
            let text = vec![b'a' + u8::try_from(rng.below(26)).unwrap_or(0); 20_000];
            match rng.below(4) {
                0 => std::fs::write(&name, &text).unwrap(),
                1 => {
                    let mut file = std::fs::File::options()
                        .create(true)
                        .append(true)
                        .open(&name)
                        .unwrap();
                    file.write_all(&text[..3000]).unwrap();
                    if file.metadata().unwrap().len() > 100_000 {
                        file.set_len(0).unwrap();
                    }
                }
                2 => {
                    std::fs::write(root.join("new"), &text).unwrap();
                    std::fs::rename(root.join("new"), &name).unwrap();
                }
                _ => match std::fs::remove_file(&name) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        panic!("cannot remove {}: {error}", name.display());
                    }
                    _ => {}
                },
            }
        }
        std::thread::sleep(Duration::from_micros(rng.below(5000)));
    }
}

/// The verbs. Each is executed in every run.
#[derive(Clone, Copy, Debug)]
enum Verb {
    Snapshot(&'static str),
    IdleSnapshot(&'static str),
    Change,
    Remove,
    Restore,
    Undo,
    LiveRestore,
    Clone,
    CloneSnapshot,
    Flatten,
    LiveFlatten,
    Rename,
    Create,
    Import,
    Destroy,
    Undelete,
}

const VERBS: &[Verb] = &[
    Verb::Snapshot(""),
    Verb::Snapshot(""),
    Verb::Snapshot("--sync"),
    Verb::Snapshot("--sync"),
    Verb::Snapshot("--no-sync"),
    Verb::Change,
    Verb::IdleSnapshot(""),
    Verb::Change,
    Verb::IdleSnapshot("--sync"),
    Verb::Change,
    Verb::IdleSnapshot("--no-sync"),
    Verb::Change,
    Verb::Restore,
    Verb::Change,
    Verb::Undo,
    Verb::LiveRestore,
    Verb::Clone,
    Verb::CloneSnapshot,
    Verb::Flatten,
    Verb::LiveFlatten,
    Verb::Rename,
    Verb::Create,
    Verb::Import,
    Verb::Remove,
    Verb::Destroy,
    Verb::Undelete,
];

/// Returns the snapshot's name in NAME@SNAP.
fn snapshot_of(address: &str) -> &str {
    address.split_once('@').map_or("", |(_, snapshot)| snapshot)
}

struct Work {
    store: PathBuf,
    beside: PathBuf,
    log: Arc<Log>,
    rng: Rng,
    care: Care,
    facts: Vec<Fact>,
    made: u32,
}

impl Work {
    fn cowl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        let mut command = cowl(&self.store, self.care);
        command.args(args);
        run_command(command, b"")
    }

    /// Creates the root filesystem of the first containers.
    fn plant(&self) {
        let root = self.beside.join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        for number in 0..12 {
            std::fs::write(root.join(format!("etc/f{number}")), vec![b'o'; 7000]).unwrap();
        }
        for number in 0..FILES / 2 {
            std::fs::write(root.join(format!("n{number}")), vec![b'l'; 9000]).unwrap();
        }
    }

    fn all(&mut self, writer_lock: &Mutex<()>) {
        let mut deck = VERBS.to_vec();
        while !deck.is_empty() {
            let index = usize::try_from(self.rng.below(deck.len() as u64)).unwrap_or(0);
            let verb = deck.swap_remove(index);
            self.act(verb, writer_lock);
            std::thread::sleep(Duration::from_millis(self.rng.below(60)));
        }
    }

    fn act(&mut self, verb: Verb, writer_lock: &Mutex<()>) {
        match verb {
            Verb::Snapshot(how) => self.snapshot(LIVE, how),
            Verb::IdleSnapshot(how) => self.snapshot(IDLE, how),
            Verb::Change => self.change(),
            Verb::Remove => self.remove(),
            Verb::Restore => self.restore(),
            Verb::Undo => self.undo(),
            Verb::LiveRestore => {
                let Some(address) = self.one_of(LIVE) else {
                    return;
                };
                {
                    let _guard = writer_lock.lock().unwrap_or_else(PoisonError::into_inner);
                    self.cowl(["restore", LIVE, snapshot_of(&address)]).ok();
                }
                self.new_snapshots(LIVE, None);
            }
            Verb::Clone => self.clone_of(LIVE),
            Verb::CloneSnapshot => {
                if let Some(address) = self.one_of(IDLE).or_else(|| self.one_of(LIVE)) {
                    self.clone_of(&address);
                }
            }
            Verb::Flatten => {
                self.cowl(["flatten", IDLE]).ok();
            }
            // Concurrently with the writer.
            Verb::LiveFlatten => {
                self.cowl(["flatten", LIVE]).ok();
            }
            Verb::Rename => self.rename(),
            Verb::Create => {
                let name = self.name("made");
                self.create(&name);
            }
            Verb::Import => self.import(),
            Verb::Destroy => self.destroy(),
            Verb::Undelete => {
                self.destroy_and_back();
            }
        }
    }

    fn name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}{}", self.made)
    }

    fn content_of(&self, address: &str) -> Content {
        content(&self.cowl(["export", address, "-"]).ok().stdout)
    }

    fn acknowledge(&mut self, address: &str, durable: bool, content: Option<Content>, from: u64) {
        self.facts.push(Fact {
            address: address.to_owned(),
            from,
            until: None,
            durable: durable.then_some(from),
            content,
        });
    }

    /// Records that `address`, and its snapshots, may be absent from now on.
    fn forget(&mut self, address: &str) {
        let now = self.log.now();
        let inner = format!("{address}@");
        for fact in &mut self.facts {
            let matches = fact.address == address || fact.address.starts_with(&inner);
            if matches && fact.until.is_none() {
                fact.until = Some(now);
            }
        }
    }

    /// Returns a random existing snapshot of a container.
    fn one_of(&mut self, container: &str) -> Option<String> {
        let inner = format!("{container}@");
        let known = self.facts.iter();
        let known: Vec<_> = known
            .filter(|fact| fact.until.is_none() && fact.address.starts_with(&inner))
            .map(|fact| fact.address.clone())
            .collect();
        (!known.is_empty()).then(|| self.rng.pick(&known))
    }

    /// Returns a random container other than the two that are written to.
    fn another(&mut self) -> Option<String> {
        let known = self.facts.iter();
        let known: Vec<_> = known
            .filter(|fact| fact.until.is_none() && !fact.address.contains('@'))
            .filter(|fact| fact.address != LIVE && fact.address != IDLE)
            .map(|fact| fact.address.clone())
            .collect();
        (!known.is_empty()).then(|| self.rng.pick(&known))
    }

    fn create(&mut self, name: &str) {
        let from = self.beside.join("root").into_os_string();
        let args = ["create".as_ref(), name.as_ref(), "--from".as_ref()];
        self.cowl(args.into_iter().chain([from.as_os_str()])).ok();
        let from = self.log.now();
        let changes = name == LIVE || name == IDLE;
        let content = (!changes).then(|| self.content_of(name));
        // A restore changes the content of the containers that are written to.
        self.acknowledge(name, !changes, content, from);
    }

    fn snapshot(&mut self, container: &str, how: &str) {
        let args = ["snapshot", container].into_iter();
        let taken = self.cowl(args.chain((!how.is_empty()).then_some(how)));
        let from = self.log.now();
        let address = format!("{container}@{}", taken.ok().out());
        let content = self.content_of(&address);
        self.acknowledge(&address, how == "--sync", Some(content), from);
    }

    /// Records additional snapshots that a command created, as acknowledged at `at` or now.
    fn new_snapshots(&mut self, container: &str, at: Option<u64>) {
        let from = at.unwrap_or_else(|| self.log.now());
        let listed = self.cowl(["list", container, "--format", "{name}"]).ok();
        let known: HashSet<_> = self.facts.iter().map(|fact| fact.address.clone()).collect();
        for name in listed.out().lines() {
            let address = format!("{container}@{name}");
            if !known.contains(&address) {
                let content = self.content_of(&address);
                self.acknowledge(&address, false, Some(content), from);
            }
        }
    }

    /// Writes to a container that is mounted for this purpose only.
    fn change(&mut self) {
        let number = self.rng.below(1000);
        let root = PathBuf::from(self.cowl(["mount", IDLE]).ok().out());
        for file in 0..6 {
            let text = format!("{number} ").repeat(2000);
            std::fs::write(root.join(format!("c{file}")), text).unwrap();
        }
        std::fs::write(root.join("etc/f1"), format!("{number}")).unwrap();
        self.cowl(["umount", IDLE]).ok();
    }

    fn remove(&mut self) {
        for container in [IDLE, LIVE] {
            if let Some(address) = self.one_of(container) {
                self.forget(&address);
                self.cowl(["rm", &address]).ok();
            }
        }
    }

    fn restore(&mut self) {
        let Some(address) = self.one_of(IDLE) else {
            return;
        };
        self.cowl(["restore", IDLE, snapshot_of(&address)]).ok();
        self.new_snapshots(IDLE, None);
        self.cowl(["restore", IDLE, "--undo"]).ok();
        self.new_snapshots(IDLE, None);
    }

    fn undo(&mut self) {
        self.cowl(["undo", IDLE]).ok();
        self.new_snapshots(IDLE, None);
    }

    fn clone_of(&mut self, source: &str) {
        let name = self.name("clone");
        self.cowl(["clone", source, &name]).ok();
        let from = self.log.now();
        let content = self.content_of(&name);
        self.acknowledge(&name, false, Some(content), from);
    }

    fn rename(&mut self) {
        let Some(old) = self.another() else { return };
        let new = self.name("named");
        let fact = self.facts.iter().find(|fact| fact.address == old).cloned();
        self.forget(&old);
        self.cowl(["rename", &old, &new]).ok();
        let from = self.log.now();
        let content = fact.and_then(|fact| fact.content);
        self.acknowledge(&new, false, content, from);
    }

    fn import(&mut self) {
        let file = self.beside.join("whole.tar");
        let name = self.name("back");
        let (arg, option) = (file.as_os_str(), "--with-snapshots".as_ref());
        self.cowl(["export".as_ref(), IDLE.as_ref(), arg, option])
            .ok();
        self.cowl(["import".as_ref(), arg, name.as_ref()]).ok();
        let from = self.log.now();
        let content = self.content_of(&name);
        self.acknowledge(&name, true, Some(content), from);
        self.new_snapshots(&name, Some(from));
    }

    fn destroy(&mut self) {
        if let Some(name) = self.another() {
            self.forget(&name);
            self.cowl(["destroy", &name, "--yes"]).ok();
        }
    }

    fn destroy_and_back(&mut self) {
        let Some(name) = self.another() else { return };
        let fact = self.facts.iter().find(|fact| fact.address == name).cloned();
        self.forget(&name);
        self.cowl(["destroy", &name, "--yes"]).ok();
        self.cowl(["undelete", &name]).ok();
        let from = self.log.now();
        let content = fact.and_then(|fact| fact.content);
        self.acknowledge(&name, false, content, from);
    }
}

//! Snapshots while programs write by passthrough: the files move to the new layer (docs/decisions/0043).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use cowl_tests::command::{Output, run, run_command, show};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images::Kind;
use cowl_tests::power_cut::moving::PHASE;
use cowl_tests::process::signal;
use cowl_tests::run::number;

pub(crate) const NEEDS: &[Need] = &[Need::Root, Need::Fuse, Need::Program("python3")];

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/containers/moving_files.py")
}

/// The exit code of the script if the content is not that of one moment.
const WRONG: i32 = 3;

/// The number of phases of a move at whose ends a daemon can be killed.
const PHASES: u64 = 4;
/// The number of snapshots that are taken at most until one of the broken variant misses a record.
const MOST_SNAPSHOTS: usize = 40;
/// Messages of snapshots that fail because a program writes, or the machine is busy.
const REFUSALS: [&str; 2] = ["changed them again", "takes too long to copy"];

/// The number of snapshots that are refused in a row, or taken without copies, from which a run fails.
const MOST_REFUSED: usize = 200;

/// The length of a run with snapshots under a program that writes.
pub(crate) struct Run {
    /// The time in seconds after which the program ends, if there were enough snapshots.
    seconds: u64,
    /// The number of snapshots after which it ends instead, if that is not 0.
    snapshots: usize,
    /// The number of snapshots that are mounted and checked.
    checked: usize,
    /// The number of records in each file of the program, a multiple of 16.
    slots: u64,
}

impl Run {
    pub(crate) fn from_env() -> Self {
        let snapshots = number("COWL_MOVING_SNAPSHOTS", 0);
        // To mount each of them takes long. The last one is of a container without a program that writes.
        let (checked, slots) = match snapshots {
            // Each slot is written several times in a few seconds.
            0 => (12, 256),
            snapshots => (snapshots + 1, 2048),
        };
        let size = |number| usize::try_from(number).unwrap();
        Self {
            seconds: number("COWL_MOVING_SECONDS", 5),
            snapshots: size(snapshots),
            checked: size(number("COWL_MOVING_CHECKED", checked)),
            slots: number("COWL_MOVING_SLOTS", slots),
        }
    }

    /// Returns the size of the image, which is sparse.
    fn image_size(&self) -> u64 {
        let each = match self.snapshots {
            0 => self.seconds,
            snapshots => snapshots as u64,
        };
        (320 << 20) + each * (16 << 20)
    }
}

/// Returns a store on a file system with space for a run, whose mounts use passthrough for all files.
pub(crate) fn store_for(kind: Kind, length: &Run) -> Store {
    let size = length.image_size();
    Store::on(|scratch, name| kind.mount_with_size(scratch, name, size)).with_passthrough()
}

/// A store on a file system, with a container that is mounted with passthrough for all files.
pub(crate) struct Lab {
    pub(crate) store: Store,
    pub(crate) top: PathBuf,
}

impl Lab {
    pub(crate) fn new<'a>(
        kind: Kind,
        keepers: bool,
        settings: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        let store = store_for(kind, &Run::from_env());
        let store = if keepers { store.with_keepers() } else { store };
        let source = store.scratch().make("source");
        std::fs::create_dir(source.join("deep")).unwrap();
        std::fs::write(source.join("cold"), vec![7; 1 << 20]).unwrap();
        store.create("web", &source);
        let mut mount = store.command(["mount", "web"]);
        mount.envs(settings);
        if !keepers {
            mount.env("COWL_KEEPER", "off");
        }
        let top = PathBuf::from(run_command(mount, b"").ok().out());
        Self { store, top }
    }

    fn snapshot(&self) -> Output {
        run_command(self.snapshot_command(), b"")
    }

    pub(crate) fn snapshot_command(&self) -> Command {
        self.store.command(["-v", "snapshot", "web"])
    }

    /// Mounts a snapshot, and returns the result of `read`.
    pub(crate) fn with_snapshot<T>(&self, name: &str, read: impl FnOnce(&Path) -> T) -> T {
        let at = self.store.beside("shown");
        std::fs::create_dir_all(&at).unwrap();
        let source = format!("web@{name}");
        let words = ["mount", &source, at.to_str().unwrap()];
        self.store.cowl(words).ok();
        let done = read(&at);
        self.store.cowl(["umount", at.to_str().unwrap()]).ok();
        done
    }
}

pub(crate) struct Program {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Program {
    pub(crate) fn start(words: &[&str]) -> Self {
        let mut child = Command::new("python3")
            .arg(script())
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Starts the program that writes numbered records to the container, and waits until it has opened its files. `pause`
    /// is the average pause after each record in milliseconds, unless `COWL_MOVING_PAUSE` is set; 0 for a short pause after
    /// some records.
    pub(crate) fn start_writer(lab: &Lab, pause: u64) -> Self {
        let pause = number("COWL_MOVING_PAUSE", pause).to_string();
        let (top, slots) = (lab.top.to_str().unwrap(), Run::from_env().slots.to_string());
        let mut writer = Self::start(&["write", top, &slots, &pause]);
        assert_eq!(writer.hear(), "ready");
        writer
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub(crate) fn end(mut self, context: &str) {
        drop(self.stdin);
        assert!(self.child.wait().unwrap().success(), "{context}");
    }

    pub(crate) fn tell(&mut self) {
        self.stdin.write_all(b"\n").unwrap();
    }
}

/// Checks the records in a copy of the container.
fn check_records(top: &Path) -> Output {
    let slots = Run::from_env().slots.to_string();
    let words = [
        script().into_os_string(),
        "check".into(),
        top.into(),
        slots.into(),
    ];
    run("python3", words)
}

/// Takes snapshots while a program writes, calls `between` after each, and checks the content of the snapshots.
pub(crate) fn snapshots_of_a_busy_container(lab: &Lab, mut between: impl FnMut()) {
    let writer = Program::start_writer(lab, 0);
    snapshots_beside(lab, writer, &|| lab.snapshot(), &mut between);
}

/// Like [`snapshots_of_a_busy_container`], with a program that writes and a function that takes a snapshot.
pub(crate) fn snapshots_beside(
    lab: &Lab,
    mut writer: Program,
    snapshot: &dyn Fn() -> Output,
    between: &mut dyn FnMut(),
) {
    let (length, begin) = (Run::from_env(), Instant::now());
    let (mut taken, mut moved, mut refused) = (Vec::new(), 0, 0);
    let mut in_a_row = 0;
    while writer.child.try_wait().unwrap().is_none() {
        let output = snapshot();
        if output.code != 0 && REFUSALS.iter().any(|text| output.err().contains(text)) {
            refused += 1;
            in_a_row += 1;
            assert!(in_a_row < MOST_REFUSED, "{}", output.report());
            continue;
        }
        in_a_row = 0;
        let output = output.ok();
        moved += usize::from(output.err().contains("were copied"));
        taken.push(output.out());
        let is_moving = moved > 5 || taken.len() < MOST_REFUSED;
        assert!(is_moving, "{}", output.report());
        if length.snapshots > 0 && taken.len() % 50 == 1 {
            let (count, seconds) = (taken.len(), begin.elapsed().as_secs());
            println!(
                "{count} snapshots after {seconds} s; the last one: {}",
                output.err()
            );
        }
        between();
        let is_last = match length.snapshots {
            0 => moved > 5 && begin.elapsed().as_secs() >= length.seconds,
            snapshots => taken.len() == snapshots,
        };
        if is_last {
            writer.tell();
            break;
        }
    }
    let written: usize = writer.hear().parse().unwrap();
    assert!(writer.child.wait().unwrap().success());
    let last = snapshot().ok();
    let (count, names) = (taken.len(), lab.store.snapshots("web"));
    assert!(
        moved > 5 && count >= length.snapshots,
        "{count} snapshots, {moved} with copies: {}",
        last.report()
    );
    let check = |top: &Path| -> usize { check_records(top).ok().out().parse().unwrap() };
    assert_eq!(check(&lab.top), written);
    let stride = names.len().div_ceil(length.checked);
    let (mut before, mut checked) = (0, 0);
    for name in names.iter().step_by(stride) {
        let found = lab.with_snapshot(name, check);
        assert!(
            found >= before && found <= written,
            "{name}: {found} after {before}"
        );
        before = found;
        checked += 1;
    }
    println!(
        "{count} snapshots of {written} records, {moved} with copies, {checked} checked; {refused} attempts were refused"
    );
    // The kernel reads the same tree from the layers.
    lab.store.cowl(["umount", "web"]).ok();
    lab.store.cowl(["check", "web"]).ok();
    let again = lab.store.mount("web");
    assert_eq!(check(&again), written);
    lab.store.cowl(["umount", "web"]).ok();
}

fn snapshots_on(kind: Kind) {
    if can(&[NEEDS, &kind.needs()].concat()) {
        snapshots_of_a_busy_container(&Lab::new(kind, false, None), || {});
    }
}

/// Appends, writes at positions, writes with O_DIRECT and stores through a mapping: a snapshot has no torn record, and no
/// record without all earlier ones.
#[test]
fn snapshots_have_the_content_of_one_moment_on_xfs() {
    snapshots_on(Kind::Xfs);
}

#[test]
fn snapshots_have_the_content_of_one_moment_on_btrfs() {
    snapshots_on(Kind::Btrfs);
}

/// Validates the test: without the check after the last copy, snapshots miss records.
#[test]
fn a_snapshot_without_the_content_of_one_moment_is_found() {
    let kind = Kind::Xfs;
    if !can(&[NEEDS, &kind.needs()].concat()) {
        return;
    }
    let settings = [
        ("COWL_DISABLE", "checks of copies"),
        // The program writes between the copies.
        ("COWL_DELAY", "after a change/5"),
    ];
    let lab = Lab::new(kind, false, settings);
    let mut writer = Program::start_writer(&lab, 0);
    let is_wrong = |top: &Path| {
        let output = check_records(top);
        assert!([0, WRONG].contains(&output.code), "{}", output.report());
        output.code == WRONG
    };
    // Whether a snapshot misses a record depends on when the program writes.
    let found = (1..=MOST_SNAPSHOTS).find(|_| {
        let output = lab.snapshot();
        let is_refused = REFUSALS.iter().any(|text| output.err().contains(text));
        !is_refused && lab.with_snapshot(&output.ok().out(), is_wrong)
    });
    writer.tell();
    writer.hear();
    writer.end("the program");
    let last = lab.snapshot().ok().out();
    println!("the first snapshot that misses records: {found:?}");
    assert!(found.is_some());
    assert!(!is_wrong(&lab.top), "the container");
    assert!(
        !lab.with_snapshot(&last, is_wrong),
        "a snapshot after the program"
    );
    lab.store.cowl(["umount", "web"]).ok();
}

/// Without shared blocks the files cannot be copied while programs write.
#[test]
fn snapshot_names_the_files_that_prevent_it() {
    let kind = Kind::Ext4;
    if !can(&[NEEDS, &kind.needs()].concat()) {
        return;
    }
    let lab = Lab::new(kind, false, None);
    let mut program = Program::start(&["step", lab.top.to_str().unwrap()]);
    assert_eq!(program.hear(), "wrote");
    let output = lab
        .snapshot()
        .fails(1, &["passthrough", "/deep/er/two", "cannot share blocks"]);
    assert!(
        output.err().contains("passthrough=read"),
        "{}",
        output.report()
    );
    program.tell();
    assert_eq!(program.hear(), "wrote");
    program.tell();
    assert_eq!(program.hear(), "done");
    program.end("without a snapshot");
    lab.store.cowl(["umount", "web"]).ok();
}

fn read(top: &Path, name: &str) -> String {
    let content = std::fs::read(top.join(name)).unwrap();
    show(&content).trim_end_matches('\0').to_owned()
}

/// Checks the snapshot, if there is one, and the container after the steps of a program, and unmounts it.
pub(crate) fn check_steps(lab: &Lab, expected: &str, context: &str) {
    for name in lab.store.snapshots("web") {
        lab.with_snapshot(&name, |top| {
            for file in ["one", "deep/er/two", "deep/link", "deep/mapped"] {
                assert_eq!(read(top, file), "first\n", "{file}, {context}");
            }
            let ino = |name: &str| std::fs::metadata(top.join(name)).unwrap().ino();
            assert_eq!(ino("one"), ino("deep/link"), "{context}");
        });
    }
    let top = lab.store.mount("web");
    for file in ["one", "deep/er/two", "deep/link"] {
        assert_eq!(read(&top, file), expected, "{file}, {context}");
    }
    assert!(!top.join("gone").try_exists().unwrap());
    assert_no_placeholders(lab, context);
    lab.snapshot().ok();
    lab.store.cowl(["umount", "web"]).ok();
    lab.store.cowl(["check", "web"]).ok();
}

/// Runs the steps of a program with a snapshot between them. The daemon is killed as `kills` describes.
fn snapshot_between_steps(kills: Option<&str>) {
    let setting = kills.map(|kills| ("COWL_KILL", kills));
    let lab = Lab::new(Kind::Xfs, kills.is_some(), setting);
    let mut program = Program::start(&["step", lab.top.to_str().unwrap()]);
    assert_eq!(program.hear(), "wrote");
    let taken = lab.snapshot();
    let context = format!("{kills:?}: {}", taken.report());
    assert!(taken.code == 0 || kills.is_some(), "{context}");
    program.tell();
    assert_eq!(program.hear(), "wrote", "{context}");
    program.tell();
    assert_eq!(program.hear(), "done", "{context}");
    program.end(&context);
    let names = lab.store.snapshots("web");
    assert_eq!(names.len(), usize::from(taken.code == 0), "{context}");
    check_steps(&lab, "first\nsecond\n", &context);
}

#[test]
fn files_of_all_kinds_move() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    snapshot_between_steps(None);
}

/// Takes snapshots until a program ends, and returns how many there are, and how many were refused.
fn snapshots_during(lab: &Lab, mut program: Program, refusals: &[&str]) -> (usize, usize) {
    let (mut taken, mut refused) = (0, 0);
    while program.child.try_wait().unwrap().is_none() {
        let output = lab.snapshot();
        if refusals.iter().any(|text| output.err().contains(text)) {
            refused += 1;
        } else {
            output.ok();
            taken += 1;
        }
    }
    assert_eq!(program.hear(), "done");
    program.end("a program during snapshots");
    (taken, refused)
}

/// No file may be in two layers: programs write to it.
pub(crate) fn assert_files_are_in_one_layer(lab: &Lab) {
    let listed = Command::new("find")
        .arg(lab.store.path())
        .args(["-path", "*/tree/*", "-type", "f", "-printf", "%i %p\n"])
        .output()
        .unwrap();
    let mut found = std::collections::HashMap::new();
    for line in show(&listed.stdout).lines() {
        let (ino, path) = line.split_once(' ').unwrap();
        let layer = path.split("/tree/").next().unwrap().to_owned();
        let other = found.insert(ino.to_owned(), layer.clone());
        assert!(other.is_none_or(|other| other == layer), "{path}");
    }
    assert!(!found.is_empty());
}

/// Checks that a snapshot left no temporary name.
pub(crate) fn assert_no_placeholders(lab: &Lab, context: &str) {
    let words = [
        lab.store.path().as_os_str(),
        "-name".as_ref(),
        ".cowl-*".as_ref(),
    ];
    assert_eq!(run("find", words).ok().out(), "", "{context}");
}

#[test]
fn a_file_whose_names_change_during_snapshots_is_in_one_layer() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let lab = Lab::new(Kind::Xfs, false, None);
    let mut program = Program::start(&["rename", lab.top.to_str().unwrap(), "4"]);
    assert_eq!(program.hear(), "ready");
    let (taken, refused) = snapshots_during(&lab, program, &["requests were running"]);
    println!("{taken} snapshots, {refused} refused");
    assert!(taken + refused > 2);
    lab.snapshot().ok();
    assert_files_are_in_one_layer(&lab);
    lab.store.cowl(["umount", "web"]).ok();
}

/// The program holds the lock of the file that it writes, and waits for the daemon.
#[test]
fn a_program_that_writes_from_a_mapping_of_the_mount_does_not_stop_it() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let lab = Lab::new(Kind::Xfs, false, None);
    let mut program = Program::start(&["cold", lab.top.to_str().unwrap(), "5"]);
    assert_eq!(program.hear(), "ready");
    let (taken, refused) = snapshots_during(&lab, program, &["changed them again"]);
    println!("{taken} snapshots, {refused} refused");
    assert!(taken + refused > 1);
    lab.snapshot().ok();
    assert_files_are_in_one_layer(&lab);
    lab.store.cowl(["umount", "web"]).ok();
}

/// The kernel copies the file only after the write, which does not end.
#[test]
fn a_write_that_does_not_end_makes_a_snapshot_fail_and_nothing_else() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let lab = Lab::new(Kind::Xfs, false, None);
    let mut program = Program::start(&["stuck", lab.top.to_str().unwrap()]);
    assert_eq!(program.hear(), "ready");
    std::thread::sleep(std::time::Duration::from_millis(300));
    for _ in 0..2 {
        lab.snapshot().fails(1, &["changed them again"]);
        std::fs::write(lab.top.join("other"), "written").unwrap();
        assert_eq!(std::fs::read(lab.top.join("other")).unwrap(), b"written");
    }
    program.tell();
    assert_eq!(program.hear(), "done");
    lab.snapshot().ok();
    program.end("the program");
    assert_files_are_in_one_layer(&lab);
    lab.store.cowl(["umount", "web"]).ok();
}

/// A registration from before the snapshot must not make a later descriptor retain the old content.
#[test]
fn a_file_that_was_closed_before_a_snapshot_shows_later_writes() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let lab = Lab::new(Kind::Xfs, false, None);
    let path = lab.top.join("file");
    std::fs::write(&path, "first").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"first");
    lab.snapshot().ok();
    let mut reader = std::fs::File::open(&path).unwrap();
    std::fs::write(&path, "second").unwrap();
    let mut content = String::new();
    std::io::Read::read_to_string(&mut reader, &mut content).unwrap();
    assert_eq!(content, "second");
    drop(reader);
    lab.store.cowl(["umount", "web"]).ok();
}

/// Kills the daemon at changes of files during the snapshot; its keeper starts another one.
#[test]
fn nothing_is_lost_if_the_daemon_is_killed_during_a_snapshot() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kills_at = |point: &str, offset: u64, name: &str| {
        let counts = dir.path().join(name);
        format!("{point}/1000000/{offset}/{}", counts.display())
    };
    let kills = |offset, name: &str| kills_at("after a change", offset, name);
    // How often fault points are passed before and during the snapshot, without a kill.
    let passed = || std::fs::metadata(dir.path().join("count")).map_or(0, |meta| meta.len());
    let setting = kills(999_999, "count");
    let lab = Lab::new(Kind::Xfs, true, Some(("COWL_KILL", setting.as_str())));
    let mut program = Program::start(&["step", lab.top.to_str().unwrap()]);
    assert_eq!(program.hear(), "wrote");
    let before = passed();
    lab.snapshot().ok();
    let after = passed();
    for answer in ["wrote", "done"] {
        program.tell();
        assert_eq!(program.hear(), answer);
    }
    program.end("without a kill");
    lab.store.cowl(["umount", "web"]).ok();
    drop(lab);
    assert!(after > before + 20, "{before} to {after}");
    let stride = number("COWL_MOVING_STRIDE", 10);
    let mut at = before + 1 + u64::from(std::process::id()) % stride;
    while at <= after {
        snapshot_between_steps(Some(&kills(at, &format!("at-{at}"))));
        at += stride;
    }
    for phase in 1..=PHASES {
        let name = format!("phase-{phase}");
        snapshot_between_steps(Some(&kills_at(PHASE, phase, &name)));
        let passings = std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(passings >= phase, "phase {phase} of {passings}");
    }
}

/// Kills a daemon without a keeper at various moments of a snapshot, in which each change takes a while.
#[test]
fn an_interrupted_snapshot_is_completed_without_the_daemon() {
    if !can(&[NEEDS, &Kind::Xfs.needs()].concat()) {
        return;
    }
    let mut interrupted = 0;
    for milliseconds in (100..1600).step_by(500) {
        let lab = Lab::new(Kind::Xfs, false, Some(("COWL_DELAY", "after a change/15")));
        let mut program = Program::start(&["step", lab.top.to_str().unwrap()]);
        assert_eq!(program.hear(), "wrote");
        let daemon = lab.store.pid("web");
        let mut snapshot = lab.snapshot_command();
        let mut snapshot = snapshot.stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        interrupted += usize::from(snapshot.try_wait().unwrap().is_none());
        signal(daemon, "-KILL");
        snapshot.wait().unwrap();
        drop(program.stdin);
        program.child.wait().unwrap();
        check_steps(&lab, "first\n", &format!("after {milliseconds} ms"));
    }
    assert!(interrupted > 0, "no kill was during a snapshot");
}

//! Golden tests of the exact output of all commands: tables, JSON, notes, errors, exit codes.
//!
//! Each file in `tests/golden/` is a session: command lines after `$ `, their output (standard error after `! `), and
//! `[N]` for an exit code other than 0. Values that vary between runs are replaced by <TIME>, <ID>, <SIZE> and <DIR>.
//! `COWL_GOLDEN=write cargo test -p cowl --test commands golden` updates the files; review the difference.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use cowl::container::durability::make_all_durable;
use cowl::error::Kind;
use cowl::store::{Mounts, Session, Store};

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let base = world.dir.path().join("base");
        std::fs::create_dir_all(base.join("etc")).unwrap();
        std::fs::write(base.join("etc/fstab"), "none\n").unwrap();
        std::fs::write(base.join("etc/passwd"), "root\n").unwrap();
        // Isolates the tests from the settings of this machine.
        std::fs::write(world.dir.path().join("none.toml"), "").unwrap();
        world
    }

    /// Runs a shell command line, in which `cowl` is the program under test, on this world's store.
    fn run(&self, line: &str) -> String {
        let program = cowl_tests::programs::cowl();
        let path = std::env::join_paths(
            std::iter::once(program.parent().unwrap().to_path_buf())
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
        );
        let output = Command::new("sh")
            .args(["-c", line])
            .current_dir(self.dir.path())
            .env("PATH", path.unwrap())
            .env("COWL_STORE", self.dir.path().join("store"))
            .env("COWL_CONFIG", self.dir.path().join("none.toml"))
            .env("TZ", "UTC")
            .env("LC_ALL", "C.UTF-8")
            .env("COLUMNS", "100")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        self.settle();
        let mut text = String::from_utf8(output.stdout).unwrap();
        for line in String::from_utf8(output.stderr).unwrap().lines() {
            text += &format!("! {line}\n");
        }
        match output.status.code() {
            Some(0) => {}
            code => text += &format!("[{}]\n", code.unwrap()),
        }
        self.normalize(&text)
    }

    /// Syncs all snapshots. Otherwise that happens in the background, and lists would depend on the timing.
    fn settle(&self) {
        let session = Session {
            command: "test".to_owned(),
            patience: Duration::from_secs(60),
            mounts: Mounts::default(),
            program: None,
        };
        match Store::open(&self.dir.path().join("store"), session) {
            Ok(store) => make_all_durable(&store, None).unwrap(),
            Err(error) if error.kind == Kind::NotFound => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Replaces the values that vary between runs.
    fn normalize(&self, text: &str) -> String {
        let text = text.replace(self.dir.path().to_str().unwrap(), "<DIR>");
        let mut normalized = String::new();
        for line in text.lines() {
            let aligned = line.contains("  ");
            let words = line.split_inclusive(|c: char| " \"',()[]/.".contains(c));
            let mut out = String::new();
            for piece in words {
                let end = piece
                    .trim_end_matches(|c: char| " \"',()[]/.".contains(c))
                    .len();
                let (word, after) = piece.split_at(end);
                out += if is_id(word) { "<ID>" } else { word };
                out += after;
            }
            let out = replace_times(&out);
            let out = replace_sizes(&out);
            // The width of columns depends on their values.
            let out = match aligned && !line.trim_start().starts_with(['"', '{', '}', '[', ']']) {
                true => out.split_whitespace().collect::<Vec<_>>().join("  "),
                false => out,
            };
            normalized += &out;
            normalized.push('\n');
        }
        normalized
    }
}

fn is_id(word: &str) -> bool {
    word.len() == 36 && word.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

/// Replaces dates, each with an optional time of day and zone.
fn replace_times(line: &str) -> String {
    let shape = |text: &str, like: &str| {
        let fits = |(c, l): (char, char)| (l == '0' && c.is_ascii_digit()) || (l != '0' && c == l);
        text.len() >= like.len() && text.chars().zip(like.chars()).all(fits)
    };
    let mut out = String::new();
    let mut rest = line;
    while let Some(next) = rest.chars().next() {
        let longest = [
            "0000-00-00T00:00:00.000Z",
            "0000-00-00T00:00:00.00Z",
            "0000-00-00T00:00:00.0Z",
            "0000-00-00T00:00:00Z",
            "0000-00-00 00:00:00",
            "0000-00-00",
        ];
        if let Some(like) = longest.into_iter().find(|like| shape(rest, like)) {
            out += "<TIME>";
            rest = &rest[like.len()..];
        } else {
            out.push(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    out
}

/// Replaces sizes, because the disk usage of a directory depends on the file system.
fn replace_sizes(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let is_number =
        |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    let mut out: Vec<String> = Vec::new();
    for word in words {
        let unit = word.trim_end_matches([',', ')', ';', '.']);
        let is_unit = matches!(unit, "B" | "KiB" | "MiB" | "bytes");
        let number = out
            .last()
            .map(|last| last.trim_start_matches('(').to_owned());
        if is_unit && number.as_deref().is_some_and(is_number) {
            let last = out.pop().unwrap();
            let open = if last.starts_with('(') { "(" } else { "" };
            out.push(format!("{open}<SIZE>{}", &word[unit.len()..]));
        } else {
            out.push(word.to_owned());
        }
    }
    let line = out.join(" ");
    // "size": 4096 in JSON.
    for key in [
        "\"size\": ",
        "\"files\": ",
        "\"bytes\": ",
        "\"inodes\": ",
        "\"unique\": ",
        "\"shared\": ",
    ] {
        if let Some((before, value)) = line.split_once(key) {
            let comma = if value.ends_with(',') { "," } else { "" };
            return format!("{before}{key}<SIZE>{comma}");
        }
    }
    line
}

fn sessions() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "txt"))
        .collect();
    files.sort();
    files
}

#[test]
fn output_of_all_commands_is_unchanged() {
    let files = sessions();
    assert!(!files.is_empty());
    let mut differ = Vec::new();
    for file in files {
        let expected = std::fs::read_to_string(&file).unwrap();
        let world = World::new();
        let mut now = String::new();
        for line in expected.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                now += &format!("{line}\n{}", world.run(command));
            } else if line.starts_with('#') || line.is_empty() {
                now += &format!("{line}\n");
            }
        }
        if std::env::var_os("COWL_GOLDEN").is_some_and(|how| how == "write") {
            std::fs::write(&file, &now).unwrap();
        } else if now != expected {
            let line = now.lines().zip(expected.lines()).find(|(a, b)| a != b);
            differ.push(format!("{}: {line:?}\nnow:\n{now}", file.display()));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

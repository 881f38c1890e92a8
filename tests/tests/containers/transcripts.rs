//! The transcripts of docs/moving.md: their commands are run on two hosts, and must print what the page shows.
//!
//! A block of the page is a transcript if the line before it is `<!-- transcript NAME -->`. `COWL_GOLDEN=write` replaces the
//! output in the page. Numbers of bytes and digests may differ, and the order of lines from both hosts.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowl_tests::command::run_command;
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::cowl::Store;
use cowl_tests::registry::{self, Protection, Registry};
use cowl_tests::two_hosts::{NEEDS, TwoHosts};
use cowl_tests::{programs, rootfs};

/// The registry in the page, in place of that of the test.
const REGISTRY: &str = "registry.example.com";

fn page() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/moving.md")
}

/// A command line with its prompt, and its output.
#[derive(Clone, Debug)]
struct Step {
    line: String,
    output: Vec<String>,
}

/// Returns the host before the prompt of a command line, and the command without its comment; `None` for output.
fn command(line: &str) -> Option<(&str, &str)> {
    let (host, rest) = line.split_once("# ")?;
    if !matches!(host, "" | "a" | "b") {
        return None;
    }
    let command = rest.split_once("   #").map_or(rest, |(command, _)| command);
    Some((host, command.trim_end()))
}

/// Returns the steps in all blocks with this name.
fn steps(page: &str, name: &str) -> Vec<Step> {
    let mark = format!("<!-- transcript {name} -->");
    let mut found: Vec<Step> = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if line != mark {
            continue;
        }
        assert!(lines.next().unwrap().starts_with("```"), "no block: {name}");
        for line in lines.by_ref().take_while(|line| *line != "```") {
            match (command(line), found.last_mut()) {
                (Some(_), _) => found.push(Step {
                    line: line.to_owned(),
                    output: Vec::new(),
                }),
                (None, Some(step)) => step.output.push(line.to_owned()),
                (None, None) => panic!("output without a command: {line}"),
            }
        }
    }
    assert!(!found.is_empty(), "the page has no transcript {name}");
    found
}

/// Returns a line without what may differ: digests, and numbers of bytes.
fn comparable(line: &str) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    for at in 0..words.len() {
        if let Some((before, digest)) = words[at].clone().split_once("sha256:") {
            let rest = digest.trim_start_matches(|c: char| c.is_ascii_hexdigit());
            words[at] = format!("{before}sha256:...{rest}");
        }
        let unit = words
            .get(at + 1)
            .map(|unit| unit.trim_end_matches([',', ';']));
        if unit.is_some_and(|unit| UNITS.contains(&unit)) && words[at].parse::<f64>().is_ok() {
            words[at] = "N".to_owned();
            let end = words[at + 1]
                .trim_start_matches(char::is_alphabetic)
                .to_owned();
            words[at + 1] = format!("UNIT{end}");
        }
    }
    words.join(" ")
}

fn comparable_lines(lines: &[String]) -> Vec<String> {
    let mut lines: Vec<_> = lines.iter().map(|line| comparable(line)).collect();
    lines.sort();
    lines
}

/// Replaces the output of the steps in the page.
fn write(name: &str, done: &[Step]) {
    let old = std::fs::read_to_string(page()).unwrap();
    let mark = format!("<!-- transcript {name} -->");
    let (mut new, mut done) = (Vec::new(), done.iter());
    let mut lines = old.lines();
    while let Some(line) = lines.next() {
        new.push(line.to_owned());
        if line != mark {
            continue;
        }
        new.push(lines.next().unwrap().to_owned());
        for line in lines.by_ref().take_while(|line| *line != "```") {
            if command(line).is_some() {
                let step = done.next().unwrap();
                new.push(step.line.clone());
                new.extend(step.output.iter().cloned());
            }
        }
        new.push("```".to_owned());
    }
    std::fs::write(page(), new.join("\n") + "\n").unwrap();
}

/// Runs the steps of a transcript, and compares their output. `run` gets the number of the step, its host and its command.
fn verify(name: &str, run: impl Fn(usize, &str, &str) -> String) {
    let expected = steps(&std::fs::read_to_string(page()).unwrap(), name);
    let mut found = Vec::new();
    for (number, step) in expected.iter().enumerate() {
        let (host, command) = command(&step.line).unwrap();
        let output = run(number, host, command);
        found.push(Step {
            line: step.line.clone(),
            output: output.lines().map(str::to_owned).collect(),
        });
    }
    if std::env::var_os("COWL_GOLDEN").is_some_and(|value| value == "write") {
        return write(name, &found);
    }
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(
            comparable_lines(&found.output),
            comparable_lines(&expected.output),
            "{}; to write the page: COWL_GOLDEN=write",
            expected.line
        );
    }
}

/// Runs a command line in a shell, on a store. Returns its output and its messages.
fn shell(store: &Store, line: &str, settings: &[(&str, &str)]) -> String {
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c", &format!("{{ {line}\n}} 2>&1")])
        .env("PATH", path())
        .env("COWL_STORE", store.path())
        .env("COWL_RETRY_WAIT", "10")
        .envs(settings.iter().copied())
        .stdin(Stdio::null());
    run_command(command, b"").ok().out()
}

/// Returns the value of PATH with the program that was built.
fn path() -> String {
    let own = programs::cowl();
    let path = std::env::var("PATH").unwrap();
    format!("{}:{path}", own.parent().unwrap().display())
}

/// Changes the container in a store.
fn change(store: &Store, name: &str, content: &str) {
    let top = store.mount("web");
    std::fs::write(top.join("etc").join(name), content).unwrap();
    store.ok(["umount", "web"]);
}

/// Creates the container with three snapshots.
fn container(store: &Store) {
    store.create("web", &rootfs::busybox_tar().unwrap());
    for name in ["one", "two", "three"] {
        change(store, name, name);
        store.ok(["snapshot", "web", "-m", name]);
    }
}

#[test]
fn the_page_shows_what_is_sent_over_ssh() {
    let more = [Need::Program("busybox")];
    if !can_mount(&[&NEEDS[..], &more].concat()) {
        return;
    }
    let (a, b) = (Store::for_test(), Store::for_test());
    let settings = format!("SetEnv PATH={} COWL_STORE={}\n", path(), b.path().display());
    let hosts = TwoHosts::start_with(&settings);
    let ssh = format!("{} -o HostName={}", hosts.ssh(), hosts.server());
    container(&a);
    change(&a, "four", "four");
    verify("ssh", |number, _, line| {
        match number {
            // Before the second snapshot, and before both hosts have new ones.
            1 => change(&a, "five", "five"),
            3 => {
                change(&a, "of-a", "a");
                a.ok(["snapshot", "web", "-m", "of a"]);
                b.ok(["restore", "web", "snap4"]);
                change(&b, "of-b", "b");
            }
            _ => {}
        }
        shell(&a, line, &[("COWL_SSH", &ssh)])
    });
    for store in [&a, &b] {
        store.ok(["check", "--deep"]);
    }
}

#[test]
fn the_page_shows_what_a_registry_gets() {
    let more = [Need::Program("busybox")];
    if !can_mount(&[registry::NEEDS, &more].concat()) {
        return;
    }
    let (a, b) = (Store::for_test(), Store::for_test());
    let registry = Registry::start(&a.beside("registry"), Protection::default());
    container(&a);
    verify("registry", |number, host, line| {
        let store = match host {
            "b" => &b,
            _ => &a,
        };
        // Host B changes the container before it pushes it.
        if number == 2 {
            change(&b, "four", "four");
        }
        let name = registry.name();
        let output = shell(store, &line.replace(REGISTRY, &name), &[]);
        output.replace(&name, REGISTRY)
    });
    for store in [&a, &b] {
        store.ok(["check", "--deep"]);
    }
}

#[test]
fn digests_and_sizes_are_not_compared() {
    let one = "note: r/web@sha256:00ff: sent 4.1 MiB, in 5 blobs";
    let two = "note: r/web@sha256:12ab9: sent 977 B, in 5 blobs";
    assert_eq!(comparable(one), comparable(two));
    assert_ne!(comparable("sent 5 blobs"), comparable("sent 6 blobs"));
    assert_eq!(
        command("a# cowl push web r   # again"),
        Some(("a", "cowl push web r"))
    );
    assert_eq!(command("note: x # y"), None);
}

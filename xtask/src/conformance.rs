//! Two published test suites on a cowlfs mount: pjdfstest (what each system call must do and
//! refuse) and fsx (that what was written is what is read). What pjdfstest finds wrong with the
//! filesystem below is not held against us; what it finds wrong with us alone must stand in the
//! list of exceptions with a reason, and an exception that has come to pass must leave the list.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cowl_tests::mount::{Overlay, Stack};

use crate::run::{Result, Run, failure, note, root, target, title};

const PJDFSTEST: &str = "0.2.2";
const FSX: &str = "0.3.2";

/// Which tests there are and what became of each.
type Results = BTreeMap<String, Verdict>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

/// Installs the suites when needed and runs them.
pub(crate) fn run() -> Result<()> {
    title("conformance: pjdfstest and fsx");
    let tools = target()?.join("tools");
    install(&tools, "pjdfstest", PJDFSTEST)?;
    install(&tools, "fsx", FSX)?;
    Run::cargo()?
        .args(["build", "--bin", "cowlfs", "--locked"])
        .run()?;

    let parent = std::env::var_os("COWL_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
    let scratch = tempfile::Builder::new()
        .prefix("cowl-conformance-")
        .tempdir_in(parent)?;
    // Users without privilege must get through to the tests' folders.
    Run::new("chmod")
        .arg("755")
        .arg(scratch.path())
        .unseen()
        .run()?;
    let place = |name: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        std::fs::create_dir(&path)?;
        Ok(path)
    };
    let config = scratch.path().join("pjdfstest.toml");
    std::fs::write(&config, configuration()?)?;

    let plain = pjdfstest(&tools, &config, &place("plain")?)?;
    let stack = Stack {
        lowers: vec![place("lower")?],
        upper: Some((place("upper")?, place("work")?)),
    };
    // Another overlay can be put in its place, to see what this one is held against.
    let program = match std::env::var_os("COWLFS_BIN") {
        Some(program) => PathBuf::from(program),
        None => target()?.join("debug/cowlfs"),
    };
    let mount = Overlay::cowlfs_at(&program, &stack, &place("mount")?, "dev,suid");
    let ours = pjdfstest(&tools, &config, mount.path())?;
    let verdict = judge(&plain, &ours)?;
    crate::fsx::run(&tools.join("bin/fsx"), scratch.path(), mount.path())?;
    mount.unmount();
    if verdict.is_empty() {
        return Ok(());
    }
    failure(format!("pjdfstest:\n  {}", verdict.join("\n  ")))
}

fn install(tools: &Path, name: &str, version: &str) -> Result<()> {
    let program = tools.join("bin").join(name);
    let (code, text) = if program.is_file() {
        Run::new(&program)
            .arg("--version")
            .unseen()
            .code_and_text()?
    } else {
        (None, String::new())
    };
    if code == Some(0) && text.contains(version) {
        return Ok(());
    }
    Run::cargo()?
        .args(["install", "--quiet", "--locked", "--force", "--root"])
        .arg(tools)
        .arg(format!("{name}@{version}"))
        .run()
}

/// pjdfstest's configuration: what Linux has, and two users that every Debian has.
fn configuration() -> Result<String> {
    let groups = std::fs::read_to_string("/etc/group")?;
    let has = |name: &str| {
        groups
            .lines()
            .any(|line| line.split(':').next() == Some(name))
    };
    let nobody = if has("nogroup") { "nogroup" } else { "nobody" };
    Ok(format!(
        "[features]\nposix_fallocate = {{}}\nrename_ctime = {{}}\nstat_st_birthtime = {{}}\n\
         utimensat = {{}}\nutime_now = {{}}\n\
         [settings]\nnaptime = 0.02\nallow_remount = false\n\
         [dummy_auth]\nentries = [[\"nobody\", \"{nobody}\"], [\"games\", \"games\"]]\n"
    ))
}

fn pjdfstest(tools: &Path, config: &Path, place: &Path) -> Result<Results> {
    let (_, text) = Run::new(tools.join("bin/pjdfstest"))
        .arg("-c")
        .arg(config)
        .arg("-p")
        .arg(place)
        // Another filesystem, for what must not go across.
        .args(["-s", "/dev/shm"])
        .code_and_text()?;
    let results = parse(&text);
    let count = |wanted| {
        results
            .values()
            .filter(|verdict| **verdict == wanted)
            .count()
    };
    note(&format!(
        "{}: {} passed, {} failed, {} skipped",
        place.display(),
        count(Verdict::Passed),
        count(Verdict::Failed),
        count(Verdict::Skipped)
    ));
    if count(Verdict::Passed) < 100 {
        return failure(format!("pjdfstest did not run:\n{text}"));
    }
    for line in explained(&text) {
        note(&format!("  {line}"));
    }
    Ok(results)
}

/// Reads `name    ok`, `name    FAILED`, `name    skipped`.
fn parse(text: &str) -> Results {
    text.lines()
        .filter_map(|line| {
            let (name, verdict) = line.split_once(char::is_whitespace)?;
            let verdict = match verdict.trim() {
                "ok" => Verdict::Passed,
                "FAILED" => Verdict::Failed,
                "skipped" => Verdict::Skipped,
                _ => return None,
            };
            Some((name.to_owned(), verdict))
        })
        .collect()
}

/// Each failure with what was said of it.
fn explained(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut failing = false;
    for line in text.lines() {
        if line.starts_with('\t') {
            if failing {
                lines.push(format!("    {}", line.trim()));
            }
        } else {
            failing = line.ends_with("FAILED");
            if failing {
                lines.push(line.trim_end_matches("FAILED").trim_end().to_owned());
            }
        }
    }
    lines
}

/// What is wrong, by the list of exceptions.
fn judge(plain: &Results, ours: &Results) -> Result<Vec<String>> {
    let list = root()?.join("tests/conformance/pjdfstest.exceptions");
    let mut excepted = BTreeSet::new();
    let mut problems = Vec::new();
    for line in std::fs::read_to_string(&list)?.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // Names have `::` in them; the reason comes after ": ".
        match line.split_once(": ") {
            Some((name, _reason)) => {
                excepted.insert(name.to_owned());
            }
            None => problems.push(format!("{}: no reason given: {line}", list.display())),
        }
    }
    for (name, verdict) in ours {
        let below = plain.get(name).copied();
        match verdict {
            Verdict::Failed if excepted.contains(name) || below == Some(Verdict::Failed) => {}
            Verdict::Failed => problems.push(format!("{name} fails on the mount alone")),
            Verdict::Skipped if below == Some(Verdict::Passed) && !excepted.contains(name) => {
                problems.push(format!("{name} is skipped on the mount alone"));
            }
            Verdict::Passed if excepted.contains(name) => {
                problems.push(format!("{name} passes: take it off the list of exceptions"));
            }
            Verdict::Passed | Verdict::Skipped => {}
        }
    }
    for name in plain.keys().filter(|name| !ours.contains_key(*name)) {
        problems.push(format!("{name} did not run on the mount"));
    }
    for name in excepted.iter().filter(|name| !ours.contains_key(*name)) {
        problems.push(format!(
            "{name} is on the list of exceptions, and there is no such test"
        ));
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read() {
        let text = "a::b     ok\na::c   FAILED\n\tassertion\na::d  skipped\n\nSummary: 1 failed\n";
        let results = parse(text);
        assert_eq!(results.len(), 3);
        assert_eq!(results.get("a::c"), Some(&Verdict::Failed));
        assert_eq!(results.get("a::d"), Some(&Verdict::Skipped));
    }
}

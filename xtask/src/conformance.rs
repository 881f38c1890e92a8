//! Runs two published test suites on a cowlfs mount: pjdfstest (behavior and errors of each system call) and fsx (data
//! integrity of random reads and writes).
//!
//! A pjdfstest test that also fails on the file system below the mount is ignored. A test that fails only on the mount
//! must be in the list of exceptions, with a reason. An exception whose test passes must be removed from the list.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cowl_tests::killer::Killer;
use cowl_tests::mount::{Overlay, Stack};

use crate::run::{Result, Run, failure, note, root, target, title};

const PJDFSTEST: &str = "0.2.2";
const FSX: &str = "0.3.2";

/// The verdict for each test, by name.
type Results = BTreeMap<String, Verdict>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

/// The options of `cargo xtask conformance`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Kill the daemon of the mount every second; its keeper starts another one
    #[arg(long)]
    kill: bool,
    /// Pass further options to the mount, for example `passthrough=off`
    #[arg(long, value_name = "OPTIONS", default_value = "")]
    options: String,
}

/// Whether the daemon is killed while the suites run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kills {
    None,
    EverySecond,
}

impl Options {
    /// Sets the machine up, and runs the suites.
    pub(crate) fn run(&self) -> Result<()> {
        crate::setup::run()?;
        let kills = match self.kill {
            true => Kills::EverySecond,
            false => Kills::None,
        };
        run(kills, &self.options)
    }
}

/// Installs the suites if necessary, and runs them on a mount with the options `extra`.
pub(crate) fn run(kills: Kills, extra: &str) -> Result<()> {
    title("conformance: pjdfstest and fsx");
    let tools = target()?.join("tools");
    install(&tools, "pjdfstest", PJDFSTEST)?;
    install(&tools, "fsx", FSX)?;
    crate::build::programs_and_tests()?;

    let parent = std::env::var_os("COWL_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
    let scratch = tempfile::Builder::new()
        .prefix("cowl-conformance-")
        .tempdir_in(parent)?;
    // pjdfstest runs tests as unprivileged users, which need to traverse this directory.
    Run::new("chmod")
        .arg("755")
        .arg(scratch.path())
        .unseen()
        .run()?;
    let make_dir = |name: &str| -> Result<PathBuf> {
        let path = scratch.path().join(name);
        std::fs::create_dir(&path)?;
        Ok(path)
    };
    let config = scratch.path().join("pjdfstest.toml");
    std::fs::write(&config, configuration()?)?;

    let plain = pjdfstest(&tools, &config, &make_dir("plain")?)?;
    let stack = Stack {
        lowers: vec![make_dir("lower")?],
        upper: Some((make_dir("upper")?, make_dir("work")?)),
    };
    // COWLFS_BIN substitutes another overlay, to compare its results with those of cowlfs.
    let program = match std::env::var_os("COWLFS_BIN") {
        Some(program) => PathBuf::from(program),
        None => target()?.join("debug/cowlfs"),
    };
    let options = match kills {
        Kills::None => "dev,suid",
        Kills::EverySecond => "dev,suid,keeper=on",
    };
    let options = match extra {
        "" => options.to_owned(),
        extra => format!("{options},{extra}"),
    };
    let mount = Overlay::cowlfs_at(&program, &stack, &make_dir("mount")?, &options);
    let killer = (kills == Kills::EverySecond).then(|| Killer::start(mount.path(), 1000..=1000));
    let ours = pjdfstest(&tools, &config, mount.path())?;
    let verdict = judge(&plain, &ours)?;
    crate::fsx::run(&tools.join("bin/fsx"), scratch.path(), mount.path())?;
    if let Some(count) = killer.map(Killer::stop) {
        note(&format!("the daemon was killed {count} times"));
        if count == 0 {
            return failure("the daemon was never killed".to_owned());
        }
    }
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

/// Returns pjdfstest's configuration: the features that Linux has, and two users that exist on every Debian.
fn configuration() -> Result<String> {
    let groups = std::fs::read_to_string("/etc/group")?;
    let has_group = |name: &str| {
        groups
            .lines()
            .any(|line| line.split(':').next() == Some(name))
    };
    let nobody = if has_group("nogroup") {
        "nogroup"
    } else {
        "nobody"
    };
    Ok(format!(
        "[features]\nposix_fallocate = {{}}\nrename_ctime = {{}}\nstat_st_birthtime = {{}}\n\
         utimensat = {{}}\nutime_now = {{}}\n\
         [settings]\nnaptime = 0.02\nallow_remount = false\n\
         [dummy_auth]\nentries = [[\"nobody\", \"{nobody}\"], [\"games\", \"games\"]]\n"
    ))
}

fn pjdfstest(tools: &Path, config: &Path, directory: &Path) -> Result<Results> {
    let (_, text) = Run::new(tools.join("bin/pjdfstest"))
        .arg("-c")
        .arg(config)
        .arg("-p")
        .arg(directory)
        // A second file system, for operations that must fail with EXDEV.
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
        directory.display(),
        count(Verdict::Passed),
        count(Verdict::Failed),
        count(Verdict::Skipped)
    ));
    if count(Verdict::Passed) < 100 {
        return failure(format!("pjdfstest did not run:\n{text}"));
    }
    for line in explanations(&text) {
        note(&format!("  {line}"));
    }
    Ok(results)
}

/// Parses lines of the forms `name    ok`, `name    FAILED` and `name    skipped`.
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

/// Returns the name of each failed test, followed by its explanation.
fn explanations(text: &str) -> Vec<String> {
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

/// Returns the differences between the mount and the file system below that the list of exceptions does not cover, and
/// outdated entries of the list.
fn judge(plain: &Results, ours: &Results) -> Result<Vec<String>> {
    let list = root()?.join("tests/conformance/pjdfstest.exceptions");
    let mut excepted = BTreeSet::new();
    let mut problems = Vec::new();
    for line in std::fs::read_to_string(&list)?.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // Test names contain `::`; the reason follows ": ".
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
            Verdict::Failed => problems.push(format!("{name} fails on the mount only")),
            Verdict::Skipped if below == Some(Verdict::Passed) && !excepted.contains(name) => {
                problems.push(format!("{name} is skipped on the mount only"));
            }
            Verdict::Passed if excepted.contains(name) => {
                problems.push(format!(
                    "{name} passes: remove it from the list of exceptions"
                ));
            }
            Verdict::Passed | Verdict::Skipped => {}
        }
    }
    for name in plain.keys().filter(|name| !ours.contains_key(*name)) {
        problems.push(format!("{name} did not run on the mount"));
    }
    for name in excepted.iter().filter(|name| !ours.contains_key(*name)) {
        problems.push(format!(
            "{name} is on the list of exceptions, but does not exist"
        ));
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_parsed() {
        let text = "a::b     ok\na::c   FAILED\n\tassertion\na::d  skipped\n\nSummary: 1 failed\n";
        let results = parse(text);
        assert_eq!(results.len(), 3);
        assert_eq!(results.get("a::c"), Some(&Verdict::Failed));
        assert_eq!(results.get("a::d"), Some(&Verdict::Skipped));
    }
}

//! Runs the workspace's test binaries, several at a time.
//!
//! Most tests wait for syncs, unmounts and daemons, and leave the CPUs idle. Each worker has a mount namespace
//! of its own, so that the mounts of one binary cannot keep those of another busy.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::run::{Failure, Result, Run, failure, note, target};

/// The slowest binaries, slowest first: they start first.
const LONG: [&str; 6] = [
    "mount",
    "crash",
    "containers",
    "power_cut",
    "commands",
    "xtask",
];

/// The lines that are repeated of each end of what a failed test printed.
const SHOWN: usize = 20;

/// A test binary.
#[derive(Debug)]
pub(super) struct Binary {
    /// The package, and the target if the package has several.
    name: String,
    /// The package's directory, in which cargo runs tests too.
    dir: PathBuf,
    program: PathBuf,
    /// Its index among the slowest binaries.
    rank: usize,
}

/// Builds all test binaries.
pub(super) fn build() -> Result<Vec<Binary>> {
    let messages = Run::cargo()?
        .args(["test", "--workspace", "--locked", "--no-run"])
        .args(["--quiet", "--message-format=json-render-diagnostics"])
        .output()?;
    let parsed = messages.lines().map(|line| {
        serde_json::from_str(line)
            .map_err(|error| Failure(format!("cargo printed {line}: {error}")))
    });
    let messages = parsed.collect::<Result<Vec<Value>>>()?;
    let mut binaries: Vec<_> = messages.iter().filter_map(parse_binary).collect();
    binaries.sort_by(|one, other| (one.rank, &one.name).cmp(&(other.rank, &other.name)));
    if binaries.is_empty() {
        return failure("cargo built no tests");
    }
    Ok(binaries)
}

/// Parses a message of cargo: an executable with tests.
fn parse_binary(message: &Value) -> Option<Binary> {
    let text = |pointer: &str| message.pointer(pointer)?.as_str();
    if message.pointer("/profile/test")? != &Value::Bool(true) {
        return None;
    }
    let program = PathBuf::from(text("/executable")?);
    let dir = Path::new(text("/manifest_path")?).parent()?.to_owned();
    let (kind, target) = (text("/target/kind/0")?, text("/target/name")?);
    let package = dir.file_name()?.display();
    Some(Binary {
        name: match kind {
            "test" => format!("{package}-{target}"),
            _ => format!("{package}-{kind}"),
        },
        rank: LONG
            .iter()
            .position(|long| *long == target)
            .unwrap_or(LONG.len()),
        dir,
        program,
    })
}

/// Runs the binaries, `jobs` at a time, with these variables in their environment.
///
/// All run, even if one fails.
pub(super) fn run(binaries: Vec<Binary>, jobs: usize, environment: &[(&str, &Path)]) -> Result<()> {
    let logs = target()?.join("test-logs");
    std::fs::create_dir_all(&logs)?;
    note(&format!(
        "{} test binaries, {jobs} at a time; their output is in {}",
        binaries.len(),
        logs.display()
    ));
    let waiting = Mutex::new(VecDeque::from(binaries));
    let failed = Mutex::new(Vec::new());
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                crate::namespace::enter();
                while let Some(binary) = next() {
                    let log = logs.join(format!("{}.log", binary.name));
                    if let Err(Failure(message)) = run_one(&binary, &log, environment) {
                        note(&message);
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.push((binary.name, failures(&message)));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failed.is_empty() {
        return Ok(());
    }
    // The end of a long output is what its readers see first, and what is left if it is shortened.
    for (name, reasons) in &failed {
        note(&format!("\n{name}:\n{reasons}"));
    }
    let names: Vec<_> = failed.into_iter().map(|(name, _)| name).collect();
    failure(format!("tests failed in {}", names.join(", ")))
}

/// Returns what each failed test printed, as libtest repeats it after the last test, without the middle of long parts.
fn failures(text: &str) -> String {
    let mut lines = text.lines().skip_while(|line| *line != "failures:").skip(1);
    let mut parts: Vec<Vec<&str>> = Vec::new();
    for line in lines.by_ref().take_while(|line| *line != "failures:") {
        match parts.last_mut() {
            Some(part) if !line.starts_with("---- ") => part.push(line),
            _ => parts.push(vec![line]),
        }
    }
    let shortened = parts.iter().map(|part| {
        let middle = part.len().saturating_sub(2 * SHOWN);
        let (first, rest) = part.split_at(SHOWN.min(part.len()));
        let last = rest.get(middle..).unwrap_or_default();
        let gap: &[&str] = if middle > 0 { &["[...]"] } else { &[] };
        [first, gap, last].concat().join("\n")
    });
    shortened.collect::<Vec<_>>().join("\n").trim().to_owned()
}

/// Runs one binary, with its output in `log`.
///
/// Prints the result, or all output if it failed.
fn run_one(binary: &Binary, log: &Path, environment: &[(&str, &Path)]) -> Result<()> {
    let output = File::create(log)?;
    let start = Instant::now();
    let status = Command::new(&binary.program)
        .current_dir(&binary.dir)
        .env("CARGO_MANIFEST_DIR", &binary.dir)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stderr(output.try_clone()?)
        .stdout(output)
        .status()
        .map_err(|error| {
            Failure(format!(
                "cannot start {}: {error}",
                binary.program.display()
            ))
        })?;
    let took = start.elapsed();
    let text = cowl_tests::command::show(&std::fs::read(log)?);
    if !status.success() {
        return failure(format!(
            "{text}\n{} ended with {status} after {took:.0?}",
            binary.name
        ));
    }
    note(&summary(&binary.name, &text, took));
    Ok(())
}

/// Returns the name of the binary, and the result as libtest prints it, so that programs that read the output of cargo
/// find it.
fn summary(name: &str, text: &str, took: Duration) -> String {
    let mut lines = text.lines().rev();
    let result = lines.find(|line| line.starts_with("test result: "));
    format!(
        "     Running {name} ({took:.0?})\n{}",
        result.unwrap_or("no tests")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_cargo_become_binaries() {
        let message = serde_json::json!({
            "reason": "compiler-artifact",
            "manifest_path": "/w/tests/Cargo.toml",
            "target": {"kind": ["test"], "name": "mount"},
            "profile": {"test": true},
            "executable": "/w/target/debug/deps/mount-1",
        });
        let found = parse_binary(&message).unwrap();
        assert_eq!((found.name.as_str(), found.rank), ("tests-mount", 0));
        assert_eq!(found.dir, Path::new("/w/tests"));
        let mut library = message.clone();
        library["profile"]["test"] = Value::Bool(false);
        assert!(parse_binary(&library).is_none());
        let mut unit = message;
        unit["target"] = serde_json::json!({"kind": ["lib"], "name": "cowl_tests"});
        let found = parse_binary(&unit).unwrap();
        assert_eq!((found.name.as_str(), found.rank), ("tests-lib", LONG.len()));
    }

    #[test]
    fn reasons_of_failures_are_repeated_without_their_middle() {
        let long: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let text = format!(
            "running 3 tests\ntest a ... FAILED\n\nfailures:\n\n---- a stdout ----\npanicked\n\n\
             ---- b stdout ----\n{long}\nfailures:\n    a\n    b\n\ntest result: FAILED. 1 passed\n"
        );
        let shown = failures(&text);
        assert!(shown.starts_with("---- a stdout ----\npanicked\n\n---- b"));
        assert!(shown.contains("line 18\n[...]\n"), "{shown}");
        assert!(shown.ends_with("line 99"), "{shown}");
        assert!(!shown.contains("line 50"), "{shown}");
        assert_eq!(failures("killed by a signal"), "");
    }

    #[test]
    fn the_result_of_a_binary_is_that_of_libtest() {
        let result = "test result: ok. 2 passed; 0 failed; finished in 0.1s";
        let text = format!("running 2 tests\n\n{result}\n");
        let summary = summary("tests-mount", &text, Duration::from_secs(3));
        assert_eq!(summary, format!("     Running tests-mount (3s)\n{result}"));
    }
}

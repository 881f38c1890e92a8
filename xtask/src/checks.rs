//! Checks the rules of the source tree that the compiler does not enforce: the order of modules, the modules that may
//! use `unsafe` and `fuser`, and the length of files.

use std::path::{Path, PathBuf};

use crate::run::{Result, failure, note, root};

/// Maximum number of lines of a file.
const MAX_LINES: usize = 600;

/// Prefixes of code that prints for developers.
const TEST_CODE: &[&str] = &[
    "fs/overlay/tests/",
    "snap-cli/tests/",
    "snap-cli/examples/",
    "snap-cli/src/tree/testing.rs",
    "tests/",
    "benches/",
];

const PRINTED: &str = "output for users goes through one writer, which escapes control characters";

/// Words that are confined to certain path prefixes, each with the reason.
const CONFINED: [(&str, &[&str], &str); 5] = [
    (
        "unsafe",
        // The second wraps a number for `fuser`, on which sys must not depend.
        &[
            "fs/layers/src/sys/",
            "fs/cowlfs/src/fuse/passthrough/backing.rs",
        ],
        "unsafe code is confined to one module",
    ),
    (
        "fuser",
        // The second is the simulated disk of the power-cut tests, not a part of cowl.
        &["fs/cowlfs/src/fuse/", "tests/src/power_cut/disk.rs"],
        "only one module depends on the protocol library",
    ),
    (
        "display",
        TEST_CODE,
        "a name may contain terminal escape sequences: print it with Show::shown",
    ),
    ("println", TEST_CODE, PRINTED),
    ("eprintln", TEST_CODE, PRINTED),
];

/// Runs every check; a failure lists all violations.
pub(crate) fn run() -> Result<()> {
    let root = root()?;
    let mut files = Vec::new();
    for directory in ["fs", "snap-cli", "tests", "benches", "xtask"] {
        collect(&root.join(directory), &mut files)?;
    }
    files.sort();
    let mut problems = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file)?;
        let path = file
            .strip_prefix(&root)
            .unwrap_or(file)
            .display()
            .to_string();
        let lines = text.lines().count();
        if lines > MAX_LINES {
            problems.push(format!(
                "{path}: {lines} lines, more than {MAX_LINES}: split it"
            ));
        }
        let code = code_only(&text);
        problems.extend(confined(&path, &code));
        problems.extend(crate::language::in_source(&path, &text));
    }
    problems.extend(crate::language::in_pages(&root)?);
    problems.extend(crate::structure::check(&root)?);
    problems.extend(crate::promises::check(&root)?);
    if problems.is_empty() {
        note(&format!("{} source files follow the rules", files.len()));
        return Ok(());
    }
    failure(format!(
        "the source tree breaks its rules:\n  {}",
        problems.join("\n  ")
    ))
}

/// Adds the Rust files below `directory` to `files`.
pub(crate) fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn confined(path: &str, code: &str) -> Vec<String> {
    let mut problems = Vec::new();
    for (word, prefixes, reason) in CONFINED {
        // This crate contains the words in the table above.
        if prefixes.iter().any(|prefix| path.starts_with(prefix)) || path.starts_with("xtask/") {
            continue;
        }
        for (number, line) in code.lines().enumerate() {
            if words(line).any(|found| found == word) {
                problems.push(format!(
                    "{path}:{}: `{word}` outside {}: {reason}",
                    number + 1,
                    prefixes.join(" and ")
                ));
            }
        }
    }
    problems
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|word| !word.is_empty())
}

/// Removes line comments and the contents of one-line strings; the number of lines does not change.
fn code_only(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let mut in_string = false;
        let mut previous = ' ';
        for (index, character) in line.char_indices() {
            if !in_string && line.get(index..).is_some_and(|rest| rest.starts_with("//")) {
                break;
            }
            if character == '"' && previous != '\\' && previous != '\'' {
                in_string = !in_string;
            } else if !in_string {
                out.push(character);
            }
            previous = if previous == '\\' { ' ' } else { character };
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_outside_its_modules_is_a_problem() {
        assert_eq!(
            confined("fs/layers/src/layer/mod.rs", "unsafe { x() }").len(),
            1
        );
        assert_eq!(
            confined("fs/layers/src/layer/mod.rs", "deny(unsafe_code)"),
            Vec::<String>::new()
        );
        assert_eq!(
            confined("fs/layers/src/sys/mod.rs", "unsafe { x() }"),
            Vec::<String>::new()
        );
    }
}

//! Checks that every test that a page of promises names exists and runs.

use std::path::{Path, PathBuf};

use crate::run::Result;

const PAGES: [&str; 5] = [
    "SECURITY.md",
    "docs/semantics.md",
    "docs/features.md",
    "docs/reliability.md",
    "docs/lxc-snapshot.md",
];

/// Returns the promises whose test does not exist or does not run.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for page in PAGES {
        let text = std::fs::read_to_string(root.join(page))?;
        let mut count = 0;
        for (file, test) in named(&text) {
            count += 1;
            let problem = match file_path(root, file)? {
                Some(path) => defect(&std::fs::read_to_string(path)?, test),
                None => Some("there is no such file, or there is more than one"),
            };
            if let Some(problem) = problem {
                problems.push(format!("{page}: {file}::{test}: {problem}"));
            }
        }
        if count == 0 {
            problems.push(format!("{page} names no test"));
        }
    }
    Ok(problems)
}

/// Returns the file and the test of each `FILE::TEST` between backticks in a table.
fn named(page: &str) -> impl Iterator<Item = (&str, &str)> {
    let rows = page.lines().filter(|line| line.starts_with('|'));
    rows.flat_map(|row| row.split('`').skip(1).step_by(2))
        .filter_map(|word| word.split_once("::"))
}

/// Returns the path of the file that a table calls `file`, if there is exactly one.
///
/// - `fs/CRATE/src/...` and `snap-cli/src/...` are unit tests in the code;
/// - `fs/NAME` and `snap-cli/NAME` are tests of the package;
/// - `NAME` is an end-to-end test.
///
/// `AREA/NAME` selects the area if several have a file of that name.
fn file_path(root: &Path, file: &str) -> Result<Option<PathBuf>> {
    let (package, name) = match file.split_once('/') {
        Some((_, below)) if below.contains("src/") => {
            let path = root.join(format!("{file}.rs"));
            return Ok(path.try_exists()?.then_some(path));
        }
        Some(("fs", name)) => ("fs/overlay", name),
        Some(("snap-cli", name)) => ("snap-cli", name),
        _ => ("tests", file),
    };
    let tests = root.join(package).join("tests");
    if name.contains('/') {
        let path = tests.join(format!("{name}.rs"));
        return Ok(path.try_exists()?.then_some(path));
    }
    let mut found = Vec::new();
    for area in std::fs::read_dir(&tests)? {
        let path = area?.path().join(format!("{name}.rs"));
        if path.try_exists()? {
            found.push(path);
        }
    }
    let only = found.pop();
    Ok(only.filter(|_| found.is_empty()))
}

/// Returns the reason why the test `name` in `code` does not run, if it does not.
fn defect(code: &str, name: &str) -> Option<&'static str> {
    let function = format!("fn {name}(");
    let lines: Vec<&str> = code.lines().collect();
    let Some(index) = lines.iter().position(|line| line.contains(&function)) else {
        return Some("there is no such test");
    };
    let above = lines.iter().take(index).rev();
    let attributes: Vec<_> = above
        .map(|line| line.trim())
        .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
        .collect();
    if attributes.iter().any(|line| line.starts_with("#[ignore")) {
        return Some("it is ignored");
    }
    if !attributes.contains(&"#[test]") {
        return Some("it is not a test");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_found_only_in_tables() {
        let page = "`x::y`\n| a | `fs/names::one` `open::two` `word` |\n";
        let found: Vec<_> = named(page).collect();
        assert_eq!(found, [("fs/names", "one"), ("open", "two")]);
    }

    #[test]
    fn a_file_is_found_in_its_area() {
        let root = crate::run::root().unwrap();
        for (file, path) in [
            ("fs/names", "fs/overlay/tests/overlay/names.rs"),
            ("snap-cli/meta", "snap-cli/tests/commands/meta.rs"),
            ("snap-cli/crash/undo", "snap-cli/tests/crash/undo.rs"),
            ("locks", "tests/tests/mount/locks.rs"),
            ("lxc/adopt", "tests/tests/lxc/adopt.rs"),
            ("snap-cli/src/store/lock", "snap-cli/src/store/lock.rs"),
        ] {
            assert_eq!(
                file_path(&root, file).unwrap(),
                Some(root.join(path)),
                "{file}"
            );
        }
        // Two areas have a file of this name.
        assert_eq!(file_path(&root, "snap-cli/undo").unwrap(), None);
        assert_eq!(file_path(&root, "nothing").unwrap(), None);
    }

    #[test]
    fn a_missing_or_ignored_test_is_a_problem() {
        let code =
            "#[test]\nfn a() {}\n/// x\n#[test]\n#[ignore = \"slow\"]\nfn b() {}\n\nfn c() {}\n";
        assert_eq!(defect(code, "a"), None);
        assert_eq!(defect(code, "b"), Some("it is ignored"));
        assert_eq!(defect(code, "c"), Some("it is not a test"));
        assert_eq!(defect(code, "d"), Some("there is no such test"));
    }
}

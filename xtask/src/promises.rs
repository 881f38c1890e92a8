//! Every test that the pages of promises name as the holder of one must exist, and run.

use std::path::{Path, PathBuf};

use crate::run::Result;

const PAGES: [&str; 3] = [
    "docs/semantics.md",
    "docs/features.md",
    "docs/lxc-snapshot.md",
];

/// What the pages promise that no test holds.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for page in PAGES {
        let text = std::fs::read_to_string(root.join(page))?;
        let mut count = 0;
        for (file, test) in named(&text) {
            count += 1;
            let path = home(file);
            // A file that is not there has no test either.
            let code = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
            if let Some(why) = lacks(&code, test) {
                problems.push(format!("{page}: {test} in {}: {why}", path.display()));
            }
        }
        if count == 0 {
            problems.push(format!("{page} names no test"));
        }
    }
    Ok(problems)
}

/// The tests that the tables name: `FILE::TEST` between backticks.
fn named(page: &str) -> impl Iterator<Item = (&str, &str)> {
    let rows = page.lines().filter(|line| line.starts_with('|'));
    rows.flat_map(|row| row.split('`').skip(1).step_by(2))
        .filter_map(|word| word.split_once("::"))
}

/// Where a file of tests lies: the crate's own tests, tests beside the code, or the end-to-end tests.
fn home(file: &str) -> PathBuf {
    match file.split_once('/') {
        Some((_, below)) if below.starts_with("src/") => PathBuf::from(format!("{file}.rs")),
        Some((folder @ ("fs" | "snap-cli"), name)) => {
            PathBuf::from(format!("{folder}/tests/{name}.rs"))
        }
        _ => PathBuf::from(format!("tests/tests/{file}.rs")),
    }
}

/// Why a file's text does not hold the test `name`, if it does not.
fn lacks(code: &str, name: &str) -> Option<&'static str> {
    let function = format!("fn {name}(");
    let lines: Vec<&str> = code.lines().collect();
    let Some(at) = lines.iter().position(|line| line.contains(&function)) else {
        return Some("there is no such test");
    };
    let above = lines.iter().take(at).rev();
    let attributes: Vec<_> = above
        .map(|line| line.trim())
        .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
        .collect();
    if attributes.iter().any(|line| line.starts_with("#[ignore")) {
        return Some("it is ignored");
    }
    if !attributes.contains(&"#[test]") {
        return Some("it is no test");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_found_in_tables_alone() {
        let page = "`x::y`\n| a | `fs/names::one` `open::two` `word` |\n";
        let found: Vec<_> = named(page).collect();
        assert_eq!(found, [("fs/names", "one"), ("open", "two")]);
        assert_eq!(home("fs/names"), Path::new("fs/tests/names.rs"));
        assert_eq!(home("snap-cli/meta"), Path::new("snap-cli/tests/meta.rs"));
        assert_eq!(home("open"), Path::new("tests/tests/open.rs"));
        let beside = "snap-cli/src/store/lock";
        assert_eq!(home(beside), Path::new("snap-cli/src/store/lock.rs"));
    }

    #[test]
    fn a_test_that_is_not_there_or_does_not_run_holds_nothing() {
        let code =
            "#[test]\nfn a() {}\n/// x\n#[test]\n#[ignore = \"slow\"]\nfn b() {}\n\nfn c() {}\n";
        assert_eq!(lacks(code, "a"), None);
        assert_eq!(lacks(code, "b"), Some("it is ignored"));
        assert_eq!(lacks(code, "c"), Some("it is no test"));
        assert_eq!(lacks(code, "d"), Some("there is no such test"));
    }
}

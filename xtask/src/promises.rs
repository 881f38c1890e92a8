//! Every test that docs/semantics.md names as the holder of a promise must exist.

use std::path::{Path, PathBuf};

use crate::run::Result;

/// What the page promises that no test holds.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let page = std::fs::read_to_string(root.join("docs/semantics.md"))?;
    let mut problems = Vec::new();
    let mut count = 0;
    for (file, test) in named(&page) {
        count += 1;
        let path = home(file);
        let text = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
        if !text.contains(&format!("fn {test}(")) {
            problems.push(format!(
                "docs/semantics.md: there is no test {test} in {}",
                path.display()
            ));
        }
    }
    if count == 0 {
        problems.push("docs/semantics.md names no test".to_owned());
    }
    Ok(problems)
}

/// The tests that the tables name: `FILE::TEST` between backticks.
fn named(page: &str) -> impl Iterator<Item = (&str, &str)> {
    let rows = page.lines().filter(|line| line.starts_with('|'));
    rows.flat_map(|row| row.split('`').skip(1).step_by(2))
        .filter_map(|word| word.split_once("::"))
}

/// Where a file of tests lies.
fn home(file: &str) -> PathBuf {
    match file.strip_prefix("fs/") {
        Some(name) => PathBuf::from(format!("fs/tests/{name}.rs")),
        None => PathBuf::from(format!("tests/tests/{file}.rs")),
    }
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
        assert_eq!(home("open"), Path::new("tests/tests/open.rs"));
    }
}

//! Documentation tests: the examples in doc comments.

use crate::run::{Result, Run, note, root};

/// The languages of code blocks that rustdoc does not compile.
const NOT_COMPILED: [&str; 4] = ["text", "console", "json", "ignore"];

/// Runs the documentation tests, if there are any.
///
/// Cargo compiles the libraries and their dependencies again for them, which takes a minute.
pub(super) fn run() -> Result<()> {
    let mut files = Vec::new();
    for directory in ["fs", "snap-cli", "tests", "benches"] {
        crate::checks::collect(&root()?.join(directory), &mut files)?;
    }
    for file in files {
        if has_example(&std::fs::read_to_string(file)?) {
            return Run::cargo()?
                .args(["test", "--workspace", "--locked", "--doc"])
                .run();
        }
    }
    note("no documentation tests");
    Ok(())
}

/// Whether a doc comment contains a code block that rustdoc compiles.
fn has_example(source: &str) -> bool {
    let mut in_block = false;
    source.lines().any(|line| {
        let line = line.trim_start();
        let text = line.strip_prefix("///").or(line.strip_prefix("//!"));
        let Some(language) = text.and_then(|text| text.trim_start().strip_prefix("```")) else {
            return false;
        };
        in_block = !in_block;
        in_block && !NOT_COMPILED.contains(&language.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_blocks_that_rustdoc_compiles_are_found() {
        for (source, expected) in [
            ("/// ```\n/// f();\n/// ```\nfn f() {}", true),
            ("    //! ```no_run\n    //! ```", true),
            ("//! ```text\n//! a tree\n//! ```\n", false),
            ("/// ```text\n/// ```\n/// ```rust\n/// ```", true),
            ("// ```\nlet text = \"```\";", false),
        ] {
            assert_eq!(has_example(source), expected, "{source}");
        }
    }
}

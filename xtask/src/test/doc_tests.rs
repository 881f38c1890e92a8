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

/// Whether doc comments may contain a code block that rustdoc compiles.
///
/// Doc comments in another form than `///` or `//!` are not parsed, and count as such.
fn has_example(source: &str) -> bool {
    let (mut in_block, mut after_blank) = (false, false);
    source.lines().map(str::trim_start).any(|line| {
        if ["/**", "/*!", "#[doc", "#![doc"]
            .iter()
            .any(|form| line.starts_with(form))
        {
            return true;
        }
        let Some(text) = line.strip_prefix("///").or(line.strip_prefix("//!")) else {
            after_blank = false;
            return false;
        };
        let fenced = text.trim_start();
        if let Some(language) = fenced.strip_prefix("```").or(fenced.strip_prefix("~~~")) {
            in_block = !in_block;
            return in_block && !NOT_COMPILED.contains(&language.trim());
        }
        // A line that is indented by four characters, after a blank one, is a code block as well.
        let is_indented = after_blank && !in_block && text.starts_with("     ");
        after_blank = text.trim().is_empty();
        is_indented
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
            ("/// ~~~\n/// f();\n/// ~~~", true),
            ("/// Text.\n///\n///     f();", true),
            ("/// - item\n///     continued", false),
            ("/** ``` */", true),
        ] {
            assert_eq!(has_example(source), expected, "{source}");
        }
    }
}

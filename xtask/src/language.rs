//! Checks the language of comments, documentation and manual pages (docs/style.md): rejects words that have a standard
//! term, and counts words that are frequent in indirect sentences.

use std::collections::BTreeMap;
use std::path::Path;

use crate::run::{Result, note, root};

/// Rejected words, each with its standard term.
const REFUSED: [(&str, &str); 14] = [
    ("folder", "directory"),
    ("folders", "directories"),
    ("room", "module, crate or space"),
    ("rooms", "modules"),
    ("whoever", "the caller, a process"),
    ("somebody", "a process, another thread"),
    ("someone", "a process, a user"),
    ("nobody", "no process"),
    ("everybody", "every process, all users"),
    ("anybody", "any process"),
    ("told", "reported, returned, notified"),
    ("tells", "reports, returns"),
    ("remark", "comment"),
    ("remarks", "comments"),
];

/// Words that are rejected in the text of messages, too, with their standard terms.
const REFUSED_IN_MESSAGES: [(&str, &str); 3] = [
    ("folder", "directory"),
    ("folders", "directories"),
    ("can't", "cannot"),
];

/// Words that are rejected in the manual, too, with their standard terms.
const REFUSED_IN_MANUAL: [(&str, &str); 1] = [("can't", "cannot")];

/// First words of a summary line that is neither a verb phrase nor a noun phrase.
const REFUSED_SUMMARIES: [&str; 9] = [
    "The same ",
    "So ",
    "What ",
    "Who",
    "How ",
    "Told ",
    "Has ",
    "Otherwise ",
    "And ",
];

/// Words that `cargo xtask language` counts but does not reject.
const COUNTED: [&str; 6] = ["what", "who", "which", "race", "retry", "truncate"];

/// The directory of the manual pages, which are generated from the help texts.
const MANUAL: &str = "docs/man";

/// Returns the rejected words in the comments of a source file, as problems.
pub(crate) fn in_source(path: &str, text: &str) -> Vec<String> {
    let mut problems = refused(path, comments(text), &REFUSED);
    problems.extend(refused_summaries(path, text));
    if !path.contains("test") && !path.starts_with("xtask/") {
        problems.extend(refused_messages(path, text));
    }
    problems
}

/// Returns the summary lines of doc comments that begin with a rejected word, as problems.
fn refused_summaries(path: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let mut is_first = true;
    for (index, line) in text.lines().enumerate() {
        let summary = line.trim_start().strip_prefix("/// ");
        if let Some(summary) = summary.filter(|_| is_first)
            && REFUSED_SUMMARIES
                .iter()
                .any(|start| summary.starts_with(start))
        {
            problems.push(format!(
                "{path}:{}: a summary begins with a verb or is a noun phrase (docs/style.md)",
                index + 1
            ));
        }
        is_first = !line.trim_start().starts_with("///");
    }
    problems
}

/// Returns the rejected words in string literals outside unit tests, as problems.
///
/// A literal of one word is stored or printed as JSON, and so not a message.
fn refused_messages(path: &str, text: &str) -> Vec<String> {
    let code = text
        .split("#[cfg(test)]\nmod tests")
        .next()
        .unwrap_or_default();
    let mut problems = Vec::new();
    for (index, line) in code.lines().enumerate() {
        if line.trim_start().starts_with("//") {
            continue;
        }
        let literals = line.split('"').skip(1).step_by(2);
        for word in literals.filter(|text| text.contains(' ')).flat_map(words) {
            if let Some((_, term)) = REFUSED_IN_MESSAGES
                .iter()
                .find(|(refused, _)| *refused == word)
            {
                problems.push(format!(
                    "{path}:{}: \"{word}\" in a message: write {term} (docs/style.md)",
                    index + 1
                ));
            }
        }
    }
    problems
}

/// Returns the rejected words in all pages of documentation and of the manual, as problems.
pub(crate) fn in_pages(root: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for (path, text) in pages(root)? {
        problems.extend(refused(&path, prose(&text), &REFUSED));
    }
    for entry in std::fs::read_dir(root.join(MANUAL))? {
        let file = entry?.path();
        let Some(name) = file.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if name.ends_with(".1") {
            let path = format!("{MANUAL}/{name}");
            let text = unformatted(&std::fs::read_to_string(&file)?);
            let lines = || text.lines().enumerate().map(|(at, line)| (at + 1, line));
            problems.extend(refused(&path, lines(), &REFUSED));
            problems.extend(refused(&path, lines(), &REFUSED_IN_MANUAL));
        }
    }
    Ok(problems)
}

/// Prints the frequency of rejected and counted words, per 10,000 words of comments and of documentation.
pub(crate) fn run() -> Result<()> {
    let root = root()?;
    let mut files = Vec::new();
    for directory in ["fs", "snap-cli", "tests", "benches", "xtask"] {
        crate::checks::collect(&root.join(directory), &mut files)?;
    }
    let mut areas: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in &files {
        let text = std::fs::read_to_string(file)?;
        let path = file.strip_prefix(&root).unwrap_or(file);
        let area: Vec<_> = path
            .iter()
            .take(2)
            .filter_map(|part| part.to_str())
            .collect();
        let lines = comments(&text).map(|(_, line)| line.to_owned());
        areas.entry(area.join("/")).or_default().extend(lines);
    }
    for (path, text) in pages(&root)? {
        let area = if path.contains('/') {
            "docs"
        } else {
            "README etc."
        };
        let lines = prose(&text).map(|(_, line)| line.to_owned());
        areas.entry(area.to_owned()).or_default().extend(lines);
    }
    note("per 10,000 words:");
    for (area, lines) in &areas {
        let all: Vec<String> = lines.iter().flat_map(|line| words(line)).collect();
        let rate = |wanted: &dyn Fn(&str) -> bool| {
            let found = all.iter().filter(|word| wanted(word)).count();
            found * 10_000 / all.len().max(1)
        };
        let refused = rate(&|word| REFUSED.iter().any(|(other, _)| *other == word));
        let counted: Vec<_> = COUNTED
            .iter()
            .map(|word| format!("{word} {}", rate(&|other| other == *word)))
            .collect();
        note(&format!(
            "{area}: {} words, refused {refused}, {}",
            all.len(),
            counted.join(", ")
        ));
    }
    Ok(())
}

fn pages(root: &Path) -> Result<Vec<(String, String)>> {
    let mut pages = Vec::new();
    for directory in ["", "docs", "docs/decisions"] {
        for entry in std::fs::read_dir(root.join(directory))? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "md") {
                let path = file.strip_prefix(root).unwrap_or(&file);
                let path = path.iter().filter_map(|part| part.to_str());
                let path = path.collect::<Vec<_>>().join("/");
                // This page lists the rejected words.
                if path != "docs/style.md" {
                    pages.push((path, std::fs::read_to_string(&file)?));
                }
            }
        }
    }
    pages.sort();
    Ok(pages)
}

/// Returns the words of `terms` that occur in numbered lines, as problems.
fn refused<'t>(
    path: &str,
    lines: impl Iterator<Item = (usize, &'t str)>,
    terms: &[(&str, &str)],
) -> Vec<String> {
    let mut problems = Vec::new();
    for (number, line) in lines {
        for word in words(line) {
            if let Some((_, term)) = terms.iter().find(|(refused, _)| *refused == word) {
                problems.push(format!(
                    "{path}:{number}: \"{word}\": write {term} (docs/style.md)"
                ));
            }
        }
    }
    problems
}

/// Returns the line number and the text of each comment line.
fn comments(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().filter_map(|(index, line)| {
        let line = line.trim_start();
        let text = line.strip_prefix("//")?;
        Some((index + 1, text.trim_start_matches(['/', '!'])))
    })
}

/// Returns the line number and the text of each line of a page outside code blocks.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
            return None;
        }
        (!in_code).then_some((index + 1, line))
    })
}

/// Returns the text of a manual page without the escapes of roff. Lines keep their numbers.
fn unformatted(page: &str) -> String {
    let plain = [
        ("\\fB", ""),
        ("\\fI", ""),
        ("\\fR", ""),
        ("\\-", "-"),
        ("\\*(Aq", "'"),
    ];
    plain.iter().fold(page.to_owned(), |text, (escape, with)| {
        text.replace(escape, with)
    })
}

/// Returns the words of a line in lower case, without those in backticks and in links.
fn words(line: &str) -> Vec<String> {
    let outside: Vec<_> = line.split('`').step_by(2).collect();
    let text = outside.join(" ");
    let mut found = Vec::new();
    for part in text.split_whitespace() {
        // A link, a path or an identifier.
        if part.contains("](") || part.contains('/') || part.contains("::") || part.contains('_') {
            continue;
        }
        let word = part.trim_matches(|c: char| !c.is_alphanumeric());
        if !word.is_empty() {
            found.push(word.to_lowercase());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_in_code_and_paths_are_ignored() {
        assert_eq!(
            words("The `folder` of a/folder, in Folder."),
            ["the", "of", "in", "folder"]
        );
        let page = "a folder\n```\nfolder\n```\n`folder`";
        assert_eq!(refused("p", prose(page), &REFUSED).len(), 1);
    }

    #[test]
    fn summaries_begin_with_a_verb_or_a_noun() {
        let code = "/// The same for files.\n///\n/// What follows is a detail.\nfn a() {}\n/// Returns it.\nfn b() {}\n";
        assert_eq!(refused_summaries("p", code).len(), 1);
    }

    #[test]
    fn messages_are_checked_and_stored_words_are_not() {
        let code = "fn a() { f(\"can't open the folder\"); g(\"folder\") }\n// \"the folder\"\n";
        assert_eq!(refused_messages("p", code).len(), 2);
    }

    #[test]
    fn manual_pages_are_checked_without_their_formatting() {
        let page = unformatted(".SH DESCRIPTION\nA \\fBfolder\\fR that can\\*(Aqt be \\-\\-read\n");
        let lines = || page.lines().enumerate();
        assert_eq!(refused("p", lines(), &REFUSED).len(), 1);
        assert_eq!(refused("p", lines(), &REFUSED_IN_MANUAL).len(), 1);
    }

    #[test]
    fn only_comments_count_in_sources() {
        let code = "let folder = 1; // folder\n/// A folder.\n//! room\n    // nobody\n";
        assert_eq!(refused("p", comments(code), &REFUSED).len(), 3);
    }
}

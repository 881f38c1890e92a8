//! The rules of the source tree that no compiler checks: which room may import which, where
//! `unsafe` and `fuser` may stand, how long a file may be.

use std::path::{Path, PathBuf};

use crate::run::{Result, failure, note, root};

/// No file is longer.
const LONGEST: usize = 600;

/// A crate with its rooms: each may import itself and those named after it.
struct Rooms {
    folder: &'static str,
    imports: &'static [(&'static str, &'static [&'static str])],
}

/// Imports run one way: from what people and the kernel see, down to system calls.
const CRATES: [Rooms; 4] = [
    Rooms {
        folder: "fs/layers/src",
        imports: &[
            ("error", &[]),
            ("name", &["error"]),
            ("shown", &[]),
            ("setup", &["error", "shown"]),
            ("format", &["error", "name"]),
            ("sys", &["error", "shown"]),
            (
                "layer",
                &["error", "name", "shown", "setup", "format", "sys"],
            ),
            ("view", &["error", "name", "format", "sys", "layer"]),
        ],
    },
    Rooms {
        folder: "fs/overlay/src",
        imports: &[("idmap", &[]), ("inode", &[])],
    },
    Rooms {
        folder: "fs/cowlfs/src",
        imports: &[
            ("choices", &[]),
            ("config", &["choices"]),
            ("requests", &[]),
            ("logging", &[]),
            ("fuse", &["choices", "requests"]),
            ("control", &["config", "requests", "fuse"]),
            ("cli", &["config"]),
            ("serve", &["config", "requests", "fuse", "control"]),
        ],
    },
    Rooms {
        folder: "snap-cli/src",
        imports: &[
            ("delta", &[]),
            ("error", &["delta"]),
            ("host", &["error"]),
            ("archive", &["error", "delta"]),
            ("store", &["error", "delta"]),
            ("config", &["error", "store"]),
            ("container", &["error", "store", "delta", "archive", "host"]),
            (
                "snapshot",
                &["error", "store", "delta", "archive", "host", "container"],
            ),
            (
                "recover",
                &["error", "store", "host", "container", "snapshot"],
            ),
            (
                "lifecycle",
                &[
                    "error",
                    "store",
                    "delta",
                    "archive",
                    "host",
                    "container",
                    "snapshot",
                    "recover",
                ],
            ),
            (
                "check",
                &[
                    "error",
                    "store",
                    "delta",
                    "host",
                    "container",
                    "snapshot",
                    "recover",
                ],
            ),
        ],
    },
];

/// Code that prints for developers.
const TEST_CODE: &[&str] = &[
    "fs/overlay/tests/",
    "snap-cli/tests/",
    "snap-cli/examples/",
    "snap-cli/src/delta/testing.rs",
    "tests/",
    "benches/",
];

const PRINTED: &str =
    "what is printed for people goes through one writer, which leaves it plain text";

/// Words that may stand only below some folders, with the reason.
const CONFINED: [(&str, &[&str], &str); 5] = [
    (
        "unsafe",
        &["fs/layers/src/sys/"],
        "each unsafe block is argued in one room",
    ),
    (
        "fuser",
        // The second is a disk that a test pulls out, and no part of cowl.
        &["fs/cowlfs/src/fuse/", "tests/src/power_cut/disk.rs"],
        "the protocol library can be exchanged only if one room knows it",
    ),
    (
        "display",
        TEST_CODE,
        "a name may hold escape sequences for a terminal: write it with Show::shown",
    ),
    ("println", TEST_CODE, PRINTED),
    ("eprintln", TEST_CODE, PRINTED),
];

/// Runs every check; a failure names each place.
pub(crate) fn run() -> Result<()> {
    let root = root()?;
    let mut files = Vec::new();
    for folder in ["fs", "snap-cli", "tests", "benches", "xtask"] {
        collect(&root.join(folder), &mut files)?;
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
        if lines > LONGEST {
            problems.push(format!(
                "{path}: {lines} lines, more than {LONGEST}: split it"
            ));
        }
        let code = code_only(&text);
        problems.extend(confined(&path, &code));
        problems.extend(imports(&path, &code));
    }
    problems.extend(crate::promises::check(&root)?);
    if problems.is_empty() {
        note(&format!("{} source files keep the rules", files.len()));
        return Ok(());
    }
    failure(format!(
        "the source tree breaks its rules:\n  {}",
        problems.join("\n  ")
    ))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
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
    for (word, homes, reason) in CONFINED {
        // The words stand in the table above, too.
        if homes.iter().any(|home| path.starts_with(home)) || path.starts_with("xtask/") {
            continue;
        }
        for (number, line) in code.lines().enumerate() {
            if words(line).any(|found| found == word) {
                problems.push(format!(
                    "{path}:{}: `{word}` outside {}: {reason}",
                    number + 1,
                    homes.join(" and ")
                ));
            }
        }
    }
    problems
}

fn imports(path: &str, code: &str) -> Vec<String> {
    let Some((rooms, room)) = CRATES.iter().find_map(|rooms| {
        let below = path.strip_prefix(rooms.folder)?.strip_prefix('/')?;
        let room = below.split('/').next()?;
        Some((rooms, room.strip_suffix(".rs").unwrap_or(room)))
    }) else {
        return Vec::new();
    };
    let Some((_, allowed)) = rooms.imports.iter().find(|(name, _)| *name == room) else {
        return Vec::new();
    };
    let known = |name: &str| rooms.imports.iter().any(|(other, _)| *other == name);
    let mut problems: Vec<String> = crate_paths(code)
        .filter(|target| target != room && known(target) && !allowed.contains(&target.as_str()))
        .map(|target| format!("{path}: `{room}` may not import `{target}`"))
        .collect();
    problems.dedup();
    problems
}

/// The first names after `crate::`, those in braces too.
fn crate_paths(code: &str) -> impl Iterator<Item = String> {
    code.split("crate::").skip(1).flat_map(|rest| {
        let group = rest
            .strip_prefix('{')
            .and_then(|inside| inside.split_once("};"));
        match group {
            Some((inside, _)) => top_level(inside),
            None => vec![leading_word(rest)],
        }
    })
}

/// The leading word of each part between commas, those inside inner braces left out.
fn top_level(text: &str) -> Vec<String> {
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for character in text.chars() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => parts.push(String::new()),
            _ if depth == 0 => {
                if let Some(part) = parts.last_mut() {
                    part.push(character);
                }
            }
            _ => {}
        }
    }
    parts.iter().map(|part| leading_word(part.trim())).collect()
}

fn leading_word(text: &str) -> String {
    words(text).next().unwrap_or_default().to_owned()
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|word| !word.is_empty())
}

/// Drops line comments and the inside of one-line strings, keeping the number of lines.
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
    fn imports_are_found_in_every_form() {
        let code = code_only(
            "use crate::sys::stat; // crate::no\nuse crate::{layer::{Layer, x}, name::Name};\n\
             let a = \"crate::none\"; crate::error::b();",
        );
        let found: Vec<_> = crate_paths(&code).collect();
        assert_eq!(found, ["sys", "layer", "name", "error"]);
    }

    #[test]
    fn a_wrong_import_and_a_stray_word_are_problems() {
        assert_eq!(
            imports("fs/layers/src/sys/dir.rs", "use crate::layer::Layer;").len(),
            1
        );
        assert_eq!(
            imports("fs/layers/src/layer/mod.rs", "use crate::sys::dir;"),
            Vec::<String>::new()
        );
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

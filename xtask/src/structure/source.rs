//! The modules of one crate, parsed, with the imports between them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use syn::visit::Visit;

use super::names::{Names, Uses};
use crate::run::{Failure, Result};

/// Path of a module from the crate's root; empty for the root.
pub(super) type ModulePath = Vec<String>;

/// A crate's modules, one for each file. Test modules are left out: they may import anything.
pub(super) struct Crate {
    pub(super) files: BTreeMap<ModulePath, File>,
    names: Names,
}

/// One file.
pub(super) struct File {
    pub(super) lines: usize,
    pub(super) syntax: syn::File,
}

/// A module that names something of another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Import {
    pub(super) from: ModulePath,
    pub(super) to: ModulePath,
    /// The item, or the method of a type that both modules implement.
    pub(super) item: String,
}

impl Crate {
    /// Parses all files below `directory`.
    pub(super) fn read(root: &Path, directory: &str) -> Result<Self> {
        let mut files = BTreeMap::new();
        collect(&root.join(directory), &[], &mut files)?;
        Ok(Self::new(files))
    }

    fn new(files: BTreeMap<ModulePath, File>) -> Self {
        let names = Names::of(&files);
        Self { files, names }
    }

    /// A crate of files that are given as module path with `/`, and text.
    #[cfg(test)]
    pub(super) fn of(files: &[(&str, &str)]) -> Self {
        let parsed = files.iter().map(|(path, text)| {
            let path = path.split('/').filter(|part| !part.is_empty());
            let file = File {
                lines: text.lines().count(),
                syntax: syn::parse_file(text).unwrap(),
            };
            (path.map(str::to_owned).collect(), file)
        });
        Self::new(parsed.collect())
    }

    /// Names of the top-level modules.
    pub(super) fn top_level(&self) -> BTreeSet<String> {
        self.files
            .keys()
            .filter_map(|path| path.first().cloned())
            .collect()
    }

    /// Every import of one file from another, through `use`, through a path, or through a method of a type that is
    /// implemented in several files.
    pub(super) fn imports(&self) -> BTreeSet<Import> {
        let mut found = BTreeSet::new();
        for (from, file) in &self.files {
            let mut uses = Uses::new(&self.names, from);
            uses.visit_file(&file.syntax);
            for (to, item) in uses.found {
                if to != *from {
                    let from = from.clone();
                    found.insert(Import { from, to, item });
                }
            }
        }
        found
    }

    /// Number of inherent methods of each type.
    pub(super) fn methods_per_type(&self) -> BTreeMap<String, usize> {
        self.names
            .methods
            .iter()
            .map(|(name, methods)| (name.join("::"), methods.len()))
            .collect()
    }
}

fn collect(
    directory: &Path,
    path: &[String],
    files: &mut BTreeMap<ModulePath, File>,
) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let file = entry?.path();
        let Some(stem) = file.file_stem().and_then(|stem| stem.to_str()) else {
            continue;
        };
        let below = |name: &str| [path, &[name.to_owned()]].concat();
        if file.is_dir() {
            collect(&file, &below(stem), files)?;
            continue;
        }
        if file.extension().is_none_or(|extension| extension != "rs") || is_for_tests(stem) {
            continue;
        }
        let text = std::fs::read_to_string(&file)?;
        let syntax = syn::parse_file(&text)
            .map_err(|error| Failure(format!("cannot parse {}: {error}", file.display())))?;
        let module = match stem {
            "mod" | "lib" => path.to_vec(),
            name => below(name),
        };
        let lines = text.lines().count();
        files.insert(module, File { lines, syntax });
    }
    Ok(())
}

fn is_for_tests(stem: &str) -> bool {
    stem.ends_with("_tests") || matches!(stem, "tests" | "testing")
}

/// Whether an item is compiled for tests only.
pub(super) fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let named = |name| attribute.path().is_ident(name);
        named("test")
            || (named("cfg")
                && matches!(&attribute.meta, syn::Meta::List(list) if list.tokens.to_string() == "test"))
    })
}

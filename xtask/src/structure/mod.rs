//! Checks the structure of the source tree: permitted imports, cycles between sibling modules, methods per type. `cargo
//! xtask check` rejects violations, `cargo xtask structure` prints metrics.

mod cycles;
mod measure;
mod names;
mod source;

use std::path::Path;

use crate::run::{Result, note, root};

use cycles::cycles;
use source::Crate;

/// Maximum number of inherent methods of a type.
const MOST_METHODS: usize = 40;

/// A crate and the order of its modules. Each module may import itself and those that are listed after it.
struct Order {
    /// Directory of the sources, relative to the repository.
    directory: &'static str,
    /// Every top-level module, from the top down. Modules in the same row must not import each other.
    modules: &'static [&'static [&'static str]],
}

/// The crates with an order of modules. Cargo enforces the dependencies between crates.
const ORDERS: [Order; 5] = [
    Order {
        directory: "fs/layers/src",
        modules: &[
            &["fuzzing"],
            &["view"],
            &["layer"],
            &["setup", "sys", "format"],
            &["locks"],
            &["panics", "points"],
            &["name"],
            &["shown"],
            &["error"],
        ],
    },
    Order {
        directory: "fs/overlay/src",
        modules: &[
            &[
                "push",
                "replace_layers",
                "record",
                "kernel_index",
                "unopened",
            ],
            &["op"],
            &["services"],
            &["overlay"],
            &["change"],
            &["metadata"],
            &["content"],
            &["copy_up"],
            &["listing"],
            &["names"],
            &["reach"],
            &["plan", "inode"],
            &["ledger"],
            &["idmap"],
        ],
    },
    Order {
        directory: "fs/cowlfs/src",
        modules: &[
            &["main"],
            &["serve", "cli"],
            &["start", "takeover"],
            &["control"],
            &["fuse", "keeper"],
            &["config", "logging"],
            &["choices", "requests", "limits"],
        ],
    },
    Order {
        directory: "snap-cli/src",
        modules: &[
            &["main"],
            &["cli"],
            &["check", "doctor"],
            &["lifecycle"],
            &["recover"],
            &["snapshot"],
            &["container"],
            &["lxc"],
            &["config"],
            &["registry"],
            &["store"],
            &["archive"],
            &["delta"],
            &["tree", "host"],
            &["error", "shell", "wait"],
        ],
    },
    Order {
        directory: "snap-cli/snapshotter/src",
        modules: &[
            &["main"],
            &["cli"],
            &["serving"],
            &["service"],
            &["messages", "operations", "server"],
            &["manager"],
            &["index"],
            &["unanswered"],
            &["filter", "listener", "logging"],
            &["error"],
        ],
    },
];

/// Returns the violations in all crates, one line each.
pub(crate) fn check(root: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for order in &ORDERS {
        let source = Crate::read(root, order.directory)?;
        problems.extend(order.problems(&source));
        for cycle in cycles(&source) {
            problems.push(format!("{}: {cycle}", order.directory));
        }
        for (name, methods) in source.methods_per_type() {
            if methods > MOST_METHODS {
                problems.push(format!(
                    "{}: the type {name} has {methods} methods, more than {MOST_METHODS}: split it",
                    order.directory
                ));
            }
        }
    }
    Ok(problems)
}

/// Prints the metrics of each crate.
pub(crate) fn run() -> Result<()> {
    let root = root()?;
    for order in &ORDERS {
        let source = Crate::read(&root, order.directory)?;
        note(&measure::summary(order.directory, &source));
        for cycle in cycles(&source) {
            note(&format!("  {cycle}"));
        }
    }
    Ok(())
}

impl Order {
    fn problems(&self, source: &Crate) -> Vec<String> {
        let mut problems = Vec::new();
        let rank = |name: &str| self.modules.iter().position(|line| line.contains(&name));
        let present = source.top_level();
        for name in &present {
            if rank(name).is_none() {
                problems.push(format!(
                    "{}: the module `{name}` has no place in the order of modules (xtask/src/structure)",
                    self.directory
                ));
            }
        }
        for name in self.modules.iter().flat_map(|line| line.iter()) {
            if !present.iter().any(|other| other == name) {
                problems.push(format!(
                    "{}: the order of modules lists `{name}`, which does not exist",
                    self.directory
                ));
            }
        }
        for import in source.imports() {
            let (Some(from), Some(to)) = (import.from.first(), import.to.first()) else {
                continue;
            };
            if from == to {
                continue;
            }
            if let (Some(above), Some(below)) = (rank(from), rank(to))
                && below <= above
            {
                problems.push(format!(
                    "{}/{}: `{from}` may not import `{to}`",
                    self.directory,
                    import.from.join("/")
                ));
            }
        }
        problems.sort();
        problems.dedup();
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: Order = Order {
        directory: "x",
        modules: &[&["top"], &["left", "right"], &["low"]],
    };

    fn problems(files: &[(&str, &str)]) -> Vec<String> {
        ORDER.problems(&Crate::of(files))
    }

    #[test]
    fn imports_go_down_only() {
        let good = [
            ("top", "use crate::left::A;"),
            ("left", "use crate::low::{self, B};"),
            ("right", "fn f() { crate::low::g() }"),
            ("low", ""),
        ];
        assert_eq!(problems(&good), Vec::<String>::new());
        for code in [
            "use crate::top::A;",
            "use crate::{low::B, top::{A, C}};",
            "fn f() -> crate::top::A { loop {} }",
            "use super::top::A;",
            "fn f() { super::super::left::g(crate::top::A) }",
        ] {
            let mut bad = good;
            bad[3] = ("low", code);
            assert!(!problems(&bad).is_empty(), "{code}");
        }
    }

    #[test]
    fn modules_of_one_line_do_not_import_each_other() {
        let files = [
            ("top", ""),
            ("left", "use crate::right::A;"),
            ("right", ""),
            ("low", ""),
        ];
        assert_eq!(problems(&files), ["x/left: `left` may not import `right`"]);
    }

    #[test]
    fn every_module_is_listed_and_exists() {
        let files = [("top", ""), ("left", ""), ("right", ""), ("new", "")];
        let found = problems(&files);
        assert!(found.iter().any(|line| line.contains("`new` has no place")));
        assert!(
            found
                .iter()
                .any(|line| line.contains("`low`, which does not exist"))
        );
    }
}

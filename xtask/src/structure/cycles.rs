//! Finds cycles between sibling modules.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{Crate, Import, ModulePath};

/// Returns a description of each cycle of a crate: per parent module, the children that depend on each other.
pub(super) fn cycles(source: &Crate) -> Vec<String> {
    let mut parents: BTreeMap<ModulePath, BTreeMap<(String, String), Vec<Import>>> =
        BTreeMap::new();
    for import in source.imports() {
        let same = import
            .from
            .iter()
            .zip(&import.to)
            .take_while(|(a, b)| a == b)
            .count();
        // If one module contains the other, the import is not between siblings.
        let (Some(from), Some(to)) = (import.from.get(same), import.to.get(same)) else {
            continue;
        };
        let parent = import.from.get(..same).unwrap_or_default().to_vec();
        let edge = (from.clone(), to.clone());
        parents
            .entry(parent)
            .or_default()
            .entry(edge)
            .or_default()
            .push(import);
    }
    let mut found = Vec::new();
    for (parent, edges) in &parents {
        for group in groups(edges.keys()) {
            found.push(describe(parent, &group, edges));
        }
    }
    found
}

/// Returns the strongly connected components that have more than one node.
fn groups<'a>(edges: impl Iterator<Item = &'a (String, String)>) -> Vec<BTreeSet<&'a str>> {
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (from, to) in edges {
        next.entry(from).or_default().insert(to);
    }
    let reach = |start: &'a str| {
        let mut seen = BTreeSet::new();
        let mut todo = vec![start];
        while let Some(node) = todo.pop() {
            for to in next.get(node).into_iter().flatten() {
                if seen.insert(*to) {
                    todo.push(to);
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        next.keys().map(|node| (*node, reach(node))).collect();
    let mut found = BTreeSet::new();
    for (node, all) in &reached {
        let group: BTreeSet<&str> = all
            .iter()
            .filter(|other| reached.get(*other).is_some_and(|back| back.contains(node)))
            .copied()
            .collect();
        if group.len() > 1 {
            found.insert(group);
        }
    }
    found.into_iter().collect()
}

fn describe(
    parent: &ModulePath,
    group: &BTreeSet<&str>,
    edges: &BTreeMap<(String, String), Vec<Import>>,
) -> String {
    let names: Vec<_> = group.iter().copied().collect();
    let mut text = format!("cycle in `{}` of {}:", parent.join("::"), names.join(", "));
    for ((from, to), imports) in edges {
        if group.contains(from.as_str()) && group.contains(to.as_str()) {
            let items: BTreeSet<_> = imports.iter().map(|import| import.item.as_str()).collect();
            let some: Vec<_> = items.iter().take(3).copied().collect();
            let more = if items.len() > some.len() {
                ", ..."
            } else {
                ""
            };
            text.push_str(&format!("\n    {from} -> {to} ({}{more})", some.join(", ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> usize {
        cycles(&Crate::of(files)).len()
    }

    #[test]
    fn two_siblings_that_import_each_other_are_a_cycle() {
        assert_eq!(
            found(&[
                ("", ""),
                ("a", "use crate::b::X;"),
                ("b", "use super::a::Y;")
            ]),
            1
        );
        assert_eq!(found(&[("", ""), ("a", "use crate::b::X;"), ("b", "")]), 0);
    }

    #[test]
    fn a_cycle_through_a_re_export_of_the_parent_is_found() {
        let parent = "mod a; mod b; pub use a::Y;";
        assert_eq!(
            found(&[
                ("", parent),
                ("a", "use crate::b::X;"),
                ("b", "use super::Y;")
            ]),
            1
        );
        assert_eq!(found(&[("", parent), ("a", ""), ("b", "use super::Y;")]), 0);
    }

    #[test]
    fn a_cycle_through_methods_of_one_type_is_found() {
        let parent = "mod a; mod b; pub struct T;";
        let a = "use super::T; impl T { pub fn one(&self) { self.two() } }";
        let back = "use super::T; impl T { pub fn two(&self) { Self::one(self) } }";
        let leaf = "use super::T; impl T { pub fn two(&self) {} }";
        assert_eq!(found(&[("", parent), ("a", a), ("b", back)]), 1);
        assert_eq!(found(&[("", parent), ("a", a), ("b", leaf)]), 0);
    }

    #[test]
    fn tests_may_import_anything() {
        let b = "#[cfg(test)] mod tests { use crate::a::Y; } #[cfg(test)] use crate::a::Z;";
        assert_eq!(found(&[("", ""), ("a", "use crate::b::X;"), ("b", b)]), 0);
    }

    #[test]
    fn a_cycle_of_three_below_a_module_is_found() {
        let files = [
            ("", ""),
            ("m", "mod a; mod b; mod c;"),
            ("m/a", "use super::b::X;"),
            ("m/b", "fn f() { super::c::g() }"),
            ("m/c", "use crate::m::a::{A, B};"),
        ];
        assert_eq!(found(&files), 1);
    }
}

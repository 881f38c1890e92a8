//! Resolves a path in the source to a module of the same crate, also through re-exports of a parent module and through
//! methods of a type that is implemented in several files.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::{self, Visit};

use super::source::{File, ModulePath, is_test};

/// Maximum length of a chain of re-exports.
const CHAIN: usize = 8;

/// Declared names of a crate.
pub(super) struct Names {
    modules: BTreeSet<ModulePath>,
    /// For each module, the names that its `use` declarations introduce, with their targets.
    aliases: BTreeMap<ModulePath, BTreeMap<String, Vec<String>>>,
    /// Modules that define each method, by type and method name.
    pub(super) methods: BTreeMap<Vec<String>, BTreeMap<String, BTreeSet<ModulePath>>>,
}

impl Names {
    /// Collects the declarations of all files.
    pub(super) fn of(files: &BTreeMap<ModulePath, File>) -> Self {
        let mut names = Self {
            modules: files.keys().cloned().collect(),
            aliases: BTreeMap::new(),
            methods: BTreeMap::new(),
        };
        for (path, file) in files {
            let mut aliases = BTreeMap::new();
            for item in &file.syntax.items {
                if let syn::Item::Use(item) = item
                    && !is_test(&item.attrs)
                {
                    for (name, target) in leaves(&item.tree) {
                        if let Some(target) = absolute(path, &target, &names.modules) {
                            aliases.insert(name, target);
                        }
                    }
                }
            }
            names.aliases.insert(path.clone(), aliases);
        }
        for (path, file) in files {
            for item in &file.syntax.items {
                let syn::Item::Impl(item) = item else {
                    continue;
                };
                if item.trait_.is_some() || is_test(&item.attrs) {
                    continue;
                }
                let Some(name) = names.type_of(path, &item.self_ty) else {
                    continue;
                };
                let methods = names.methods.entry(name).or_default();
                for member in &item.items {
                    if let syn::ImplItem::Fn(function) = member
                        && !is_test(&function.attrs)
                    {
                        let modules = methods.entry(function.sig.ident.to_string()).or_default();
                        modules.insert(path.clone());
                    }
                }
            }
        }
        names
    }

    /// Returns the full path of a type of this crate.
    fn type_of(&self, module: &ModulePath, ty: &syn::Type) -> Option<Vec<String>> {
        let syn::Type::Path(path) = ty else {
            return None;
        };
        let segments: Vec<_> = path
            .path
            .segments
            .iter()
            .map(|s| s.ident.to_string())
            .collect();
        let full = match absolute(module, &segments, &self.modules) {
            Some(full) => full,
            None => [module.as_slice(), &segments].concat(),
        };
        Some(self.follow(full).0)
    }

    /// Resolves re-exports in `full`; returns the final path and the module that defines it.
    fn follow(&self, mut full: Vec<String>) -> (Vec<String>, ModulePath) {
        for _ in 0..CHAIN {
            let module = self.module_of(&full);
            let Some(next) = full.get(module.len()) else {
                return (full, module);
            };
            let Some(target) = self.aliases.get(&module).and_then(|names| names.get(next)) else {
                return (full, module);
            };
            let rest = full.get(module.len() + 1..).unwrap_or_default();
            let followed = [target.as_slice(), rest].concat();
            if followed == full {
                return (full, module);
            }
            full = followed;
        }
        let module = self.module_of(&full);
        (full, module)
    }

    /// Returns the longest prefix of `full` that is a module.
    fn module_of(&self, full: &[String]) -> ModulePath {
        (0..=full.len())
            .rev()
            .filter_map(|end| full.get(..end))
            .find(|prefix| self.modules.contains(*prefix))
            .unwrap_or_default()
            .to_vec()
    }
}

/// Returns the names that a `use` declares, with their targets.
fn leaves(tree: &syn::UseTree) -> Vec<(String, Vec<String>)> {
    fn walk(tree: &syn::UseTree, before: &[String], out: &mut Vec<(String, Vec<String>)>) {
        match tree {
            syn::UseTree::Path(path) => {
                let before = [before, &[path.ident.to_string()]].concat();
                walk(&path.tree, &before, out);
            }
            syn::UseTree::Name(name) if name.ident == "self" => {
                if let Some(last) = before.last() {
                    out.push((last.clone(), before.to_vec()));
                }
            }
            syn::UseTree::Name(name) => {
                let name = name.ident.to_string();
                out.push((name.clone(), [before, &[name]].concat()));
            }
            syn::UseTree::Rename(rename) => {
                let target = [before, &[rename.ident.to_string()]].concat();
                out.push((rename.rename.to_string(), target));
            }
            syn::UseTree::Glob(_) => out.push(("*".to_owned(), before.to_vec())),
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|item| walk(item, before, out))
            }
        }
    }
    let mut out = Vec::new();
    walk(tree, &[], &mut out);
    out
}

/// Returns the path from the crate's root for a path that is written in `module`. Returns None for paths into other
/// crates, and for names that a `use` declares.
fn absolute(
    module: &ModulePath,
    path: &[String],
    modules: &BTreeSet<ModulePath>,
) -> Option<Vec<String>> {
    let (first, mut rest) = path.split_first()?;
    let mut base = match first.as_str() {
        "crate" => Vec::new(),
        "self" => module.clone(),
        "super" => parent(module),
        child => {
            let full = [module.as_slice(), &[child.to_owned()]].concat();
            return modules
                .contains(&full)
                .then(|| [module.as_slice(), path].concat());
        }
    };
    while let Some((next, after)) = rest.split_first()
        && next == "super"
    {
        base = parent(&base);
        rest = after;
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

fn parent(module: &[String]) -> ModulePath {
    module
        .split_last()
        .map(|(_, up)| up.to_vec())
        .unwrap_or_default()
}

/// Collects the items of other modules that one file refers to.
pub(super) struct Uses<'a> {
    names: &'a Names,
    module: &'a ModulePath,
    /// The type whose methods are being visited.
    current: Option<Vec<String>>,
    /// The module and the item of each reference.
    pub(super) found: BTreeSet<(ModulePath, String)>,
}

impl<'a> Uses<'a> {
    pub(super) fn new(names: &'a Names, module: &'a ModulePath) -> Self {
        Self {
            names,
            module,
            current: None,
            found: BTreeSet::new(),
        }
    }

    fn note(&mut self, path: &[String]) {
        let full = match absolute(self.module, path, &self.names.modules) {
            Some(full) => full,
            // The name is declared by a `use` of this file.
            None => [self.module.as_slice(), path].concat(),
        };
        let (full, module) = self.names.follow(full);
        let item = full.get(module.len()..).unwrap_or_default().join("::");
        if !item.is_empty() || module != *self.module {
            self.found.insert((module, item));
        }
    }

    fn note_method(&mut self, method: &str) {
        let Some(current) = &self.current else { return };
        let modules = self
            .names
            .methods
            .get(current)
            .and_then(|methods| methods.get(method));
        for module in modules.into_iter().flatten() {
            if module != self.module {
                let item = format!("{}::{method}", current.last().map_or("", String::as_str));
                self.found.insert((module.clone(), item));
            }
        }
    }
}

impl Visit<'_> for Uses<'_> {
    fn visit_item(&mut self, item: &syn::Item) {
        let attributes = match item {
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Use(item) => &item.attrs,
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !is_test(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &syn::ItemUse) {
        // Re-exports are not dependencies of the parent on its children.
        if matches!(item.vis, syn::Visibility::Inherited) {
            for (_, target) in leaves(&item.tree) {
                self.note(&target);
            }
        }
    }

    fn visit_path(&mut self, path: &syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        match segments.as_slice() {
            [first, method] if first == "Self" => self.note_method(method),
            [_, _, ..] => self.note(&segments),
            _ => {}
        }
        visit::visit_path(self, path);
    }

    fn visit_item_impl(&mut self, item: &syn::ItemImpl) {
        self.current = self.names.type_of(self.module, &item.self_ty);
        visit::visit_item_impl(self, item);
        self.current = None;
    }

    fn visit_expr_method_call(&mut self, call: &syn::ExprMethodCall) {
        if let syn::Expr::Path(receiver) = &*call.receiver
            && receiver.path.is_ident("self")
        {
            self.note_method(&call.method.to_string());
        }
        visit::visit_expr_method_call(self, call);
    }
}

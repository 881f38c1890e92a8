//! Figures about a crate.

use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

use super::source::{Crate, is_test};

/// Lines of a function that are worth listing.
const LONG: usize = 80;

/// One crate in a few lines.
pub(super) fn summary(directory: &str, source: &Crate) -> String {
    let mut lines: Vec<(usize, String)> = source
        .files
        .iter()
        .map(|(path, file)| (file.lines, path.join("/")))
        .collect();
    lines.sort();
    let median = lines.get(lines.len() / 2).map_or(0, |(lines, _)| *lines);
    let (longest, which) = lines.last().cloned().unwrap_or_default();
    let mut functions = Functions::default();
    for (path, file) in &source.files {
        functions.file = path.join("/");
        functions.visit_file(&file.syntax);
    }
    let mut types: Vec<_> = source.methods_per_type().into_iter().collect();
    types.sort_by_key(|(_, methods)| std::cmp::Reverse(*methods));
    let types: Vec<_> = types
        .iter()
        .take(5)
        .map(|(name, methods)| format!("{name} {methods}"))
        .collect();
    format!(
        "{directory}: {} files, median {median} lines, longest {longest} ({which}); {} functions, {} over {LONG} lines{}; \
         {} parameters of type bool; methods per type: {}",
        lines.len(),
        functions.count,
        functions.long.len(),
        match functions.long.as_slice() {
            [] => String::new(),
            long => format!(" ({})", long.join(", ")),
        },
        functions.bools,
        types.join(", "),
    )
}

#[derive(Default)]
struct Functions {
    file: String,
    count: usize,
    long: Vec<String>,
    bools: usize,
}

impl Functions {
    fn note(&mut self, signature: &syn::Signature, span: proc_macro2::Span) {
        self.count += 1;
        let lines = span.end().line.saturating_sub(span.start().line) + 1;
        if lines > LONG {
            self.long
                .push(format!("{}::{}", self.file, signature.ident));
        }
        self.bools += signature
            .inputs
            .iter()
            .filter(|input| {
                matches!(input, syn::FnArg::Typed(typed)
                    if matches!(&*typed.ty, syn::Type::Path(path) if path.path.is_ident("bool")))
            })
            .count();
    }
}

impl Visit<'_> for Functions {
    fn visit_item_mod(&mut self, item: &syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &syn::ItemFn) {
        if !is_test(&item.attrs) {
            self.note(&item.sig, item.span());
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &syn::ImplItemFn) {
        self.note(&item.sig, item.span());
        visit::visit_impl_item_fn(self, item);
    }
}

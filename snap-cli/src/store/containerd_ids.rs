//! Containers of containerd, found by the ids that its clients print.

use cowl_layers::shown::Show as _;

use super::Store;
use super::containerd::is_reserved;
use super::name::ContainerName;
use crate::error::{Error, Result};

/// The maximum length of an id or a namespace of containerd, in bytes (its package `identifiers`).
const MAX_ID: usize = 76;

/// The minimum length of the beginning of an id, in digits: what clients and the names of containers show.
const MIN_DIGITS: usize = 12;

/// The number of candidates that a message names.
const MAX_SHOWN: usize = 10;

/// Whether the beginning of an id selects a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abbreviation {
    /// It does.
    Accepted,
    /// Only the whole id does.
    Refused,
}

/// The id of a container, `ID` or `NAMESPACE/ID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdQuery<'t> {
    namespace: Option<&'t str>,
    id: &'t str,
}

impl<'t> IdQuery<'t> {
    /// Parses an id; `None` if no container of containerd can have it.
    pub fn parse(text: &'t str) -> Option<Self> {
        let (namespace, id) = match text.split_once('/') {
            Some((namespace, id)) => (Some(namespace), id),
            None => (None, text),
        };
        let is_valid = |part: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            (1..=MAX_ID).contains(&part.len()) && part.bytes().all(allowed)
        };
        let all = [namespace.unwrap_or(id), id];
        all.into_iter()
            .all(is_valid)
            .then_some(Self { namespace, id })
    }
}

/// A container that commands may use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    name: ContainerName,
    namespace: String,
    id: String,
}

impl Candidate {
    fn is_in(&self, namespace: Option<&str>) -> bool {
        namespace.is_none_or(|namespace| self.namespace == namespace)
    }
}

/// Returns the name of the container with an id; `None` if there is none.
///
/// For an id of 64 hexadecimal digits, which nerdctl and Kubernetes assign, the first 12 suffice if abbreviations are
/// accepted. Fails if several containers have the id, or if another one that cannot be read may have it.
pub fn find(
    stores: &[Store],
    query: IdQuery<'_>,
    abbreviation: Abbreviation,
) -> Result<Option<ContainerName>> {
    let (mut candidates, mut unreadable) = (Vec::new(), None);
    for store in stores {
        candidates.extend(read(store, &mut unreadable)?);
    }
    match (select(query, abbreviation, &candidates)?, unreadable) {
        (Some(_), Some(error)) => Err(error.hint(
            "another container may have the same id: write the name that `cowl list --containerd` shows",
        )),
        (found, _) => Ok(found.map(|found| found.name.clone())),
    }
}

/// Reads the containers of containerd in a store. `unreadable` becomes the error of one that cannot be read.
fn read(store: &Store, unreadable: &mut Option<Error>) -> Result<Vec<Candidate>> {
    let mut found = Vec::new();
    for (id, name) in store.names()? {
        match name {
            Ok(name) if is_reserved(&name) => {}
            Ok(_) => continue,
            Err(error) => {
                *unreadable = Some(error);
                continue;
            }
        }
        let manifest = match store.container(id) {
            Ok(Some(record)) => record.body,
            Ok(None) => continue,
            Err(error) => {
                *unreadable = Some(error);
                continue;
            }
        };
        let record = manifest.containerd.filter(|record| record.is_open());
        if let Some((namespace, id)) = record.as_deref().and_then(|record| record.address()) {
            found.push(Candidate {
                name: manifest.name,
                namespace: namespace.to_owned(),
                id: id.to_owned(),
            });
        }
    }
    Ok(found)
}

fn select<'c>(
    query: IdQuery<'_>,
    abbreviation: Abbreviation,
    all: &'c [Candidate],
) -> Result<Option<&'c Candidate>> {
    let of_namespace = || all.iter().filter(|one| one.is_in(query.namespace));
    let is_long = |id: &str| id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut found: Vec<_> = of_namespace().filter(|one| one.id == query.id).collect();
    let is_beginning = abbreviation == Abbreviation::Accepted && query.id.len() >= MIN_DIGITS;
    if found.is_empty() && is_beginning {
        let begins = |one: &&Candidate| is_long(&one.id) && one.id.starts_with(query.id);
        found = of_namespace().filter(begins).collect();
    }
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        many => Err(ambiguous(query.id, many)),
    }
}

fn ambiguous(id: &str, found: &[&Candidate]) -> Error {
    let shown = |one: &&Candidate| {
        let Candidate {
            name,
            namespace,
            id,
        } = one;
        format!("{name} ({}/{})", namespace.shown(), id.shown())
    };
    let mut list: Vec<_> = found.iter().take(MAX_SHOWN).map(shown).collect();
    if found.len() > MAX_SHOWN {
        list.push("...".to_owned());
    }
    Error::usage(format!(
        "{} containers of containerd have the id {}",
        found.len(),
        id.shown()
    ))
    .hint(format!(
        "write the name, NAMESPACE/ID or more digits of one of them: {}",
        list.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn candidate(name: &str, namespace: &str, id: &str) -> Candidate {
        Candidate {
            name: ContainerName::parse(name).unwrap(),
            namespace: namespace.to_owned(),
            id: id.to_owned(),
        }
    }

    #[test]
    fn a_container_is_found_by_its_id_or_the_beginning_of_a_long_one() {
        let (one, two) = (
            format!("ab{}{}", "0".repeat(10), "1".repeat(52)),
            format!("ab{}{}", "0".repeat(10), "2".repeat(52)),
        );
        let short = format!("ab{}", "0".repeat(10));
        let three = "ac".repeat(32);
        let all = [
            candidate("ctr.default.web", "default", "web"),
            candidate("ctr.default.db", "default", "db"),
            candidate("ctr.other.db", "other", "db"),
            candidate("ctr.k8s.io.ab", "k8s.io", &one),
            candidate("ctr.k8s.io.ab2", "k8s.io", &two),
            candidate("ctr.k8s.io.ac", "k8s.io", &three),
            candidate("ctr.default.ab", "default", "ab"),
        ];
        for (text, expected) in [
            ("web", Ok(Some("ctr.default.web"))),
            ("default/web", Ok(Some("ctr.default.web"))),
            ("other/web", Ok(None)),
            // Another container could be meant.
            ("we", Ok(None)),
            ("db", Err(Kind::Usage)),
            ("other/db", Ok(Some("ctr.other.db"))),
            // Such a name is typed easily.
            ("ac", Ok(None)),
            ("acacacacaca", Ok(None)),
            ("acacacacacac", Ok(Some("ctr.k8s.io.ac"))),
            ("k8s.io/acacacacacac", Ok(Some("ctr.k8s.io.ac"))),
            ("default/acacacacacac", Ok(None)),
            ("ab", Ok(Some("ctr.default.ab"))),
            (&*short, Err(Kind::Usage)),
            (&*format!("{short}1"), Ok(Some("ctr.k8s.io.ab"))),
            (&*two, Ok(Some("ctr.k8s.io.ab2"))),
        ] {
            let query = IdQuery::parse(text).unwrap();
            let found = select(query, Abbreviation::Accepted, &all);
            let found = found.map(|one| one.map(|one| one.name.as_str()));
            assert_eq!(found.map_err(|error| error.kind), expected, "{text}");
        }
        for (text, expected) in [
            ("acacacacacac", None),
            (&*short, None),
            (&*three, Some("ctr.k8s.io.ac")),
            ("web", Some("ctr.default.web")),
        ] {
            let query = IdQuery::parse(text).unwrap();
            let found = select(query, Abbreviation::Refused, &all).unwrap();
            assert_eq!(found.map(|one| one.name.as_str()), expected, "{text}");
        }
        let query = IdQuery::parse("db").unwrap();
        let db = select(query, Abbreviation::Accepted, &all).unwrap_err();
        let hint = db.hint.unwrap();
        assert!(
            hint.contains("ctr.default.db (default/db), ctr.other.db (other/db)"),
            "{hint}"
        );
    }

    #[test]
    fn text_that_is_no_id_is_not_searched() {
        let long = "x".repeat(77);
        for text in [
            "", "/", "a/", "/a", "a/b/c", "a@b", "a b", "é", "a\n", &long,
        ] {
            assert_eq!(IdQuery::parse(text), None, "{text:?}");
        }
        assert!(IdQuery::parse(&"x".repeat(76)).is_some());
    }
}

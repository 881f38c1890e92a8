//! The filter language of containerd: `kind==active,labels."a.b"~=^x`. A comma means "and".

use std::borrow::Cow;
use std::iter::Peekable;
use std::str::Chars;

use cowl_layers::shown::Show as _;
use regex::{Regex, RegexBuilder};

use crate::error::{RequestError, Result};
use cowl::store::containerd::ContainerdRecord;

/// The maximum length of all filters of a request in bytes.
const MAX_LENGTH: usize = 16 << 10;

/// The maximum size of a compiled regular expression in bytes.
const MAX_REGEX: usize = 1 << 20;

/// Filters, of which at least one must match. An empty list and an empty filter match everything.
#[derive(Debug)]
pub(crate) struct Filters(Vec<Vec<Selector>>);

/// A condition on a field.
#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    condition: Condition,
}

#[derive(Debug)]
enum Condition {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Parses the filters of a request.
    pub(crate) fn parse(filters: &[String]) -> Result<Self> {
        if filters.iter().map(String::len).sum::<usize>() > MAX_LENGTH {
            return Err(RequestError::Invalid(format!(
                "the filters have more than {MAX_LENGTH} bytes"
            )));
        }
        let parse = |text: &String| {
            if text.is_empty() {
                return Ok(Vec::new());
            }
            Parser(text.chars().peekable()).filter().map_err(|why| {
                RequestError::Invalid(format!("cannot parse the filter {}: {why}", text.shown()))
            })
        };
        Ok(Self(filters.iter().map(parse).collect::<Result<_>>()?))
    }

    /// Returns whether a snapshot matches.
    pub(crate) fn matches(&self, record: &ContainerdRecord) -> bool {
        let all = |selectors: &Vec<Selector>| selectors.iter().all(|s| s.matches(record));
        self.0.is_empty() || self.0.iter().any(all)
    }
}

impl Selector {
    /// Matches as containerd does: an absent field is empty, and is unequal to any other value.
    fn matches(&self, record: &ContainerdRecord) -> bool {
        let value = field(&self.path, record);
        match &self.condition {
            Condition::Present => value.is_some(),
            Condition::Equal(wanted) => value.is_some_and(|value| value == *wanted),
            Condition::NotEqual(other) => value.unwrap_or_default() != *other,
            Condition::Matches(regex) => regex.is_match(&value.unwrap_or_default()),
        }
    }
}

/// Returns the value of a field.
fn field<'r>(path: &[String], record: &'r ContainerdRecord) -> Option<Cow<'r, str>> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "kind" => Some(record.kind.name().into()),
        "name" => Some(record.key.as_str().into()),
        "parent" => Some(record.parent.as_deref().unwrap_or_default().into()),
        "labels" => record
            .labels
            .get(&rest.join("."))
            .map(|value| value.as_str().into()),
        _ => None,
    }
}

struct Parser<'t>(Peekable<Chars<'t>>);

type Parsed<T> = std::result::Result<T, String>;

impl Parser<'_> {
    fn filter(mut self) -> Parsed<Vec<Selector>> {
        let mut selectors = Vec::new();
        loop {
            selectors.push(self.selector()?);
            match self.0.next() {
                None => return Ok(selectors),
                Some(',') => {}
                Some(other) => return Err(unexpected(other)),
            }
        }
    }

    fn selector(&mut self) -> Parsed<Selector> {
        let mut path = vec![self.field()?];
        while self.0.next_if_eq(&'.').is_some() {
            path.push(self.field()?);
        }
        let condition = match self.0.peek() {
            None | Some(',') => Condition::Present,
            Some(_) => match (self.0.next(), self.0.next()) {
                (Some('='), Some('=')) => Condition::Equal(self.value(&['"'])?),
                (Some('!'), Some('=')) => Condition::NotEqual(self.value(&['"'])?),
                (Some('~'), Some('=')) => {
                    Condition::Matches(regex(&self.value(&['"', '/', '|'])?)?)
                }
                (Some(other), _) => return Err(unexpected(other)),
                (None, _) => return Err("it ends early".to_owned()),
            },
        };
        Ok(Selector { path, condition })
    }

    /// Parses a part of a field's path: a word or a quoted string.
    fn field(&mut self) -> Parsed<String> {
        if self.0.next_if_eq(&'"').is_some() {
            return self.quoted('"');
        }
        let word = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        match (word.chars().next(), self.0.peek()) {
            (Some(first), _) if first.is_ascii_alphabetic() => Ok(word),
            (Some(other), _) | (None, Some(&other)) => Err(unexpected(other)),
            (None, None) => Err("it ends early".to_owned()),
        }
    }

    /// Parses a value: everything up to a comma or a space, or a string in one of `quotes`.
    fn value(&mut self, quotes: &[char]) -> Parsed<String> {
        if let Some(quote) = self.0.next_if(|c| quotes.contains(c)) {
            return self.quoted(quote);
        }
        let word = self.take_while(|c| c != ',' && !c.is_whitespace());
        match word.is_empty() {
            true => Err("a value is missing".to_owned()),
            false => Ok(word),
        }
    }

    fn take_while(&mut self, accepts: impl Fn(char) -> bool) -> String {
        let mut word = String::new();
        while let Some(c) = self.0.next_if(|c| accepts(*c)) {
            word.push(c);
        }
        word
    }

    /// Parses the rest of a string up to the quote, with the escapes of Go.
    ///
    /// Other quotes than `"` enclose regular expressions, in which only the quote itself is escaped.
    fn quoted(&mut self, quote: char) -> Parsed<String> {
        let mut text = String::new();
        while let Some(c) = self.0.next() {
            match c {
                c if c == quote => return Ok(text),
                '\\' if quote == '"' => text.push(self.escape()?),
                '\\' => match self.0.next() {
                    Some(next) if next == quote => text.push(next),
                    Some(next) => text.extend(['\\', next]),
                    None => break,
                },
                c => text.push(c),
            }
        }
        Err("a string has no end".to_owned())
    }

    fn escape(&mut self) -> Parsed<char> {
        let c = self.0.next().ok_or("a string has no end")?;
        Ok(match c {
            'a' => '\u{7}',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\u{b}',
            '\\' | '"' | '\'' => c,
            'x' => self.code(2)?,
            'u' => self.code(4)?,
            'U' => self.code(8)?,
            other => return Err(format!("unknown escape \\{}", other.to_string().shown())),
        })
    }

    fn code(&mut self, digits: usize) -> Parsed<char> {
        let hex: String = self.0.by_ref().take(digits).collect();
        let code = u32::from_str_radix(&hex, 16).ok();
        code.filter(|_| hex.len() == digits)
            .and_then(char::from_u32)
            .ok_or_else(|| format!("invalid escape {}", hex.shown()))
    }
}

fn regex(text: &str) -> Parsed<Regex> {
    let built = RegexBuilder::new(text).size_limit(MAX_REGEX).build();
    built.map_err(|error| error.to_string().shown().to_string())
}

fn unexpected(c: char) -> String {
    format!("unexpected {}", c.to_string().shown())
}

#[cfg(test)]
mod tests {
    use cowl::store::containerd::ContainerdKind;

    use super::*;

    fn matches(filters: &[&str]) -> bool {
        let record = ContainerdRecord {
            key: "default/1/web".to_owned(),
            kind: ContainerdKind::Active,
            parent: None,
            labels: [("a.b/c", "one two"), ("x", "1")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            created: String::new(),
            updated: String::new(),
            committed_from: None,
            labels_before: None,
            snapshots_before: 0,
            undone: 0,
            frozen: false,
            extra: Default::default(),
        };
        let filters: Vec<_> = filters.iter().map(|f| (*f).to_owned()).collect();
        Filters::parse(&filters).unwrap().matches(&record)
    }

    #[test]
    fn filters_match_as_those_of_containerd() {
        for (filters, expected) in [
            (&[][..], true),
            (&[""], true),
            (&["kind==committed", ""], true),
            (&["kind==active"], true),
            (&["kind==committed"], false),
            (&["kind==committed", "name==default/1/web"], true),
            (&["kind==active,name==other"], false),
            (&["kind!=view"], true),
            (&["labels.x"], true),
            (&["labels.y"], false),
            (&["labels.y==1"], false),
            (&["labels.y!=1"], true),
            (&["labels.\"a.b/c\"==\"one two\""], true),
            (&["labels.\"a.b/c\"==\"one\\x20two\""], true),
            (&["labels.a.\"b/c\"~=^one"], true),
            (&["labels.x~=/[0-9]+/,kind~=|act|"], true),
            (&["name~=/default\\/1\\/w/"], true),
            (&["labels.x~=\"^\\\\d$\""], true),
            (&["parent==\"\""], true),
            (&["size==1"], false),
        ] {
            assert_eq!(matches(filters), expected, "{filters:?}");
        }
    }

    #[test]
    fn invalid_filters_are_refused() {
        let long = format!("name=={}", "x".repeat(MAX_LENGTH));
        let large = format!("name~={}", "(x{1000}){1000}");
        for text in [
            "=",
            "name=",
            "name=x",
            "name==",
            "name==x,",
            "name==\"x",
            "name==\"\\q\"",
            ".",
            "a..b",
            "name~=(",
            "1a==x",
            "name== x",
            "name==\"\\ud800\"",
            &long,
            &large,
        ] {
            let error = Filters::parse(&[text.to_owned()]).unwrap_err();
            assert!(matches!(error, RequestError::Invalid(_)), "{text}");
        }
    }
}

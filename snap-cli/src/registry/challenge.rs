//! The challenge of a registry: the header WWW-Authenticate (RFC 9110, section 11). Pure.

use std::collections::BTreeMap;

/// The maximum length of a header that is parsed, in bytes.
const MAX_HEADER: usize = 8 << 10;

/// The authentication that a registry requires.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// The name and the password of a user with each request.
    Basic,
    /// A token.
    Bearer {
        /// The URL of the token server.
        realm: String,
        /// The registry, in the words of the token server.
        service: Option<String>,
        /// The permissions that the request needs.
        scope: Option<String>,
    },
}

impl Challenge {
    /// Parses the values of all headers WWW-Authenticate, and returns a supported challenge: a token rather than a
    /// password.
    pub(super) fn select<'h>(headers: impl Iterator<Item = &'h str>) -> Option<Self> {
        let mut basic = None;
        for header in headers.filter(|header| header.len() <= MAX_HEADER) {
            for (scheme, mut parameters) in parse(header) {
                if scheme.eq_ignore_ascii_case("bearer")
                    && let Some(realm) = parameters.remove("realm")
                {
                    return Some(Self::Bearer {
                        realm,
                        service: parameters.remove("service"),
                        scope: parameters.remove("scope"),
                    });
                }
                if scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                }
            }
        }
        basic
    }
}

type Parameters = BTreeMap<String, String>;

/// Parses the challenges in one header. Stops at the first syntax error.
fn parse(header: &str) -> Vec<(String, Parameters)> {
    let mut found: Vec<(String, Parameters)> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let (word, after) = token(rest);
        if word.is_empty() {
            return found;
        }
        let value = after.trim_start();
        match value.strip_prefix('=') {
            // A parameter of the current challenge.
            Some(value) => {
                let Some((value, after)) = parameter(value.trim_start()) else {
                    return found;
                };
                if let Some((_, parameters)) = found.last_mut() {
                    let key = word.to_ascii_lowercase();
                    parameters.entry(key).or_insert(value);
                }
                rest = after;
            }
            None => {
                found.push((word.to_owned(), Parameters::new()));
                rest = after;
            }
        }
    }
}

/// Splits a token from the rest.
fn token(text: &str) -> (&str, &str) {
    let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let end = text.find(|c| !is_token(c)).unwrap_or(text.len());
    text.split_at(end)
}

/// Splits the value of a parameter, quoted or not, from the rest.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = token(text);
        return (!value.is_empty()).then(|| (value.to_owned(), rest));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, quoted.get(at + 1..)?)),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(headers: &[&str]) -> Option<Challenge> {
        Challenge::select(headers.iter().copied())
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn challenges_are_parsed() {
        let https = "https://auth.example/token";
        for (headers, expected) in [
            (&["Basic realm=\"x\""][..], Some(Challenge::Basic)),
            (&["basic"], Some(Challenge::Basic)),
            (
                &[
                    "Bearer realm=\"https://auth.example/token\",service=\"r.example\",scope=\"repository:a/b:pull,push\"",
                ],
                bearer(https, Some("r.example"), Some("repository:a/b:pull,push")),
            ),
            (
                &["BEARER Realm = https-only , service=\"a\\\"b\" "],
                bearer("https-only", Some("a\"b"), None),
            ),
            (
                &["Basic realm=\"x\", Bearer realm=\"https://auth.example/token\""],
                bearer(https, None, None),
            ),
            (
                &[
                    "Basic realm=\"x\"",
                    "Bearer realm=\"https://auth.example/token\"",
                ],
                bearer(https, None, None),
            ),
            // The first of two equal parameters counts.
            (
                &["Bearer realm=\"https://auth.example/token\",realm=\"http://evil\""],
                bearer(https, None, None),
            ),
            (&["Bearer service=\"x\""], None),
            (&["Negotiate"], None),
            (&["Bearer realm=\"unterminated"], None),
            (&["\"", "=", ",,,", "Bearer =x"], None),
            (&[], None),
        ] {
            assert_eq!(select(headers), expected, "{headers:?}");
        }
        let long = format!("Basic realm=\"{}\"", "x".repeat(MAX_HEADER));
        assert_eq!(select(&[&long]), None);
    }
}

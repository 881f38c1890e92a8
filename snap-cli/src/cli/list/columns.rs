//! Templates of the option `--format`: text with fields of the JSON in braces.

use serde_json::Value;

use super::super::output;
use crate::error::{Error, Result};

/// A parsed template.
#[derive(Debug)]
pub(super) struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(String),
}

impl Template {
    /// Parses a template: `{field}`, `{{` and `}}` for braces, `\t`, `\n`, `\\`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            Err(Error::usage(format!("invalid format \"{text}\": {why}"))
                .hint("write for example: --format '{name}\\t{created}\\t{comment}'"))
        };
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text.chars();
        while let Some(c) = rest.next() {
            match c {
                '\\' => match rest.next() {
                    Some('t') => plain.push('\t'),
                    Some('n') => plain.push('\n'),
                    Some('\\') => plain.push('\\'),
                    _ => return refuse("\\ must be followed by t, n or \\"),
                },
                '{' if rest.as_str().starts_with('{') => {
                    rest.next();
                    plain.push('{');
                }
                '}' if rest.as_str().starts_with('}') => {
                    rest.next();
                    plain.push('}');
                }
                '{' => {
                    let Some((field, after)) = rest.as_str().split_once('}') else {
                        return refuse("{ without }");
                    };
                    rest = after.chars();
                    parts.push(Part::Text(std::mem::take(&mut plain)));
                    parts.push(Part::Field(field.to_owned()));
                }
                '}' => return refuse("} without {"),
                c => plain.push(c),
            }
        }
        parts.push(Part::Text(plain));
        parts.retain(|part| *part != Part::Text(String::new()));
        Ok(Self { parts })
    }

    /// Fills the template with the fields of an object; fails if a field does not exist.
    pub(super) fn fill(&self, object: &Value) -> Result<String> {
        let mut line = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => line.push_str(text),
                Part::Field(name) => match object.get(name) {
                    Some(Value::Null) => {}
                    Some(Value::String(text)) => line.push_str(&output::shown(text.as_bytes())),
                    Some(value) => line.push_str(&value.to_string()),
                    None => return Err(unknown(name, object)),
                },
            }
        }
        Ok(line)
    }
}

fn unknown(name: &str, object: &Value) -> Error {
    let fields: Vec<&str> = object
        .as_object()
        .map(|object| object.keys().map(String::as_str).collect())
        .unwrap_or_default();
    let hint = match crate::store::name::nearest(name, fields.iter().copied()) {
        Some(near) => format!("did you mean {{{near}}}?"),
        None => format!("use one of: {}", fields.join(", ")),
    };
    Error::usage(format!("there is no field {{{name}}}")).hint(hint)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn templates_are_filled_with_fields() {
        let object = json!({"name": "web", "size": 12, "comment": "a\nb", "parent": null});
        for (text, line) in [
            ("{name}", "web"),
            ("{name}\\t{size}\\n", "web\t12\n"),
            ("{{{name}}}", "{web}"),
            ("<{parent}>", "<>"),
            ("{comment}", "a\\nb"),
            ("", ""),
        ] {
            assert_eq!(
                Template::parse(text).unwrap().fill(&object).unwrap(),
                line,
                "{text}"
            );
        }
        for bad in ["{", "{name", "}", "\\x", "\\"] {
            assert!(Template::parse(bad).is_err(), "{bad}");
        }
        let error = Template::parse("{nmae}")
            .unwrap()
            .fill(&object)
            .unwrap_err();
        assert_eq!(error.hint.unwrap(), "did you mean {name}?");
    }
}
